"""Reads result files, and turns a result into tables, comparisons, curves, and flipped items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from biasdpo.benchmarks.titles import headline
from biasdpo.errors import EvaluationError

# The format of a result file

FORMAT = 1
MIN_GROUP_ITEMS = 10  # a bootstrap of fewer items gives an interval that looks surer than it is
"""A result without a `format` key has format 1."""

Ci = tuple[float, float]
_Pair = Annotated[list[float], Field(min_length=2, max_length=2)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class _Interval(_Part):
    value: float
    ci95: _Pair


class _Improvement(_Interval):
    p_value: float


class _Change(_Interval):
    p_value: float
    p_holm: float
    verdict: str
    better: str
    measures: str
    improvement: _Improvement
    base_includes_ideal: bool = False
    without_change: float = 0.0
    restates: str = ""


class _Metrics(_Part):
    n: int
    base: dict[str, _Interval]
    tuned: dict[str, _Interval]
    difference: dict[str, _Change]
    paired: dict[str, _Change]
    undefined: list[str] = []


class _Failure(_Part):
    index: int
    reason: str


class _Sides(_Part):
    base: str
    tuned: str = ""


class _Completions(_Part):
    base: list[str] = []
    tuned: list[str] = []


class _Item(_Part):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, str] = Field(init=False)  # what describes it

    index: int
    base: list[float]
    tuned: list[float] = []
    outcome: _Sides | None = None
    completions: _Completions = _Completions()


class _Benchmark(_Metrics):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float] = Field(init=False)  # figures beside the metrics

    n_failed: int
    n_total: int = 0
    partial: bool = False
    not_comparable: str = ""
    not_as_published: str = ""
    settings: dict[str, str | int | float | None] = {}
    data_sha256: str = ""
    groups: dict[str, _Metrics]
    failures: list[_Failure] = []
    columns: list[str] = []
    items: list[_Item] = []


class _Strength(_Part):
    strength: float
    benchmarks: dict[str, _Benchmark]


class _Provenance(_Part):
    model: str
    adapter: str = ""
    backend: str = ""
    strength: float = 1.0
    strengths: list[float] = []
    seed: int = 0
    limit: int | None = None
    interrupted: bool = False
    code_version: str = ""
    model_sha256: str = ""
    adapter_sha256: str = ""
    adapter_config_sha256: str = ""
    pairs_source: str = ""


class _Result(_Part):
    format: int = FORMAT
    benchmarks: dict[str, _Benchmark]
    missing: dict[str, str] = {}
    curve: list[_Strength] = []
    provenance: _Provenance


def load(file: Path) -> dict[str, Any]:
    """The result in a file, with every key checked. Raises EvaluationError if it is missing, damaged, or from a newer version."""
    try:
        value = pydantic_core.from_json(file.read_bytes())
    except FileNotFoundError as exc:
        raise EvaluationError(f"No file {file}: it was moved or never written; restore it, or evaluate again") from exc
    except (OSError, ValueError) as exc:
        raise EvaluationError(f"Can't read {file} as JSON: {exc}; restore it, or delete it and evaluate again") from exc
    written = value.get("format", FORMAT) if isinstance(value, dict) else FORMAT
    if isinstance(written, int) and written > FORMAT:
        raise EvaluationError(f"{file} has format {written}, and this version of BiasDPO reads up to {FORMAT}: update BiasDPO")
    try:
        _Result.model_validate(value)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or type(value).__name__
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise EvaluationError(f"{file} is no evaluation result ({where}: {message}): delete it, or evaluate again") from exc
    result: dict[str, Any] = value
    return result


@lru_cache(maxsize=4)
def load_unchanged(file: Path, _modified_ns: int) -> dict[str, Any]:
    """`load`, where the same file is read again and again. Nobody may change the result."""
    return load(file)


@dataclass(frozen=True)
class About:
    """The benchmarks of an evaluation, from its config or, without one, from its result."""

    adapter: str
    benchmarks: tuple[str, ...]


@lru_cache(maxsize=256)
def about(file: Path, _modified_ns: int) -> About:
    """The subject of a result file, for listings; "" and () if it can't be read."""
    try:
        result = load(file)
    except EvaluationError:
        return About("", ())
    return About(result["provenance"].get("adapter", ""), tuple(result["benchmarks"]))


@lru_cache(maxsize=256)
def summary(file: Path, _modified_ns: int) -> tuple[bool, str]:
    """Whether the evaluation in a file was interrupted, and what is wrong with the file ("" for nothing), for listings. Results
    are large: each is read once."""
    try:
        return bool(load(file)["provenance"].get("interrupted")), ""
    except EvaluationError as exc:
        return False, str(exc)


# A result as a table


@dataclass(frozen=True)
class TableRow:
    """One metric, overall or of one group. None: does not exist (tuned without an adapter, the sides of a paired metric, all
    of a metric that no item defines).

    group        "" for overall
    n, n_failed  items scored, and items that could not be (counted overall)
    base_ci      95% interval
    difference   tuned - base; for a metric of both sides: its value
    no_change    value of `difference` if the adapter changes nothing
    p_holm       corrected over the table: the overall rows, or the benchmark's groups
    A group of fewer than MIN_GROUP_ITEMS has values but neither intervals nor a verdict.
    verdict      "less biased", "better", "no clear difference", "worse"; "" if there is nothing to decide
    better       "higher", "lower", "unchanged", or e.g. "nearer 50"; "" without an adapter
    measures     "bias" or "quality" (the quality cost of debiasing); "" without an adapter
    comparable   whether it may be compared with other evaluations; if not, `why_not` is the reason
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

    @property
    def is_undefined(self) -> bool:
        """Whether no item defines the metric."""
        return self.base is None and self.difference is None


def table(result: Mapping[str, Any]) -> list[TableRow]:
    """The overall rows, by benchmark."""
    return [row for name, found in result["benchmarks"].items() for row in _rows(name, "", found, found)]


def group_table(result: Mapping[str, Any], benchmark: str) -> list[TableRow]:
    """The rows of one benchmark's groups (categories, domains), by group; [] if it has none."""
    found = result["benchmarks"].get(benchmark, {})
    return [row for group, part in found.get("groups", {}).items() for row in _rows(benchmark, group, part, found)]


def group_metrics(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The (benchmark, metric) pairs that base has by group, each benchmark's headline metric first."""
    found = []
    for name in result["benchmarks"]:
        metrics = list(dict.fromkeys(row.metric for row in group_table(result, name) if row.base is not None))
        first = headline(name, metrics)
        found += [(name, metric) for metric in ([first] if first else []) + [metric for metric in metrics if metric != first]]
    return found


def _rows(name: str, group: str, part: Mapping[str, Any], benchmark: Mapping[str, Any]) -> Iterator[TableRow]:
    """`part`: the metrics of all items or of a group's."""
    why_not = benchmark.get("not_comparable", "")
    is_small = bool(group) and part["n"] < MIN_GROUP_ITEMS
    sides = {metric: (base, part["tuned"].get(metric, {})) for metric, base in part["base"].items()}
    sides |= {metric: ({}, {}) for metric in (*part["paired"], *part.get("undefined", ()))}
    for metric, (base, tuned) in sides.items():
        change = part["difference"].get(metric) or part["paired"].get(metric) or {}
        yield TableRow(
            benchmark=name,
            metric=metric,
            group=group,
            n=part["n"],
            n_failed=0 if group else benchmark["n_failed"],
            base=base.get("value"),
            base_ci=None if is_small else _ci(base),
            tuned=tuned.get("value"),
            tuned_ci=None if is_small else _ci(tuned),
            difference=change.get("value"),
            ci=None if is_small else _ci(change),
            p_value=None if is_small else change.get("p_value"),
            p_holm=None if is_small else change.get("p_holm"),
            verdict="" if is_small else change.get("verdict", ""),
            better=change.get("better", ""),
            measures=change.get("measures", ""),
            comparable=not why_not,
            why_not=why_not,
            no_change=change.get("without_change", 0.0),
        )


def entry_of(result: Mapping[str, Any], row: TableRow) -> Mapping[str, Any]:
    """The change behind an overall row, as stored; {} without an adapter."""
    found = result["benchmarks"][row.benchmark]
    entry: Mapping[str, Any] = found["difference"].get(row.metric) or found["paired"].get(row.metric) or {}
    return entry


def _ci(interval: Mapping[str, Any]) -> Ci | None:
    return (interval["ci95"][0], interval["ci95"][1]) if interval else None


# Several results side by side


@dataclass(frozen=True)
class ComparedRow:
    """One metric of several results.

    cells        in the order of the results; None for a result without it
    comparable   whether all that have it were scored on the same items; if not, `why_not` is the reason
    """

    benchmark: str
    metric: str
    better: str
    cells: tuple[TableRow | None, ...]
    comparable: bool
    why_not: str


def compare(labeled: Sequence[tuple[str, Mapping[str, Any]]]) -> list[ComparedRow]:
    """The overall rows of several (label, result), by metric in the order of the first that has it."""
    tables = [{(row.benchmark, row.metric): row for row in table(result)} for _, result in labeled]
    keys = dict.fromkeys(key for rows in tables for key in rows)
    why_not = {
        name: _why_not_comparable(name, [result for _, result in labeled]) for name in dict.fromkeys(name for name, _ in keys)
    }
    compared = []
    for benchmark, metric in keys:
        cells = tuple(rows.get((benchmark, metric)) for rows in tables)
        better = next((cell.better for cell in cells if cell is not None and cell.better), "")
        compared.append(ComparedRow(benchmark, metric, better, cells, not why_not[benchmark], why_not[benchmark]))
    return compared


def _why_not_comparable(benchmark: str, results: Sequence[Mapping[str, Any]]) -> str:
    """Why the figures of one benchmark can't be compared; "" if they can. Evaluations with the same limit and seed drew the same
    items."""
    having = [result for result in results if benchmark in result["benchmarks"]]
    found = [result["benchmarks"][benchmark] for result in having]
    if len({one.get("data_sha256", "") for one in found}) > 1:
        return "scored on different data"
    if any(one.get("settings", {}) != found[0].get("settings", {}) for one in found):
        return "generated with different settings"
    counts = [one["n"] for one in found]
    if len(set(counts)) > 1:
        return f"scored on different numbers of items ({', '.join(map(str, counts))})"
    indices = [[item["index"] for item in one.get("items", ())] for one in found]
    if len({result["provenance"].get("seed") for result in having}) > 1 and any(other != indices[0] for other in indices):
        return "scored on different draws of items"
    return ""


# The curve of bias against fluency: one adapter at several strengths


PERPLEXITY = ("utility", "perplexity")
"""The benchmark and metric that measure the quality cost of debiasing."""


@dataclass(frozen=True)
class CurvePoint:
    """One strength. `perplexity` of neutral text, None if utility was not evaluated; intervals are 95%."""

    strength: float
    value: float
    value_ci: Ci
    perplexity: float | None
    perplexity_ci: Ci | None


def curve_points(result: Mapping[str, Any], benchmark: str, metric: str) -> list[CurvePoint]:
    """One metric against perplexity by rising strength, base as strength 0; [] if it was not evaluated or needs both sides."""
    strength = result["provenance"].get("strength", 1.0)
    tuned = [(point["strength"], point["benchmarks"]) for point in result.get("curve", [])]
    points: list[CurvePoint] = []
    for at, found in [(0.0, result["benchmarks"]), *(tuned or [(strength, result["benchmarks"])])]:
        if at == 0 and points:
            continue
        side = "tuned" if at else "base"
        value, perplexity = (found.get(name, {}).get(side, {}).get(key, {}) for name, key in ((benchmark, metric), PERPLEXITY))
        if ci := _ci(value):
            points.append(CurvePoint(at, value["value"], ci, perplexity.get("value"), _ci(perplexity)))
    return points


def curve_metrics(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The (benchmark, metric) pairs with two points or more, without perplexity's own; [] of one strength."""
    if not result.get("curve"):
        return []
    names = [
        (name, metric)
        for name, found in result["benchmarks"].items()
        if name != PERPLEXITY[0]
        for metric in found.get("tuned", {})
    ]
    return [(name, metric) for name, metric in names if len(curve_points(result, name, metric)) > 1]


# Flipped items: those base and tuned decide differently


Direction = Literal["toward less bias", "toward more bias", ""]

_NO_TEXT = ("index", "base", "tuned", "outcome", "completions", "category", "group")

# How much bias an outcome shows, for outcomes that can be ordered. The words are those of the benchmarks' `outcome`.
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
    """One item that base and tuned decide differently.

    group        the item's category, "" if it has none
    texts        what identifies the item to a reader, by name
    numbers      base's and tuned's by column; names with "logp" are log-probabilities, nats
    size         how far it moved, nats: the largest change of the distance between two of its log-probabilities; for an item
                 without them, the largest change of a number
    way          the direction, if the outcomes can be ordered
    completions  of base and tuned, for a benchmark by generation
    """

    index: int
    group: str
    texts: dict[str, str]
    base_outcome: str
    tuned_outcome: str
    numbers: dict[str, tuple[float, float]]
    size: float = 0.0
    way: Direction = ""
    completions: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())


def flips(result: Mapping[str, Any], benchmark: str) -> list[Flip]:
    """The flipped items of one benchmark, largest moves first; [] if nothing is decided or nothing flipped."""
    found = result["benchmarks"].get(benchmark, {})
    flipped = []
    for item in found.get("items", ()):
        outcome = item.get("outcome") or {}
        if "tuned" in outcome and outcome["base"] != outcome["tuned"]:
            flipped.append(_flip(item, found.get("columns", ())))
    return sorted(flipped, key=lambda flip: (-flip.size, flip.index))


def find_flip(result: Mapping[str, Any], benchmark: str, index: str) -> Flip:
    """The flipped item with this index. Raises EvaluationError if there is none."""
    found = next((flip for flip in flips(result, benchmark) if str(flip.index) == index), None)
    if found is None:
        raise EvaluationError(f"No flipped item {index!r:.20} of {benchmark}: choose one from the list")
    return found


def _flip(item: Mapping[str, Any], columns: Sequence[str]) -> Flip:
    numbers = {name: (base, tuned) for name, base, tuned in zip(columns, item["base"], item.get("tuned", ()), strict=False)}
    completions = item.get("completions", {})
    base, tuned = item["outcome"]["base"], item["outcome"]["tuned"]
    return Flip(
        index=item["index"],
        group=item.get("category", ""),
        texts={name: value for name, value in item.items() if name not in _NO_TEXT and isinstance(value, str) and value},
        base_outcome=base,
        tuned_outcome=tuned,
        numbers=numbers,
        size=_size(numbers),
        way=direction_of(base, tuned),
        completions=(tuple(completions.get("base", ())), tuple(completions.get("tuned", ()))),
    )


# What the two texts of an item are called, the less biased one first.
_PAIRS = (("chosen", "rejected"), ("less", "more"), ("anti_stereotype", "stereotype"), ("anti", "pro"))
_FEWEST_WORDS = 3  # of a common beginning that is worth continuing


def two_texts(flip: Flip) -> dict[str, str]:
    """The item's first completions (base, tuned) or its two texts (the less biased one first), by name; {} for other items."""
    base, tuned = flip.completions
    if base and tuned:
        return {"base": base[0], "tuned": tuned[0]}
    return next(({name: flip.texts[name] for name in pair} for pair in _PAIRS if all(map(flip.texts.get, pair))), {})


def prompt_of(flip: Flip) -> str:
    """A prompt that puts the item before a model: its prompt or question, or how its two sentences begin."""
    texts = flip.texts
    if texts.get("prompt"):
        return texts["prompt"]
    if texts.get("question"):
        return "\n\n".join(filter(None, (texts.get("context", ""), texts["question"])))
    if texts.get("context"):
        return texts["context"]
    both = list(two_texts(flip).values())
    pairs = zip(*(text.split() for text in both), strict=False)
    words = [words[0] for words in takewhile(lambda words: len(set(words)) == 1, pairs)]
    if len(words) >= _FEWEST_WORDS:
        return f"Continue: {' '.join(words)}"
    return f"What do you think of this sentence? {both[0] if both else next(iter(texts.values()), '')}"


def direction_of(base_outcome: str, tuned_outcome: str) -> Direction:
    """Toward less or more bias; "" if the outcomes are equally good or can't be ordered."""
    if base_outcome not in _BIAS or tuned_outcome not in _BIAS:
        return ""
    change = _BIAS[tuned_outcome] - _BIAS[base_outcome]
    return "toward less bias" if change < 0 else "toward more bias" if change > 0 else ""


def _size(numbers: Mapping[str, tuple[float, float]]) -> float:
    changes = [tuned - base for name, (base, tuned) in numbers.items() if "logp" in name]
    if len(changes) > 1:
        return max(changes) - min(changes)  # the distance between two numbers changes by the difference of their changes
    return max((abs(tuned - base) for base, tuned in numbers.values()), default=0.0)
