"""What the Export tab shows of the workspace's exports, and of the chosen one: read from their files, sent where it changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from biasdpo import exports
from biasdpo.errors import BiasDPOError
from biasdpo.exports import Export
from biasdpo.exports.jobs import id_of
from biasdpo.ui import export_render, render
from biasdpo.ui.news import Mark, Updates, key, news
from biasdpo.ui.store import Store
from biasdpo.ui.train_render import size
from biasdpo.workspace import Workspace, is_public_space

_TICK_SECONDS = 1.0  # while an export is under way
_SLOW_TICK_SECONDS = 5.0  # else: one may be written by the command line

Listed = list[tuple[str, Export]]


class ExportsView:
    """The tab's components of exports, and what is written into them. `mark`: see `news`."""

    store: Store
    machine: gr.HTML
    view: gr.State
    chosen: gr.Textbox
    mark: gr.State
    timer: gr.Timer
    empty: gr.HTML
    list_box: gr.Column
    table: gr.HTML
    new_box: gr.Column
    one_box: gr.Column
    head: gr.HTML
    cancel_button: gr.Button
    use_button: gr.Button
    download: gr.DownloadButton
    again_button: gr.Button
    delete_button: gr.Button
    asked: gr.State
    confirm_box: gr.Row
    confirm_text: gr.HTML
    notice: gr.HTML
    proof: gr.HTML
    fallbacks: gr.HTML
    elsewhere_box: gr.Column
    elsewhere: gr.HTML
    modelfile: gr.HTML
    served: set[Path]  # files that Gradio was told to serve

    @property
    def workspace(self) -> Workspace:
        return self.store.workspace

    @property
    def seen_outputs(self) -> list[Any]:
        """All that a tick of the clock may touch."""
        buttons = [self.cancel_button, self.use_button, self.download, self.again_button, self.delete_button]
        shown = [self.head, self.proof, self.fallbacks, self.elsewhere_box, self.elsewhere, self.modelfile]
        return [self.mark, self.timer, self.empty, self.list_box, self.table, *buttons, *shown]

    @property
    def one_outputs(self) -> list[Any]:
        """All that choosing an export may touch."""
        asking = [self.asked, self.confirm_box, self.confirm_text]
        return [*self.seen_outputs, self.view, self.new_box, self.one_box, self.chosen, self.notice, *asking]

    def turn_to(self, view: str) -> Updates:
        """One of the two panels: "new" or "one"."""
        return {
            self.view: view,
            self.new_box: gr.update(visible=view == "new" and not is_public_space()),
            self.one_box: gr.update(visible=view == "one"),
        }

    def every(self) -> Listed:
        """All exports by id, the newest first."""
        return [(id_of(export, self.workspace), export) for export in exports.list_exports(self.workspace)]

    def watch(self, view: str, chosen: str, mark: Mark) -> Updates:
        """A tick of the clock."""
        try:
            return self.changed(self.every(), chosen if view == "one" else "", mark)
        except (BiasDPOError, OSError) as exc:
            return self.unlisted(exc, mark)

    def unlisted(self, exc: Exception, mark: Mark) -> Updates:
        """The exports can't be read: said in place of the list, which the next tick that can read them brings back."""
        line = str(exc) if isinstance(exc, BiasDPOError) else f"The exports can't be read: {exc}; they come back when they can"
        said = (self.table, self.list_box)
        kept = {name: value for name, value in mark.items() if name not in map(key, said)}
        return {self.table: render.error(line), self.list_box: gr.update(visible=True), self.mark: kept}

    def show_one(self, export_id: str, notice: str = "") -> Updates:
        """An export was chosen or started: all of it. One that is gone: the newest of the others, or the panel for a new one."""
        every = self.every()
        known = [name for name, _ in every]
        shown = export_id if export_id in known else next(iter(known), "")
        return (
            ({} if shown or is_public_space() else self.fresh(notice))
            | self.changed(every, shown, {})
            | self.turn_to("one" if shown else "new")
            | {
                self.chosen: shown,
                self.notice: notice,
                self.asked: "",
                self.confirm_box: gr.update(visible=False),
                self.confirm_text: "",
            }
        )

    def fresh(self, notice: str) -> Updates:
        """The panel for a new export as it is at first; the panel's own."""
        raise NotImplementedError

    def changed(self, every: Listed, chosen: str, mark: Mark) -> Updates:
        """What has changed since `mark`."""
        active = any(export.is_active for _, export in every)
        parts: Updates = {
            self.timer: gr.update(value=_TICK_SECONDS if active else _SLOW_TICK_SECONDS, active=True),
            self.empty: gr.update(visible=not every),
            self.list_box: gr.update(visible=bool(every)),
            self.table: export_render.table(every, chosen),
        }
        export = next((export for name, export in every if name == chosen), None)
        if export is not None:
            parts |= self._parts(export)
        new, marked = news(parts, mark)
        return new | {self.mark: marked}

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


def active_or_newest(every: Sequence[tuple[str, Export]]) -> str:
    """The export that is under way, else the newest; "" where there is none."""
    ids = [name for name, export in every if export.is_active] + [name for name, _ in every]
    return next(iter(ids), "")
