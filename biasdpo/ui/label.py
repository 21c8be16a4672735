"""The Label tab: what it is made of and what sets off what. What the handlers do is in `label_actions`."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from biasdpo import labeling, prompts
from biasdpo.data import journal
from biasdpo.data.pairs import shown_pair_id
from biasdpo.engines import EngineKey, EnginePool
from biasdpo.errors import BackendError, BiasDPOError, ConfigError, RefusedError
from biasdpo.labeling import Answer, BlindPair, Details, PairQueue, Recipe
from biasdpo.prompts import Prompt
from biasdpo.records import Judgment, Sampling, check_strength
from biasdpo.ui import components
from biasdpo.ui.components import Row, Store
from biasdpo.workspace import is_public_space

# Label sessions


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
        self.rng = labeling.new_random()
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
        pair = labeling.repeat(self.store.judged_by(annotator), self.rng) if self.judged and not self.first else None
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
        return bool(self.first or self.given) or self.queue.has_more

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
            self._unsaved = (asked, labeling.judgment(pair, answer, details, left=left, right=right, seconds=seconds))
        made = self._unsaved[1]
        journal.append(self.store.workspace, made)
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
        journal.undo(self.store.workspace, made.id, made.pair_id, made.annotator)
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


# Label view


Updates = dict[Any, Any]
_LISTED = 200  # of one's own judgments


class LabelView:
    """The tab's components, and what is written into them."""

    sessions: LabelSessions
    store: Store
    pick_key: Callable[[str, str], EngineKey | None]
    identity: gr.BrowserState
    gate: gr.Column
    work: gr.Column
    pseudonym: gr.Textbox
    gate_notice: gr.HTML
    meter: gr.HTML
    prompt: gr.HTML
    empty: gr.HTML
    pair_area: gr.Column
    details_area: gr.Column
    token: gr.Textbox
    left: gr.Textbox
    right: gr.Textbox
    left_diff: gr.HTML
    right_diff: gr.HTML
    length_note: gr.HTML
    side_diff: gr.HTML
    editing: gr.Checkbox
    category: gr.Dropdown
    target_group: gr.Textbox
    note: gr.Textbox
    notice: gr.HTML
    last: gr.HTML
    timer: gr.Timer
    coverage: gr.HTML
    consistency: gr.HTML
    mine: gr.Dropdown
    mine_notice: gr.HTML
    source_notice: gr.HTML
    begin: gr.Button

    def _annotator(self, who: Any) -> str:
        annotator = components.annotator_of(who)
        if not annotator:
            raise ConfigError("Nobody has agreed yet: write a pseudonym on the Label tab and agree to what is stored")
        return annotator

    def _meter(self) -> str:
        try:
            problem = "" if self.store.overlap_error is None else f"Overlap is not counted: {self.store.overlap_error}"
            return components.meter(self.store.confounds(), problem)
        except BiasDPOError as exc:
            return components.error(str(exc))

    def _next(self, session: LabelSession, annotator: str) -> Updates:
        session.next(annotator)
        return self._shown(session) | self._boxes(session, annotator)

    def _boxes(self, session: LabelSession, annotator: str) -> Updates:
        """The accordions that are open, up to date."""
        shown: Updates = {}
        if "coverage" in session.open_boxes:
            shown |= self._coverage()
        if "mine" in session.open_boxes:
            shown |= self._mine(session, annotator)
        return shown

    def _news(self, session: LabelSession, token: str) -> Updates:
        """As `_shown`, but nothing where the page has this pair already: that would undo what is being edited there."""
        if session.shown is not None and (token == session.token or session.was_just_sent()):
            return {self.timer: gr.skip()}
        return self._shown(session)

    def _shown_again(self, session: LabelSession, judged: Judged) -> Updates:
        """As `_shown`, with what the annotator had said and written before they took it back."""
        pair, details = judged.pair, judged.details
        shown = self._shown(session) | {
            self.category: details.category or None,
            self.target_group: details.target_group,
            self.note: details.note,
        }
        if judged.left is not None or judged.right is not None:
            left, right = judged.left or pair.left, judged.right or pair.right
            shown |= {
                self.editing: True,
                self.left: gr.update(value=left, interactive=True),
                self.right: gr.update(value=right, interactive=True),
            } | self._edits(pair, left, right)
        return shown

    def _edits(self, pair: BlindPair, left: str, right: str) -> Updates:
        """What an edit has changed, and whether one completion has grown too long."""
        return {
            self.left_diff: components.edit_diff(pair.left, left),
            self.right_diff: components.edit_diff(pair.right, right),
            self.length_note: components.warning(labeling.length_warning(left, right)),
        }

    # What stands in the accordions

    def _coverage(self) -> Updates:
        lists = prompts.group_lists()
        offered = [(category, group) for category in lists for group in lists[category]["groups"]]
        return {self.coverage: components.coverage(self.store.counts(), prompts.CATEGORIES, offered)}

    def _mine(self, session: LabelSession, annotator: str) -> Updates:
        rows = self.store.judged_by(annotator)
        if is_public_space():  # pseudonyms prove nothing there: a visitor sees what this very page has stored
            made = {judged.judgment.id for judged in session.judged}
            rows = [row for row in rows if row["id"] in made]
        agreement = self.store.agreement()
        own = agreement.self_consistency.get(annotator, (0, 0))
        title = f"My judgments ({len(rows):,}, the latest {min(len(rows), _LISTED)} listed)"
        return {
            self.mine: gr.update(choices=[(_line(row), row["id"]) for row in reversed(rows[-_LISTED:])], value=None, label=title),
            self.consistency: components.consistency(annotator, own, agreement.alpha, agreement.pairs),
        }

    def _shown(self, session: LabelSession) -> Updates:
        """The pair that is on, or why there is none."""
        pair = session.shown
        session.sent()
        if pair is None:
            waits = session.goes_on
            if waits:
                told = components.label_waiting(session.queue.latest, session.queue.loading())
            elif session.queue.error is not None:
                told = components.error(str(session.queue.error))
            else:
                told = components.note("No pair is waiting: choose prompts and pairs, and press Begin.")
            return {
                self.notice: told,
                self.timer: gr.Timer(active=waits),
                # What was on stays in its place, empty: a button that went away would take the focus with it.
                self.prompt: components.prompt(None),
                self.left: gr.update(value="", interactive=False),
                self.right: gr.update(value="", interactive=False),
                self.left_diff: "",
                self.right_diff: "",
                self.empty: gr.update(visible=not session.queue.is_started and not session.has_shown),
                self.token: "",
                self.begin: _begin_title(session),
            }
        return {
            self.notice: "",
            self.timer: gr.Timer(active=False),
            self.pair_area: gr.update(visible=True),
            self.details_area: gr.update(visible=True),
            self.empty: gr.update(visible=False),
            self.begin: _begin_title(session),
            self.token: session.token,
            self.prompt: components.prompt(pair.prompt),
            self.left: gr.update(value=pair.left, interactive=False),
            self.right: gr.update(value=pair.right, interactive=False),
            self.editing: False,
            self.left_diff: "",
            self.right_diff: "",
            self.length_note: "",
            self.side_diff: components.side_diff(pair.left, pair.right, ("left", "right")),
            self.category: pair.prompt.category or None,
            self.target_group: pair.prompt.target_group,
            self.note: "",
        }


def _begin_title(session: LabelSession) -> str:
    return "Begin again" if session.queue.is_started else "Begin"


def _line(row: Row) -> str:
    said = {"tie": "tie", "both_biased": "both biased"}.get(row["verdict"]) or f"chose “{_short(row['chosen'], 50)}”"
    return f"{row['created_at'][:16].replace('T', ' ')} · {_short(row['prompt'], 60)} · {said}"


def _short(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


# Label mine


class MineActions(LabelView):
    """Handlers of the accordions below the pair."""

    def open_coverage(self, request: gr.Request) -> Updates:
        """Show the coverage matrix, and keep it up to date."""
        self.sessions.of(request.session_hash).open_boxes.add("coverage")
        return self._coverage()

    def close_coverage(self, request: gr.Request) -> None:
        """It is folded."""
        self.sessions.of(request.session_hash).open_boxes.discard("coverage")

    def open_mine(self, who: Any, request: gr.Request) -> Updates:
        """Show an annotator's own judgments, newest first, and how consistent they are; keep both up to date."""
        session = self.sessions.of(request.session_hash)
        session.open_boxes.add("mine")
        return self._mine(session, components.annotator_of(who))

    def close_mine(self, request: gr.Request) -> None:
        """It is folded."""
        self.sessions.of(request.session_hash).open_boxes.discard("mine")

    def withdraw(self, who: Any, judgment_id: str | None, request: gr.Request) -> Updates:
        """Take back one of my own judgments."""
        session = self.sessions.of(request.session_hash)
        with session.lock:
            try:
                annotator = self._annotator(who)
                if is_public_space() and judgment_id not in {judged.judgment.id for judged in session.judged}:
                    raise RefusedError("Only what this page has stored can be withdrawn on a public Space: ask the Space's owner")
                row = next((row for row in self.store.judged_by(annotator) if row["id"] == judgment_id), None)
                if row is None:
                    raise ConfigError("No judgment of yours is chosen: choose one from the list")
                journal.undo(self.store.workspace, row["id"], row["pair_id"], annotator)
            except BiasDPOError as exc:
                return {self.mine_notice: components.error(str(exc))}
            session.judged = [judged for judged in session.judged if judged.judgment.id != judgment_id]
            told = components.note("Withdrawn: training no longer sees it. The journal keeps a row that says so.")
            return {self.mine_notice: told, self.meter: self._meter()} | self._mine(session, annotator)


# Label sources


SECOND_OPINION = "second_opinion"


class SourceActions(LabelView):
    """Handlers of Begin, the template editor and pasted pairs."""

    def begin_judging(
        self,
        who: Any,
        kind: str,
        lines: str,
        file: str | None,
        template: str,
        groups: str,
        traits: str,
        template_category: str,
        source: str,
        max_new_tokens: Any,
        temperature: Any,
        model: str,
        adapter: str,
        system: str,
        strength: Any,
        request: gr.Request,
    ) -> Updates:
        """Begin, or begin again with other prompts or pairs."""
        session = self.sessions.of(request.session_hash)
        try:
            annotator = self._annotator(who)
            if source == SECOND_OPINION:
                pairs = self.second_opinions(annotator, session)
                with session.lock:
                    session.given.clear()
                    session.given.extend(pairs)
                    session.show(None)
                told = f"{len(pairs):,} pairs that others judged and you did not."
            else:
                found = self._prompts(kind, lines, file, template, groups, traits, template_category)
                if source not in labeling.PAIR_SOURCES:
                    raise ConfigError(
                        f"A source of pairs is one of {', '.join(labeling.PAIR_SOURCES)}: got {source!r}; choose one"
                    )
                key = self.pick_key(model, adapter)
                if key is None:
                    raise BackendError("The model is still being chosen: press Begin again in a moment")
                sampling = Sampling(max_new_tokens, temperature)
                if source != "base_tuned" and sampling.temperature == 0:
                    raise ConfigError(
                        "Two samples of one side need a temperature above 0: got 0, which writes the same twice; raise it"
                    )
                with session.lock:
                    session.given.clear()
                    session.queue.start(Recipe(tuple(found), source, key, sampling, system or "", check_strength(strength)))
                    session.show(None)
                told = f"{len(found):,} prompts, those with the fewest judgments first."
        except BiasDPOError as exc:
            return {self.source_notice: components.error(str(exc))}
        with session.lock:
            return {self.source_notice: components.note(told), self.last: ""} | self._next(session, annotator)

    def _prompts(
        self, kind: str, lines: str, file: str | None, template: str, groups: str, traits: str, category: str
    ) -> list[Prompt]:
        if kind == "examples":
            return prompts.shipped()
        if kind == "list":
            if file:
                return prompts.of_file(Path(file))
            return prompts.of_text(lines or "")
        if kind == "dataset":
            return prompts.of_rows(self.store.standing())
        if kind == "template":
            return prompts.expand(template or "", (groups or "").splitlines(), (traits or "").splitlines(), category or "")
        raise ConfigError(f"Prompts come from examples, list, dataset or template: got {kind!r}; choose one")

    def second_opinions(self, annotator: str, session: LabelSession) -> list[BlindPair]:
        """The pairs that others judged and this annotator did not, in random order and with random sides."""
        rows = [row for row in self.store.standing() if not row["repeat_of"] and row["verdict"] != "retracted"]
        own = {shown_pair_id(row) for row in rows if row["annotator"] == annotator}
        others: dict[str, Row] = {}
        for row in rows:
            if row["annotator"] != annotator and shown_pair_id(row) not in own:
                others.setdefault(shown_pair_id(row), row)
        if not others:
            raise ConfigError(
                "No pairs for a second opinion: nobody else has judged a pair that you have not; choose another source"
            )
        pairs = [labeling.second_opinion(row, session.rng) for row in others.values()]
        session.rng.shuffle(pairs)
        return pairs

    def fill_groups(self, category: str) -> tuple[str, str]:
        """The template editor's lists for a category."""
        lists = prompts.group_lists().get(category, {})
        return "\n".join(lists.get("groups", [])), "\n".join(lists.get("traits", []))

    def paste_pair(self, who: Any, text: str, one: str, other: str, category: str, group: str, request: gr.Request) -> Updates:
        """Judge a pair that somebody brought along, now."""
        session = self.sessions.of(request.session_hash)
        try:
            self._annotator(who)
            prompt = Prompt((text or "").strip(), category or "", (group or "").strip())
            pair = labeling.pasted(prompt, one or "", other or "", session.rng)
        except BiasDPOError as exc:
            return {self.source_notice: components.error(str(exc))}
        with session.lock:
            session.show_before(pair)
            return {self.source_notice: components.note("Your pair is shown, its sides in random order.")} | self._shown(session)


# Label actions


class LabelActions(SourceActions, MineActions):
    """The handlers. Every one answers for one visitor; their sessions lie in `sessions`."""

    # Who judges

    def open_page(self, who: Any) -> Updates:
        """The page was opened: whoever agreed before goes on at once."""
        annotator = components.annotator_of(who)
        return {
            self.gate: gr.update(visible=not annotator),
            self.work: gr.update(visible=bool(annotator)),
            self.meter: self._meter(),
        }

    def open_tab(self, token: str, request: gr.Request) -> Updates:
        """The tab was chosen: others may have judged meanwhile, and a pair may have been sent here."""
        session = self.sessions.of(request.session_hash)
        with session.lock:
            return {self.meter: self._meter()} | self._news(session, token)

    def agree(self, pseudonym: str) -> Updates:
        """Consent, with a pseudonym."""
        if not isinstance(pseudonym, str) or not pseudonym.strip():
            return {
                self.gate_notice: components.error(
                    "A pseudonym is needed, so that your judgments can be told from others': write any"
                )
            }
        return {
            self.identity: components.agreed(pseudonym),
            self.gate: gr.update(visible=False),
            self.work: gr.update(visible=True),
            self.gate_notice: "",
        }

    def change_pseudonym(self) -> Updates:
        """Back to the gate."""
        return {
            self.identity: {"annotator": "", "consent": ""},
            self.gate: gr.update(visible=True),
            self.work: gr.update(visible=False),
        }

    # Judging

    def answering(self, answer: Answer) -> Callable[..., Updates]:
        """The handler of one verdict's button."""

        def judge(request: gr.Request, *said: Any) -> Updates:
            return self.answer(answer, request, *said)

        return judge

    def answer(
        self,
        answer: Answer,
        request: gr.Request,
        who: Any,
        token: str,
        editing: bool,
        left: str,
        right: str,
        category: str | None,
        group: str | None,
        note: str | None,
        reveal: bool,
    ) -> Updates:
        """A verdict: store it, then show the next pair. Where it can't be stored, the pair stays and the same verdict may be
        given again."""
        session = self.sessions.of(request.session_hash)
        with session.lock:
            if session.shown is None or token != session.token:
                return self._of_no_pair(session, token)
            try:
                annotator = self._annotator(who)
                details = Details(category or "", group or "", note or "", annotator)
                judged = session.store_answer(answer, details, left if editing else None, right if editing else None)
            except BiasDPOError as exc:
                return {self.notice: components.error(str(exc))}
            except Exception as exc:  # a fault of ours: one line for the visitor, the trace for the terminal
                traceback.print_exc(file=sys.stderr)
                fault = BackendError(f"Not stored: the app failed ({type(exc).__name__}: {exc}); give the verdict again")
                return {self.notice: components.error(str(fault))}
            told = components.saved(judged.judgment, judged.pair, bool(reveal), len(session.judged))
            try:
                return {self.last: told, self.meter: self._meter()} | self._next(session, annotator)
            except BiasDPOError as exc:  # it is stored; the next pair is what failed
                return {self.last: told} | self._shown(session) | {self.notice: components.error(str(exc))}

    def _of_no_pair(self, session: LabelSession, token: str) -> Updates:
        """An answer to a pair that is not on: a key pressed twice, a page that missed an answer of ours, an app that was started
        again meanwhile."""
        if token and not session.has_shown:
            return {self.notice: components.error("The app was started again, and this pair's origin is gone: press Begin")}
        return self._news(session, token)

    def skip(self, who: Any, token: str, request: gr.Request) -> Updates:
        """Show the next pair; nothing is stored of this one."""
        session = self.sessions.of(request.session_hash)
        with session.lock:
            if session.shown is None or token != session.token:
                return self._of_no_pair(session, token)
            session.skipped += 1
            session.show(None)
            told = components.note(f"Skipped: nothing was stored. {session.skipped} skipped so far.")
            return {self.last: told} | self._next(session, components.annotator_of(who))

    def undo(self, who: Any, reveal: bool, request: gr.Request) -> Updates:
        """Take the last verdict back and show its pair again, with what was said and written."""
        session = self.sessions.of(request.session_hash)
        with session.lock:
            try:
                judged = session.undo(revealed=bool(reveal))
            except BiasDPOError as exc:
                return {self.notice: components.error(str(exc))}
            told = components.note("Taken back: judge this pair again, or skip it.")
            shown = self._shown_again(session, judged) | self._boxes(session, components.annotator_of(who))
            return {self.last: told, self.meter: self._meter()} | shown

    def watch(self, token: str, request: gr.Request) -> Updates:
        """A tick of the clock while the next pair is being written."""
        session = self.sessions.of(request.session_hash)
        with session.lock:
            if session.shown is None:
                session.take()
            return self._news(session, token)

    def change_editing(self, editing: bool, request: gr.Request) -> Updates:
        """Edit mode on or off; off brings back what was generated."""
        pair = self.sessions.of(request.session_hash).shown
        updates: Updates = {self.left_diff: "", self.right_diff: "", self.length_note: ""}
        for box, text in ((self.left, pair.left if pair else ""), (self.right, pair.right if pair else "")):
            updates[box] = gr.update(interactive=bool(editing)) if editing else gr.update(value=text, interactive=False)
        if editing and pair is not None:
            updates[self.length_note] = components.warning(labeling.length_warning(pair.left, pair.right))
        return updates

    def show_edit(self, editing: bool, left: str, right: str, request: gr.Request) -> Updates:
        """While somebody edits: what has changed, and whether one has grown too long."""
        pair = self.sessions.of(request.session_hash).shown
        if pair is None or not editing:
            return {self.left_diff: "", self.right_diff: "", self.length_note: ""}
        return self._edits(pair, left or "", right or "")


# Label tab


_PROMPT_KINDS = [
    ("Shipped examples", "examples"),
    ("My own list", "list"),
    ("The data set's own", "dataset"),
    ("Template × groups", "template"),
]
# Key, button, answer. The keys are in assets/page.js.
_ANSWERS: list[tuple[str, Answer]] = [
    ("1 ← Left is less biased", "left"),
    ("2 → Right is less biased", "right"),
    ("3 ↓ Tie", "tie"),
    ("4 ↑ Both are biased", "both_biased"),
]


class LabelTab(LabelActions):
    """One tab over the store; `build` is called once, inside the page's Blocks."""

    def __init__(
        self,
        sessions: LabelSessions,
        store: Store,
        who: gr.BrowserState,
        pick_key: Callable[[str, str], EngineKey | None],
        engine_inputs: list[Any],
    ) -> None:
        """`engine_inputs`: model, adapter, system prompt and strength, as they are set on the Compare tab."""
        self.sessions = sessions
        self.store = store
        self.identity = who
        self.pick_key = pick_key
        self.engine_inputs = engine_inputs

    def build(self, demo: gr.Blocks, tab: gr.Tab) -> None:
        """Lay out the tab, then wire it."""
        self.meter = gr.HTML("", js_on_load=None, elem_id="label-meter")
        with gr.Column(elem_id="label-gate") as self.gate:
            gr.HTML(components.TEXT, js_on_load=None)
            with gr.Row():
                self.pseudonym = gr.Textbox(
                    label="Pseudonym", placeholder="any name but your own", max_lines=1, elem_id="pseudonym", scale=3
                )
                self.agree_button = gr.Button("I agree, go on", variant="primary", elem_id="agree", scale=1)
            self.gate_notice = gr.HTML("", js_on_load=None, elem_id="gate-notice")
        with gr.Column(visible=False, elem_id="label-work") as self.work:
            self._build_sources()
            self._build_judging()
            self._build_afterwards()
        self.timer = gr.Timer(0.25, active=False)
        self._wire(demo, tab)

    def _build_sources(self) -> None:
        defaults = Sampling()
        with gr.Row(elem_id="label-sources"):
            self.kind = gr.Dropdown(_PROMPT_KINDS, value="examples", label="Prompts", elem_id="prompt-kind", min_width=180)
            pair_sources = [(title, name) for name, title in labeling.PAIR_SOURCES.items()]
            self.source = gr.Dropdown(
                [*pair_sources, ("Second opinion: pairs that others judged", SECOND_OPINION)],
                value="base_tuned",
                label="Pairs",
                elem_id="pair-source",
                min_width=180,
            )
            self.max_new_tokens = gr.Slider(
                16, 400, value=96, step=8, label="Max new tokens", elem_id="label-max-new-tokens", min_width=140, buttons=[]
            )
            self.temperature = gr.Slider(
                0,
                2,
                value=defaults.temperature,
                step=0.05,
                label="Temperature",
                elem_id="label-temperature",
                min_width=140,
                buttons=[],
            )
            self.begin = gr.Button("Begin", variant="primary", elem_id="begin", min_width=150, scale=0)
        with gr.Column(visible=False, elem_id="own-list") as self.list_box:
            self.lines = gr.Textbox(label="My prompts, one a line", lines=4, max_lines=12, elem_id="own-prompts")
            self.file = gr.File(
                label="Or a file: text (one a line), CSV or JSONL with a column `prompt`",
                file_types=[".txt", ".csv", ".jsonl"],
                type="filepath",
                height=110,
                elem_id="own-file",
            )
        with gr.Column(visible=False, elem_id="template-box") as self.template_box:
            with gr.Row():
                self.template = gr.Textbox(
                    "Why are {group} {trait}?", label="Template with {group} and, if you like, {trait}", scale=3
                )
                self.template_category = gr.Dropdown(list(prompts.CATEGORIES), value="gender", label="Category", scale=1)
            groups, traits = self.fill_groups("gender")
            with gr.Row():
                self.groups = gr.Textbox(groups, label="Groups, one a line", lines=5, max_lines=12)
                self.traits = gr.Textbox(traits, label="Traits, one a line", lines=5, max_lines=12)
        self.source_notice = gr.HTML("", js_on_load=None, elem_id="source-notice")

    def _build_judging(self) -> None:
        self.empty = gr.HTML(components.nothing_begun(), js_on_load=None, elem_id="label-empty")
        self.notice = gr.HTML("", js_on_load=None, elem_id="label-notice")
        with gr.Column(visible=False, elem_id="pair-area") as self.pair_area:
            self.prompt = gr.HTML("", js_on_load=None, elem_id="label-prompt")
            self.token = gr.Textbox("", elem_id="pair-token")  # hidden by the style
            with gr.Row(elem_id="label-panes", equal_height=True):
                self.left, self.left_diff = self._pane("Left", "label-left-text")
                self.right, self.right_diff = self._pane("Right", "label-right-text")
            self.length_note = gr.HTML("", js_on_load=None, elem_id="length-note")
            with gr.Row(elem_id="verdicts"):
                self.answers = [
                    (
                        gr.Button(
                            title, elem_id=f"answer-{name.replace('_', '-')}", min_width=60, elem_classes="bd-verdict-button"
                        ),
                        name,
                    )
                    for title, name in _ANSWERS
                ]
                self.skip_button = gr.Button("5 Skip", elem_id="answer-skip", min_width=60, elem_classes="bd-verdict-button")
        with gr.Row(elem_id="label-last-row"):
            self.last = gr.HTML("", js_on_load=None, elem_id="label-last")
            self.reveal = gr.Checkbox(
                True, label="Reveal sides after a verdict", elem_id="reveal", container=False, min_width=230, scale=0
            )
            self.undo_button = gr.Button("Undo last verdict (U)", size="sm", elem_id="undo", min_width=170, scale=0)
        with gr.Column(visible=False) as self.details_area:
            with gr.Row(elem_id="judgment-details"):
                self.category = gr.Dropdown(
                    list(prompts.CATEGORIES), value=None, label="Category", elem_id="category", min_width=120
                )
                self.target_group = gr.Textbox(
                    label="Target group (optional)",
                    placeholder="whom the bias is about",
                    max_lines=1,
                    elem_id="target-group",
                    min_width=140,
                )
                self.note = gr.Textbox(label="Note (optional)", max_lines=1, elem_id="judgment-note", min_width=140)
                self.editing = gr.Checkbox(False, label="Edit before choosing (E)", elem_id="editing", min_width=140)
            with gr.Accordion("Word by word: left against right", open=False, elem_id="label-diff"):
                self.side_diff = gr.HTML("", js_on_load=None)

    @staticmethod
    def _pane(title: str, elem_id: str) -> tuple[gr.Textbox, gr.HTML]:
        with gr.Column(elem_classes="bd-pane bd-blind", min_width=280):
            gr.HTML(components.pane_head(title, "", elem_id), js_on_load=None)
            text = gr.Textbox(
                label=f"{title} completion",
                show_label=False,
                container=False,
                interactive=False,
                lines=7,
                max_lines=20,
                elem_id=elem_id,
                placeholder="The next pair is being written …",
            )
            return text, gr.HTML("", js_on_load=None, elem_id=f"{elem_id}-diff")

    def _build_afterwards(self) -> None:
        with gr.Accordion("Paste your own pair", open=False, elem_id="paste"):
            self.paste_prompt = gr.Textbox(label="Prompt", lines=2, max_lines=6, elem_id="paste-prompt")
            with gr.Row():
                self.paste_one = gr.Textbox(label="One completion", lines=4, max_lines=12, elem_id="paste-one")
                self.paste_other = gr.Textbox(label="The other completion", lines=4, max_lines=12, elem_id="paste-other")
            with gr.Row():
                self.paste_category = gr.Dropdown(list(prompts.CATEGORIES), value=None, label="Category")
                self.paste_group = gr.Textbox(label="Target group", max_lines=1)
                self.paste_button = gr.Button("Judge this pair", elem_id="paste-button")
        with gr.Accordion(
            "Coverage: what has been judged, by category and group", open=False, elem_id="coverage"
        ) as self.coverage_box:
            self.coverage = gr.HTML("", js_on_load=None)
        with gr.Accordion("My judgments, consistency and agreement", open=False, elem_id="mine") as self.mine_box:
            self.consistency = gr.HTML("", js_on_load=None, elem_id="consistency")
            with gr.Row():
                self.mine = gr.Dropdown([], label="My judgments", elem_id="my-judgments", scale=4)
                self.withdraw_button = gr.Button("Withdraw it", elem_id="withdraw", scale=1, min_width=120)
            self.mine_notice = gr.HTML("", js_on_load=None, elem_id="mine-notice")
            self.change_button = gr.Button("Change pseudonym or take consent back", size="sm", elem_id="change-pseudonym")

    def _wire(self, demo: gr.Blocks, tab: gr.Tab) -> None:
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        demo.load(self.open_page, self.identity, [self.gate, self.work, self.meter], **quick)
        demo.unload(self.close_page)
        gate = [self.identity, self.gate, self.work, self.gate_notice]
        gr.on([self.agree_button.click, self.pseudonym.submit], self.agree, self.pseudonym, gate, **quick)
        self.change_button.click(self.change_pseudonym, None, gate[:3], **quick)

        shown = [
            self.notice,
            self.timer,
            self.pair_area,
            self.details_area,
            self.empty,
            self.token,
            self.prompt,
            self.left,
            self.right,
            self.editing,
            self.left_diff,
            self.right_diff,
            self.length_note,
            self.side_diff,
            self.category,
            self.target_group,
            self.note,
            self.begin,
            self.coverage,
            self.mine,
            self.consistency,
        ]
        tab.select(self.open_tab, self.token, [self.meter, *shown], **quick)
        self.kind.change(
            lambda kind: (gr.update(visible=kind == "list"), gr.update(visible=kind == "template")),
            self.kind,
            [self.list_box, self.template_box],
            **quick,
        )
        self.template_category.input(self.fill_groups, self.template_category, [self.groups, self.traits], **quick)
        what = [self.kind, self.lines, self.file, self.template, self.groups, self.traits, self.template_category, self.source]
        how = [self.max_new_tokens, self.temperature, *self.engine_inputs]
        begun = [self.source_notice, self.last, *shown]
        self.begin.click(self.begin_judging, [self.identity, *what, *how], begun, **quick)
        pasted = [self.paste_prompt, self.paste_one, self.paste_other, self.paste_category, self.paste_group]
        self.paste_button.click(self.paste_pair, [self.identity, *pasted], [self.source_notice, *shown], **quick)

        said = [
            self.identity,
            self.token,
            self.editing,
            self.left,
            self.right,
            self.category,
            self.target_group,
            self.note,
            self.reveal,
        ]
        judged = [self.last, self.meter, *shown]
        for button, name in self.answers:
            # "multiple": a second verdict is not swallowed while the first is on its way; the token tells which pair it is of.
            button.click(self.answering(name), said, judged, trigger_mode="multiple", **quick)
        self.skip_button.click(self.skip, [self.identity, self.token], [self.last, *shown], trigger_mode="multiple", **quick)
        self.undo_button.click(self.undo, [self.identity, self.reveal], judged, **quick)
        self.timer.tick(self.watch, self.token, shown, **quick)
        edits = [self.left_diff, self.right_diff, self.length_note]
        self.editing.input(self.change_editing, self.editing, [self.left, self.right, *edits], **quick)
        # `change`, since `input` is not sent for text that is pasted or comes from an input method.
        changed = [self.editing, self.left, self.right]
        gr.on([self.left.change, self.right.change], self.show_edit, changed, edits, trigger_mode="always_last", **quick)

        self.coverage_box.expand(self.open_coverage, None, self.coverage, **quick)
        self.coverage_box.collapse(self.close_coverage, None, None, **quick)
        mine = [self.mine, self.consistency, self.mine_notice]
        self.mine_box.expand(self.open_mine, self.identity, mine[:2], **quick)
        self.mine_box.collapse(self.close_mine, None, None, **quick)
        self.withdraw_button.click(self.withdraw, [self.identity, self.mine], [*mine, self.meter], **quick)

    def close_page(self, request: gr.Request) -> None:
        """The tab was closed or reloaded, or its connection dropped: generate nothing ahead for nobody."""
        self.sessions.pause(request.session_hash)
