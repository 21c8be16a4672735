"""What the New run panel does with its rows of data: one more, one less, a file of the visitor's own, and what they come to."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from biasdpo import run_config, runs
from biasdpo.errors import BiasDPOError, ConfigError
from biasdpo.ui import render, train_plan_render, train_settings, train_sources
from biasdpo.ui.store import Store
from biasdpo.ui.train_settings import SETTINGS
from biasdpo.ui.train_sources import MOST_SOURCES, Rows
from biasdpo.workspace import refuse_on_public_space

Updates = dict[Any, Any]


class DataActions:
    """The handlers of the rows. `source_rows`: row, source, weight, and the button that removes it."""

    store: Store
    shown_sources: gr.State
    source_rows: list[tuple[gr.Row, gr.Dropdown, gr.Number, gr.Button]]
    add_button: gr.Button
    new_notice: gr.HTML
    mixture_view: gr.HTML

    def rows_shown(self, rows: Rows, named: Sequence[str] = ()) -> Updates:
        rows = rows[:MOST_SOURCES] or [("", 1.0)]
        choices = train_sources.choices(self.store, named)
        shown: Updates = {self.shown_sources: len(rows), self.add_button: gr.update(visible=len(rows) < MOST_SOURCES)}
        for i, (row, source, weight, _remove) in enumerate(self.source_rows):
            name, factor = rows[i] if i < len(rows) else ("", 1.0)
            shown |= {row: gr.update(visible=i < len(rows)), source: gr.update(choices=choices, value=name), weight: factor}
        return shown

    def add_source(self, shown: int, *given: Any) -> Updates:
        """One row more."""
        return self.rows_shown([*_raw_rows(given)[:shown], ("", 1.0)], given[::2])

    def removing(self, index: int) -> Callable[..., Updates]:
        """The handler of one row's button."""

        def remove(shown: int, *given: Any) -> Updates:
            rows = _raw_rows(given)[:shown]
            return self.rows_shown(rows[:index] + rows[index + 1 :], given[::2])

        return remove

    def add_file(self, file: Any, shown: int, *given: Any) -> Updates:
        """A file was taken up: it is the next source."""
        try:
            refuse_on_public_space("Training")
            path = file.get("path") if isinstance(file, dict) else None
            if not isinstance(path, str):
                raise ConfigError("No file was taken up: choose a JSONL, JSON, CSV or Parquet file")
            rows = [row for row in _raw_rows(given)[:shown] if row[0]]
            if len(rows) >= MOST_SOURCES:
                raise ConfigError(f"All {MOST_SOURCES} rows of data are taken: remove one, then add the file")
        except BiasDPOError as exc:
            return {self.new_notice: render.error(str(exc))}
        return self.rows_shown([*rows, (path, 1.0)], [*given[::2], path]) | {self.new_notice: ""}

    def show_mixture(self, shown: int, held_out_share: Any, seed: Any, *given: Any) -> Iterator[str]:
        """The data was changed: count it, and measure what its pairs have in common."""
        yield render.busy("Reading the data …")
        try:
            refuse_on_public_space("Training")
            values = {"held_out_share": held_out_share, "seed": seed}
            read = {s.name: train_settings.from_field(s, values[s.name]) for s in SETTINGS if s.name in values}
            rows = train_sources.read_rows(given[: 2 * shown])
            config = run_config.from_mapping(read | train_sources.config_values(rows))
            yield train_plan_render.mixture(runs.mixture(config, self.store.workspace))
        except Exception as exc:
            yield render.error(told(exc, "The data could not be read"))


def _raw_rows(given: Sequence[Any]) -> Rows:
    return list(zip((name or "" for name in given[::2]), given[1::2], strict=True))


def told(exc: Exception, failed: str) -> str:
    """One line for the visitor; the trace of a fault of ours goes to the terminal."""
    if isinstance(exc, BiasDPOError):
        return re.sub(
            r"name (it|its columns) with --map\b.*", "import the file on the Data set tab, where columns are named", str(exc)
        )
    traceback.print_exc(file=sys.stderr)
    return f"{failed}: the app failed ({type(exc).__name__}: {exc}); the terminal says more"
