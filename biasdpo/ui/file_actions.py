"""What the Data set tab does with files: import after a preview, export."""

from __future__ import annotations

import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache

from biasdpo import dataset
from biasdpo.dataset import HUB, ColumnMapping
from biasdpo.dataset.importing import import_name
from biasdpo.errors import BiasDPOError, ConfigError
from biasdpo.ui import file_render, render
from biasdpo.ui.store import Store
from biasdpo.workspace import ASSETS, refuse_on_public_space

Updates = dict[Any, Any]
ORIGINS = {"file": "A file", "hub": "A data set of the Hub", "seed": "The shipped seed set"}
FORMATS = {".jsonl": "JSONL", ".csv": "CSV", ".parquet": "Parquet"}
SEED_SET = ASSETS / "seed_pairs.jsonl"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_SHOWN_ROWS = 5
_TELL_SECONDS = 0.5  # between two counts of an import that takes long


@dataclass(frozen=True)
class Previewed:
    """What was previewed, and is imported: kept with the visitor's own page."""

    source: str
    name: str
    columns: tuple[str, ...]
    guess: ColumnMapping

    def mapping(self, picked: tuple[Any, ...]) -> ColumnMapping:
        """The guess with the columns that were picked: prompt, chosen, rejected, category, target group."""
        fields = ("prompt", "chosen", "rejected", "category", "target_group")
        given = dict(zip(fields, (column or "" for column in picked), strict=True))
        for field, column in given.items():
            if column not in ("", *self.columns):
                raise ConfigError(f"The column for {field} is none of this file's: choose one of the list")
        if given["prompt"] != self.guess.prompt:  # these belong to the prompt's column that was recognised
            given |= {"input": "", "history": ""}
        return replace(self.guess, **given)


class FileActions:
    """Import and export. On a public Space the functions behind them refuse, and the page shows what they say."""

    store: Store
    previewed: gr.State
    import_notice: gr.HTML
    preview_box: gr.Column
    pickers: list[gr.Dropdown]
    preview: gr.HTML
    imported: gr.HTML
    export_notice: gr.HTML
    export_box: gr.Row
    download: gr.DownloadButton
    download_card: gr.DownloadButton

    # Import

    def choose_origin(self, origin: Any) -> tuple[Any, Any]:
        """File or Hub: show what that one needs."""
        return gr.update(visible=origin == "file"), gr.update(visible=origin == "hub")

    def show_preview(self, origin: Any, file: Any, hub: Any) -> Iterator[Updates]:
        """Read the first rows of a source, guess its columns, and show both."""
        yield self._put_away() | {self.import_notice: render.busy("Reading the first rows …"), self.imported: ""}
        source = ""
        try:
            refuse_on_public_space("Import")  # before any word on what was named
            source = _source(origin, file, hub)
            seen = dataset.preview(source, rows=_SHOWN_ROWS)
        except Exception as exc:
            yield {self.import_notice: render.error(_told(exc, "Not read", source))}
            return
        known = Previewed(source, import_name(source), seen.columns, seen.mapping)
        choices = file_render.mapping_choices(seen.columns)
        yield {
            self.previewed: known,
            self.import_notice: "",
            self.preview_box: gr.update(visible=True),
            self.preview: file_render.preview(seen, known.name),
        } | {
            picker: gr.update(choices=choices, value=guess)
            for picker, guess in zip(self.pickers, file_render.guessed(seen.mapping), strict=True)
        }

    def map_columns(self, previewed: Previewed | None, *picked: Any) -> Updates:
        """A column was picked by hand: the first rows as they would be now."""
        try:
            known = _known(previewed)
            seen = dataset.preview(known.source, known.mapping(picked), _SHOWN_ROWS)
        except Exception as exc:
            return {self.import_notice: render.error(_told(exc, "Not read", previewed.source if previewed else ""))}
        return {self.import_notice: "", self.preview: file_render.preview(seen, known.name)}

    def import_rows(self, origin: Any, file: Any, hub: Any, previewed: Previewed | None, *picked: Any) -> Iterator[Updates]:
        """Import what was previewed. Where the page is closed meanwhile, the thread goes on: all of it is stored, or nothing."""
        rows = 0

        def on_row() -> None:
            nonlocal rows
            rows += 1

        yield {self.import_notice: file_render.reading(0), self.imported: ""}
        try:
            refuse_on_public_space("Import")
            known = _known(previewed)
            if _source(origin, file, hub) != known.source:
                raise ConfigError("Another source was named since this preview: press Preview again")
            mapping = known.mapping(picked)
            for name, column in (("chosen", mapping.chosen), ("rejected", mapping.rejected)):
                if not column:
                    raise ConfigError(f"No column is {name}: choose one of the list above")
            with ThreadPoolExecutor(1) as pool:
                task = pool.submit(dataset.import_file, self.store.workspace, known.source, mapping, known.name, on_row)
                while wait([task], _TELL_SECONDS).not_done:
                    yield {self.import_notice: file_render.reading(rows)}
            done = task.result()
        except Exception as exc:
            yield {self.import_notice: render.error(_told(exc, "Not imported", previewed.source if previewed else ""))}
            return
        yield self._put_away() | {self.import_notice: "", self.imported: file_render.imported(done)}

    def _put_away(self) -> Updates:
        return {self.previewed: None, self.preview_box: gr.update(visible=False)}

    # Export

    def export(self, suffix: Any) -> Iterator[Updates]:
        """Write what training reads, with its card, and offer both for download."""
        yield {self.export_notice: render.busy("Exporting …"), self.export_box: gr.update(visible=False)}
        try:
            if suffix not in (*FORMATS,):
                raise ConfigError(f"An export is {', '.join(FORMATS.values())}: got {suffix!r}; choose one")
            with tempfile.TemporaryDirectory(prefix="biasdpo-export-") as folder:
                done = dataset.export_file(self.store.workspace, Path(folder) / f"biasdpo_pairs{suffix}")
                # Gradio serves its own cache to whoever has the address, and nothing else: the workspace stays closed.
                data, card = (save_file_to_cache(path, self.download.GRADIO_CACHE) for path in (done.path, done.card))
        except Exception as exc:
            yield {self.export_notice: render.error(_told(exc, "Not exported"))}
            return
        yield {
            self.export_notice: file_render.exported(done),
            self.export_box: gr.update(visible=True),
            self.download: gr.update(label=f"Download {done.path.name}", value=data),
            self.download_card: gr.update(label=f"Download its card, {done.card.name}", value=card),
        }


def _source(origin: Any, file: Any, hub: Any) -> str:
    """The file or Hub name that was chosen. A file is what Gradio took up itself: it refuses any other path before we see it."""
    if origin == "seed":
        return str(SEED_SET)
    if origin == "hub":
        name = hub.strip().removeprefix(HUB) if isinstance(hub, str) else ""
        if not _HUB_NAME.fullmatch(name):
            raise ConfigError(f"A data set of the Hub is OWNER/NAME: got {name[:60]!r}; write such a name")
        return HUB + name
    if origin != "file":
        raise ConfigError(f"Pairs come from {', '.join(ORIGINS)}: got {origin!r}; choose one")
    path = file.get("path") if isinstance(file, dict) else None
    if not isinstance(path, str):
        raise ConfigError("No file yet: choose a JSONL, JSON, CSV or Parquet file")
    return path


def _known(previewed: Previewed | None) -> Previewed:
    if not isinstance(previewed, Previewed):
        raise ConfigError("Nothing was previewed on this page (or the app was started again): press Preview first")
    return previewed


def _told(exc: Exception, failed: str, source: str = "") -> str:
    """One line for the visitor; the trace of a fault of ours goes to the terminal."""
    if not isinstance(exc, BiasDPOError):
        traceback.print_exc(file=sys.stderr)
        return f"{failed}: the app failed ({type(exc).__name__}: {exc}); the terminal says more"
    text = str(exc).replace("name its columns with --map", "choose other columns")  # that is the command line's way
    return text.replace(f"{Path(source).parent}/", "") if source and not source.startswith(HUB) else text
