"""Runs benchmarks on a model and its adapter: items -> answers -> numbers -> metrics -> the result object.

`run` goes through the strengths, `_run_strength` through the benchmarks. `score_items` asks for likelihoods and `complete_items`
for completions, both only for what is not cached; the benchmark turns an item's answers into K numbers; `summarize` turns all
items' numbers into metrics with intervals and p-values, and `correct` adds what the whole table decides.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from biasdpo import __version__
from biasdpo.backends.base import Backend, Cancellation
from biasdpo.benchmarks.base import Benchmark, GenerationBenchmark, LikelihoodBenchmark
from biasdpo.benchmarks.preference import Preference
from biasdpo.chat import BARE
from biasdpo.config import RUN, WORKSPACE
from biasdpo.data import splits
from biasdpo.data.pairs import PreferencePair, derive
from biasdpo.engines import Engine
from biasdpo.errors import ConfigError, DatasetError, PromptError, WorkspaceError, plural
from biasdpo.evaluation import stats
from biasdpo.evaluation.stats import Array, Interval, Metric
from biasdpo.model_files import gguf_parts, weight_files
from biasdpo.models import AdapterSpec
from biasdpo.records import SEED_RANGE, Completion, CompletionRequest, Likelihood, Request, Side, check_strength
from biasdpo.workspace import Workspace, locked, read_json, sha256_of, write_json

OnItem = Callable[[str, int, int], None]
"""Called with (benchmark, items done, items in total)."""


def run(
    engine: Engine,
    benchmarks: Sequence[Benchmark[Any]],
    strengths: Sequence[float] = (1.0,),
    *,
    limit: int | None = None,
    seed: int = 0,
    workspace: Workspace | None = None,
    missing: Mapping[str, str] = MappingProxyType({}),
    on_item: OnItem = lambda _name, _done, _total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Score both sides of an engine on each benchmark. Returns the object that `python -m biasdpo evaluate --out` writes, with a
    curve if there are several strengths. Without an adapter only base is scored.

    limit         items per benchmark, drawn by `seed`; a larger limit includes a smaller one's items
    seed          of the draw, of sampling, and of the bootstrap
    workspace     where answers are cached; None: in memory only
    missing       benchmarks that could not be loaded, and why; part of the result
    on_item       progress, with the items of all strengths together
    should_stop   polled between items and while completions are generated: what is scored by then is the result, marked as not
                  comparable; strengths that are cut short are left out of the curve
    """
    ordered = strength_order([check_strength(strength) for strength in strengths])
    parents = _parents(engine, workspace)
    base = _open_cache(workspace, "base", _scorer(engine, parents))
    results: dict[float, dict[str, Any]] = {}
    for i, strength in enumerate(ordered):
        if results and should_stop():
            break
        caches: dict[Side, AnswerCache] = {"base": base}
        if engine.adapter is not None:
            tuned = {"side": "tuned", "adapter_sha256": parents["adapter_sha256"], "strength": strength}
            caches["tuned"] = _open_cache(workspace, "tuned", {**_scorer(engine, parents), **tuned})

        def report(name: str, done: int, total: int, i: int = i) -> None:
            on_item(name, i * total + done, len(ordered) * total)

        results[strength] = _run_strength(engine.backend, benchmarks, caches, strength, limit, seed, report, should_stop)
        results[strength]["provenance"] = {
            **parents,
            "model": engine.spec.id,
            "adapter": "" if engine.adapter is None else engine.adapter.id,
            "backend": engine.backend.name,
            "strength": strength,
            "seed": seed,
            "limit": limit,
            "pairs_source": next((one.pairs_source for one in benchmarks if one.pairs_source), ""),
            "interrupted": results[strength].pop("interrupted"),
            "code_version": __version__,
        }
    main = results[ordered[0]]
    main["missing"] = {**missing, **main["missing"]}
    if not main["benchmarks"] and main["missing"] and not main["provenance"]["interrupted"]:
        raise DatasetError(" · ".join(main["missing"].values()))
    if len(strengths) == 1:
        return main
    complete = {strength: found for strength, found in results.items() if not found["provenance"]["interrupted"]}
    curve = [
        {"strength": strength, "benchmarks": {name: _brief(part) for name, part in complete[strength]["benchmarks"].items()}}
        for strength in sorted(complete)
    ]
    provenance = main["provenance"] | {"strengths": sorted(complete), "interrupted": len(complete) < len(ordered)}
    return {"benchmarks": main["benchmarks"], "missing": main["missing"], "curve": curve, "provenance": provenance}


def strength_order(strengths: Sequence[float]) -> list[float]:
    """The strengths to compute, the main one first, so that a canceled evaluation has it. 0 is base: skipped beside others."""
    computed = [strength for strength in strengths if strength] or list(strengths)
    main = 1.0 if 1.0 in computed else computed[-1]
    return [main, *sorted(strength for strength in computed if strength != main)]


def _brief(part: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key not in ("items", "failures", "columns")}


def _run_strength(
    backend: Backend,
    benchmarks: Sequence[Benchmark[Any]],
    caches: Mapping[Side, AnswerCache],
    strength: float,
    limit: int | None,
    seed: int,
    on_item: OnItem,
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """The benchmarks' results at one strength, and whether the run was interrupted."""
    results: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    interrupted = False
    for benchmark in benchmarks:
        interrupted = interrupted or should_stop()
        if interrupted:
            break
        chosen = draw(len(benchmark.items), limit, seed)
        if not chosen:
            missing[benchmark.name] = f"{benchmark.name} has no items to score: give more data"
            continue

        def on_done(done: int, name: str = benchmark.name, total: int = len(chosen)) -> None:
            on_item(name, done, total)

        options: dict[str, Any] = {"strength": strength, "on_done": on_done, "should_stop": should_stop}
        texts: dict[Side, list[list[str]]] = {}
        if isinstance(benchmark, GenerationBenchmark):
            scored = complete_items(backend, caches, benchmark, chosen, seed=seed, **options)
            requests = [requests_of(benchmark, benchmark.items[index], seed) for index in scored.indices]
            texts = {side: [[c.text for c in cache.get(r)] for r in requests] for side, cache in caches.items()}
        else:
            assert isinstance(benchmark, LikelihoodBenchmark)
            scored = score_items(backend, caches, benchmark, chosen, **options)
        interrupted = scored.done < len(chosen)
        if scored.indices:
            results[benchmark.name] = _benchmark_result(benchmark, len(chosen), scored, texts, seed)
        elif scored.done:  # else it was stopped at once; earlier benchmarks' results stay
            reason = scored.failures[0]["reason"]
            failed = f"none of {plural(scored.done, 'item')} could be scored: the first failed with: {reason}"
            missing[benchmark.name] = f"{benchmark.name}: {failed}"
    correct(results)
    return {"benchmarks": results, "missing": missing, "interrupted": interrupted}


def draw(n: int, limit: int | None, seed: int) -> list[int]:
    """At most `limit` of n indices, ascending, drawn at random."""
    if limit is None or limit >= n:
        return list(range(n))
    shuffled = list(range(n))
    random.Random(seed).shuffle(shuffled)
    return sorted(shuffled[:limit])


def _benchmark_result(
    benchmark: Benchmark[Any], chosen: int, scored: ItemNumbers, texts: Mapping[Side, list[list[str]]], seed: int
) -> dict[str, Any]:
    """One benchmark's part of the result. `chosen`: how many items were to be scored; `texts`: completions by side and item."""
    total, items = len(benchmark.items), [benchmark.items[index] for index in scored.indices]
    arrays = {side: np.array(numbers, dtype=np.float64) for side, numbers in scored.numbers.items()}
    not_comparable = f"limited to {scored.done:,} of {plural(total, 'item')}" if scored.done < total else ""
    if scored.done < chosen:
        not_comparable = f"interrupted after {scored.done:,} of {plural(chosen, 'item')}"
    rows = []
    for i, (index, item) in enumerate(zip(scored.indices, items, strict=True)):
        numbers = {side: list(values[i]) for side, values in scored.numbers.items()}
        row: dict[str, Any] = {"index": index} | benchmark.describe(item) | numbers
        outcome = {side: benchmark.outcome(item, values) for side, values in numbers.items()}
        if any(outcome.values()):
            row["outcome"] = outcome
        if texts:
            row["completions"] = {side: of_items[i] for side, of_items in texts.items()}
        rows.append(row)
    return {
        "n": len(items),
        "n_failed": len(scored.failures),
        "n_total": total,
        "partial": scored.done < total,
        "not_comparable": not_comparable,
        "not_as_published": benchmark.not_as_published,
        "settings": dict(benchmark.settings),
        "data_sha256": benchmark.data_sha256,
        **summarize(benchmark, items, arrays["base"], arrays.get("tuned"), seed),
        "failures": scored.failures,
        "columns": list(benchmark.columns),
        "items": rows,
    }


# Items to numbers, by likelihood


@dataclass
class ItemNumbers:
    """The numbers of a benchmark's items.

    indices    of the scored items, in file order
    numbers    by side: the scored items' K numbers, in the order of `indices`
    failures   items that could not be scored: {"index", "reason"}
    done       items tried; fewer than requested if stopped
    """

    indices: list[int] = field(default_factory=list)
    numbers: dict[Side, list[Sequence[float]]] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)
    done: int = 0


# A batch holds as many uncached items as take about this long, which bounds what an interruption loses and the delay between
# progress reports: hundreds on a GPU, one for a large model on a CPU.
_SECONDS_PER_BATCH = 3.0
_FIRST_BATCH, _LARGEST_BATCH, _GROWTH = 16, 1024, 4


def score_items(
    backend: Backend,
    caches: Mapping[Side, AnswerCache],
    benchmark: LikelihoodBenchmark[Any],
    chosen: Sequence[int],
    *,
    strength: float = 1.0,
    on_done: Callable[[int], None] = lambda _done: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> ItemNumbers:
    """Score the chosen items on each side. Items that can't be scored are counted as failures.

    caches        known likelihoods by side; computed ones are added
    on_done       called with the number of items tried
    should_stop   polled between batches
    """
    result = ItemNumbers(numbers={side: [] for side in caches})
    size, begin = _FIRST_BATCH, 0
    while begin < len(chosen) and not should_stop():
        batch, uncached = _next_batch(caches, benchmark, chosen[begin : begin + _LARGEST_BATCH], size)
        begin += len(batch)
        started_at = time.monotonic()
        reasons: dict[int, str] = {}
        for side, cache in caches.items():
            reasons |= _compute_missing(backend, side, cache, batch, strength)
        if uncached:
            items_per_second = uncached / max(time.monotonic() - started_at, 1e-3)
            size = min(max(int(items_per_second * _SECONDS_PER_BATCH), 1), size * _GROWTH, _LARGEST_BATCH)
        for index, requests in batch.items():
            if index in reasons:
                result.failures.append({"index": index, "reason": reasons[index]})
                continue
            numbers = {side: benchmark.scores(benchmark.items[index], cache.get(requests)) for side, cache in caches.items()}
            if all(map(math.isfinite, (number for values in numbers.values() for number in values))):
                _add(result, index, numbers)
            else:
                result.failures.append({"index": index, "reason": "a log-probability that is no number"})
        result.done += len(batch)
        on_done(result.done)
    return result


def _add(result: ItemNumbers, index: int, numbers: Mapping[Side, Sequence[float]]) -> None:
    result.indices.append(index)
    for side, values in numbers.items():
        result.numbers[side].append(values)


def _next_batch(
    caches: Mapping[Side, AnswerCache], benchmark: LikelihoodBenchmark[Any], chosen: Sequence[int], size: int
) -> tuple[dict[int, Sequence[Request]], int]:
    """(requests of the next items by index, number of these items that are not cached): up to `size` uncached items. They keep
    their file order, in which items with the same context are neighbors: the shared beginning is computed once."""
    batch: dict[int, Sequence[Request]] = {}
    uncached = 0
    for index in chosen:
        batch[index] = requests = benchmark.requests(benchmark.items[index])
        uncached += any(cache.missing(requests) for cache in caches.values())
        if uncached == size:
            break
    return batch, uncached


def _compute_missing(
    backend: Backend, side: Side, cache: AnswerCache, batch: Mapping[int, Sequence[Request]], strength: float
) -> dict[int, str]:
    """Compute the missing likelihoods of some items. Returns, by index, why an item can't be scored."""
    missing = cache.missing(request for requests in batch.values() for request in requests)
    if not missing:
        return {}
    try:
        cache.add(missing, backend.loglikelihood(missing, side, strength=strength))
    except PromptError as exc:  # some request is too long or too short: halve the batch until it is found
        if len(batch) == 1:
            return {index: str(exc) for index in batch}
        indices = list(batch)
        reasons: dict[int, str] = {}
        for half in (indices[: len(indices) // 2], indices[len(indices) // 2 :]):
            reasons |= _compute_missing(backend, side, cache, {index: batch[index] for index in half}, strength)
        return reasons
    return {}


# Items to numbers, by generation

_ITEMS_PER_SCORING = 64
_POLL_SECONDS = 0.1


def complete_items(
    backend: Backend,
    caches: Mapping[Side, AnswerCache],
    benchmark: GenerationBenchmark[Any],
    chosen: Sequence[int],
    *,
    seed: int = 0,
    strength: float = 1.0,
    on_done: Callable[[int], None] = lambda _done: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> ItemNumbers:
    """Generate the completions of the chosen items on each side, and score them. Items that can't be scored are failures.

    caches        known completions by side; complete new ones are added
    seed          of the evaluation; see `requests_of`
    on_done       called with the number of items tried
    should_stop   polled between items and during generation
    """
    result = ItemNumbers(numbers={side: [] for side in caches})
    unscored: list[int] = []
    with ThreadPoolExecutor(max_workers=len(caches), thread_name_prefix="complete") as threads:
        for index in chosen:
            if should_stop():
                break
            requests = requests_of(benchmark, benchmark.items[index], seed)
            try:
                if not _generate_missing(backend, caches, requests, strength, threads, should_stop):
                    break
            except PromptError as exc:
                result.failures.append({"index": index, "reason": str(exc)})
            else:
                unscored.append(index)
            result.done += 1
            if len(unscored) == _ITEMS_PER_SCORING:
                _score_completions(benchmark, caches, unscored, seed, result)
                unscored = []
            on_done(result.done)
    _score_completions(benchmark, caches, unscored, seed, result)
    result.failures.sort(key=lambda failure: int(failure["index"]))
    return result


def requests_of(benchmark: GenerationBenchmark[Any], item: Any, seed: int) -> list[CompletionRequest]:
    """An item's requests with their seeds. A seed depends on the evaluation's seed, the prompt, and the sample's number: not on
    other items, both sides use the same, and more samples include fewer samples' ones. Greedy completions have seed 0."""
    return [
        replace(request, sampling=replace(request.sampling, seed=_seed_of(request, seed) if request.sampling.temperature else 0))
        for request in benchmark.requests(item)
    ]


def _seed_of(request: CompletionRequest, seed: int) -> int:
    digest = hashlib.sha256(f"{seed} {request.sample} {request.prompt}".encode()).digest()
    low, high = SEED_RANGE
    return low + int.from_bytes(digest[:8], "big") % (high + 1 - low)


def _generate_missing(
    backend: Backend,
    caches: Mapping[Side, AnswerCache],
    requests: Sequence[CompletionRequest],
    strength: float,
    threads: ThreadPoolExecutor,
    should_stop: Callable[[], bool],
) -> bool:
    """Generate an item's missing completions, on all sides at once. Returns whether all exist; raises the first side's error."""
    cancellation = Cancellation()

    def generate(side: Side, missing: Sequence[CompletionRequest]) -> None:
        for request in missing:
            completion = _complete(backend, request, side, strength, cancellation)
            if completion.finish_reason == "cancelled":
                return
            caches[side].add([request], [completion])

    futures: list[Future[None]] = [
        threads.submit(generate, side, missing) for side, cache in caches.items() if (missing := cache.missing(requests))
    ]
    try:
        running = set(futures)
        while running:
            done, running = wait(running, timeout=_POLL_SECONDS)
            if any(future.exception() for future in done) or should_stop():
                cancellation.set()
    finally:
        cancellation.set()  # if this thread was interrupted, the others end within a token
        wait(futures)
    for future in futures:
        future.result()
    return not any(cache.missing(requests) for cache in caches.values())


def _complete(
    backend: Backend, request: CompletionRequest, side: Side, strength: float, cancellation: Cancellation
) -> Completion:
    template = BARE if request.bare else backend.template
    stream = backend.stream(
        request.prompt, request.sampling, side, strength=strength, template=template, cancellation=cancellation
    )
    pieces: list[str] = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as stop:
            return Completion(side, "".join(pieces), len(pieces), stop.value)


def _score_completions(
    benchmark: GenerationBenchmark[Any],
    caches: Mapping[Side, AnswerCache],
    indices: Sequence[int],
    seed: int,
    result: ItemNumbers,
) -> None:
    """Add the numbers of items whose completions are all cached."""
    items = [benchmark.items[index] for index in indices]
    requests = [requests_of(benchmark, item, seed) for item in items]
    scored = {side: benchmark.scores(items, [cache.get(of_item) for of_item in requests]) for side, cache in caches.items()}
    for i, index in enumerate(indices):
        empty = [side for side, numbers in scored.items() if not all(map(math.isfinite, numbers[i]))]
        if empty:
            result.failures.append({"index": index, "reason": f"{' and '.join(empty)} wrote nothing that can be scored"})
        else:
            _add(result, index, {side: numbers[i] for side, numbers in scored.items()})


# Numbers to metrics


def summarize(benchmark: Benchmark[Any], items: Sequence[Any], base: Array, tuned: Array | None, seed: int = 0) -> dict[str, Any]:
    """The metrics of one benchmark, overall and by group, from the items' numbers (N, K); `tuned` None: no adapter. `correct`
    adds what the whole table decides."""
    groups: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        for group in dict.fromkeys(benchmark.groups(item)):
            groups.setdefault(group, []).append(i)
    return {
        **_metrics(benchmark, base, tuned, seed),
        "groups": {
            group: {"n": len(rows), **_metrics(benchmark, base[rows], None if tuned is None else tuned[rows], seed)}
            for group, rows in sorted(groups.items())
        },
        **benchmark.report(items, base),
    }


def _metrics(benchmark: Benchmark[Any], base: Array, tuned: Array | None, seed: int) -> dict[str, Any]:
    of_side, of_both = benchmark.side_metrics(), benchmark.paired_metrics()
    if tuned is None:
        alone = stats.bootstrap(base, of_side, seed=seed)
        found = {name: interval.to_json() for name, interval in alone.items()}
        return {"base": found, "tuned": {}, "difference": {}, "paired": {}, "undefined": [n for n in of_side if n not in found]}
    both = np.concatenate([base, tuned], axis=1)
    tested = {("difference", name): stats.difference(metric) for name, metric in of_side.items()}
    tested |= {("nearer", name): stats.improvement(metric) for name, metric in of_side.items() if metric.better == "nearer"}
    tested |= {("paired", name): metric for name, metric in of_both.items()}
    sides = {(side, name): stats.of_side(one, i) for i, side in enumerate(("base", "tuned")) for name, one in of_side.items()}
    intervals = stats.bootstrap(both, tested | sides, seed=seed)  # all from the same resamples
    p_values = stats.randomization_p(both, {key: metric for key, metric in tested.items() if key in intervals}, seed=seed)

    def change(kind: str, name: str, metric: Metric) -> dict[str, Any]:
        interval, nearer = intervals[kind, name], intervals.get(("nearer", name))
        improved = nearer or _improvement(metric, interval, metric.ideal if kind == "paired" else 0.0)
        return {
            **interval.to_json(),
            "p_value": p_values[kind, name],
            "improvement": {**improved.to_json(), "p_value": p_values["nearer" if nearer else kind, name]},
            "better": f"nearer {metric.ideal:g}" if metric.better == "nearer" else metric.better,
            "measures": metric.measures,
        }

    def one_side(side: str) -> dict[str, Any]:
        return {name: intervals[side, name].to_json() for name in of_side if (side, name) in intervals}

    return {
        "base": one_side("base"),
        "tuned": one_side("tuned"),
        "difference": {
            name: {
                **change("difference", name, metric),
                "base_includes_ideal": metric.better == "nearer"
                and intervals["base", name].low <= metric.ideal <= intervals["base", name].high,
            }
            for name, metric in of_side.items()
            if ("difference", name) in intervals
        },
        "paired": {
            name: {**change("paired", name, metric), "without_change": metric.ideal, "restates": metric.restates}
            for name, metric in of_both.items()
            if ("paired", name) in intervals
        },
        "undefined": [name for name in of_side if ("base", name) not in intervals],
    }


def _improvement(metric: Metric, change: Interval, without_change: float) -> Interval:
    """A change as an improvement: positive is good. If any change is a cost, the interval of the cost."""
    value, low, high = (end - without_change for end in (change.value, change.low, change.high))
    if metric.better == "unchanged":
        return Interval(-abs(value), -max(abs(low), abs(high)), 0.0 if low <= 0 <= high else -min(abs(low), abs(high)))
    return Interval(-value, -high, -low) if metric.better == "lower" else Interval(value, low, high)


def correct(results: Mapping[str, dict[str, Any]]) -> None:
    """Add `p_holm` and `verdict` to every change. All benchmarks' overall figures are one table, and each benchmark's groups are
    another. Redundant metrics (`restates`) are excluded from the correction and take the other metric's outcome."""
    _decide(entry for result in results.values() for entry in _tested(result))
    for result in results.values():
        _decide(entry for group in result["groups"].values() for entry in _tested(group))
        for part in (result, *result["groups"].values()):
            for entry in part["paired"].values():
                if entry["restates"]:
                    restated = part["difference"][entry["restates"]]
                    entry |= {name: restated[name] for name in ("p_value", "p_holm", "verdict")}


def _tested(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [*part["difference"].values(), *(entry for entry in part["paired"].values() if not entry["restates"])]


def _decide(entries: Iterable[dict[str, Any]]) -> None:
    table = list(entries)
    for entry, p_holm in zip(table, stats.holm([entry["improvement"]["p_value"] for entry in table]), strict=True):
        low, high = entry["improvement"]["ci95"]
        entry["p_holm"] = p_holm
        entry["verdict"] = stats.verdict(entry["measures"], Interval(entry["improvement"]["value"], low, high), p_holm)


# Cached answers: WORKSPACE/cache/scores/KEY.jsonl, one file per side of a model, named by all that an answer depends on but its
# request; one line per request, [KEY OF THE REQUEST, ...ANSWER]

_SCORES_VERSION = 2  # raise it if a backend's answer to the same request changes by more than noise
_PACKAGES = {"llamacpp": ("llama-cpp-python",), "transformers": ("torch", "transformers", "peft")}  # by the backend's name


class AnswerCache:
    """The likelihoods and completions of one side, by request: in memory, and appended to a file if there is one."""

    def __init__(self, side: Side, file: Path | None = None) -> None:
        self._side = side
        self._file = file
        self._answers: dict[str, Likelihood | Completion] = {}
        if file is not None and file.is_file():
            for line in file.read_bytes().split(b"\n"):
                with suppress(ValueError, TypeError, RecursionError):  # a truncated or damaged line
                    key, *values = json.loads(line)
                    self._answers[key] = self._decode(*values)

    def _decode(self, first: Any, tokens: int, *finish_reason: Any) -> Likelihood | Completion:
        return Completion(self._side, first, tokens, *finish_reason) if finish_reason else Likelihood(float(first), int(tokens))

    def missing(self, requests: Iterable[Request | CompletionRequest]) -> list[Any]:
        """The requests without an answer, each once."""
        return [request for request in dict.fromkeys(requests) if _key_of(request) not in self._answers]

    def get(self, requests: Sequence[Request | CompletionRequest]) -> list[Any]:
        """The answers to requests, all of which must be known."""
        return [self._answers[_key_of(request)] for request in requests]

    def add(self, requests: Sequence[Request | CompletionRequest], answers: Sequence[Likelihood | Completion]) -> None:
        """Store computed answers."""
        new = {_key_of(request): answer for request, answer in zip(requests, answers, strict=True)}
        self._answers |= new
        if self._file is None or not new:
            return
        lines = "".join(json.dumps([key, *_values(answer)]) + "\n" for key, answer in new.items())
        with locked(self._file), self._file.open("ab") as file:
            file.write(b"\n" + lines.encode())  # begins a line of its own after a truncated one; empty lines are skipped


def _values(answer: Likelihood | Completion) -> list[Any]:
    if isinstance(answer, Completion):
        return [answer.text, answer.tokens, answer.finish_reason]
    return [answer.logp, answer.tokens]


@lru_cache(maxsize=32768)  # each request is looked up several times, on both sides
def _key_of(request: Request | CompletionRequest) -> str:
    text = json.dumps([type(request).__name__, asdict(request)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _open_cache(workspace: Workspace | None, side: Side, scorer: Mapping[str, Any]) -> AnswerCache:
    """`scorer`: all that an answer depends on but its request."""
    if workspace is None:
        return AnswerCache(side)
    text = json.dumps({**scorer, "scores_version": _SCORES_VERSION}, sort_keys=True)
    return AnswerCache(side, workspace.cache / "scores" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.jsonl")


def _scorer(engine: Engine, parents: Mapping[str, str]) -> dict[str, Any]:
    """The settings that an answer of the base side depends on, besides its request."""
    backend = engine.backend
    packages = next((names for name, names in _PACKAGES.items() if backend.name.startswith(name)), ())
    return {
        "backend": backend.name,
        "device": backend.device.split(",")[0].split(" ")[0],  # "CPU", "cuda:0": the number of threads changes nothing
        "packages": {name: metadata.version(name) for name in packages},
        "model_sha256": parents["model_sha256"],
        "template": asdict(backend.template),
        "side": "base",
    }


def _parents(engine: Engine, workspace: Workspace | None) -> dict[str, str]:
    """SHA-256 of the model's files and of the adapter's weights and configuration."""
    spec, adapter = engine.spec, engine.adapter
    if engine.backend.name.startswith("llamacpp") or spec.hf_folder is None:
        files = [] if spec.gguf_path is None else gguf_parts(spec.gguf_path)
    else:
        files = sorted([*weight_files(spec.hf_folder), *spec.hf_folder.glob("*.json")])
    return {
        "model_sha256": _sha256_of_files(files, workspace),
        "adapter_sha256": "" if adapter is None else sha256_of(adapter.weights),
        "adapter_config_sha256": "" if adapter is None else sha256_of(adapter.folder / "adapter_config.json"),
    }


def _sha256_of_files(files: Sequence[Path], workspace: Workspace | None) -> str:
    """SHA-256 of the files' bytes, remembered by path, size and modification time."""
    memo = None if workspace is None else workspace.cache / "scores" / "files.json"
    known: dict[str, str] = {}
    if memo is not None and memo.is_file():
        with suppress(WorkspaceError, ValueError, TypeError):
            known = dict(read_json(memo))
    found = {}
    for file in files:
        status = file.stat()
        mark = f"{file.resolve()}|{status.st_size}|{status.st_mtime_ns}"
        found[mark] = known.get(mark) or sha256_of(file)
    if memo is not None and not found.keys() <= known.keys():
        write_json(memo, known | found)
    hashes = list(found.values())
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


# The pairs of the benchmark `preference`: those the adapter's training held out


def preference_benchmark(source: str, adapter: AdapterSpec | None, workspace: Workspace) -> Preference:
    """The held-out pairs of a JSONL file, of the `workspace`, or of the adapter's `run`.

    Raises ConfigError if nothing is named, DatasetError if nothing is held out.
    """
    if not source:
        raise ConfigError("preference needs the pairs: name with --dataset the file that was trained on, workspace or run")
    if source == RUN:
        if adapter is None:
            raise ConfigError("--dataset run is what the adapter was trained on, and there is none: name a file, or workspace")
        known, name = splits.unseen_by(adapter, workspace)
        if not known:
            raise DatasetError(
                f"No pairs to score: what {adapter.id} was trained on is not in this workspace, or nothing of it was held out; "
                "name a file with --dataset"
            )
        return Preference(known, _sha256_of_pairs(known), name)
    rows = splits.load([WORKSPACE], workspace) if source == WORKSPACE else splits.load_file(Path(source))
    pairs = derive(rows).pairs
    held_out = splits.unseen(pairs, adapter, workspace)
    if not held_out:
        raise DatasetError(
            f"No pairs to score: of the {len(pairs)} in {Path(source).name} the run held none out, and those it was trained on "
            "prove nothing; train again with held_out_share 0.1 or more, or score another benchmark"
        )
    if source == WORKSPACE:
        return Preference(held_out, _sha256_of_pairs(held_out), "held-out pairs of the workspace's judgments")
    return Preference(held_out, sha256_of(Path(source)), f"held-out pairs of {Path(source).name}")


def _sha256_of_pairs(pairs: Sequence[PreferencePair]) -> str:
    """SHA-256 of the scored pairs: unlike the journal's bytes, they don't change with every new judgment."""
    lines = "".join(json.dumps([pair.prompt, pair.chosen, pair.rejected]) + "\n" for pair in pairs)
    return hashlib.sha256(lines.encode()).hexdigest()
