"""Each annotator's session on the Label tab: what is shown, what was judged, what comes next."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, replace

from biasdpo import dataset, label
from biasdpo.engines import EnginePool
from biasdpo.errors import ConfigError
from biasdpo.label import Answer, BlindPair, Details
from biasdpo.label_queue import PairQueue
from biasdpo.records import Judgment
from biasdpo.ui.store import Store

_ON_ITS_WAY_SECONDS = 10.0  # an answer that has not arrived by then is sent again
_KEPT_SECONDS = 3600.0  # a session that nobody uses; a laptop that sleeps, or a proxy that cuts a stream, is no farewell
_KEPT = 500  # sessions, the latest used ones


@dataclass(frozen=True)
class Judged:
    """A stored judgment with the pair it is of, and what was said beside the answer."""

    judgment: Judgment
    pair: BlindPair
    details: Details
    left: str | None = None  # after an edit
    right: str | None = None


class LabelSession:
    """One visitor's; its lock is held by whoever calls. `token` names the pair that is shown: an answer to another one (a key
    pressed twice) is none."""

    def __init__(self, pool: EnginePool, store: Store) -> None:
        self.store = store
        self.rng = label.new_random()
        self.queue = PairQueue(pool, self.rng, store.counts)
        self.first: deque[BlindPair] = deque()  # undone, pasted or sent here, or put back for one of those
        self.given: deque[BlindPair] = deque()  # pairs that need no model: second opinions
        self.shown: BlindPair | None = None
        self.token = ""
        self.has_shown = False
        self.judged: list[Judged] = []
        self.skipped = 0
        self.open_boxes: set[str] = set()  # accordions that are to be kept up to date
        self.used_at = time.monotonic()
        self.lock = threading.Lock()
        self._shown_at = 0.0
        self._sent: tuple[str, float] = ("", 0.0)
        self._unsaved: tuple[object, Judgment] | None = None

    def next(self, annotator: str) -> BlindPair | None:
        """Show the next pair, after a verdict: now and then a hidden repeat, else what is ready. None: not yet."""
        pair = label.repeat(self.store.judged_by(annotator), self.rng) if self.judged and not self.first else None
        if pair is not None:
            return self.show(replace(pair, prompt=self.queue.prompt_of(pair.prompt.text) or pair.prompt))
        return self.take()

    def take(self) -> BlindPair | None:
        """Show the next pair if one is ready."""
        waiting = self.first or self.given
        return self.show(waiting.popleft() if waiting else self.queue.take())

    @property
    def goes_on(self) -> bool:
        """Whether another pair will come."""
        return bool(self.first or self.given) or self.queue.goes_on

    def show(self, pair: BlindPair | None) -> BlindPair | None:
        """Put a pair before the annotator; the clock runs from here."""
        self.shown, self._unsaved = pair, None
        self.token = f"{self.rng.randrange(2**64):016x}" if pair is not None else ""
        self.has_shown = self.has_shown or pair is not None
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
            self.first.appendleft(self.shown)
        self.show(pair)

    def store_answer(self, answer: Answer, details: Details, left: str | None = None, right: str | None = None) -> Judged:
        """Store the answer to the shown pair and take it off. Where storing fails, the pair stays, and the same answer again
        stores one row."""
        pair = self.shown
        if pair is None:
            raise ConfigError("Nothing is shown to judge: press Begin first")
        asked = (self.token, answer, details, left, right)
        if self._unsaved is None or self._unsaved[0] != asked:
            seconds = time.monotonic() - self._shown_at
            self._unsaved = (asked, label.judgment(pair, answer, details, left=left, right=right, seconds=seconds))
        made = self._unsaved[1]
        dataset.append(self.store.workspace, made)
        judged = Judged(made, pair, details, left, right)
        self.judged.append(judged)
        self.show(None)
        return judged

    def undo(self, *, revealed: bool) -> Judged:
        """Take back the latest judgment and show its pair again. `revealed`: its sides were told after the verdict."""
        if not self.judged:
            raise ConfigError("No verdict of this page is left to undo: earlier ones can be withdrawn under “My judgments”")
        last = self.judged[-1]
        made = last.judgment
        dataset.undo(self.store.workspace, made.id, made.pair_id, made.annotator)
        self.judged.pop()
        self.show_before(replace(last.pair, sides_known=last.pair.sides_known or revealed))
        return last


class LabelSessions:
    """By Gradio's session, made at the first need."""

    def __init__(self, pool: EnginePool, store: Store) -> None:
        self._pool = pool
        self._store = store
        self._lock = threading.Lock()
        self._sessions: dict[str, LabelSession] = {}  # in order of last use

    def of(self, session_hash: str | None) -> LabelSession:
        """The visitor's session. Those that nobody has used for long make room."""
        now = time.monotonic()
        with self._lock:
            session = self._sessions.pop(session_hash or "", None) or LabelSession(self._pool, self._store)
            self._sessions[session_hash or ""] = session
            session.used_at = now
            for name, old in list(self._sessions.items()):
                if now - old.used_at < _KEPT_SECONDS and len(self._sessions) <= _KEPT:
                    break
                old.queue.pause()
                del self._sessions[name]
        return session

    def pause(self, session_hash: str | None) -> None:
        """The visitor has left, or seems to: generate nothing ahead until they ask again."""
        with self._lock:
            session = self._sessions.get(session_hash or "")
        if session is not None:
            session.queue.pause()

    def __len__(self) -> int:
        with self._lock:
            return len(self._sessions)
