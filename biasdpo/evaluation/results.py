"""Result files: read, and told from other JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from biasdpo import data
from biasdpo.benchmarks.base import Benchmark, GenerationBenchmark
from biasdpo.benchmarks.preference import Preference
from biasdpo.config import TrainConfig
from biasdpo.data import PreferencePair
from biasdpo.engines import Engine
from biasdpo.errors import ConfigError, DatasetError, EvaluationError, WorkspaceError
from biasdpo.evaluation import run as evaluate
from biasdpo.evaluations.request import RUN, WORKSPACE
from biasdpo.gguf.proof import held_out_pairs
from biasdpo.models import AdapterSpec
from biasdpo.workspace import Workspace, read_json, sha256_of

# --- table: A result as a table: one row a benchmark and metric


Ci = tuple[float, float]


@dataclass(frozen=True)
class TableRow:
    """One metric, overall or of one group. None stands for what there is not: tuned where there is no adapter, the sides of a
    metric that needs both.

    group        "" overall
    n, n_failed  items scored, and those that could not be (counted overall)
    base_ci      95 % interval
    difference   tuned - base; of a metric of both sides: its value
    no_change    what `difference` is where the adapter changes nothing
    p_holm       corrected for the table: of the overall rows, or of the benchmark's groups
    verdict      "less biased", "better", "no clear difference", "worse"; "" where there is nothing to decide
    better       "higher", "lower", or "nearer 50"; "" where there is no adapter
    measures     "bias", or "quality": the price; "" where there is no adapter
    comparable   whether it may be set beside others
    why_not      why it may not be; "" where it may
    """

    benchmark: str
    metric: str
    group: str
    n: int
    n_failed: int
    base: float | None
    base_ci: Ci | None
    tuned: float | None
    tuned_ci: Ci | None
    difference: float | None
    ci: Ci | None
    p_value: float | None
    p_holm: float | None
    verdict: str
    better: str
    measures: str
    comparable: bool
    why_not: str
    no_change: float = 0.0


def table(result: Mapping[str, Any]) -> list[TableRow]:
    """The overall rows, benchmark by benchmark."""
    return [row for name, found in result["benchmarks"].items() for row in _rows(name, "", found, found)]


def group_table(result: Mapping[str, Any], benchmark: str) -> list[TableRow]:
    """The rows of one benchmark's groups (categories, domains), group by group; [] where it has none."""
    found = result["benchmarks"].get(benchmark, {})
    return [row for group, part in found.get("groups", {}).items() for row in _rows(benchmark, group, part, found)]


def _rows(name: str, group: str, part: Mapping[str, Any], whole: Mapping[str, Any]) -> Iterator[TableRow]:
    """`part`: the metrics of all items or of a group's; `whole`: what is known of the benchmark."""

    def row(metric: str, sides: tuple[Mapping[str, Any], Mapping[str, Any]], change: Mapping[str, Any]) -> TableRow:
        base, tuned = sides
        why_not = whole.get("not_comparable", "")
        return TableRow(
            benchmark=name,
            metric=metric,
            group=group,
            n=part["n"],
            n_failed=0 if group else whole["n_failed"],
            base=base.get("value"),
            base_ci=_ci(base),
            tuned=tuned.get("value"),
            tuned_ci=_ci(tuned),
            difference=change.get("value"),
            ci=_ci(change),
            p_value=change.get("p_value"),
            p_holm=change.get("p_holm"),
            verdict=change.get("verdict", ""),
            better=change.get("better", ""),
            measures=change.get("measures", ""),
            comparable=not why_not,
            why_not=why_not,
            no_change=change.get("without_change", 0.0),
        )

    for metric, base in part["base"].items():
        yield row(metric, (base, part["tuned"].get(metric, {})), part["difference"].get(metric, {}))
    for metric, change in part["paired"].items():
        yield row(metric, ({}, {}), change)


def _ci(interval: Mapping[str, Any]) -> Ci | None:
    return (interval["ci95"][0], interval["ci95"][1]) if "ci95" in interval else None


# --- compare: Several evaluations side by side: only what was measured on the same items may be compared


@dataclass(frozen=True)
class ComparedRow:
    """One metric of several evaluations.

    cells        in the order of the evaluations; None where one does not have it
    comparable   whether all that have it were scored on the same items
    why_not      why not, in words; "" where they were
    """

    benchmark: str
    metric: str
    better: str
    cells: tuple[TableRow | None, ...]
    comparable: bool
    why_not: str


def compare(labelled: Sequence[tuple[str, Mapping[str, Any]]]) -> list[ComparedRow]:
    """The overall rows of several results, metric by metric in the order of the first that has it."""
    tables = [{(row.benchmark, row.metric): row for row in table(result)} for _, result in labelled]
    keys = dict.fromkeys(key for rows in tables for key in rows)
    whys = {name: _why_not(name, [result for _, result in labelled]) for name in dict.fromkeys(name for name, _ in keys)}
    compared = []
    for key in keys:
        cells = tuple(rows.get(key) for rows in tables)
        better = next((cell.better for cell in cells if cell is not None and cell.better), "")
        compared.append(ComparedRow(*key, better, cells, not whys[key[0]], whys[key[0]]))
    return compared


def _why_not(benchmark: str, results: Sequence[Mapping[str, Any]]) -> str:
    """Why the figures of one benchmark must not be set beside each other; "" where they may.

    A limited evaluation may stand beside another of the same limit and seed: that is the same draw.
    """
    found = [result["benchmarks"][benchmark] for result in results if benchmark in result["benchmarks"]]
    if len({one["data_sha256"] for one in found}) > 1:
        return "scored on different data"
    if any(one.get("settings", {}) != found[0].get("settings", {}) for one in found):
        return "generated with different settings"
    counts = [one["n"] for one in found]
    if len(set(counts)) > 1:
        return f"scored on different numbers of items ({', '.join(map(str, counts))})"
    seeds = {result["provenance"].get("seed") for result in results if benchmark in result["benchmarks"]}
    indices = [[item["index"] for item in one.get("items", ())] for one in found]
    if len(seeds) > 1 and any(other != indices[0] for other in indices):
        return "scored on different draws of items"
    return ""


# --- curve: How much bias goes for how much fluency: one adapter at several strengths


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


# --- flips: The items that flipped: those for which base and tuned decide otherwise


Way = Literal["toward less bias", "toward more bias", ""]

_NO_TEXT = ("index", "base", "tuned", "outcome", "completions", "category", "group")

# How much bias an outcome shows, where outcomes can be set in an order: 0 is none. The words are those of the benchmarks'
# `outcome`; one that is not here is in no order.
_BIAS = {
    "prefers the less stereotypical sentence": 0,
    "prefers the more stereotypical sentence": 1,
    "prefers the anti-stereotype": 0,
    "prefers the stereotype": 1,
    "right: unknown": 0,
    "right: the unbiased answer": 0,
    "right: the biased answer": 0,
    "wrong: the biased answer": 1,
    "right in both": 0,
    "right in the stereotypical sentence only": 1,
    "prefers chosen": 0,
    "prefers rejected": 1,
}


@dataclass(frozen=True)
class Flip:
    """One item that the adapter decides otherwise than its base model.

    group        the item's category, "" where it has none
    texts        what a reader must see to know the item again, by name
    numbers      by name of a column: base's and tuned's. Log-probabilities (nats) are among them, by names with "logp"
    size         how far it moved, nats: the largest change of the distance between two of its log-probabilities; of an item
                 without any, the largest change of a number
    way          which way, where one can say
    completions  what base and tuned wrote, of a benchmark by generation
    """

    index: int
    group: str
    texts: dict[str, str]
    base_outcome: str
    tuned_outcome: str
    numbers: dict[str, tuple[float, float]]
    size: float = 0.0
    way: Way = ""
    completions: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())


def flips(result: Mapping[str, Any], benchmark: str) -> list[Flip]:
    """The flipped items of one benchmark, those that moved most first. [] where nothing is decided or nothing flipped."""
    found = result["benchmarks"].get(benchmark, {})
    columns: Sequence[str] = found.get("columns", ())
    flipped = [_flip(item, columns) for item in found.get("items", ()) if _has_flipped(item)]
    return sorted(flipped, key=lambda flip: (-flip.size, flip.index))


def way_of(base_outcome: str, tuned_outcome: str) -> Way:
    """Toward less or more bias; "" where the two are as good as each other, or in no order."""
    if base_outcome not in _BIAS or tuned_outcome not in _BIAS:
        return ""
    change = _BIAS[tuned_outcome] - _BIAS[base_outcome]
    return "toward less bias" if change < 0 else "toward more bias" if change > 0 else ""


def _has_flipped(item: Mapping[str, Any]) -> bool:
    outcome = item.get("outcome") or {}
    return "tuned" in outcome and outcome["base"] != outcome["tuned"]


def _flip(item: Mapping[str, Any], columns: Sequence[str]) -> Flip:
    numbers = {name: (base, tuned) for name, base, tuned in zip(columns, item["base"], item["tuned"], strict=True)}
    written = item.get("completions", {})
    base, tuned = item["outcome"]["base"], item["outcome"]["tuned"]
    return Flip(
        index=item["index"],
        group=item.get("category", ""),
        texts={name: value for name, value in item.items() if name not in _NO_TEXT and isinstance(value, str) and value},
        base_outcome=base,
        tuned_outcome=tuned,
        numbers=numbers,
        size=_size(numbers),
        way=way_of(base, tuned),
        completions=(tuple(written.get("base", ())), tuple(written.get("tuned", ()))),
    )


def _size(numbers: Mapping[str, tuple[float, float]]) -> float:
    changes = [tuned - base for name, (base, tuned) in numbers.items() if "logp" in name]
    if len(changes) > 1:
        return max(changes) - min(changes)  # the distance of two changes by as much as their changes differ
    return max((abs(tuned - base) for base, tuned in numbers.values()), default=0.0)


# --- pairs: The pairs of `preference`: of whatever is named, those that the adapter's training never saw


def preference(source: str, adapter: AdapterSpec | None, workspace: Workspace) -> Preference:
    """The held-out pairs of a JSONL file, of the `workspace`, or of the adapter's `run`.

    Raises ConfigError where nothing is named, DatasetError where nothing is held out.
    """
    if not source:
        raise ConfigError("preference needs the pairs: name with --dataset the file that was trained on, workspace or run")
    if source == RUN:
        return _of_run(adapter, workspace)
    rows = data.load([WORKSPACE], workspace) if source == WORKSPACE else data.load_jsonl(Path(source))
    pairs = data.derive(rows).pairs
    trained = None if adapter is None else adapter.held_out_share
    share = TrainConfig.settings()["held_out_share"].default if trained is None else trained
    held_out = data.split(pairs, share).held_out
    if not held_out:
        raise DatasetError(
            f"No pairs to score: of the {len(pairs)} in {Path(source).name} the run held none out (held_out_share {share:g}), "
            "and those it was trained on prove nothing; train again with held_out_share 0.1 or more, or score another benchmark"
        )
    return Preference(held_out, _sha256_of_pairs(held_out) if source == WORKSPACE else sha256_of(Path(source)))


def _of_run(adapter: AdapterSpec | None, workspace: Workspace) -> Preference:
    if adapter is None:
        raise ConfigError("--dataset run is what the adapter was trained on, and there is none: name a file, or workspace")
    pairs = held_out_pairs(adapter, workspace, limit=10**9)
    if not pairs:
        raise DatasetError(
            f"No pairs to score: what {adapter.id} was trained on is not in this workspace, or nothing of it was held out; name "
            "a file with --dataset"
        )
    return Preference(pairs, _sha256_of_pairs(pairs))


def _sha256_of_pairs(pairs: Sequence[PreferencePair]) -> str:
    """Of what is scored: the journal grows, and so do its bytes."""
    lines = "".join(json.dumps([pair.prompt, pair.chosen, pair.rejected]) + "\n" for pair in pairs)
    return hashlib.sha256(lines.encode()).hexdigest()


# --- result: Result files: read, and told from other JSON


def load(file: Path) -> dict[str, Any]:
    """The result in a file. Raises EvaluationError where there is none, or something else."""
    try:
        value = read_json(file)
    except WorkspaceError as exc:
        raise EvaluationError(str(exc)) from exc
    parts = value.values() if isinstance(value, dict) else ()
    if not isinstance(value, dict) or not all(isinstance(value.get(name), dict) for name in ("benchmarks", "provenance")):
        what = f"an object of {len(parts)} keys" if isinstance(value, dict) else type(value).__name__
        raise EvaluationError(f"{file} is no evaluation's result (got {what}): delete it, or evaluate again")
    return value


@lru_cache(maxsize=256)
def summary(file: Path, _modified_ns: int) -> tuple[bool, str]:
    """Whether the evaluation in a file was interrupted, and what is wrong with the file ("" for nothing). Results are large: each
    is read once."""
    try:
        return bool(load(file)["provenance"].get("interrupted")), ""
    except EvaluationError as exc:
        return False, str(exc)
