"""One prompt -> two completions, streamed together."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from biasdpo.backends.base import Backend, Cancellation
from biasdpo.engines import Engine
from biasdpo.errors import PromptError
from biasdpo.records import Completion, FinishReason, GenerationPair, Sampling, Side, check_strength

_WAIT_SECONDS = 0.25  # how often a waiting visitor's position is looked up


@dataclass(frozen=True)
class Waiting:
    """The engine serves others first; `ahead` of them."""

    ahead: int


@dataclass(frozen=True)
class _Ended:
    finish_reason: FinishReason | None
    error: BaseException | None = None


def stream_pair(
    engine: Engine,
    prompt: str,
    sampling: Sampling,
    *,
    system: str = "",
    strength: float = 1.0,
    cancellation: Cancellation | None = None,
) -> Iterator[Waiting | GenerationPair]:
    """Stream both sides' completions of one prompt; yields the pair so far, the last one finished.

    Both sides draw from the same seed. Visitors are served in turn: while others are ahead, `Waiting` is yielded. Setting
    `cancellation`, or closing the generator, stops both sides within one token. Without an adapter the pair has no right side.
    Raises PromptError for an empty prompt or one that does not fit the context.
    """
    if not prompt.strip():
        raise PromptError("The prompt is empty: type one, or pick an example")
    check_strength(strength)
    cancellation = cancellation or Cancellation()
    backend = engine.backend
    pair = GenerationPair(
        prompt=prompt,
        model=engine.spec.id,
        adapter=engine.adapter.id if engine.adapter is not None else "",
        backend=backend.name,
        sampling=sampling,
        system=system if backend.template.has_system else "",
        strength=strength,
        canary_kl_nats=backend.proof.kl_nats,
        left=Completion("base"),
        right=Completion("tuned") if backend.has_adapter else None,
    )
    with backend.turnstile.ticket() as ticket:
        while ahead := backend.turnstile.wait(ticket, _WAIT_SECONDS):
            if cancellation.is_set():
                yield _cancelled(pair)
                return
            yield Waiting(ahead)
        yield from _stream_sides(backend, pair, cancellation)


def _cancelled(pair: GenerationPair) -> GenerationPair:
    right = None if pair.right is None else replace(pair.right, finish_reason="cancelled")
    return replace(pair, left=replace(pair.left, finish_reason="cancelled"), right=right)


def _stream_sides(backend: Backend, pair: GenerationPair, cancellation: Cancellation) -> Iterator[GenerationPair]:
    """Run one thread a side; gather what they write into one pair after the other."""
    events: queue.SimpleQueue[tuple[Side, float, str | _Ended]] = queue.SimpleQueue()

    def write(side: Side) -> None:
        try:
            stream = backend.stream(
                pair.prompt, pair.sampling, side, system=pair.system, strength=pair.strength, cancellation=cancellation
            )
            while True:
                try:
                    piece = next(stream)
                except StopIteration as stop:
                    events.put((side, time.perf_counter(), _Ended(stop.value)))
                    return
                events.put((side, time.perf_counter(), piece))
        except BaseException as exc:  # carried to the reader's thread, raised there
            events.put((side, time.perf_counter(), _Ended(None, exc)))

    completions = {c.side: c for c in (pair.left, pair.right) if c is not None}
    started = time.perf_counter()
    threads = [threading.Thread(target=write, args=(side,), name=f"stream {side}", daemon=True) for side in completions]
    first_at: dict[Side, float] = {}
    failure: BaseException | None = None
    running = len(threads)
    try:
        for thread in threads:
            thread.start()
        while running:
            # All that has come by now goes into one pair, so that a slow reader skips pairs instead of falling behind.
            batch = [events.get()]
            while not events.empty():
                batch.append(events.get())
            for side, at, event in batch:
                if isinstance(event, _Ended):
                    running -= 1
                    completions[side] = replace(completions[side], finish_reason=event.finish_reason)
                    if event.error is not None:
                        failure = failure or event.error
                        cancellation.set()
                else:
                    first = first_at.setdefault(side, at)
                    so_far = completions[side]
                    completions[side] = replace(
                        so_far,
                        text=so_far.text + event,
                        tokens=so_far.tokens + 1,
                        seconds_to_first_token=first - started,
                        tokens_per_second=so_far.tokens / (at - first) if at > first else None,
                    )
            if failure is None:
                yield replace(pair, left=completions[pair.left.side], right=completions.get("tuned"))
    finally:
        cancellation.set()  # a reader that left (closed tab) ends both sides; after a normal end it does nothing
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if failure is not None:
        raise failure
