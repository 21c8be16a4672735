"""One prompt -> two completions: both sides streamed together, or two samples of one side."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from biasdpo.backends.base import Backend, Cancellation, Ticket, VisitorQueue
from biasdpo.engines import Engine
from biasdpo.errors import ConfigError, PromptError
from biasdpo.records import SEED_RANGE, Completion, FinishReason, GenerationPair, Sampling, Side, check_strength

_WAIT_SECONDS = 0.25  # how often a waiting visitor's position is updated


@dataclass(frozen=True)
class Waiting:
    """The engine serves `ahead` others first."""

    ahead: int


class Prefetch:
    """Marks a generation that nobody waits for yet: visitors go first. `promote` it once a visitor does wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._promoted = False
        self._place: tuple[VisitorQueue, Ticket] | None = None

    def entered(self, visitors: VisitorQueue, ticket: Ticket) -> None:
        """Note the queue that the generation has entered."""
        with self._lock:
            self._place = (visitors, ticket)
            if self._promoted:
                visitors.promote(ticket)

    def promote(self) -> None:
        """Treat the generation as a visitor's from now on."""
        with self._lock:
            self._promoted = True
            if self._place is not None:
                visitors, ticket = self._place
                visitors.promote(ticket)


def stream_pair(
    engine: Engine,
    prompt: str,
    sampling: Sampling,
    *,
    system: str = "",
    strength: float = 1.0,
    cancellation: Cancellation | None = None,
    prefetch: Prefetch | None = None,
) -> Iterator[Waiting | GenerationPair]:
    """Stream both sides' completions of one prompt, with the same seed; yields the pair so far, finally the finished one.

    Yields `Waiting` while other visitors are ahead. Setting `cancellation`, or closing the generator, stops both sides within one
    token. Without an adapter the pair has no right side. With `prefetch`, visitors go first and cancel a running generation.
    Raises PromptError if the prompt is empty or does not fit the context.
    """
    right = Completion("tuned") if engine.backend.has_adapter else None
    pair = _new_pair(engine, prompt, sampling, system, strength, Completion("base"), right)
    yield from _in_turn(engine.backend, pair, [sampling, sampling], cancellation or Cancellation(), prefetch)


def stream_samples(
    engine: Engine,
    prompt: str,
    sampling: Sampling,
    side: Side,
    *,
    system: str = "",
    strength: float = 1.0,
    cancellation: Cancellation | None = None,
    prefetch: Prefetch | None = None,
) -> Iterator[Waiting | GenerationPair]:
    """Stream two samples of one side, one after the other, with consecutive seeds; otherwise like `stream_pair`.

    Raises ConfigError if the temperature is 0: both samples would be the same.
    """
    if sampling.temperature == 0.0:
        raise ConfigError("Two samples of one side need a temperature above 0: got 0, which writes the same twice; raise it")
    second = replace(sampling, seed=following_seed(sampling.seed))
    pair = _new_pair(engine, prompt, sampling, system, strength, Completion(side), Completion(side))
    yield from _in_turn(engine.backend, pair, [sampling, second], cancellation or Cancellation(), prefetch)


def following_seed(seed: int) -> int:
    """The seed of a second sample."""
    low, high = SEED_RANGE
    return low + (seed + 1 - low) % (high + 1 - low)


def _new_pair(
    engine: Engine, prompt: str, sampling: Sampling, system: str, strength: float, left: Completion, right: Completion | None
) -> GenerationPair:
    if not prompt.strip():
        raise PromptError("The prompt is empty: type one, or pick an example")
    backend = engine.backend
    return GenerationPair(
        prompt=prompt,
        model=engine.spec.id,
        adapter=engine.adapter.id if engine.adapter is not None else "",
        backend=backend.name,
        sampling=sampling,
        system=system if backend.template.has_system else "",
        strength=check_strength(strength),
        canary_kl_nats=backend.proof.kl_nats,
        left=left,
        right=right,
    )


def _in_turn(
    backend: Backend, pair: GenerationPair, samplings: list[Sampling], cancellation: Cancellation, prefetch: Prefetch | None
) -> Iterator[Waiting | GenerationPair]:
    with backend.queue.ticket(None if prefetch is None else cancellation) as ticket:
        if prefetch is not None:
            prefetch.entered(backend.queue, ticket)
        while ahead := backend.queue.position(ticket, _WAIT_SECONDS):
            if cancellation.is_set():
                right = None if pair.right is None else replace(pair.right, finish_reason="cancelled")
                yield replace(pair, left=replace(pair.left, finish_reason="cancelled"), right=right)
                return
            yield Waiting(ahead)
        yield from _stream_sides(backend, pair, samplings, cancellation)


@dataclass(frozen=True)
class _Ended:
    finish_reason: FinishReason | None
    error: BaseException | None = None


def _stream_sides(
    backend: Backend, pair: GenerationPair, samplings: list[Sampling], cancellation: Cancellation
) -> Iterator[GenerationPair]:
    """Stream both completions and yield the growing pair. One thread per side: two sides run together, two samples of one side
    one after the other."""
    events: queue.SimpleQueue[tuple[int, float, str | _Ended]] = queue.SimpleQueue()
    completions = [c for c in (pair.left, pair.right) if c is not None]
    started_at = [time.perf_counter()] * len(completions)

    def write(place: int) -> FinishReason:
        started_at[place] = time.perf_counter()
        stream = backend.stream(
            pair.prompt,
            samplings[place],
            completions[place].side,
            system=pair.system,
            strength=pair.strength,
            cancellation=cancellation,
        )
        while True:
            try:
                piece = next(stream)
            except StopIteration as stop:
                reason: FinishReason = stop.value
                return reason
            events.put((place, time.perf_counter(), piece))

    def write_all(places: list[int]) -> None:
        for place in places:
            try:
                ended = _Ended(write(place))
            except BaseException as exc:  # raised again in the reader's thread
                ended = _Ended(None, exc)
            events.put((place, time.perf_counter(), ended))

    by_side: dict[Side, list[int]] = {}
    for place, completion in enumerate(completions):
        by_side.setdefault(completion.side, []).append(place)
    threads = [
        threading.Thread(target=write_all, args=(places,), name=f"stream {side}", daemon=True) for side, places in by_side.items()
    ]
    first_at: dict[int, float] = {}
    failure: BaseException | None = None
    running = len(completions)
    try:
        for thread in threads:
            thread.start()
        while running:
            # All events so far go into one pair: a slow reader skips pairs instead of falling behind.
            batch = [events.get()]
            while not events.empty():
                batch.append(events.get())
            for place, at, event in batch:
                so_far = completions[place]
                if isinstance(event, _Ended):
                    running -= 1
                    completions[place] = replace(so_far, finish_reason=event.finish_reason)
                    if event.error is not None:
                        failure = failure or event.error
                        cancellation.set()
                else:
                    first = first_at.setdefault(place, at)
                    completions[place] = replace(
                        so_far,
                        text=so_far.text + event,
                        tokens=so_far.tokens + 1,
                        seconds_to_first_token=first - started_at[place],
                        tokens_per_second=so_far.tokens / (at - first) if at > first else None,
                    )
            if failure is None:
                yield replace(pair, left=completions[0], right=completions[1] if len(completions) > 1 else None)
    finally:
        cancellation.set()  # a reader that left (closed tab) ends both sides; after a normal end this does nothing
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if failure is not None:
        raise failure
