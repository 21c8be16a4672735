"""Items to numbers: asks a backend for the likelihoods that are not known yet, and a benchmark what they mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from biasdpo.backends.base import Backend
from biasdpo.benchmarks.base import Benchmark
from biasdpo.errors import PromptError
from biasdpo.records import Request, Side
from biasdpo.scores import Scores

_ITEMS_AT_ONCE = 16  # what an interruption may lose, and how often progress is told


@dataclass
class ItemScores:
    """What came of the items of one benchmark.

    kept       indices of the scored items, in the order of their file
    numbers    by side: the scored items' numbers, in the order of `kept`
    failures   the others that were tried: {"index", "reason"}
    done       how many were tried; fewer than asked for where it was stopped
    """

    kept: list[int] = field(default_factory=list)
    numbers: dict[Side, list[Sequence[float]]] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)
    done: int = 0


def score_items(
    backend: Backend,
    sides: Mapping[Side, Scores],
    benchmark: Benchmark,
    chosen: Sequence[int],
    *,
    strength: float = 1.0,
    on_done: Callable[[int], None] = lambda _done: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> ItemScores:
    """Score the chosen items of a benchmark on each side. What can't be scored is counted, never scored.

    sides         what is known of each side already; what is computed is added
    on_done       told how many items were tried
    should_stop   asked between batches of items
    """
    result = ItemScores(numbers={side: [] for side in sides})
    for begin in range(0, len(chosen), _ITEMS_AT_ONCE):
        if should_stop():
            break
        batch = chosen[begin : begin + _ITEMS_AT_ONCE]
        reasons = _compute_missing(backend, sides, benchmark, batch, strength)
        for index in batch:
            item = benchmark.items[index]
            if index in reasons:
                result.failures.append({"index": index, "reason": reasons[index]})
                continue
            scored = {side: benchmark.scores(item, scores.of(benchmark.requests(item))) for side, scores in sides.items()}
            if not all(math.isfinite(number) for values in scored.values() for number in values):
                result.failures.append({"index": index, "reason": "a log-probability that is no number"})
                continue
            result.kept.append(index)
            for side, values in scored.items():
                result.numbers[side].append(values)
        result.done += len(batch)
        on_done(result.done)
    return result


def _compute_missing(
    backend: Backend, sides: Mapping[Side, Scores], benchmark: Benchmark, batch: Sequence[int], strength: float
) -> dict[int, str]:
    """Compute what is missing of a batch of items; return why some could not be scored, by index."""
    wanted = {index: list(benchmark.requests(benchmark.items[index])) for index in batch}
    reasons: dict[int, str] = {}
    for side, scores in sides.items():

        def compute(requests: Sequence[Request], side: Side = side, scores: Scores = scores) -> None:
            missing = scores.missing(requests)
            if missing:
                scores.add(missing, backend.loglikelihood(missing, side, strength=strength))

        try:
            compute([request for index in batch if index not in reasons for request in wanted[index]])
        except PromptError:  # which of them is it that is too long or too short? Failed items are counted, never scored
            for index in batch:
                try:
                    compute(wanted[index])
                except PromptError as exc:
                    reasons[index] = str(exc)
    return reasons
