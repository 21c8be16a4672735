"""Where the list of jobs, the question before one is deleted, and their handlers stand on a tab of jobs (`jobs_view`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import gradio as gr

from biasdpo.errors import BiasDPOError, ConfigError
from biasdpo.ui import components
from biasdpo.ui.components import Store
from biasdpo.workspace import Workspace, is_public_space, refuse_on_public_space

# News


Updates = dict[Any, Any]
Mark = dict[str, int]


def key(part: Any) -> str:
    """A component's name in a mark."""
    return str(part.elem_id or part._id)


def news(parts: Updates, mark: Mark) -> tuple[Updates, Mark]:
    """The parts that are not as `mark` remembers them, and what is to be remembered now."""
    marks = {key(part): hash(repr(value)) for part, value in parts.items()}
    return {part: value for part, value in parts.items() if mark.get(key(part)) != marks[key(part)]}, mark | marks


# Jobs view


TICK_SECONDS = 1.0  # while a job is under way
SLOW_TICK_SECONDS = 5.0  # else: one may be written by the command line


class Job(Protocol):
    """A process of its own."""

    @property
    def is_active(self) -> bool: ...


J = TypeVar("J", bound=Job)


class JobsView(ABC, Generic[J]):
    """A tab over the workspace's jobs of one kind. `mark`: see `news`.

    noun     what a job is called ("export")
    tab_id   of the tab
    """

    noun: ClassVar[str]
    tab_id: ClassVar[str]

    store: Store
    tabs: gr.Tabs
    view: gr.State
    chosen: gr.Textbox
    mark: gr.State
    timer: gr.Timer
    empty: gr.HTML
    list_box: gr.Column
    table: gr.HTML
    new_box: gr.Column
    one_box: gr.Column
    delete_button: gr.Button
    asked: gr.State
    confirm_box: gr.Row
    confirm_text: gr.HTML
    notice: gr.HTML

    # Of each kind of job

    @abstractmethod
    def every(self) -> Sequence[J]:
        """All jobs, the newest first."""

    @abstractmethod
    def id_of(self, job: J) -> str:
        """By which the page asks for it."""

    @abstractmethod
    def name_of(self, job: J) -> str:
        """What a reader calls it."""

    @abstractmethod
    def found(self, job_id: str) -> J:
        """The job of this id; none is a BiasDPOError."""

    @abstractmethod
    def deleting(self, job: J) -> str:
        """What is lost when it is deleted."""

    @abstractmethod
    def delete_files(self, job: J) -> None:
        """Delete it."""

    @abstractmethod
    def listed(self, every: Sequence[J], chosen: str) -> str:
        """The list; the chosen one is marked."""

    @abstractmethod
    def parts_of(self, job: J, mark: Mark) -> tuple[Updates, Mark]:
        """The chosen job's own components, and what is to be remembered of it beside them."""

    @abstractmethod
    def first(self, run_id: str, *given: Any) -> Updates:
        """The panel for a new one was opened. `run_id`: the run that it is for, "" for what was chosen."""

    @abstractmethod
    def fresh(self, notice: str) -> Updates:
        """That panel as it is at first."""

    @property
    @abstractmethod
    def seen_outputs(self) -> list[Any]:
        """All that a tick of the clock may touch: `list_outputs` and the job's own."""

    @property
    @abstractmethod
    def all_outputs(self) -> list[Any]:
        """All of the tab that opening it may touch."""

    # What is shown

    @property
    def workspace(self) -> Workspace:
        return self.store.workspace

    @property
    def panels(self) -> Mapping[str, gr.Column]:
        """The panels of which one is shown, by what `view` calls them."""
        return {"new": self.new_box, "one": self.one_box}

    @property
    def list_outputs(self) -> list[Any]:
        return [self.notice, self.mark, self.timer, self.empty, self.list_box, self.table]

    @property
    def one_outputs(self) -> list[Any]:
        """All that choosing a job may touch."""
        asking = [self.asked, self.confirm_box, self.confirm_text]
        return [*self.seen_outputs, self.view, *self.panels.values(), self.chosen, *asking]

    def turn_to(self, view: str) -> Updates:
        """One of the panels."""
        hidden = "new" if is_public_space() else ""
        return {self.view: view} | {box: gr.update(visible=name == view and name != hidden) for name, box in self.panels.items()}

    def watch(self, view: str, chosen: str, mark: Mark) -> Updates:
        """A tick of the clock."""
        try:
            return self.changed(self.every(), chosen if view == "one" else "", mark)
        except (BiasDPOError, OSError) as exc:
            return self.unlisted(exc, mark)

    def unlisted(self, exc: Exception, mark: Mark) -> Updates:
        """The jobs can't be read: said in place of the list, which the next tick that can read them brings back."""
        unread = f"The {self.noun}s can't be read: {exc}; they come back when they can"
        said = (self.table, self.list_box)
        kept = {name: value for name, value in mark.items() if name not in map(key, said)}
        shown = components.error(str(exc) if isinstance(exc, BiasDPOError) else unread)
        return {self.table: shown, self.list_box: gr.update(visible=True), self.mark: kept}

    def changed(self, every: Sequence[J], chosen: str, mark: Mark) -> Updates:
        """What has changed since `mark`."""
        active = any(job.is_active for job in every)
        parts: Updates = {
            self.timer: gr.update(value=TICK_SECONDS if active else SLOW_TICK_SECONDS, active=True),
            self.empty: gr.update(visible=not every),
            self.list_box: gr.update(visible=bool(every)),
            self.table: self.listed(every, chosen),
        }
        remembered: Mark = {}
        job = next((job for job in every if self.id_of(job) == chosen), None)
        if job is not None:
            own, remembered = self.parts_of(job, mark)
            parts |= own
        new, marked = news(parts, mark)
        if mark.get("active") and job is not None and not job.is_active:
            new[self.notice] = ""  # that it was asked to end is said by its state now
        return new | {self.mark: marked | remembered | {"active": job is not None and job.is_active}}

    def show_one(self, job_id: str, notice: str = "") -> Updates:
        """A job was chosen or started: all of it. One that is gone: the newest other, or the panel for a new one."""
        every = self.every()
        known = [self.id_of(job) for job in every]
        shown = job_id if job_id in known else next(iter(known), "")
        return (
            ({} if shown or is_public_space() else self.fresh(notice))
            | self.changed(every, shown, {})
            | self.turn_to("one" if shown else "new")
            | {self.chosen: shown, self.notice: notice}
            | self.keep()
        )

    # Opening

    def open_tab(self, view: str, chosen: str, mark: Mark, *new: Any) -> Updates:
        """The tab was chosen: what was on, else the job that is under way, else the newest, else the panel for the first."""
        try:
            if view == "new":
                return self.watch(view, chosen, mark) | self.first("", *new)
            every = self.every()
            known = [self.id_of(job) for job in every]
            if view not in ("", "one") or (view == "one" and chosen in known):  # as it was left, with what was picked of it
                return self.watch(view, chosen, mark)
            active = [self.id_of(job) for job in every if job.is_active]
            shown = chosen if chosen in known else next(iter([*active, *known]), "")
            if not shown:
                return self.open_new(*new)
            gone = f"No {self.noun} {chosen.rpartition('/')[2]!r} any more: another is shown."
            return self.show_one(shown, components.note(gone if chosen and chosen not in known else ""))
        except (BiasDPOError, OSError) as exc:
            return self.unlisted(exc, mark)

    def open_new(self, *new: Any, run_id: str = "") -> Updates:
        """The panel for a new one."""
        shown = self.changed(self.every(), "", {}) | self.turn_to("new")
        return shown if is_public_space() else shown | self.first(run_id, *new)

    def open_run(self, run_id: Any, *new: Any) -> Updates:
        """The panel for a new one of this run, from its own panel on the Train tab."""
        if not isinstance(run_id, str) or not run_id:
            return {self.tabs: gr.skip()}
        return self.open_new(*new, run_id=run_id) | {self.tabs: gr.Tabs(selected=self.tab_id)}

    def choose_row(self, event: gr.EventData) -> Updates:
        """A row of the list was chosen."""
        wanted = event._data.get("id") if isinstance(event._data, dict) else None
        try:
            return self.show_one(str(wanted))
        except (BiasDPOError, OSError) as exc:
            return self.unlisted(exc, {})

    # One job

    def one(self, job_id: Any) -> J:
        """The job that is chosen; none is a ConfigError."""
        if not isinstance(job_id, str) or not job_id:
            raise ConfigError(f"No {self.noun} is chosen: choose one of the list")
        return self.found(job_id)

    def ask_delete(self, job_id: Any) -> Updates:
        """Ask first, and say what is lost. The answer is of this job, whichever is chosen meanwhile."""
        try:
            job = self.one(job_id)
        except BiasDPOError as exc:
            return {self.notice: components.error(str(exc))}
        return {self.asked: job_id, self.confirm_box: gr.update(visible=True), self.confirm_text: self.deleting(job)}

    def keep(self) -> Updates:
        """Nothing is to be deleted."""
        return {self.asked: "", self.confirm_box: gr.update(visible=False), self.confirm_text: ""}

    def delete(self, asked: Any) -> Updates:
        """Delete it; the newest of the others is shown, or the panel for a new one."""
        try:
            refuse_on_public_space(f"Deleting an {self.noun}")
            job = self.one(asked)
            self.delete_files(job)
        except BiasDPOError as exc:
            return self.keep() | {self.notice: components.error(str(exc))}
        return self.show_one("", components.note(f"{self.name_of(job)} was deleted."))


# Jobs layout


QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
RAW: dict[str, Any] = QUICK | {"preprocess": False}


class JobsLayout(JobsView[J]):
    """What such a tab lays out and wires beside its own panels. `prefix`: of the elements' ids."""

    prefix: ClassVar[str]

    new_button: gr.Button
    really_button: gr.Button
    keep_button: gr.Button

    def build_state(self) -> None:
        """What the page remembers of the tab."""
        self.view = gr.State("")
        self.mark = gr.State({})
        self.asked = gr.State("")
        # hidden by CSS; kept by the page across restarts of the app
        self.chosen = gr.Textbox("", elem_id=f"{self.prefix}-chosen")

    def build_list(self, *, empty: str) -> None:
        """The list and its head, to which a kind of jobs may add. `empty`: what is said where there is none."""
        self.empty = gr.HTML(empty, js_on_load=None, visible=False, elem_id=f"{self.prefix}-empty")
        with gr.Column(visible=False, elem_id=f"{self.prefix}-list") as self.list_box:
            with gr.Row(elem_id=f"{self.prefix}-list-top"):
                gr.HTML(f"<h2>{self.noun.capitalize()}s</h2>", js_on_load=None)
                self.new_button = gr.Button(
                    f"New {self.noun}",
                    size="sm",
                    elem_id=f"{self.prefix}-new-button",
                    min_width=120,
                    scale=0,
                    visible=not is_public_space(),
                )
                self.build_list_buttons()
            self.table = gr.HTML(
                "", js_on_load="window.bdTable(element, trigger)", apply_default_css=False, elem_id=f"{self.prefix}-table"
            )

    def build_list_buttons(self) -> None:
        """Buttons of this kind of jobs at the head of the list."""

    def action(self, title: str, name: str, variant: Any = "secondary") -> gr.Button:
        """A button of the chosen job, shown where it can be used."""
        return gr.Button(title, size="sm", variant=variant, elem_id=f"{self.prefix}-{name}", min_width=60, visible=False)

    def build_asking(self) -> None:
        """The question before a job is deleted, and the line that says what became of a click."""
        self.confirm_text = gr.HTML("", js_on_load=None, elem_id=f"{self.prefix}-confirm-text")
        with gr.Row(visible=False, elem_id=f"{self.prefix}-confirm") as self.confirm_box:
            self.really_button = gr.Button(
                "Really delete", variant="stop", size="sm", elem_id=f"{self.prefix}-really-delete", min_width=60
            )
            self.keep_button = gr.Button("Keep it", size="sm", elem_id=f"{self.prefix}-keep", min_width=60)
        self.notice = gr.HTML("", js_on_load=None, elem_id=f"{self.prefix}-notice")

    # What sets off what

    def wire_list(self, tab: gr.Tab, new_inputs: list[Any]) -> None:
        """Opening the tab, the clock, the list. `new_inputs`: what `first` is given."""
        here, shown = [self.view, self.chosen, self.mark], self.all_outputs
        tab.select(self.open_tab, [*here, *new_inputs], shown, **RAW)
        self.timer.tick(self.watch, here, self.seen_outputs, **QUICK)
        # Not "always_last": for a click during another one Gradio would send the first one's row again.
        chosen = self.table.click(self.choose_row, None, shown, trigger_mode="multiple", **QUICK)
        chosen.success(None, None, None, js=f"() => window.bdShow('{self.prefix}-one')", api_visibility="private")
        opened = self.new_button.click(self.open_new, new_inputs, shown, **RAW)
        opened.then(None, None, None, js=f"() => window.bdShow('{self.prefix}-new')", api_visibility="private")

    def wire_deleting(self) -> None:
        """Asking, and both answers. The focus goes where the hand goes on."""
        asking = [self.asked, self.confirm_box, self.confirm_text, self.notice]

        def then_focus(event: Any, *selectors: str) -> None:
            names = ", ".join(f"'{selector}'" for selector in selectors)
            event.then(None, None, None, js=f"() => window.bdFocus({names})", api_visibility="private")

        new, at = f"#{self.prefix}-new-button", f"#{self.prefix}"
        then_focus(self.delete_button.click(self.ask_delete, self.chosen, asking, **QUICK), f"{at}-keep")
        then_focus(self.keep_button.click(self.keep, None, asking[:3], **QUICK), f"{at}-delete", new)
        deleted = self.really_button.click(self.delete, self.asked, self.all_outputs, **QUICK)
        then_focus(deleted, f"{at}-table tr[aria-current] button", new, f"{at}-start")
