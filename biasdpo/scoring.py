"""Items to numbers: asks a backend for the likelihoods that are not known yet, and a benchmark what they mean."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from biasdpo.backends.base import Backend
from biasdpo.benchmarks.base import Benchmark
from biasdpo.errors import PromptError
from biasdpo.records import Request, Side
from biasdpo.scores import Scores

# How many items that are not known yet are asked for at once: as many as take about this long, which is what an interruption may
# lose, and how often progress is told. On a GPU that is hundreds, for the backend to lay into batches; of a large model on a CPU
# it is one.
_SECONDS_AT_ONCE = 3.0
_FIRST_ITEMS, _MOST_ITEMS, _GROWTH = 16, 1024, 4


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
    most, begin = _FIRST_ITEMS, 0
    while begin < len(chosen) and not should_stop():
        batch, unknown = _next_batch(sides, benchmark, chosen, begin, most)
        begin += len(batch)
        started_at = time.monotonic()
        reasons: dict[int, str] = {}
        for side, scores in sides.items():
            reasons |= _compute_missing(backend, side, scores, batch, strength)
        if unknown:
            rate = unknown / max(time.monotonic() - started_at, 1e-3)  # items a second
            most = min(max(int(rate * _SECONDS_AT_ONCE), 1), most * _GROWTH, _MOST_ITEMS)
        for index in batch:
            item = benchmark.items[index]
            if index in reasons:
                result.failures.append({"index": index, "reason": reasons[index]})
                continue
            scored = {side: benchmark.scores(item, scores.of(batch[index])) for side, scores in sides.items()}
            if not all(math.isfinite(number) for values in scored.values() for number in values):
                result.failures.append({"index": index, "reason": "a log-probability that is no number"})
                continue
            result.kept.append(index)
            for side, values in scored.items():
                result.numbers[side].append(values)
        result.done += len(batch)
        on_done(result.done)
    return result


def _next_batch(
    sides: Mapping[Side, Scores], benchmark: Benchmark, chosen: Sequence[int], begin: int, most: int
) -> tuple[dict[int, Sequence[Request]], int]:
    """(the next items' requests by index, how many of these items are not known yet): until `most` are unknown. They keep the
    order of their file, in which those about one context stand together: what they share is computed once."""
    batch: dict[int, Sequence[Request]] = {}
    unknown = 0
    for index in chosen[begin : begin + _MOST_ITEMS]:
        batch[index] = requests = benchmark.requests(benchmark.items[index])
        unknown += any(scores.missing(requests) for scores in sides.values())
        if unknown == most:
            break
    return batch, unknown


def _compute_missing(
    backend: Backend, side: Side, scores: Scores, batch: Mapping[int, Sequence[Request]], strength: float
) -> dict[int, str]:
    """Compute what is missing of some items; return why some of them could not be scored, by index."""
    missing = scores.missing(request for requests in batch.values() for request in requests)
    if not missing:
        return {}
    try:
        scores.add(missing, backend.loglikelihood(missing, side, strength=strength))
    except PromptError as exc:  # one of them is too long or too short: failed items are counted, never scored
        if len(batch) == 1:
            return {index: str(exc) for index in batch}
        indices = list(batch)
        halves = indices[: len(indices) // 2], indices[len(indices) // 2 :]
        reasons: dict[int, str] = {}
        for half in halves:
            reasons |= _compute_missing(backend, side, scores, {index: batch[index] for index in half}, strength)
        return reasons
    return {}
