"""Each visitor's generation: a thread of its own that the engine answers to, whatever becomes of the browser tab."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from biasdpo.backends.base import Cancellation
from biasdpo.compare import Waiting, stream_pair
from biasdpo.engines import EngineKey, EnginePool, Loading
from biasdpo.errors import BiasDPOError
from biasdpo.records import GenerationPair, Sampling

_POLL_SECONDS = 0.25  # how often a page that waits hears of it
_PACE_SECONDS = 0.06  # between two updates of a page: as fast as eyes follow, and no load on the engine's cores

Event = Waiting | GenerationPair


class Turn:
    """One generation of one visitor. Gradio leaves an abandoned generator suspended, and one suspended inside
    `stream_pair` would keep its place in the queue: so the stream is read here, and the page only looks on.
    """

    def __init__(self) -> None:
        self.cancellation = Cancellation()
        self.stopped = False  # by the visitor; an engine that fails sets the cancellation too
        self.superseded = False  # the page belongs to a later turn (or was cleared): show nothing more of this one
        self._changed = threading.Condition()
        self._latest: Event | None = None
        self._news = False
        self._ended = False
        self._error: BaseException | None = None

    def start(self, pool: EnginePool, key: EngineKey, prompt: str, sampling: Sampling, system: str, strength: float) -> None:
        """Wait for the engine, then write; to be called once."""

        def write() -> None:
            error: BaseException | None = None
            try:
                with pool.lease(key, self.cancellation) as engine:
                    for event in stream_pair(
                        engine, prompt, sampling, system=system, strength=strength, cancellation=self.cancellation
                    ):
                        self._report(event)
            except BaseException as exc:  # carried to the page's thread
                error = exc
            with self._changed:
                self._ended, self._error = True, error
                self._changed.notify_all()

        threading.Thread(target=write, name="generation", daemon=True).start()

    def _report(self, event: Event) -> None:
        with self._changed:
            self._latest, self._news = event, True
            self._changed.notify_all()

    def watch(self, pool: EnginePool, key: EngineKey) -> Iterator[Event | Loading]:
        """What the page should show, newest first come: skips what is out of date, ends with the last event or its error."""
        pace = threading.Event()
        while True:
            with self._changed:
                if not self._news and not self._ended:
                    self._changed.wait(_POLL_SECONDS)
                event = self._latest if self._news else None
                self._news = False
                ended, error = self._ended, self._error
            if self.superseded:
                return
            if event is not None:
                yield event
            elif self._latest is None and not ended and (loading := pool.state(key)) is not None and not loading.done:
                yield loading
            if ended:
                if error is not None and not self._stopped_before_start(error):
                    raise error
                return
            pace.wait(_PACE_SECONDS)

    def _stopped_before_start(self, error: BaseException) -> bool:
        """A visitor's own Stop while the model was loading is no error."""
        return self.stopped and self._latest is None and isinstance(error, BiasDPOError)


class Visitors:
    """The running turn of each visitor, by Gradio's session."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turns: dict[str, Turn] = {}

    def begin(self, session: str) -> Turn:
        """A new turn; the visitor's earlier one, if it still runs, is stopped."""
        self.dismiss(session)
        turn = Turn()
        with self._lock:
            self._turns[session] = turn
        return turn

    def stop(self, session: str) -> None:
        """Stop writing; what was written stays on the page."""
        with self._lock:
            turn = self._turns.get(session)
        if turn is not None:
            turn.stopped = True
            turn.cancellation.set()

    def dismiss(self, session: str) -> None:
        """Stop writing and show no more of it (cleared, closed, or begun again)."""
        with self._lock:
            turn = self._turns.pop(session, None)
        if turn is not None:
            turn.superseded = True
            turn.cancellation.set()

    def end(self, session: str, turn: Turn) -> None:
        """The page looks at this turn no more."""
        turn.cancellation.set()
        with self._lock:
            if self._turns.get(session) is turn:
                del self._turns[session]

    def __len__(self) -> int:
        with self._lock:
            return len(self._turns)
