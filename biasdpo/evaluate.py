"""benchmark x model -> result: both sides on the same items, intervals, paired differences, and what produced them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from biasdpo import __version__, models, stats
from biasdpo.benchmarks.base import Benchmark
from biasdpo.engines import Engine
from biasdpo.errors import BackendError, DatasetError, PromptError
from biasdpo.records import Side
from biasdpo.stats import Array, Metric

_ITEMS_AT_ONCE = 8


def run(
    engine: Engine,
    benchmarks: Sequence[Benchmark],
    *,
    strength: float = 1.0,
    limit: int | None = None,
    seed: int = 0,
    on_item: Callable[[str, int, int], None] = lambda _name, _done, _total: None,
) -> dict[str, Any]:
    """Score both sides of an engine on each benchmark; return DESIGN's evaluation object.

    limit     items of each benchmark, the first ones; a limited result is marked `partial`
    on_item   called with (benchmark, items done, items in all)
    """
    if not engine.backend.has_adapter or engine.adapter is None:
        raise BackendError("Evaluation compares base and tuned, and there is no adapter: choose one with --adapter")
    results = {b.name: _run_one(engine, b, strength, limit, seed, on_item) for b in benchmarks}
    return {
        "benchmarks": results,
        "provenance": {
            "model": engine.spec.id,
            "adapter": engine.adapter.id,
            "adapter_sha256": models.adapter_sha256(engine.adapter),
            "backend": engine.backend.name,
            "strength": strength,
            "seed": seed,
            "code_version": __version__,
        },
    }


def _run_one(
    engine: Engine, benchmark: Benchmark, strength: float, limit: int | None, seed: int, on_item: Callable[[str, int, int], None]
) -> dict[str, Any]:
    items = list(benchmark.items)[:limit]
    if not items:
        raise DatasetError(f"{benchmark.name} has no items to score (limit {limit}): raise --limit or give more data")
    numbers: dict[Side, list[Sequence[float]]] = {"base": [], "tuned": []}
    kept: list[Any] = []
    failed = 0
    for begin in range(0, len(items), _ITEMS_AT_ONCE):
        for item in items[begin : begin + _ITEMS_AT_ONCE]:
            try:
                scored = {side: _scores(engine, benchmark, item, side, strength) for side in numbers}
            except PromptError:  # too long or too short to score: counted, never scored
                failed += 1
                continue
            kept.append(item)
            for side, values in scored.items():
                numbers[side].append(values)
        on_item(benchmark.name, min(begin + _ITEMS_AT_ONCE, len(items)), len(items))
    if not kept:
        raise DatasetError(f"{benchmark.name}: none of {len(items)} items could be scored; check its data")
    base, tuned = np.array(numbers["base"], dtype=np.float64), np.array(numbers["tuned"], dtype=np.float64)
    both = np.concatenate([base, tuned], axis=1)
    width = base.shape[1]
    side_metrics = benchmark.side_metrics()

    def intervals(numbers: Array, metrics: Mapping[str, Metric]) -> dict[str, object]:
        return {name: stats.bootstrap(numbers, metric, seed=seed)[0].to_json() for name, metric in metrics.items()}

    return {
        "n": len(kept),
        "n_failed": failed,
        "partial": limit is not None and limit < len(benchmark.items),
        "base": {
            name: stats.bootstrap(base, metric, seed=seed)[0].to_json() for name, metric in benchmark.side_metrics().items()
        },
        "tuned": {
            name: stats.bootstrap(tuned, metric, seed=seed)[0].to_json() for name, metric in benchmark.side_metrics().items()
        },
        "difference": {name: _difference(both, metric, width, seed) for name, metric in side_metrics.items()},
        "paired": {
            name: stats.bootstrap(both, metric, seed=seed)[0].to_json() for name, metric in benchmark.paired_metrics().items()
        },
        **benchmark.report(kept, base),
        "items": [{"base": list(b), "tuned": list(t)} for b, t in zip(base.tolist(), tuned.tolist(), strict=True)],
    }


def _scores(engine: Engine, benchmark: Benchmark, item: Any, side: Side, strength: float) -> Sequence[float]:
    return benchmark.scores(item, engine.backend.loglikelihood(benchmark.requests(item), side, strength=strength))


def _difference(both: Array, metric: Metric, width: int, seed: int) -> dict[str, object]:
    """Tuned minus base on the same resampled items."""

    def change(items: Array) -> Array:
        return np.asarray(metric(items[..., width:]) - metric(items[..., :width]))

    interval, resampled = stats.bootstrap(both, change, seed=seed)
    return {**interval.to_json(), "p_value": stats.two_sided_p(resampled)}
