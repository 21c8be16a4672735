"""One prompt -> two completions: both sides streamed together, or two samples of one side."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from biasdpo.backends.base import Backend, Cancellation, Ticket, Turnstile
from biasdpo.engines import Engine
from biasdpo.errors import ConfigError, PromptError
from biasdpo.records import SEED_RANGE, Completion, FinishReason, GenerationPair, Sampling, Side, check_strength

_WAIT_SECONDS = 0.25  # how often a waiting visitor's position is looked up


@dataclass(frozen=True)
class Waiting:
    """The engine serves others first; `ahead` of them."""

    ahead: int


class SpareTime:
    """Generating ahead of its time: visitors go first. `want` when a visitor has come to wait for it after all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = False
        self._place: tuple[Turnstile, Ticket] | None = None

    def begun(self, turnstile: Turnstile, ticket: Ticket) -> None:
        """It stands in this queue now."""
        with self._lock:
            self._place = (turnstile, ticket)
            if self._wanted:
                turnstile.promote(ticket)

    def want(self) -> None:
        """From now on it is nobody's spare time."""
        with self._lock:
            self._wanted = True
            if self._place is not None:
                turnstile, ticket = self._place
                turnstile.promote(ticket)


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
    spare: SpareTime | None = None,
) -> Iterator[Waiting | GenerationPair]:
    """Stream both sides' completions of one prompt; yields the pair so far, the last one finished.

    Both sides draw from the same seed. Visitors are served in turn: while others are ahead, `Waiting` is yielded. Setting
    `cancellation`, or closing the generator, stops both sides within one token. Without an adapter the pair has no right side.
    With `spare` nobody waits for the pair yet: visitors go first, and stop it where it has begun.
    Raises PromptError for an empty prompt or one that does not fit the context.
    """
    pair = _begin(engine, prompt, sampling, system, strength)
    pair = replace(pair, left=Completion("base"), right=Completion("tuned") if engine.backend.has_adapter else None)
    yield from _in_turn(engine.backend, pair, [sampling, sampling], cancellation or Cancellation(), spare)


def stream_samples(
    engine: Engine,
    prompt: str,
    sampling: Sampling,
    side: Side,
    *,
    system: str = "",
    strength: float = 1.0,
    cancellation: Cancellation | None = None,
    spare: SpareTime | None = None,
) -> Iterator[Waiting | GenerationPair]:
    """Stream two samples of one side, one after the other: the second draws from the seed that follows. Else as `stream_pair`.

    Raises ConfigError where the temperature is 0: both samples would be the same.
    """
    if sampling.temperature == 0.0:
        raise ConfigError("Two samples of one side need a temperature above 0: got 0, which writes the same twice; raise it")
    second = replace(sampling, seed=following_seed(sampling.seed))
    pair = _begin(engine, prompt, sampling, system, strength)
    pair = replace(pair, left=Completion(side), right=Completion(side))
    yield from _in_turn(engine.backend, pair, [sampling, second], cancellation or Cancellation(), spare)


def following_seed(seed: int) -> int:
    """The seed of a second sample."""
    low, high = SEED_RANGE
    return low + (seed + 1 - low) % (high + 1 - low)


def _begin(engine: Engine, prompt: str, sampling: Sampling, system: str, strength: float) -> GenerationPair:
    if not prompt.strip():
        raise PromptError("The prompt is empty: type one, or pick an example")
    check_strength(strength)
    backend = engine.backend
    return GenerationPair(
        prompt=prompt,
        model=engine.spec.id,
        adapter=engine.adapter.id if engine.adapter is not None else "",
        backend=backend.name,
        sampling=sampling,
        system=system if backend.template.has_system else "",
        strength=strength,
        canary_kl_nats=backend.proof.kl_nats,
        left=Completion("base"),
        right=None,
    )


def _in_turn(
    backend: Backend, pair: GenerationPair, samplings: list[Sampling], cancellation: Cancellation, spare: SpareTime | None
) -> Iterator[Waiting | GenerationPair]:
    with backend.turnstile.ticket(None if spare is None else cancellation) as ticket:
        if spare is not None:
            spare.begun(backend.turnstile, ticket)
        while ahead := backend.turnstile.wait(ticket, _WAIT_SECONDS):
            if cancellation.is_set():
                yield _cancelled(pair)
                return
            yield Waiting(ahead)
        yield from _stream_sides(backend, pair, samplings, cancellation)


def _cancelled(pair: GenerationPair) -> GenerationPair:
    right = None if pair.right is None else replace(pair.right, finish_reason="cancelled")
    return replace(pair, left=replace(pair.left, finish_reason="cancelled"), right=right)


def _stream_sides(
    backend: Backend, pair: GenerationPair, samplings: list[Sampling], cancellation: Cancellation
) -> Iterator[GenerationPair]:
    """Write both completions and gather them into one pair after the other: one thread a side, so that two sides are written
    together, and two samples of one side one after the other."""
    events: queue.SimpleQueue[tuple[int, float, str | _Ended]] = queue.SimpleQueue()
    completions = [c for c in (pair.left, pair.right) if c is not None]
    started_at = [time.perf_counter()] * len(completions)

    def write(places: list[int]) -> None:
        for place in places:
            started_at[place] = time.perf_counter()
            try:
                side = completions[place].side
                stream = backend.stream(
                    pair.prompt, samplings[place], side, system=pair.system, strength=pair.strength, cancellation=cancellation
                )
                while True:
                    try:
                        piece = next(stream)
                    except StopIteration as stop:
                        events.put((place, time.perf_counter(), _Ended(stop.value)))
                        break
                    events.put((place, time.perf_counter(), piece))
            except BaseException as exc:  # carried to the reader's thread, raised there
                events.put((place, time.perf_counter(), _Ended(None, exc)))

    by_side: dict[Side, list[int]] = {}
    for place, completion in enumerate(completions):
        by_side.setdefault(completion.side, []).append(place)
    threads = [threading.Thread(target=write, args=(places,), name=f"stream {s}", daemon=True) for s, places in by_side.items()]
    first_at: dict[int, float] = {}
    failure: BaseException | None = None
    running = len(completions)
    try:
        for thread in threads:
            thread.start()
        while running:
            # All that has come by now goes into one pair, so that a slow reader skips pairs instead of falling behind.
            batch = [events.get()]
            while not events.empty():
                batch.append(events.get())
            for place, at, event in batch:
                if isinstance(event, _Ended):
                    running -= 1
                    completions[place] = replace(completions[place], finish_reason=event.finish_reason)
                    if event.error is not None:
                        failure = failure or event.error
                        cancellation.set()
                else:
                    first = first_at.setdefault(place, at)
                    so_far = completions[place]
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
        cancellation.set()  # a reader that left (closed tab) ends both sides; after a normal end it does nothing
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if failure is not None:
        raise failure
