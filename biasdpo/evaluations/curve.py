"""How much bias goes for how much fluency: one adapter at several strengths.

A result of several strengths holds "curve": [{"strength", "benchmarks": as in the result, but without items and failures}] by
rising strength; its "benchmarks" are those of strength 1 (else of the last). Strength 0 is the base model, by definition: it is
not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from biasdpo import evaluate
from biasdpo.benchmarks.base import Benchmark, GenerationBenchmark
from biasdpo.engines import Engine
from biasdpo.workspace import Workspace

PRICE = ("utility", "perplexity")
"""The benchmark and metric that tell what an adapter costs: perplexity of neutral text."""

_LEFT_OUT = ("items", "failures", "columns")


@dataclass(frozen=True)
class CurvePoint:
    """One strength. `perplexity` of neutral text, None where utility was not evaluated; intervals are 95 %."""

    strength: float
    value: float
    value_ci: tuple[float, float]
    perplexity: float | None
    perplexity_ci: tuple[float, float] | None


def points(result: Mapping[str, Any], benchmark: str, metric: str) -> list[CurvePoint]:
    """One benchmark's metric against perplexity by rising strength, base as strength 0. [] where it was not evaluated, or has
    no such metric of one side."""
    found = []
    for strength, benchmarks in _by_strength(result):
        side = "base" if strength == 0 else "tuned"
        value = _interval(benchmarks, benchmark, side, metric)
        price = _interval(benchmarks, PRICE[0], side, PRICE[1])
        if value is not None:
            found.append(CurvePoint(strength, *value, *(price or (None, None))))
    return found


def metrics(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The (benchmark, metric) pairs that have two points or more, the price's own left out."""
    names = [
        (name, metric) for name, values in result["benchmarks"].items() if name != PRICE[0] for metric in values.get("tuned", {})
    ]
    return [(name, metric) for name, metric in names if len(points(result, name, metric)) > 1]


def _by_strength(result: Mapping[str, Any]) -> Iterator[tuple[float, Mapping[str, Any]]]:
    """Base first, as strength 0."""
    strength = result["provenance"].get("strength", 1.0)
    curve = [(point["strength"], point["benchmarks"]) for point in result.get("curve", [])]
    yield 0.0, result["benchmarks"]
    yield from ((s, found) for s, found in curve or [(strength, result["benchmarks"])] if s > 0)


def _interval(benchmarks: Mapping[str, Any], name: str, side: str, metric: str) -> tuple[float, tuple[float, float]] | None:
    found = benchmarks.get(name, {}).get(side, {}).get(metric)
    return None if found is None else (found["value"], (found["ci95"][0], found["ci95"][1]))


def run(
    engine: Engine,
    benchmarks: Sequence[Benchmark | GenerationBenchmark],
    strengths: Sequence[float] = (1.0,),
    *,
    limit: int | None = None,
    seed: int = 0,
    workspace: Workspace | None = None,
    on_item: Callable[[str, int, int], None] = lambda _name, _done, _total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """`evaluate.run` at each of several strengths: DESIGN's object, with a curve where there are several.

    workspace   None scores base anew at each strength
    on_item     called with (benchmark, items done, items in all), of all strengths together
    should_stop a strength that it cut short is left out of the curve
    """
    computed = order(strengths)
    results: dict[float, dict[str, Any]] = {}
    for round_, strength in enumerate(computed):

        def tell(name: str, done: int, total: int, round_: int = round_) -> None:
            on_item(name, round_ * total + done, len(computed) * total)

        if not round_ or not should_stop():
            results[strength] = evaluate.run(
                engine,
                benchmarks,
                strength=strength,
                limit=limit,
                seed=seed,
                workspace=workspace,
                on_item=tell,
                should_stop=should_stop,
            )
    main = results[computed[0]]
    if len(strengths) == 1:
        return main
    whole = {strength: found for strength, found in results.items() if not found["provenance"]["interrupted"]}
    curve = [{"strength": strength, "benchmarks": _brief(whole[strength])} for strength in sorted(whole)]
    main["provenance"] |= {"strengths": sorted(whole), "interrupted": len(whole) < len(computed)}
    return {"benchmarks": main["benchmarks"], "curve": curve, "provenance": main["provenance"]}


def order(strengths: Sequence[float]) -> list[float]:
    """The strengths that are computed, in their order: the main one first, so that a cancelled evaluation has it; 0 beside others
    not at all."""
    computed = [strength for strength in strengths if strength] or list(strengths)
    main = 1.0 if 1.0 in computed else computed[-1]
    return [main, *sorted(strength for strength in computed if strength != main)]


def _brief(result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {key: value for key, value in found.items() if key not in _LEFT_OUT} for name, found in result["benchmarks"].items()
    }
