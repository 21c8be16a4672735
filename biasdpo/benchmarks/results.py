"""From the numbers of all items to what is shown: intervals, paired differences, corrected p-values, verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from biasdpo.benchmarks.base import Measured
from biasdpo.evaluation import stats
from biasdpo.evaluation.stats import Array, Interval, Metric


@dataclass(frozen=True)
class Scored:
    """What one benchmark's items got. `base` and `tuned` (N, K); `tuned` is None where there is no adapter."""

    benchmark: Measured
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


def _metrics(benchmark: Measured, base: Array, tuned: Array | None, seed: int) -> dict[str, Any]:
    of_side, of_both = benchmark.side_metrics(), benchmark.paired_metrics()
    if tuned is None:
        return {"base": _json(_intervals(base, of_side, seed)), "tuned": {}, "difference": {}, "paired": {}}
    both = np.concatenate([base, tuned], axis=1)
    # All at once, so that the items are drawn once for all.
    asked = {f"difference {name}": stats.difference(metric) for name, metric in of_side.items()}
    asked |= {f"nearer {name}": stats.improvement(metric) for name, metric in of_side.items() if metric.better == "nearer"}
    asked |= {f"paired {name}": metric for name, metric in of_both.items()}
    alone = {f"base {name}": stats.of_base(metric) for name, metric in of_side.items()}
    alone |= {f"tuned {name}": stats.of_tuned(metric) for name, metric in of_side.items()}
    found = _intervals(both, asked | alone, seed)
    p_values = stats.randomization_p(both, {name: metric for name, metric in asked.items() if name in found}, seed=seed)

    def of(kind: str) -> dict[str, Interval]:
        return {name.removeprefix(f"{kind} "): interval for name, interval in found.items() if name.startswith(f"{kind} ")}

    def improvement(name: str, metric: Metric, asked_as: str, without_change: float) -> dict[str, object]:
        interval = found.get(f"nearer {name}") or _gain(metric, found[asked_as], without_change)
        return {**interval.to_json(), "p_value": p_values.get(f"nearer {name}", p_values[asked_as])}

    return {
        "base": _json(of("base")),
        "tuned": _json(of("tuned")),
        "difference": {
            name: {
                **changed.to_json(),
                "p_value": p_values[f"difference {name}"],
                "improvement": improvement(name, of_side[name], f"difference {name}", 0.0),
                "better": f"nearer {of_side[name].ideal:g}" if of_side[name].better == "nearer" else of_side[name].better,
                "measures": of_side[name].measures,
                "base_includes_ideal": stats.includes_ideal(of_side[name], found[f"base {name}"]),
            }
            for name, changed in of("difference").items()
        },
        "paired": {
            name: {
                **interval.to_json(),
                "p_value": p_values[f"paired {name}"],
                "improvement": improvement(name, of_both[name], f"paired {name}", of_both[name].ideal),
                "better": of_both[name].better,
                "measures": of_both[name].measures,
                "without_change": of_both[name].ideal,
                "restates": of_both[name].restates,
            }
            for name, interval in of("paired").items()
        },
    }


def _intervals(items: Array, metrics: Mapping[str, Metric], seed: int) -> dict[str, Interval]:
    """Of the metrics that are defined over these items."""
    found = {name: interval for name, (interval, _) in stats.bootstrap_all(items, metrics, seed=seed).items()}
    return {name: interval for name, interval in found.items() if not np.isnan(interval.value)}


def _gain(metric: Metric, interval: Interval, without_change: float) -> Interval:
    """A change as an improvement over none: positive is good. Where no change is good, the interval of what is lost."""
    value, low, high = (end - without_change for end in (interval.value, interval.low, interval.high))
    if metric.better == "unchanged":
        farthest = max(abs(low), abs(high))
        return Interval(-abs(value), -farthest, 0.0 if low <= 0 <= high else -min(abs(low), abs(high)))
    return Interval(-value, -high, -low) if metric.better == "lower" else Interval(value, low, high)


def _json(intervals: Mapping[str, Interval]) -> dict[str, object]:
    return {name: interval.to_json() for name, interval in intervals.items()}


def correct(results: Mapping[str, dict[str, Any]]) -> None:
    """Add `p_holm` and `verdict` to every difference: the benchmarks' overall figures are one table, and the groups of each
    benchmark one of their own. A metric that restates another asks no question of its own: it has that one's answer."""
    _decide(entry for result in results.values() for entry in _entries(result))
    for result in results.values():
        _decide(entry for group in result["groups"].values() for entry in _entries(group))
        for part in (result, *result["groups"].values()):
            for entry in part["paired"].values():
                if entry["restates"]:
                    asked = part["difference"][entry["restates"]]
                    entry |= {"p_value": asked["p_value"], "p_holm": asked["p_holm"], "verdict": asked["verdict"]}


def _entries(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [*result["difference"].values(), *(entry for entry in result["paired"].values() if not entry["restates"])]


def _decide(entries: Iterable[dict[str, Any]]) -> None:
    table = list(entries)
    for entry, p_holm in zip(table, stats.holm([entry["improvement"]["p_value"] for entry in table]), strict=True):
        low, high = entry["improvement"]["ci95"]
        entry["p_holm"] = p_holm
        entry["verdict"] = stats.verdict(entry["measures"], Interval(entry["improvement"]["value"], low, high), p_holm)
