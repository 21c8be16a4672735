"""benchmark x model -> result: both sides on the same items, intervals, paired differences, and what produced them."""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from biasdpo import __version__, models
from biasdpo.backends.base import Backend, Cancellation
from biasdpo.benchmarks.base import Benchmark, GenerationBenchmark, Measured
from biasdpo.benchmarks.results import Scored, correct, summarise
from biasdpo.chat import BARE
from biasdpo.engines import Engine
from biasdpo.errors import DatasetError, PromptError
from biasdpo.records import SEED_RANGE, Completion, CompletionRequest, Likelihood, Request, Side, check_strength
from biasdpo.workspace import Workspace, locked, sha256_of, write_json

# --- kept: What a model answered once, kept by content: WORKSPACE/cache/scores/KEY.jsonl, one file for eac


R = TypeVar("R", bound=Request | CompletionRequest)
A = TypeVar("A")


class Kept(ABC, Generic[R, A]):
    """The answers of one side to requests, in memory and on disk. `file` None: in memory alone."""

    def __init__(self, file: Path | None) -> None:
        self._file: Path | None = file
        self._known: dict[str, A] = {}
        if file is not None and file.is_file():
            for line in file.read_bytes().split(b"\n"):
                with suppress(ValueError, TypeError):  # a torn line
                    key, *values = json.loads(line)
                    self._known[key] = self._read(*values)

    @abstractmethod
    def _read(self, *values: Any) -> A:
        """The answer that `_written` wrote; a ValueError or TypeError where it can't be one."""

    @abstractmethod
    def _written(self, answer: A) -> list[Any]:
        """The answer as JSON's values."""

    def missing(self, requests: Iterable[R]) -> list[R]:
        """Those of the requests that are not known, each once."""
        return [request for request in dict.fromkeys(requests) if _key_of(request) not in self._known]

    def of(self, requests: Sequence[R]) -> list[A]:
        """The answers to requests of which none is missing."""
        return [self._known[_key_of(request)] for request in requests]

    def add(self, requests: Sequence[R], answers: Sequence[A]) -> None:
        """Keep what was computed."""
        new = {_key_of(request): answer for request, answer in zip(requests, answers, strict=True)}
        self._known |= new
        if self._file is None or not new:
            return
        lines = "".join(json.dumps([key, *self._written(answer)]) + "\n" for key, answer in new.items())
        with locked(self._file), self._file.open("ab") as file:
            # After a torn line, the next begins on a line of its own; an empty one is no loss.
            file.write(b"\n" + lines.encode())


def file_for(workspace: Workspace | None, of: dict[str, Any]) -> Path | None:
    """Where answers are kept that depend on `of` and their request alone; `workspace` None: nowhere."""
    if workspace is None:
        return None
    text = json.dumps(of, sort_keys=True)
    return workspace.cache / "scores" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.jsonl"


@lru_cache(maxsize=32768)  # a batch's requests are asked for several times, on both sides
def _key_of(request: Request | CompletionRequest) -> str:
    text = json.dumps([type(request).__name__, asdict(request)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# --- completions: Completions that were written once, kept by content (see `kept`): text, tokens, why it ended


# Of how a request is written: raise it when a backend's `stream` gives another text for the same seed, or a request another key.
_VERSION = 2


class Completions(Kept[CompletionRequest, Completion]):
    """The completions of one side."""

    def __init__(self, side: Side, file: Path | None) -> None:
        self._side = side
        super().__init__(file)

    def _read(self, *values: Any) -> Completion:
        text, tokens, finish_reason = values
        return Completion(self._side, text, tokens, finish_reason)

    def _written(self, answer: Completion) -> list[Any]:
        return [answer.text, answer.tokens, answer.finish_reason]


def open_completions(workspace: Workspace | None, side: Side, writer: dict[str, Any]) -> Completions:
    """The completions of what `writer` describes, all that they depend on; `workspace` None: kept nowhere."""
    return Completions(side, file_for(workspace, {**writer, "completions_version": _VERSION}))


# --- scores: Likelihoods that were computed once, kept by content (see `kept`): logp, tokens


# Of what a request's tokens are and how they are computed: raise it when a backend's `_request_tokens` changes, or its numbers do
# by more than noise (2: llama.cpp computes no token in a batch of its own, see `backends.llamacpp_context`).
_VERSION = 2


class Scores(Kept[Request, Likelihood]):
    """The likelihoods of one side."""

    def _read(self, *values: Any) -> Likelihood:
        logp, tokens = values
        return Likelihood(float(logp), int(tokens))

    def _written(self, answer: Likelihood) -> list[Any]:
        return [answer.logp, answer.tokens]


def open_scores(workspace: Workspace | None, scorer: dict[str, Any]) -> Scores:
    """The likelihoods of what `scorer` describes, all that they depend on; `workspace` None: kept nowhere."""
    return Scores(file_for(workspace, {**scorer, "scores_version": _VERSION}))


def sha256_of_model(files: Sequence[Path], workspace: Workspace | None) -> str:
    """Of all the files' bytes. A file that has the size and the time of change that it had is not read again."""
    memo = None if workspace is None else workspace.cache / "scores" / "files.json"
    known: dict[str, str] = {}
    if memo is not None and memo.is_file():
        with suppress(ValueError, OSError):
            known = dict(json.loads(memo.read_text(encoding="utf-8")))
    found = {}
    for file in files:
        status = file.stat()
        mark = f"{file.resolve()}|{status.st_size}|{status.st_mtime_ns}"
        found[mark] = known.get(mark) or sha256_of(file)
    if memo is not None and not found.keys() <= known.keys():
        write_json(memo, known | found)
    parts = list(found.values())
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


# --- scoring: Items to numbers: asks a backend for the likelihoods that are not known yet, and a benchmark wh


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


# --- generating: Items to numbers by what is written: asks a backend for the completions that are not known yet,


_ITEMS_AT_ONCE = 64  # that are scored together
_ASK_SECONDS = 0.1  # how often it is asked whether to stop while something is being written


def complete_items(
    backend: Backend,
    sides: Mapping[Side, Completions],
    benchmark: GenerationBenchmark,
    chosen: Sequence[int],
    *,
    seed: int = 0,
    strength: float = 1.0,
    on_done: Callable[[int], None] = lambda _done: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> ItemScores:
    """Let each side write what the chosen items of a benchmark ask for, and score it. What can't be is counted, never scored.

    sides         what each side has written already; what is written is added, whole completions only
    seed          of the evaluation; see `requests_of`
    on_done       told how many items were tried
    should_stop   asked between items, and while one is being written
    """
    result = ItemScores(numbers={side: [] for side in sides})
    whole: list[int] = []  # written and not scored yet
    with ThreadPoolExecutor(max_workers=len(sides), thread_name_prefix="write") as threads:
        for index in chosen:
            if should_stop():
                break
            try:
                requests = requests_of(benchmark, benchmark.items[index], seed)
                if not _write_missing(backend, sides, requests, strength, threads, should_stop):
                    break
            except PromptError as exc:
                result.failures.append({"index": index, "reason": str(exc)})
            else:
                whole.append(index)
            result.done += 1
            if len(whole) == _ITEMS_AT_ONCE:
                _score(benchmark, sides, whole, seed, result)
                whole = []
            on_done(result.done)
    _score(benchmark, sides, whole, seed, result)
    result.failures.sort(key=lambda failure: int(failure["index"]))
    return result


def requests_of(benchmark: GenerationBenchmark, item: Any, seed: int) -> list[CompletionRequest]:
    """What an item asks for. The seed of each completion comes from the evaluation's seed, the prompt and which of its samples it
    is: it does not depend on the other items, both sides draw from the same, and a larger number of samples holds a smaller
    one's. A greedy completion has seed 0."""
    return [
        replace(request, sampling=replace(request.sampling, seed=_seed_of(request, seed) if request.sampling.temperature else 0))
        for request in benchmark.requests(item)
    ]


def _seed_of(request: CompletionRequest, seed: int) -> int:
    digest = hashlib.sha256(f"{seed} {request.sample} {request.prompt}".encode()).digest()
    low, high = SEED_RANGE
    return low + int.from_bytes(digest[:8], "big") % (high + 1 - low)


def _score(
    benchmark: GenerationBenchmark, sides: Mapping[Side, Completions], whole: Sequence[int], seed: int, result: ItemScores
) -> None:
    """Add the numbers of items whose completions are all there."""
    items = [benchmark.items[index] for index in whole]
    requests = [requests_of(benchmark, item, seed) for item in items]
    scored = {side: benchmark.scores(items, [known.of(asked) for asked in requests]) for side, known in sides.items()}
    for i, index in enumerate(whole):
        silent = [side for side, numbers in scored.items() if not all(map(math.isfinite, numbers[i]))]
        if silent:
            reason = f"{' and '.join(silent)} wrote nothing that can be scored"
            result.failures.append({"index": index, "reason": reason})
            continue
        result.kept.append(index)
        for side, numbers in scored.items():
            result.numbers[side].append(numbers[i])


def _write_missing(
    backend: Backend,
    sides: Mapping[Side, Completions],
    requests: Sequence[CompletionRequest],
    strength: float,
    threads: ThreadPoolExecutor,
    should_stop: Callable[[], bool],
) -> bool:
    """Write what is missing of an item, on all sides at once; whether all of it is there. The first side's error is raised."""
    cancellation = Cancellation()

    def write(side: Side, completions: Completions, missing: Sequence[CompletionRequest]) -> None:
        for request in missing:
            completion = _complete(backend, request, side, strength, cancellation)
            if completion.finish_reason == "cancelled":
                return
            completions.add([request], [completion])

    wanted = {side: completions.missing(requests) for side, completions in sides.items()}
    writing: list[Future[None]] = [
        threads.submit(write, side, sides[side], missing) for side, missing in wanted.items() if missing
    ]
    try:
        running = set(writing)
        while running:
            done, running = wait(running, timeout=_ASK_SECONDS)
            if any(future.exception() for future in done) or should_stop():
                cancellation.set()
    finally:
        cancellation.set()  # where this thread was interrupted, the others end within a token
        wait(writing)
    for future in writing:
        future.result()
    return not any(completions.missing(requests) for completions in sides.values())


def _complete(
    backend: Backend, request: CompletionRequest, side: Side, strength: float, cancellation: Cancellation
) -> Completion:
    """One completion, whole or cancelled."""
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


# --- evaluate: benchmark x model -> result: both sides on the same items, intervals, paired differences, and w


_PACKAGES = {"llamacpp": ("llama-cpp-python",), "transformers": ("torch", "transformers", "peft")}  # by the backend's name


def run(
    engine: Engine,
    benchmarks: Sequence[Benchmark | GenerationBenchmark],
    *,
    strength: float = 1.0,
    limit: int | None = None,
    seed: int = 0,
    workspace: Workspace | None = None,
    on_item: Callable[[str, int, int], None] = lambda _name, _done, _total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Score the sides of an engine on each benchmark; return DESIGN's evaluation object. Without an adapter base stands alone.

    limit         items of each benchmark, drawn by `seed`; a larger limit's items hold a smaller one's
    seed          of the draw, of what is generated, and of the bootstrap
    workspace     where likelihoods and completions are kept; None: nowhere
    on_item       called with (benchmark, items done, items in all)
    should_stop   asked between items, and while a completion is written: what was scored until then is the result, marked as not
                  comparable
    """
    check_strength(strength)
    parents = _parents(engine, workspace)
    sides = _who_scores(engine, strength, parents)
    scores = {side: open_scores(workspace, who) for side, who in sides.items()}
    completions = {side: open_completions(workspace, side, who) for side, who in sides.items()}
    results: dict[str, dict[str, Any]] = {}
    interrupted = False
    for benchmark in benchmarks:
        interrupted = interrupted or should_stop()
        if interrupted:
            break
        chosen = draw(len(benchmark.items), limit, seed)
        if not chosen:
            raise DatasetError(f"{benchmark.name} has no items to score (limit {limit}): raise --limit or give more data")
        report = partial(_report, on_item, benchmark.name, len(chosen))
        options: dict[str, Any] = {"strength": strength, "on_done": report, "should_stop": should_stop}
        if isinstance(benchmark, GenerationBenchmark):
            scored = complete_items(engine.backend, completions, benchmark, chosen, seed=seed, **options)
            written = _written(benchmark, scored.kept, completions, seed)
        else:
            scored = score_items(engine.backend, scores, benchmark, chosen, **options)
            written = {}
        interrupted = scored.done < len(chosen)
        if scored.done:  # else it was stopped at once; what was scored before is kept
            results[benchmark.name] = _result(benchmark, len(chosen), scored, written, seed)
    correct(results)
    return {
        "benchmarks": results,
        "provenance": {
            **parents,
            "model": engine.spec.id,
            "adapter": "" if engine.adapter is None else engine.adapter.id,
            "backend": engine.backend.name,
            "strength": strength,
            "seed": seed,
            "limit": limit,
            "interrupted": interrupted,
            "code_version": __version__,
        },
    }


def _report(on_item: Callable[[str, int, int], None], name: str, total: int, done: int) -> None:
    on_item(name, done, total)


_Texts = dict[Side, list[list[str]]]
"""What each side wrote, by item."""


def _written(benchmark: GenerationBenchmark, kept: Sequence[int], completions: Mapping[Side, Completions], seed: int) -> _Texts:
    requests = [requests_of(benchmark, benchmark.items[index], seed) for index in kept]
    return {side: [[found.text for found in known.of(asked)] for asked in requests] for side, known in completions.items()}


def _result(
    benchmark: Benchmark | GenerationBenchmark, chosen: int, scored: ItemScores, written: _Texts, seed: int
) -> dict[str, Any]:
    """One benchmark's part of the result, of which `chosen` items were to be scored."""
    kept, numbers, failures, done = scored.kept, scored.numbers, scored.failures, scored.done
    if not kept:
        first = failures[0]["reason"]  # something was tried
        raise DatasetError(f"{benchmark.name}: none of {done} items could be scored: the first failed with: {first}")
    arrays = {side: np.array(values, dtype=np.float64) for side, values in numbers.items()}
    items = [benchmark.items[index] for index in kept]
    return {
        "n": len(kept),
        "n_failed": len(failures),
        "n_total": len(benchmark.items),
        "partial": done < len(benchmark.items),
        "not_comparable": _why_partial(done, len(benchmark.items), chosen),
        "not_as_published": benchmark.not_as_published if isinstance(benchmark, GenerationBenchmark) else "",
        "settings": dict(benchmark.settings) if isinstance(benchmark, GenerationBenchmark) else {},
        "data_sha256": benchmark.data_sha256,
        **summarise(Scored(benchmark, items, arrays["base"], arrays.get("tuned")), seed),
        "failures": failures,
        "columns": list(benchmark.columns),
        "items": [
            {
                "index": index,
                **benchmark.describe(item),
                **{side: list(values[i]) for side, values in numbers.items()},
                **_outcomes(benchmark, item, {side: values[i] for side, values in numbers.items()}),
                **({"completions": {side: texts[i] for side, texts in written.items()}} if written else {}),
            }
            for i, (index, item) in enumerate(zip(kept, items, strict=True))
        ],
    }


def _outcomes(benchmark: Measured, item: Any, numbers: Mapping[Side, Sequence[float]]) -> dict[str, dict[Side, str]]:
    """What each side decided of an item, where anything is decided."""
    outcomes = {side: benchmark.outcome(item, of_side) for side, of_side in numbers.items()}
    return {"outcome": outcomes} if any(outcomes.values()) else {}


def draw(n: int, limit: int | None, seed: int) -> list[int]:
    """Indices of at most `limit` of n items in ascending order, drawn without regard to their order in the file."""
    if limit is None or limit >= n:
        return list(range(n))
    shuffled = list(range(n))
    random.Random(seed).shuffle(shuffled)
    return sorted(shuffled[:limit])


def _why_partial(done: int, total: int, chosen: int) -> str:
    """Why a result must not be set beside others; "" where it may."""
    if done < chosen:
        return f"interrupted after {done:,} of {chosen:,} items"
    return f"limited to {done:,} of {total:,} items" if done < total else ""


def _who_scores(engine: Engine, strength: float, parents: Mapping[str, str]) -> dict[Side, dict[str, Any]]:
    """Of each side, all that a likelihood or a completion depends on but its request."""
    backend = engine.backend
    packages = next((names for name, names in _PACKAGES.items() if backend.name.startswith(name)), ())
    scorer = {
        "backend": backend.name,
        "device": backend.device.split(",")[0].split(" ")[0],  # "CPU", "cuda:0": the number of threads changes nothing
        "packages": {name: metadata.version(name) for name in packages},
        "model_sha256": parents["model_sha256"],
        "template": asdict(backend.template),
    }
    sides: dict[Side, dict[str, Any]] = {"base": {**scorer, "side": "base"}}
    if engine.adapter is not None:
        sides["tuned"] = {**scorer, "side": "tuned", "adapter_sha256": parents["adapter_sha256"], "strength": strength}
    return sides


def _parents(engine: Engine, workspace: Workspace | None) -> dict[str, str]:
    """SHA-256 of the model's files and of the adapter's weights and configuration."""
    spec, adapter = engine.spec, engine.adapter
    files: list[Path] = []
    if engine.backend.name.startswith("llamacpp") or spec.hf_folder is None:
        files = [] if spec.gguf_path is None else [spec.gguf_path]
    else:
        files = sorted([*spec.hf_folder.glob("*.safetensors"), *spec.hf_folder.glob("*.json")])
    parents = {"model_sha256": sha256_of_model(files, workspace), "adapter_sha256": "", "adapter_config_sha256": ""}
    if adapter is not None:
        parents["adapter_sha256"] = models.adapter_sha256(adapter)
        parents["adapter_config_sha256"] = sha256_of_model([adapter.folder / "adapter_config.json"], None)
    return parents
