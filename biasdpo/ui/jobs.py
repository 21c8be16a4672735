"""Jobs on a page: the list, the chosen job's state, and its buttons; the same on Train, Measure and Export."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from typing import Any

import gradio as gr

from biasdpo.access import is_owner, require_owner
from biasdpo.errors import JobError
from biasdpo.jobs import store
from biasdpo.jobs.job import Job, Kind
from biasdpo.ui.components import QUICK, Studio, Updates, duration, escape, handles, local_time

TICK_SECONDS = 4.0

NOUNS: dict[Kind, str] = {"train": "run", "evaluate": "evaluation", "export": "export"}
_DELETES: dict[Kind, str] = {
    "train": "the run with its adapter, checkpoints and log",
    "evaluate": "the evaluation with its scores and log",
    "export": "the export with its file and log",
}
_RESUME_WORDS = {"failed": "Retry", "interrupted": "Resume", "stopped": "Resume"}
SMALL: dict[str, Any] = {"size": "sm", "visible": False, "min_width": 90}
"""Look of the buttons in `JobPanel.actions`, which are shown when the chosen job allows them."""
_POLL_SECONDS = 1.0
_CURVES_SECONDS = 12.0


class JobPanel:
    """The list of jobs of one kind and the chosen one, with its state and buttons.

    row_of   a job's row under `headers`; its first cell is the job's id
    detail   the outcome of a job, in Markdown

    A tab adds what it shows of the job below, inside `with panel.box:`, then calls `watch` and `wire`.
    """

    def __init__(
        self,
        studio: Studio,
        kind: Kind,
        headers: Sequence[str],
        row_of: Callable[[Job], list[Any]],
        detail: Callable[[Job], str] = lambda _job: "",
    ) -> None:
        self.studio, self.kind, self.row_of, self.detail = studio, kind, row_of, detail
        label = f"{NOUNS[kind].capitalize()}s"
        look: dict[str, Any] = {"interactive": False, "visible": False, "max_height": 190, "buttons": [], "type": "array"}
        self.table = gr.Dataframe(headers=list(headers), label=label, elem_id=f"{kind}-jobs", **look)
        with gr.Column(visible=False, elem_id=f"{kind}-job") as self.box:
            self.head = gr.Markdown(elem_id=f"{kind}-head")
            with gr.Row(elem_classes="actions") as self.actions:  # a tab may add its buttons
                self.stop = gr.Button("Stop", variant="stop", elem_id=f"{kind}-stop", **SMALL)
                self.resume = gr.Button("Resume", elem_id=f"{kind}-resume", **SMALL)
                self.delete = gr.Button("Delete", elem_id=f"{kind}-delete", **SMALL)
            with gr.Row(visible=False, elem_id=f"{kind}-confirm") as self.confirm:
                self.question = gr.Markdown()
                self.confirm_delete = gr.Button("Delete", variant="stop", size="sm", elem_id=f"{kind}-confirm-delete")
                self.keep = gr.Button("Keep", size="sm", elem_id=f"{kind}-keep")
        # Hidden: id of the chosen job, "" for none; kept by the page when the app restarts.
        self.selected = studio.signal("chosen", elem_id=f"{kind}-selected")
        # By file of the job's folder; beside them "list", "status" (all that the job is) and "state" (what changes seldom).
        self.versions = {name: studio.signal(name) for name in ("list", "status", "state")}
        with studio.signals:
            self.timer = gr.Timer(TICK_SECONDS, active=False)

    # What a tab uses

    def watch(self, file: str, render: Callable[..., Updates], outputs: Sequence[Any], inputs: Sequence[Any] = ()) -> None:
        """Call `render(job, *inputs)` when another job is chosen or `file` of its folder changes; "state": when its state does.

        Call it while building the tab, before `wire`.
        """
        if file not in self.versions:
            self.versions[file] = self.studio.signal(file)
        version = self.versions[file]

        def show(seen: str, *values: Any) -> Updates:
            return render(self.job(seen.partition("\n")[0]), *values)

        version.change(handles(show), [version, *inputs], list(outputs), **QUICK)

    def build_note(self) -> None:
        """The user's note on the job; saved when the field loses focus."""
        note = gr.Textbox(label="Note", placeholder="What you tried and why", max_lines=8, elem_id=f"{self.kind}-note")

        def save(selected: str, text: str) -> None:
            if selected:
                store.write_note(selected, self.studio.workspace, text, self.kind)

        self.watch("note.txt", lambda job: {note: "" if job is None else job.folder.read_note()}, [note])
        gr.on([note.blur, note.submit], handles(save), [self.selected, note], None, **QUICK)

    def build_log(self) -> None:
        """The log, folded away and read while it is open."""
        opened = gr.State(False)
        with gr.Accordion("Log", open=False, visible=False, elem_id=f"{self.kind}-log-box") as box:
            log = gr.Textbox(label="Log", show_label=False, lines=8, max_lines=20, interactive=False, elem_id=f"{self.kind}-log")

        def show(job: Job | None, is_open: bool) -> Updates:
            return {log: _log_of(job) if is_open else gr.skip()}

        self.watch("log.txt", show, [log], [opened])
        self.watch("state", lambda job: {box: gr.Accordion(visible=job is not None)}, [box])
        box.expand(handles(lambda selected: (True, _log_of(self.job(selected)))), self.selected, [opened, log], **QUICK)
        box.collapse(lambda: (False, ""), None, [opened, log], **QUICK)

    def wire(self, tab: gr.Tab) -> None:
        """Connect the list, the buttons and the clock; after every `watch`."""
        looked_at = [self.timer, *self.versions.values()]
        refresh = handles(self.refresh)
        chosen = [self.selected, *looked_at]
        asked = [self.selected, self.studio.requests[_TABS[self.kind]]]
        tab.select(refresh, asked, chosen, **QUICK)
        self.timer.tick(refresh, asked, chosen, **QUICK)
        self.studio.on_request(_TABS[self.kind], self._open, [], chosen)
        self.table.select(handles(self._choose), None, chosen, **QUICK)
        self.versions["list"].change(handles(self._rows), None, self.table, **QUICK)
        self.watch("status", lambda job: {self.head: "" if job is None else head(job, self.detail(job))}, [self.head])
        self.watch("state", self._buttons, [self.box, self.stop, self.resume, self.delete, self.confirm], [self.question])
        self.studio.changes.append(self.versions["state"].change)
        self.stop.click(handles(self._stop), self.selected, chosen, **QUICK)
        self.resume.click(handles(self._resume), self.selected, chosen, **QUICK)
        self.delete.click(handles(self._ask), self.selected, [self.confirm, self.question], **QUICK)
        self.keep.click(lambda: gr.Row(visible=False), None, self.confirm, **QUICK)
        self.confirm_delete.click(handles(self._delete), self.selected, [self.confirm, *chosen], **QUICK)
        address = f"(job) => window.bdAddress('{_TABS[self.kind]}', job)"  # so that a reload shows the same job
        self.selected.change(None, self.selected, None, js=address, api_visibility="private")

    def chosen_outputs(self) -> list[Any]:
        """The outputs of a handler that returns `show(job_id)`: a tab's Start button."""
        return [self.selected, self.timer, *self.versions.values()]

    def show(self, job_id: str) -> Updates:
        """Choose a job, e.g. one that was just started."""
        return {self.selected: job_id} | self._versions(job_id)

    def job(self, selected: str) -> Job | None:
        """The chosen job as it is now; None where nothing is chosen or it was deleted."""
        if not selected:
            return None
        try:
            return store.find_job(selected, self.studio.workspace, self.kind)
        except JobError:
            return None

    # Handlers

    def refresh(self, selected: str, request: dict[str, Any]) -> Updates:
        """Look at the jobs' folders; a changed version triggers an event, which redraws that part."""
        return self._open(request) if self.job(selected) is None else self._versions(selected)

    def _default(self) -> str:
        """The active job, else the newest."""
        jobs = store.list_jobs(self.studio.workspace, self.kind)
        return next((job.id for job in jobs if job.is_active), jobs[0].id if jobs else "")

    def _versions(self, selected: str) -> Updates:
        jobs = store.list_jobs(self.studio.workspace, self.kind)
        job = next((job for job in jobs if job.id == selected), None)
        seen: dict[str, Any] = {"status": job, "state": job and (job.state, job.has_result, job.has_adapter)}
        seen |= {file: (job and job.is_active, _stamp(job, file)) for file in self.versions.keys() - {"list", *seen}}
        values = {name: f"{selected}\n{_digest(value)}" for name, value in seen.items()}
        values["list"] = f"{len(jobs)}\n{_digest([self.row_of(job) for job in jobs])}"
        active = any(job.is_active for job in jobs)
        return {self.versions[name]: value for name, value in values.items()} | {self.timer: gr.Timer(active=active)}

    def _open(self, request: dict[str, Any]) -> Updates:
        job_id = request.get("job")
        return self.show(job_id if isinstance(job_id, str) and self.job(job_id) is not None else self._default())

    def _choose(self, event: gr.SelectData) -> Updates:
        return self.show(str(event.row_value[0]))

    def _rows(self) -> Any:
        rows = [self.row_of(job) for job in store.list_jobs(self.studio.workspace, self.kind)]
        return gr.Dataframe(value=rows, visible=bool(rows))

    def _buttons(self, job: Job | None, question: str | None) -> Updates:
        if job is None:
            return {self.box: gr.Column(visible=False), self.confirm: gr.Row(visible=False)}
        may = is_owner()
        resumable = job.state in _RESUME_WORDS and job.loose is None and job.config is not None
        return {
            self.box: gr.Column(visible=True),
            self.stop: gr.Button(visible=may and job.is_active, interactive=job.state != "stopping"),
            self.resume: gr.Button(
                _RESUME_WORDS.get(job.state, "Resume"),
                variant="secondary" if self.kind == "train" and job.state == "failed" else "primary",
                visible=may and resumable,
            ),
            self.delete: gr.Button(visible=may and not job.is_active),
            # A question about this very job stays: it may have been asked before this came.
            **({} if (question or "").startswith(_asked(job.id)) else {self.confirm: gr.Row(visible=False)}),
        }

    def _stop(self, selected: str) -> Updates:
        require_owner("Stopping a job")
        store.stop_job(selected, self.studio.workspace, self.kind)
        return self._versions(selected)

    def _resume(self, selected: str) -> Updates:
        require_owner("Resuming a job")
        store.resume_job(selected, self.studio.workspace, self.kind)
        return self._versions(selected)

    def _ask(self, selected: str) -> Updates:
        question = f"{_asked(selected)}, {_DELETES[self.kind]}? This can't be undone."
        return {self.confirm: gr.Row(visible=True), self.question: question}

    def _delete(self, selected: str) -> Updates:
        require_owner("Deleting a job")
        store.delete_job(selected, self.studio.workspace, self.kind)
        return {self.confirm: gr.Row(visible=False)} | self.show(self._default())


_TABS: dict[Kind, str] = {"train": "train", "evaluate": "measure", "export": "export"}


def _asked(job_id: str) -> str:
    return f"Delete **{escape(job_id)}**"


def run_estimate(shown: Callable[[float], Any], estimate: Callable[..., Any], *given: Any) -> Generator[Any, None, Any]:
    """Return what `estimate` finds in a process of its own; until then yield `shown(seconds)`. Closing this generator, which
    Gradio does when the page is closed or by `cancels`, ends the process."""
    began, ended = time.monotonic(), threading.Event()
    with ThreadPoolExecutor(1) as executor:
        as_caller = copy_context().run  # the thread asks for whoever asked here
        task = executor.submit(as_caller, estimate, *given, cancelled=ended.is_set)
        try:
            while not wait([task], _POLL_SECONDS).done:
                yield shown(time.monotonic() - began)
            return task.result()
        finally:
            ended.set()


def head(job: Job, detail: str = "") -> str:
    """The chosen job in Markdown: its state, its error with the remedy, the outcome, notes."""
    status = job.status
    parts = [f"### {escape(job.id)}", f"**{state_word(job)}**"]
    if job.kind == "train" and status.total_steps and job.state != "finished":
        parts.append(f"step {status.step:,} of {status.total_steps:,}")
    if job.is_active and status.phase:
        parts.append(escape(status.phase))
    if job.is_active and status.eta_seconds is not None:
        parts.append(f"about {duration(status.eta_seconds)} left")
    if job.started_at:
        parts.append(f"started {local_time(job.started_at)}")
    if status.tokens_per_second is not None and job.is_active:
        parts.append(f"{status.tokens_per_second:,.0f} tokens/s")
    line = parts[0] + "\n" + " · ".join(parts[1:])
    if job.state in ("running", "stopping"):
        share = status.share or _share(job)  # before a run's first step: of what comes before it
        line += f'\n\n<progress value="{share:.3f}" max="1" aria-label="Progress"></progress>'
    if status.waits_for:
        line += f"\n\nWaiting for {escape(status.waits_for)}, which is using the same device."
    if job.error:
        line += f"\n\n> ⚠ {escape(job.error)}"
    line += f"\n\n{detail}" if detail else ""
    return line + (f"\n\n{escape('. '.join(status.notes))}." if status.notes else "")


def state_word(job: Job) -> str:
    """A job's state for people: "Running · 45%", "Finished"."""
    share, word = _share(job), str(job.state).capitalize()
    return f"{word} · {share:.0%}" if job.is_active and share else word


def _share(job: Job) -> float:
    """How much of the job is done, from 0 to 1; 0 while unknown."""
    status = job.status
    if status.progress and (total := sum(part.total for part in status.progress)):
        return sum(part.done for part in status.progress) / total
    if job.kind == "train":
        return status.step / status.total_steps if status.total_steps else 0.0
    return status.share


def _log_of(job: Job | None) -> str:
    if job is not None and not is_owner():  # it may name folders
        return "The log is shown to this app's owner only."
    return "" if job is None else job.log_tail(200)


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _stamp(job: Job | None, file: str) -> tuple[int, int]:
    """When a file of the job's folder was last written, and its size; zeros where there is none."""
    if job is None:
        return 0, 0
    try:
        status = (job.folder.path / file).stat()
    except OSError:
        return 0, 0
    if job.is_active and file == "metrics.jsonl":  # drawing the curves is the page's greatest cost
        return int(status.st_mtime // _CURVES_SECONDS), 0
    return status.st_mtime_ns, status.st_size
