"""Items to numbers by what is written: asks a backend for the completions that are not known yet, and a benchmark what they mean.

Both sides write at the same time, a thread each, over one copy of the weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

from biasdpo.backends.base import Backend, Cancellation
from biasdpo.benchmarks.base import GenerationBenchmark
from biasdpo.completions import Completions
from biasdpo.errors import PromptError
from biasdpo.records import SEED_RANGE, Completion, CompletionRequest, Side
from biasdpo.scoring import ItemScores
from biasdpo.template import BARE

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
