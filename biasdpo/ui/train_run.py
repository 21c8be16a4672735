"""The panel of one run: what its buttons do. What it shows is in `train_watch`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache

from biasdpo import models, runs
from biasdpo.errors import BiasDPOError, ConfigError, RunError
from biasdpo.ui import render, train_probes, train_render
from biasdpo.ui.train_data import Updates, told
from biasdpo.ui.train_reading import SeenRun, see, size_of
from biasdpo.ui.train_watch import RunsView
from biasdpo.workspace import refuse_on_public_space


class RunActions(RunsView):
    """The handlers of one run's buttons."""

    pick_adapter: Callable[[str, str], Updates]
    tabs: gr.Tabs

    def _run(self, run_id: Any) -> SeenRun:
        if not isinstance(run_id, str) or not run_id:
            raise ConfigError("No run is chosen: choose one of the list")
        return see(runs.show(run_id, self.workspace))

    def _again(self, run_id: str, log_open: bool, notice: str) -> Updates:
        """After something was done to a run: all of it as it is now, without what was asked before."""
        return self.show_run(run_id, log_open, notice)

    def choose(self, event: gr.EventData, log_open: bool) -> Updates:
        """A row of the list was chosen."""
        wanted = event._data.get("id") if isinstance(event._data, dict) else None
        try:
            return self.show_run(self._run(wanted).id, log_open)
        except BiasDPOError as exc:
            return self.unlisted(exc, {})

    def stop(self, run_id: Any, log_open: bool) -> Updates:
        """Ask the run to stop."""
        try:
            refuse_on_public_space("Stopping a run")
            runs.stop(self._run(run_id).id, self.workspace)
        except BiasDPOError as exc:
            return {self.run_notice: render.error(str(exc))}
        return self._again(run_id, log_open, render.note("Asked to stop: a checkpoint is saved after this step."))

    def resume(self, run_id: Any, log_open: bool) -> Updates:
        """Go on from the last checkpoint."""
        try:
            refuse_on_public_space("Training")
            run = self._run(run_id)
            freed = self.pool.free_gpu()
            runs.resume(run.id, self.workspace)
        except BiasDPOError as exc:
            return {self.run_notice: render.error(str(exc))}
        text = "Goes on from the last checkpoint." + (f" Freed on the GPU: {', '.join(freed)}." if freed else "")
        return self._again(run_id, log_open, render.note(text))

    # Delete

    def ask_delete(self, run_id: Any) -> Updates:
        """Ask first, and say what is lost. The answer is of this run, whichever is chosen meanwhile."""
        try:
            run = self._run(run_id)
        except BiasDPOError as exc:
            return {self.run_notice: render.error(str(exc))}
        text = train_render.deleting(run, size_of(run.folder.path))
        return {self.asked: run.id, self.confirm_box: gr.update(visible=True), self.confirm_text: text}

    def keep(self) -> Updates:
        """Nothing is to be deleted."""
        return {self.asked: "", self.confirm_box: gr.update(visible=False), self.confirm_text: ""}

    def delete(self, asked: Any) -> Updates:
        """Delete it; the newest of the others is shown, or the panel for a new one."""
        try:
            run = self._run(asked)
            runs.delete(run.id, self.workspace)
        except BiasDPOError as exc:
            return self.keep() | {self.run_notice: render.error(str(exc))}
        others = self.every()
        return self.keep() | self.show_run(others[0].id if others else "", False, render.note(f"Run {run.id} was deleted."))

    # Note, log, probes

    def save_note(self, run_id: Any, text: Any) -> str:
        """What the user writes about a run."""
        try:
            runs.write_note(self._run(run_id).id, self.workspace, text if isinstance(text, str) else "")
        except BiasDPOError as exc:
            return render.error(str(exc))
        return render.note(f"Saved with run {run_id}.")  # its name, since another may be shown by now

    def open_log(self, run_id: Any) -> Updates:
        """The log was unfolded."""
        try:
            return {self.log_open: True, self.log: self.log_of(self._run(run_id))}
        except BiasDPOError as exc:
            return {self.log_open: True, self.log: render.error(str(exc))}

    def turning(self, by: int) -> Callable[..., Updates]:
        """The handler of "earlier" and "later"."""

        def turn(run_id: Any, probe_at: int | None) -> Updates:
            try:
                rows = self._run(run_id).folder.read_probes()
            except BiasDPOError as exc:
                return {self.run_notice: render.error(str(exc))}
            at = train_probes.turned(rows, probe_at, by)
            return {
                self.probe_at: at,
                self.probe_position: train_probes.position(rows, at),
                self.probes: train_probes.probes(rows, at, expected=True),
            }

        return turn

    # What next

    def open_in_compare(self, run_id: Any) -> Updates:
        """The Compare tab, with this run's model and adapter."""
        try:
            run = self._run(run_id)
            if run.config is None or not run.has_adapter:
                raise RunError(f"Run {run.id!r} has no adapter yet: wait until it has finished")
        except BiasDPOError as exc:
            return {self.run_notice: render.error(str(exc))}
        return self.pick_adapter(run.config.model, run.id) | {self.tabs: gr.Tabs(selected="compare")}

    def export_zip(self, run_id: Any) -> Iterator[Updates]:
        """The adapter's folder as it is, for PEFT. (As a GGUF, for llama.cpp: the Export tab.)"""
        yield {self.run_notice: render.busy("Exporting …"), self.download: gr.update(visible=False)}
        try:
            refuse_on_public_space("Export")
            run = self._run(run_id)
            with tempfile.TemporaryDirectory(prefix="biasdpo-export-") as folder:
                file = self._zip(run, Path(folder))
                # Gradio serves its own cache to whoever has the address, and nothing else: the workspace stays closed.
                served = save_file_to_cache(file, self.download.GRADIO_CACHE)
                size = train_render.size(file.stat().st_size)
        except Exception as exc:
            yield {self.run_notice: render.error(told(exc, "Not exported"))}
            return
        yield {
            self.run_notice: render.note(f"Ready: {file.name}, {size}."),
            self.download: gr.update(label=f"Download {file.name}", value=served, visible=True),
        }

    def _zip(self, run: SeenRun, folder: Path) -> Path:
        models.from_run(self.workspace, run.id)  # a folder that is no adapter has its own line
        return Path(shutil.make_archive(str(folder / f"{run.id}-adapter"), "zip", run.folder.adapter))
