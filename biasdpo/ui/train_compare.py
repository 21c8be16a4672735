"""Several runs side by side: their curves in one chart each, what differs in their settings, what they came to."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import gradio as gr

from biasdpo.errors import BiasDPOError, ConfigError
from biasdpo.ui import render, train_charts
from biasdpo.ui.measured import LABELS
from biasdpo.ui.train_curves import charts_of_runs
from biasdpo.ui.train_data import Updates
from biasdpo.ui.train_reading import SeenRun, differing
from biasdpo.ui.train_render import chip, shown_value, table
from biasdpo.ui.train_watch import RunsView

MOST_RUNS = 6  # as many as the page has colours


class CompareRuns(RunsView):
    """The handlers of the panel."""

    picked: gr.Dropdown
    comparison: gr.HTML

    def open_compare(self, picked: Any) -> Updates:
        """The panel was opened: all runs can be picked; the two newest that have curves are, at first."""
        try:
            every = self.every()
        except BiasDPOError as exc:
            return {self.comparison: render.error(str(exc))}
        known = [run.id for run in every]
        drawn = [run.id for run in every if run.status.step]
        kept = [name for name in picked or () if name in known] or drawn[:2]
        choices = [(f"{run.id} · {run.model} · {run.status.state}", run.id) for run in every]
        return self.turn_to("compare") | {
            self.table: table(every, ""),
            self.picked: gr.update(choices=choices, value=kept),
            self.comparison: self.compare(kept),
        }

    def compare(self, picked: Any) -> str:
        """The runs that were picked."""
        try:
            names = [name for name in picked or () if isinstance(name, str)]
            if len(names) > MOST_RUNS:
                raise ConfigError(f"At most {MOST_RUNS} runs in one chart: got {len(names)}; take some out")
            found = {run.id: run for run in self.every()}
            chosen = [found[name] for name in names if name in found]
            return comparison(chosen) if chosen else render.note("Choose two or more runs to compare.")
        except BiasDPOError as exc:
            return render.error(str(exc))


def comparison(chosen: Sequence[SeenRun]) -> str:
    """Curves, then what the runs came to, then what differs in their settings."""
    drawn = charts_of_runs((run.id, run.folder.read_metrics()) for run in chosen)
    curves = train_charts.charts(drawn, "None of these runs has logged a step yet.", [run.id for run in chosen])
    return curves + results(chosen) + differences(chosen)


def results(chosen: Sequence[SeenRun]) -> str:
    """A column a run: its state, and its final numbers on its held-out pairs."""
    rows = [("State", [chip(run.status.state) for run in chosen])]
    rows.append(("Steps", [f"{run.status.step:,} of {run.status.total_steps:,}" for run in chosen]))
    rows.append(("Best step", ["–" if run.status.best_step is None else f"{run.status.best_step:,}" for run in chosen]))
    names = list(dict.fromkeys(name for run in chosen for name in run.held_out))
    for name in names:
        values = [run.held_out.get(name) for run in chosen]
        if any(isinstance(value, float | int) for value in values):
            rows.append((escape(_title(name)), [escape(shown_value(value)) for value in values]))
    return _table("Results", "On held-out pairs", chosen, rows)


def _title(name: str) -> str:
    side = next((side for side in ("base", "tuned") if name.endswith(f"_{side}")), "")
    plain = name.removesuffix(f"_{side}") if side else name
    title = LABELS.get(plain, plain.replace("_", " ").capitalize())
    return f"{title}, {side}" if side else title


def differences(chosen: Sequence[SeenRun]) -> str:
    """The settings and data that are not the same in all."""
    configs = {run.id: run.config for run in chosen if run.config is not None}
    different = differing(configs) if len(configs) > 1 else {}
    rows = [
        (escape(name), [escape(shown_value(values.get(run.id))) for run in chosen])
        for name, values in different.items()
        if name not in ("datasets",)
    ]
    data = [str(run.origin.get("dataset_sha256", ""))[:12] or "–" for run in chosen]
    if len(set(data)) > 1:
        rows.insert(0, ("data", [f"{escape(run.data)} <code>{digest}</code>" for run, digest in zip(chosen, data, strict=True)]))
    if not rows:
        return render.note("Their settings and their data are the same.") if len(chosen) > 1 else ""
    return _table("What differs", "Setting", chosen, rows)


def _table(title: str, first: str, chosen: Sequence[SeenRun], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    head = "".join(f'<th scope="col" class="bd-c{i % 6}">{escape(run.id)}</th>' for i, run in enumerate(chosen))
    body = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{value}</td>" for value in values)}</tr>' for name, values in rows
    )
    return (
        f'<h3 class="bd-compared">{title}</h3><div class="bd-scroll"><table class="bd-table bd-compared-table"><thead><tr>'
        f'<th scope="col">{first}</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
