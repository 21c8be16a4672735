"""From the numbers of all items to what is shown: intervals, paired differences, corrected p-values, verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from biasdpo import stats
from biasdpo.benchmarks.base import Benchmark
from biasdpo.stats import Array, Interval, Metric


@dataclass(frozen=True)
class Scored:
    """What one benchmark's items got. `base` and `tuned` (N, K); `tuned` is None where there is no adapter."""

    benchmark: Benchmark
    items: Sequence[Any]
    base: Array
    tuned: Array | None


def summarise(scored: Scored, seed: int) -> dict[str, Any]:
    """The metrics of one benchmark, overall and by group. `correct` then adds what the whole table decides."""
    benchmark = scored.benchmark
    groups: dict[str, list[int]] = {}
    for i, item in enumerate(scored.items):
        for group in dict.fromkeys(benchmark.groups(item)):
            groups.setdefault(group, []).append(i)
    return {
        **_metrics(benchmark, scored.base, scored.tuned, seed),
        "groups": {
            group: {
                "n": len(rows),
                **_metrics(benchmark, scored.base[rows], None if scored.tuned is None else scored.tuned[rows], seed),
            }
            for group, rows in sorted(groups.items())
        },
        **benchmark.report(scored.items, scored.base),
    }


def _metrics(benchmark: Benchmark, base: Array, tuned: Array | None, seed: int) -> dict[str, Any]:
    of_side, of_both = benchmark.side_metrics(), benchmark.paired_metrics()
    base_intervals = _intervals(base, of_side, seed)
    if tuned is None:
        return {"base": _json(base_intervals), "tuned": {}, "difference": {}, "paired": {}}
    both = np.concatenate([base, tuned], axis=1)
    defined = {name: metric for name, metric in of_side.items() if name in base_intervals}
    differences = {name: stats.difference(metric) for name, metric in defined.items()}
    improvements = {name: stats.improvement(metric) for name, metric in defined.items()}
    changed, improved = _intervals(both, differences, seed), _intervals(both, improvements, seed)
    p_changed = stats.randomization_p(both, differences, seed=seed)
    p_improved = stats.randomization_p(both, improvements, seed=seed)
    paired = _intervals(both, of_both, seed)
    p_paired = stats.randomization_p(both, of_both, seed=seed)
    return {
        "base": _json(base_intervals),
        "tuned": _json(_intervals(tuned, of_side, seed)),
        "difference": {
            name: {
                **changed[name].to_json(),
                "p_value": p_changed[name],
                "improvement": {**improved[name].to_json(), "p_value": p_improved[name]},
                "better": f"nearer {metric.ideal:g}" if metric.better == "nearer" else metric.better,
                "measures": metric.measures,
                "base_includes_ideal": stats.includes_ideal(metric, base_intervals[name]),
            }
            for name, metric in defined.items()
            if name in changed
        },
        "paired": {
            name: {
                **paired[name].to_json(),
                "p_value": p_paired[name],
                "improvement": {**_gain(of_both[name], paired[name]).to_json(), "p_value": p_paired[name]},
                "better": of_both[name].better,
                "measures": of_both[name].measures,
                "without_change": of_both[name].ideal,
            }
            for name in paired
        },
    }


def _intervals(items: Array, metrics: Mapping[str, Metric], seed: int) -> dict[str, Interval]:
    """Of the metrics that are defined over these items."""
    found = {name: interval for name, (interval, _) in stats.bootstrap_all(items, metrics, seed=seed).items()}
    return {name: interval for name, interval in found.items() if not np.isnan(interval.value)}


def _gain(metric: Metric, interval: Interval) -> Interval:
    """A metric of both sides as an improvement over no change: positive is good."""
    if metric.better == "lower":
        return Interval(metric.ideal - interval.value, metric.ideal - interval.high, metric.ideal - interval.low)
    return Interval(interval.value - metric.ideal, interval.low - metric.ideal, interval.high - metric.ideal)


def _json(intervals: Mapping[str, Interval]) -> dict[str, object]:
    return {name: interval.to_json() for name, interval in intervals.items()}


def correct(results: Mapping[str, dict[str, Any]]) -> None:
    """Add `p_holm` and `verdict` to every difference: the benchmarks' overall figures are one table, and the groups of each
    benchmark one of their own."""
    _decide(entry for result in results.values() for entry in _entries(result))
    for result in results.values():
        _decide(entry for group in result["groups"].values() for entry in _entries(group))


def _entries(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [*result["difference"].values(), *result["paired"].values()]


def _decide(entries: Iterable[dict[str, Any]]) -> None:
    table = list(entries)
    for entry, p_holm in zip(table, stats.holm([entry["improvement"]["p_value"] for entry in table]), strict=True):
        low, high = entry["improvement"]["ci95"]
        entry["p_holm"] = p_holm
        entry["verdict"] = stats.verdict(entry["measures"], Interval(entry["improvement"]["value"], low, high), p_holm)
