"""What the Train tab shows of the workspace's runs, and of the chosen one: read from their folders, sent where it has changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from biasdpo import models, runs
from biasdpo.engines import EnginePool
from biasdpo.errors import BiasDPOError, ConfigError
from biasdpo.ui import render, train_charts, train_probes, train_render
from biasdpo.ui.news import key, news
from biasdpo.ui.store import Store
from biasdpo.ui.train_curves import charts_of_run, logged_csv
from biasdpo.ui.train_data import Updates
from biasdpo.ui.train_reading import SeenRun, see
from biasdpo.workspace import Workspace, is_public_space

LOG_LINES = 200
_TICK_SECONDS = 1.0  # while a run is active
_SLOW_TICK_SECONDS = 5.0  # else: one may be started by the command line
_NO_CURVES = "Curves are drawn from the first logged step on."


class RunsView:
    """The tab's components of runs, and what is written into them.

    A page remembers, part by part, what it was sent last (`mark`): a tick of the clock sends only what is new.
    """

    store: Store
    pool: EnginePool
    machine: gr.HTML
    view: gr.State
    chosen: gr.Textbox
    mark: gr.State
    probe_at: gr.State
    log_open: gr.State
    timer: gr.Timer
    empty: gr.HTML
    list_box: gr.Column
    table: gr.HTML
    new_box: gr.Column
    run_box: gr.Column
    compare_box: gr.Column
    head: gr.HTML
    stop_button: gr.Button
    resume_button: gr.Button
    retry_button: gr.Button
    compare_button: gr.Button
    evaluate_button: gr.Button
    export_button: gr.Button
    zip_button: gr.Button
    delete_button: gr.Button
    confirm_box: gr.Row
    asked: gr.State
    confirm_text: gr.HTML
    note_saved: gr.HTML
    run_notice: gr.HTML
    download: gr.DownloadButton
    charts: gr.HTML
    probe_position: gr.HTML
    probe_buttons: gr.Row
    probes: gr.HTML
    note: gr.Textbox
    log: gr.HTML
    details: gr.HTML
    evaluate: gr.HTML
    waiting: set[str]  # runs that were queued when last seen

    @property
    def workspace(self) -> Workspace:
        return self.store.workspace

    @property
    def seen_outputs(self) -> list[Any]:
        """All that a tick of the clock may touch."""
        return [
            self.mark,
            self.timer,
            self.empty,
            self.list_box,
            self.table,
            self.head,
            self.stop_button,
            self.resume_button,
            self.retry_button,
            self.compare_button,
            self.evaluate_button,
            self.export_button,
            self.zip_button,
            self.delete_button,
            self.charts,
            self.probe_position,
            self.probe_buttons,
            self.probes,
            self.log,
            self.details,
            self.evaluate,
        ]

    @property
    def run_outputs(self) -> list[Any]:
        """All that choosing a run may touch."""
        boxes = [self.view, self.new_box, self.run_box, self.compare_box]
        own = [self.chosen, self.probe_at, self.note, self.note_saved, self.run_notice, self.download]
        asking = [self.confirm_box, self.confirm_text, self.asked]
        return [*self.seen_outputs, *boxes, *own, *asking]

    def turn_to(self, view: str) -> Updates:
        """One of the three panels: "new", "run" or "compare"."""
        return {
            self.view: view,
            self.new_box: gr.update(visible=view == "new" and not is_public_space()),
            self.run_box: gr.update(visible=view == "run"),
            self.compare_box: gr.update(visible=view == "compare"),
        }

    def every(self) -> list[SeenRun]:
        """All runs, the newest first."""
        return [see(run) for run in runs.list_runs(self.workspace)]

    def watch(self, view: str, chosen: str, mark: dict[str, int], probe_at: int | None, log_open: bool) -> Updates:
        """A tick of the clock."""
        try:
            every = self.every()
            self._make_room(every)
            return self._news(every, chosen if view == "run" else "", mark, probe_at, log_open)
        except (BiasDPOError, OSError) as exc:
            return self.unlisted(exc, mark)

    def unlisted(self, exc: Exception, mark: dict[str, int]) -> Updates:
        """The runs can't be read: said in place of the list, which the next tick that can read them brings back."""
        line = str(exc) if isinstance(exc, BiasDPOError) else f"The runs can't be read: {exc}; the list comes back when they can"
        said = (self.table, self.list_box)
        kept = {name: value for name, value in mark.items() if name not in map(key, said)}
        return {self.table: render.error(line), self.list_box: gr.update(visible=True), self.mark: kept}

    def _make_room(self, every: Sequence[SeenRun]) -> None:
        """A queued run's turn has come: what was loaded on the GPU since it was started gives way."""
        for run in every:
            if run.status.state == "queued":
                self.waiting.add(run.id)
            elif run.id in self.waiting:
                self.waiting.discard(run.id)
                if run.status.state == "running" and (run.config is None or run.config.accelerate != "cpu"):
                    self.pool.free_gpu()

    def show_run(self, run_id: str, log_open: bool, notice: str = "") -> Updates:
        """A run was chosen or started: all of it."""
        every = self.every()
        run = next((run for run in every if run.id == run_id), None)
        if run is None:
            return self._news(every, "", {}, None, False) | self.turn_to("new") | {self.chosen: ""}
        return (
            self._news(every, run_id, {}, None, log_open)
            | self.turn_to("run")
            | {
                self.chosen: run_id,
                self.probe_at: None,
                self.note: run.folder.read_note(),
                self.note_saved: "",
                self.run_notice: notice,
                self.confirm_box: gr.update(visible=False),
                self.confirm_text: "",
                self.asked: "",
                self.download: gr.update(visible=False),
            }
        )

    def _news(self, every: Sequence[SeenRun], chosen: str, mark: dict[str, int], probe_at: int | None, log_open: bool) -> Updates:
        """What has changed since `mark`."""
        parts: Updates = {
            self.timer: gr.update(value=_TICK_SECONDS if any(run.active for run in every) else _SLOW_TICK_SECONDS, active=True),
            self.empty: gr.update(visible=not every),
            self.list_box: gr.update(visible=bool(every)),
            self.table: train_render.table(every, chosen),
        }
        run = next((run for run in every if run.id == chosen), None)
        ended = hash(repr((run.id, run.status, run.held_out, run.has_adapter))) if run is not None and not run.active else 0
        if run is not None and (run.active or mark.get("ended") != ended):  # the files of a run that has ended are read once
            parts |= self._parts(run, probe_at, log_open)
        new, marked = news(parts, mark)
        return new | {self.mark: marked | {"ended": ended}}

    def _parts(self, run: SeenRun, probe_at: int | None, log_open: bool) -> Updates:
        state, folder = run.status.state, run.folder
        here = not is_public_space()
        drawn = charts_of_run(folder.read_metrics(), folder.read_speed(), run.baseline, run.status.best_step)
        probes = folder.read_probes()
        expected = run.config is not None and run.config.probe_every > 0
        return {
            self.head: train_render.head(run),
            self.stop_button: gr.update(visible=here and state in ("queued", "running", "stopping")),
            self.resume_button: gr.update(visible=here and state in ("stopped", "interrupted", "failed")),
            self.retry_button: gr.update(visible=here and run.config is not None),
            self.compare_button: gr.update(visible=run.has_adapter and not run.active),
            self.evaluate_button: gr.update(visible=here and run.has_adapter and not run.active),
            self.export_button: gr.update(visible=here and run.has_adapter and not run.active),
            self.zip_button: gr.update(visible=here and run.has_adapter and not run.active),
            self.delete_button: gr.update(visible=here and not run.active),
            self.charts: train_charts.charts(drawn, _NO_CURVES, [run.id]),
            self.probe_position: train_probes.position(probes, probe_at),
            self.probe_buttons: gr.update(visible=len(train_probes.steps(probes)) > 1),
            self.probes: train_probes.probes(probes, probe_at, expected),
            self.log: self.log_of(run) if log_open else "",
            self.details: train_render.details(run),
            self.evaluate: train_render.evaluate_command(run) if here and run.has_adapter and not run.active else "",
        }

    def log_of(self, run: SeenRun) -> str:
        """The end of a run's log; on a public Space it may name folders that are none of a visitor's business."""
        if is_public_space():
            return render.note("Logs are not shown on a public Space.")
        return train_render.log(run.folder.log_tail(LOG_LINES))

    def machine_note(self) -> str:
        """What a run does to the models that are loaded."""
        return train_render.refused() if is_public_space() else train_render.machine(models.free_gpu_memory_gb())

    def logged_csv(self, asked: Any) -> str:
        """The numbers of one chart as the runs logged them, for its download. `asked`: {"chart": its id, "runs": run ids}."""
        chart, names = (asked.get("chart"), asked.get("runs")) if isinstance(asked, dict) else (None, None)
        if not isinstance(chart, str) or not isinstance(names, list):
            raise ConfigError(f"A chart's id and its runs are needed: got {asked!r:.80}; use the chart's own button")
        folders = [runs.show(str(name), self.workspace).folder for name in names]
        return logged_csv(chart, ((folder.id, folder.read_metrics(), folder.read_speed()) for folder in folders))
