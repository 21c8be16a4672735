"""What the Export tab shows of the workspace's exports, and of the chosen one: read from their files, sent where it changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from biasdpo import exports
from biasdpo.exports import Export, jobs
from biasdpo.ui import export_render
from biasdpo.ui.jobs_view import JobsView
from biasdpo.ui.news import Mark, Updates
from biasdpo.ui.train_render import size
from biasdpo.workspace import is_public_space


class ExportsView(JobsView[Export]):
    """The tab's components of exports, and what is written into them."""

    noun = "export"
    tab_id = "export"

    machine: gr.HTML
    head: gr.HTML
    cancel_button: gr.Button
    use_button: gr.Button
    download: gr.DownloadButton
    again_button: gr.Button
    proof: gr.HTML
    fallbacks: gr.HTML
    elsewhere_box: gr.Column
    elsewhere: gr.HTML
    modelfile: gr.HTML
    served: set[Path]  # files that Gradio was told to serve

    @property
    def seen_outputs(self) -> list[Any]:
        buttons = [self.cancel_button, self.use_button, self.download, self.again_button, self.delete_button]
        shown = [self.head, self.proof, self.fallbacks, self.elsewhere_box, self.elsewhere, self.modelfile]
        return [*self.list_outputs, *buttons, *shown]

    def every(self) -> list[Export]:
        return exports.list_exports(self.workspace)

    def id_of(self, job: Export) -> str:
        return jobs.id_of(job, self.workspace)

    def name_of(self, job: Export) -> str:
        return job.out.name

    def found(self, job_id: str) -> Export:
        return exports.find(job_id, self.workspace)

    def deleting(self, job: Export) -> str:
        return export_render.deleting(job)

    def delete_files(self, job: Export) -> None:
        exports.delete(job)

    def listed(self, every: Sequence[Export], chosen: str) -> str:
        return export_render.table([(self.id_of(export), export) for export in every], chosen)

    def parts_of(self, job: Export, _mark: Mark) -> tuple[Updates, Mark]:
        return self._parts(job), {}

    def _parts(self, export: Export) -> Updates:
        here = not is_public_space()
        record = export.record
        usable = here and record is not None and not export.is_active
        return {
            self.head: export_render.head(export),
            self.cancel_button: gr.update(visible=here and export.is_active),
            self.use_button: gr.update(visible=usable),
            self.download: self._download(export) if here else gr.update(visible=False),
            self.again_button: gr.update(visible=here and export.state in ("failed", "interrupted")),
            self.delete_button: gr.update(visible=here and not export.is_active),
            self.proof: export_render.proof_panel(export),
            self.fallbacks: export_render.fallbacks(record),
            self.elsewhere_box: gr.update(visible=usable),
            self.elsewhere: export_render.elsewhere(record) if usable and record is not None else "",
            self.modelfile: export_render.modelfile(record) if usable and record is not None else "",
        }

    def _download(self, export: Export) -> Any:
        """The button with the file itself, served to whoever has its address: a copy in Gradio's cache could fill the disk."""
        if export.is_active or not export.out.is_file():
            return gr.update(visible=False)
        if export.out not in self.served:
            gr.set_static_paths([export.out])
            self.served.add(export.out)
        return gr.update(label=f"Download ({size(export.out.stat().st_size)})", value=str(export.out), visible=True)
