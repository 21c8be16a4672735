"""Each annotator's session on the Label tab: what is shown, what was judged, what comes next."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass

from biasdpo import dataset, label
from biasdpo.engines import EnginePool
from biasdpo.errors import ConfigError
from biasdpo.label import Answer, BlindPair, Details
from biasdpo.label_queue import PairQueue
from biasdpo.records import Judgment
from biasdpo.ui.store import Store

_ON_ITS_WAY_SECONDS = 10.0  # an answer that has not arrived by then is sent again


@dataclass(frozen=True)
class Judged:
    """A stored judgment with the pair it is of."""

    judgment: Judgment
    pair: BlindPair


class LabelSession:
    """One visitor's. `token` names the pair that is shown: an answer to another one (a key pressed twice) is none."""

    def __init__(self, pool: EnginePool, store: Store) -> None:
        self.store = store
        self.rng = label.new_random()
        self.queue = PairQueue(pool, self.rng, store.counts)
        self.given: deque[BlindPair] = deque()  # pairs that need no model: second opinions
        self.shown: BlindPair | None = None
        self.token = ""
        self.judged: list[Judged] = []
        self.skipped = 0
        self.lock = threading.Lock()
        self._shown_at = 0.0
        self._sent: tuple[str, float] = ("", 0.0)
        self._unsaved: tuple[object, Judgment] | None = None

    def next(self, annotator: str) -> BlindPair | None:
        """Show the next pair: now and then a hidden repeat, else what the queue has ready. None: not yet."""
        mine = [row for row in self.store.judged_by(annotator) if not row["repeat_of"]]
        pair = label.repeat(mine, self.rng) if self.judged else None
        return self.show(pair or (self.given.popleft() if self.given else self.queue.take()))

    def show(self, pair: BlindPair | None) -> BlindPair | None:
        """Put a pair before the annotator; the clock runs from here."""
        self.shown, self._unsaved = pair, None
        self.token = f"{self.rng.randrange(2**64):016x}" if pair is not None else ""
        self._shown_at = time.monotonic()
        return pair

    def sent(self) -> None:
        """The page was sent what is shown now."""
        self._sent = (self.token, time.monotonic())

    def was_just_sent(self) -> bool:
        """Whether the page may not have had time to say that it has this pair."""
        token, at = self._sent
        return token == self.token and time.monotonic() - at < _ON_ITS_WAY_SECONDS

    def show_before(self, pair: BlindPair) -> None:
        """Show this pair, and after it the one that was on."""
        if self.shown is not None:
            self.queue.put_first(self.shown)
        self.show(pair)

    def store_answer(self, answer: Answer, details: Details, left: str | None, right: str | None) -> Judged:
        """Store the answer to the shown pair. Where that fails, the pair stays, and the same answer again stores one row."""
        if self.shown is None:
            raise ConfigError("Nothing is shown to judge: begin first")
        asked = (self.token, answer, details, left, right)
        if self._unsaved is None or self._unsaved[0] != asked:
            seconds = time.monotonic() - self._shown_at
            made = label.judgment(self.shown, answer, details, left=left, right=right, seconds=seconds)
            self._unsaved = (asked, made)
        dataset.append(self.store.workspace, self._unsaved[1])
        judged = Judged(self._unsaved[1], self.shown)
        self.judged.append(judged)
        return judged

    def undo(self) -> BlindPair:
        """Take back the latest judgment and show its pair again."""
        if not self.judged:
            raise ConfigError("Nothing to undo: no verdict was given on this page yet")
        last = self.judged[-1]
        made = last.judgment
        dataset.undo(self.store.workspace, made.id, made.pair_id, made.annotator)
        self.judged.pop()
        self.show_before(last.pair)
        return last.pair


class LabelSessions:
    """By Gradio's session; made at the first need, closed with the page."""

    def __init__(self, pool: EnginePool, store: Store) -> None:
        self._pool = pool
        self._store = store
        self._lock = threading.Lock()
        self._sessions: dict[str, LabelSession] = {}

    def of(self, session_hash: str | None) -> LabelSession:
        with self._lock:
            return self._sessions.setdefault(session_hash or "", LabelSession(self._pool, self._store))

    def close(self, session_hash: str | None) -> None:
        with self._lock:
            session = self._sessions.pop(session_hash or "", None)
        if session is not None:
            session.queue.close()
