"""One prompt -> two completions: both sides streamed together, or two samples of one side; a visitor's generation in a thread."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass, replace
from typing import Any

from biasdpo.access import is_owner
from biasdpo.backends.base import Backend, Cancellation, Ticket, VisitorQueue
from biasdpo.engines import Engine, EngineKey, EnginePool, Loading
from biasdpo.errors import BiasDPOError, ConfigError, PromptError
from biasdpo.records import (
    SEED_RANGE,
    Completion,
    FinishReason,
    GenerationPair,
    LikelihoodRequest,
    PairTurn,
    Sampling,
    Side,
    check_strength,
)
from biasdpo.workspace import ASSETS, read_json

EXAMPLE_PAIRS = ASSETS / "example_pairs.json"  # written by scripts/example_pairs.py
_WAIT_SECONDS = 0.25  # how often a waiting visitor's position is updated
_PACE_SECONDS = 0.06  # between two updates of a reader


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
    history: Sequence[PairTurn] = (),
    strength: float = 1.0,
    cancellation: Cancellation | None = None,
    prefetch: Prefetch | None = None,
) -> Iterator[Waiting | GenerationPair]:
    """Stream both sides' completions of one prompt, with the same seed; yields the pair so far, finally the finished one.

    Yields `Waiting` while other visitors are ahead. Setting `cancellation`, or closing the generator, stops both sides within one
    token. Without an adapter the pair has no right side. With `history`, the prompt is a follow-up, and each side continues its
    own conversation. With `prefetch`, visitors go first and cancel a running generation.
    Raises PromptError if the prompt is empty or does not fit the context.
    """
    right = Completion("tuned") if engine.backend.has_adapter else None
    pair = _new_pair(engine, prompt, sampling, system, strength, Completion("base"), right)
    pair = replace(pair, history=tuple(history))
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
        system=system,
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
            history=pair.history_of(completions[place].side),
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
    threads = [  # in this thread's context, which holds the visitor's request
        threading.Thread(target=copy_context().run, args=(write_all, places), name=f"stream {side}", daemon=True)
        for side, places in by_side.items()
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


# Token scores


@dataclass(frozen=True)
class TokenScore:
    """A token of a completion, and its log-probability (nats) under both sides, given the tokens before it."""

    text: str
    base: float
    tuned: float


def score_tokens(engine: Engine, pair: GenerationPair, side: Side) -> list[TokenScore]:
    """Score one side's completion with both sides, in the visitor's turn. The tuned side is scored at the pair's strength, the
    base side's tokens after the base side's conversation, without any sampling settings."""
    completion = pair.left if side == "base" else pair.right
    if completion is None or not completion.text:
        return []
    backend = engine.backend
    request = LikelihoodRequest(pair.prompt, completion.text, pair.system, history=pair.history_of(side))
    with backend.queue.ticket() as ticket:
        while backend.queue.position(ticket, _WAIT_SECONDS):
            pass
        base = backend.score_tokens(request, "base")
        tuned = backend.score_tokens(request, "tuned", strength=pair.strength)
    return [TokenScore(text, before, after) for (text, before), (_, after) in zip(base, tuned, strict=True)]


# A visitor's generation


class Generation:
    """One visitor's pair, generated in a thread of its own: a reader that never comes back (a closed browser tab) would keep a
    suspended `stream_pair`, and with it the engine."""

    def __init__(self) -> None:
        self.cancellation = Cancellation()
        self.stopped = False  # by the visitor; an engine that fails sets the cancellation, too
        self.superseded = threading.Event()  # the visitor has started another, or left: nothing more of this one is shown
        self._changed = threading.Condition()
        self._latest: Waiting | GenerationPair | None = None
        self._ended = False
        self._error: BaseException | None = None

    @property
    def pair(self) -> GenerationPair | None:
        """The latest pair, if anything was generated."""
        return self._latest if isinstance(self._latest, GenerationPair) else None

    def start(self, pool: EnginePool, key: EngineKey, prompt: str, sampling: Sampling, **settings: Any) -> None:
        """Load the engine if necessary and generate; `settings` as in `stream_pair`. Call it once."""
        seconds = math.inf if is_owner() else pool.visitor_seconds

        def generate() -> None:
            error: BaseException | None = None
            ends_at = math.inf
            try:
                with pool.lease(key, self.cancellation) as engine:
                    for event in stream_pair(engine, prompt, sampling, cancellation=self.cancellation, **settings):
                        if event == self._latest:
                            continue  # each update of the page takes time from whoever's turn it is
                        with self._changed:
                            self._latest = event
                            self._changed.notify_all()
                        if isinstance(event, GenerationPair):  # their turn has come
                            ends_at = min(ends_at, time.monotonic() + seconds)
                        if time.monotonic() >= ends_at:
                            self.cancellation.set()
            except BaseException as exc:  # raised again in the reader's thread
                error = exc
            with self._changed:
                self._ended, self._error = True, error
                self._changed.notify_all()

        threading.Thread(target=copy_context().run, args=(generate,), name="generation", daemon=True).start()

    def events(self, pool: EnginePool, key: EngineKey) -> Iterator[Waiting | GenerationPair | Loading]:
        """The latest state, whenever it has changed: a slow reader skips some. Raises the generation's error."""
        shown: Waiting | GenerationPair | None = None
        while not self.superseded.is_set():
            with self._changed:
                if self._latest is shown and not self._ended:
                    self._changed.wait(_WAIT_SECONDS)
                latest, ended = self._latest, self._ended
            if self.superseded.is_set():
                return
            if latest is not None and latest is not shown:
                shown = latest
                yield latest
            elif latest is None and not ended and (loading := pool.state(key)) is not None and not loading.done:
                yield loading
            if ended and self._latest is shown:
                # A visitor's own stop while the model was loading is no error.
                if self._error is not None and not (self.stopped and shown is None and isinstance(self._error, BiasDPOError)):
                    raise self._error
                return
            time.sleep(_PACE_SECONDS)


class Generations:
    """The running generation of each visitor, by session."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, Generation] = {}

    def begin(self, session: str) -> Generation:
        """A new generation, to be started; the visitor's earlier one is dropped."""
        self.drop(session)
        with self._lock:
            generation = self._running[session] = Generation()
        return generation

    def stop(self, session: str) -> None:
        """Stop generating; what there is stays on the page."""
        with self._lock:
            generation = self._running.get(session)
        if generation is not None:
            generation.stopped = True
            generation.cancellation.set()

    def drop(self, session: str) -> None:
        """Stop generating and show nothing more of it: the visitor has left, or started another."""
        with self._lock:
            generation = self._running.pop(session, None)
        if generation is not None:
            generation.superseded.set()
            generation.cancellation.set()

    def end(self, session: str, generation: Generation) -> None:
        """Forget a generation that has ended."""
        generation.cancellation.set()
        with self._lock:
            if self._running.get(session) is generation:
                del self._running[session]

    def __len__(self) -> int:
        with self._lock:
            return len(self._running)


# Finished pairs that are shipped


def load_example_pairs() -> list[GenerationPair]:
    """The pairs that the page shows before anything is generated, as the shipped adapter writes them."""
    stored = read_json(EXAMPLE_PAIRS)
    shared = {key: stored[key] for key in ("model", "adapter", "backend", "system", "strength", "canary_kl_nats")}

    def completion(side: Side, row: Mapping[str, Any]) -> Completion:
        return Completion(side, row["text"], row["tokens"], row["finish_reason"])

    return [
        GenerationPair(
            prompt=row["prompt"],
            sampling=Sampling(**stored["sampling"]),
            left=completion("base", row["base"]),
            right=completion("tuned", row["tuned"]),
            **shared,
        )
        for row in stored["pairs"]
    ]
