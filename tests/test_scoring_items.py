"""Items to numbers: how many are asked for at once, what an interruption loses, and items that can't be scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from biasdpo.benchmarks.crows_pairs import CrowsPairs, SentencePair
from biasdpo.errors import BackendError, PromptError
from biasdpo.evaluation import run as scoring
from biasdpo.evaluation.run import AnswerCache, likelihood_cache, score_items
from biasdpo.records import ContinuationRequest, Likelihood, Request, Side


class Clock:
    """Stands for `time`: a backend moves it on."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class Length:
    """Stands for a backend: log p is minus the length, at `seconds` a request. Refuses texts of more than 99 characters."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds
        self.calls: list[tuple[Side, int]] = []

    def loglikelihood(self, requests: Sequence[Request], side: Side, *, strength: float = 1.0) -> list[Likelihood]:
        texts = [request.continuation for request in requests if isinstance(request, ContinuationRequest)]
        if max(map(len, texts)) > 99:
            raise PromptError(f"A text of {max(map(len, texts))} tokens does not fit the context of 99: shorten it")
        self.calls.append((side, len(requests)))
        self.clock.now += self.seconds * len(requests)
        return [Likelihood(-strength * len(text), 1) for text in texts]


def pairs(count: int) -> CrowsPairs:
    return CrowsPairs([SentencePair(f"{i}", f"{i}.", "age") for i in range(100, 100 + count)])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(scoring, "time", clock)
    return clock


def run(backend: Length, benchmark: CrowsPairs, sides: dict[Side, AnswerCache[Likelihood]], **options: Any) -> Any:
    return score_items(backend, sides, benchmark, range(len(benchmark.items)), **options)  # type: ignore[arg-type]


def test_as_many_items_at_once_as_take_three_seconds(clock: Clock) -> None:
    done: list[int] = []
    # 2 requests a side and an item, 1/64 s each: 1/16 s an item, so 48 in three seconds
    found = run(Length(clock, 1 / 64), pairs(200), {"base": likelihood_cache(), "tuned": likelihood_cache()}, on_done=done.append)
    assert done == [16, 64, 112, 160, 200]
    assert found.indices == list(range(200))
    assert found.numbers["base"][7] == [-3, -4]
    done.clear()
    run(Length(clock, 1.0), pairs(20), {"base": likelihood_cache(), "tuned": likelihood_cache()}, on_done=done.append)
    assert done == [16, 17, 18, 19, 20]  # slower than that: one by one
    done.clear()
    run(Length(clock, 0.0), pairs(2000), {"base": likelihood_cache()}, on_done=done.append)
    assert done == [16, 80, 336, 1360, 2000]  # four times as many, and no more than 1,024


def test_what_is_known_already_is_passed_over_and_does_not_count_as_fast(clock: Clock) -> None:
    sides: dict[Side, AnswerCache[Likelihood]] = {"base": likelihood_cache()}
    backend = Length(clock, 1 / 8)
    run(backend, pairs(100), sides)
    backend.calls.clear()
    done: list[int] = []
    found = run(backend, pairs(160), sides, on_done=done.append)
    # 100 known ones beside the first 16; 1/4 s an item, so 12 in three seconds
    assert done == [116, 128, 140, 152, 160]
    assert sum(count for _, count in backend.calls) == 2 * 60
    assert found.indices == list(range(160))


def test_an_interruption_loses_the_batch_under_way_alone(clock: Clock) -> None:
    sides: dict[Side, AnswerCache[Likelihood]] = {"base": likelihood_cache()}
    backend = Length(clock, 1 / 8)
    done: list[int] = []
    found = run(backend, pairs(100), sides, on_done=done.append, should_stop=lambda: len(done) == 2)
    assert (found.done, found.indices) == (28, list(range(28)))
    backend.calls.clear()
    run(backend, pairs(100), sides)
    assert sum(count for _, count in backend.calls) == 2 * (100 - 28)


def test_one_that_is_too_long_fails_alone(clock: Clock) -> None:
    items = [*pairs(30).items]
    items[11] = SentencePair("x" * 100, "x", "age")
    backend = Length(clock, 0.0)
    found = run(backend, CrowsPairs(items), {"base": likelihood_cache(), "tuned": likelihood_cache()})
    assert found.failures == [{"index": 11, "reason": "A text of 100 tokens does not fit the context of 99: shorten it"}]
    assert found.indices == [i for i in range(30) if i != 11]
    # 16 items: halves of 8, of which one is halved to 4, 2 and 1. 14 items: one call. On each side.
    assert len(backend.calls) == 2 * (4 + 1)


def test_an_engine_that_can_t_score_is_one_error_and_not_a_failed_item(clock: Clock) -> None:
    backend = Length(clock, 0.0)

    def refuse(*_args: Any, **_options: Any) -> list[Likelihood]:
        raise BackendError("This server gives no log-probabilities: use --backend llamacpp")

    backend.loglikelihood = refuse  # type: ignore[method-assign]
    with pytest.raises(BackendError, match="gives no log-probabilities"):
        run(backend, pairs(3), {"base": likelihood_cache()})
