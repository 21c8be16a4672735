"""What the Train tab shows of runs, as HTML: pure functions of records. Everything that is not ours is escaped."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from biasdpo.run_folder import State, Status
from biasdpo.ui import render
from biasdpo.ui.train_reading import SeenRun, changed

STATES: dict[State, str] = {
    "queued": "queued",
    "running": "running",
    "stopping": "stopping",
    "stopped": "stopped",
    "finished": "finished",
    "failed": "failed",
    "interrupted": "interrupted",
}

_ORIGIN = {"code_version": "Code", "command": "Command"}
_WIDE = ' class="bd-wide"'


def refused() -> str:
    """What stands first on a public Space."""
    return (
        '<div class="bd-space" role="note"><b>Training is off on this public Space.</b> Duplicate the Space, or run BiasDPO on '
        "your own machine, to start runs. What is here can be read.</div>"
    )


def machine(gpu_gb: float) -> str:
    """What a run does to the models that are loaded for Compare and Label."""
    if gpu_gb > 0:
        text = (
            f"Runs train on the GPU ({gpu_gb:.0f} GB free now), one at a time. The chat model's memory there is freed before a "
            "run starts, and again when a queued run's turn comes, as long as this page is open; Generate loads it again."
        )
    else:
        text = "Runs train on the CPU, one at a time. While one trains, Compare and Label write more slowly."
    return f'<div class="bd-note">{escape(text)}</div>'


def no_runs_here() -> str:
    """The empty state of a public Space."""
    return '<div class="bd-empty" role="note"><h2>No runs</h2><p>None was trained in this Space.</p></div>'


def no_runs() -> str:
    """The empty state."""
    return (
        '<div class="bd-empty" role="note"><h2>No runs yet</h2><p>A run teaches a model to prefer the less biased completion of '
        "each pair, and leaves an adapter that Compare, Label and <code>evaluate</code> can use at once. Below, the model, the "
        "shipped pairs and a <b>quick look</b> are chosen already: press <b>Start</b>, or <b>Estimate</b> first.</p></div>"
    )


def chip(state: str) -> str:
    """A state as a coloured word."""
    return f'<span class="bd-chip bd-state bd-state-{escape(state)}">{escape(STATES.get(state, state))}</span>'  # type: ignore[call-overload]


# The list


def table(runs: Sequence[SeenRun], chosen: str) -> str:
    """All runs, the newest first; the chosen one is marked."""
    at = next((i for i, run in enumerate(runs) if run.id == chosen), 0)
    rows = "".join(_row(run, run.id == chosen, i == at) for i, run in enumerate(runs))
    head = "".join(
        f'<th scope="col">{name}</th>' for name in ("Run", "State", "Model", "Data", "Steps", "Held-out", "Started (UTC)")
    )
    listed = f'<table class="bd-rows bd-runs"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<div class="bd-rows-box">{listed}</div>'


def _row(run: SeenRun, chosen: bool, tabbed: bool) -> str:
    status = run.status
    steps = f"{status.step:,} / {status.total_steps:,}" if status.total_steps else "–"
    accuracy = "–" if run.accuracy is None else f"{run.accuracy:.3f}"
    wait = f' <span class="bd-waits">waits for {escape(status.waits_for)}</span>' if _waits(status) else ""
    cells = (chip(status.state) + wait, escape(run.model), escape(run.data), steps, accuracy, escape(when(run.started_at)))
    current = ' aria-current="true"' if chosen else ""
    button = f'<button type="button" tabindex="{0 if tabbed else -1}" data-focus="{escape(run.id)}">{escape(run.id)}</button>'
    return f'<tr data-id="{escape(run.id)}"{current}><td>{button}</td>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _waits(status: Status) -> bool:
    return status.state == "queued" and bool(status.waits_for)


def when(moment: str) -> str:
    """A UTC time for people: its date and minute."""
    return moment[:16].replace("T", " ") if moment else "–"


# One run


def head(run: SeenRun) -> str:
    """State, progress, numbers, what went wrong and what is to be known."""
    status = run.status
    parts = [
        f'<div class="bd-run-head"><h2>{escape(run.id)}</h2>{chip(status.state)}'
        f'<span class="bd-run-words" role="status">{escape(words(status))}</span></div>'
    ]
    if run.active or status.step:
        parts.append(_progress(status))
    parts.append(_numbers(run))
    if status.error:
        parts.append(render.error(status.error))
    if status.notes:
        parts.append(f'<ul class="bd-run-notes">{"".join(f"<li>{escape(note)}</li>" for note in status.notes)}</ul>')
    return f'<section class="bd-run" aria-label="Run {escape(run.id)}">{"".join(parts)}</section>'


def words(status: Status) -> str:
    """What a run is doing, or how it ended, in words."""
    if status.state == "queued":
        return f"waits for {status.waits_for}: one run at a time" if status.waits_for else "is about to start"
    if status.state == "running":
        return status.phase or "running"
    at = f"step {status.step:,} of {status.total_steps:,}" if status.total_steps else "its start"
    return {
        "stopping": "saves a checkpoint after this step, then ends",
        "stopped": f"stopped at {at}; Resume goes on from there",
        "finished": "its adapter is in every picker",
        "failed": f"failed at {at}",
        "interrupted": f"interrupted at {at}; Resume goes on from the last checkpoint",
    }[status.state]


def _progress(status: Status) -> str:
    total = max(status.total_steps, 1)
    percent = min(100.0, 100 * status.step / total)
    label = f"step {status.step:,} of {status.total_steps:,}" if status.total_steps else "not begun"
    eta = ""
    if status.state == "running" and status.eta_seconds is not None and status.step < status.total_steps:
        eta = f"<span>about {duration(status.eta_seconds)} left</span>"
    return (
        f'<div class="bd-progress bd-is-{status.state}"><div class="bd-progress-track" role="progressbar" aria-label="Progress" '
        f'aria-valuenow="{percent:.0f}" aria-valuemin="0" aria-valuemax="100"><i style="width: {percent:.1f}%"></i></div>'
        f"<div><span>{label}</span>{eta}<span>{percent:.0f} %</span></div></div>"
    )


def _numbers(run: SeenRun) -> str:
    status = run.status
    facts = [("model", escape(run.model)), ("data", escape(run.data))]
    if status.device:
        facts.append(("device", escape(device(status.device))))
    if status.tokens_per_second is not None:
        facts.append(("speed", f"{status.tokens_per_second:,.0f} tokens/s"))
    if status.best_step is not None:
        best = f"step {status.best_step:,}"
        if status.best_accuracy is not None:
            best += f", held-out accuracy {status.best_accuracy:.3f}"
        facts.append(("best", best))
    if run.held_out:
        accuracy = run.held_out.get("reward_accuracy")
        if isinstance(accuracy, float | int):
            longer = "" if run.baseline is None else f" (picking the longer: {run.baseline:.3f})"
            facts.append(("held-out accuracy", f"<b>{accuracy:.3f}</b>{longer}"))
    if run.started_at:
        facts.append(("started", f"{escape(when(run.started_at))} UTC"))
    return f'<div class="bd-facts bd-run-facts">{"".join(f"<span><i>{name}</i> {value}</span>" for name, value in facts)}</div>'


def device(name: str) -> str:
    """A device for people: "cpu" is "CPU", a GPU has its own name."""
    return "CPU" if name == "cpu" else name


def duration(seconds: float) -> str:
    """For people: 8 s, 3 min, 2 h 5 min."""
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def size(count: float) -> str:
    """Bytes for people."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} bytes"


def details(run: SeenRun) -> str:
    """Data and config in full."""
    rows, confounds = (run.origin.get(name) for name in ("dataset_rows", "confounds"))
    facts = [("Sources", escape(run.data))]
    digest = str(run.origin.get("dataset_sha256", ""))
    if digest:
        facts.append(("SHA-256", f"<code>{escape(digest)}</code>"))
    facts += _named(rows)
    facts += [(title, f"<code>{escape(str(run.origin[n]))}</code>") for n, title in _ORIGIN.items() if run.origin.get(n)]
    text = f"<h4>Data</h4>{_list(facts)}"
    if isinstance(confounds, dict):
        warnings = [("Warning", escape(str(line))) for line in confounds.get("warnings") or ()]
        text += f"<h4>Confounds of the rows that an epoch sees</h4>{_list(_named(confounds) + warnings)}"
    if run.config is not None:
        own = changed(run.config)
        settings = [
            (f"<b>{escape(name)}</b>" if name in own else escape(name), escape(shown_value(value)))
            for name, value in run.config.to_json().items()
            if name not in ("datasets", "model")
        ]
        text += f"<h4>Settings <small>(bold: not the default)</small></h4>{_list(settings)}"
    return f'<div class="bd-detail-body">{text}</div>'


def _named(values: Any) -> list[tuple[str, str]]:
    if not isinstance(values, dict):
        return []
    told = {name: value for name, value in values.items() if name not in ("annotators", "warnings") and value is not None}
    return [(escape(str(name).replace("_", " ").capitalize()), escape(shown_value(value))) for name, value in told.items()]


def _list(facts: Iterable[tuple[str, str]]) -> str:
    lines = (f"<div{_WIDE if len(value) > 60 else ''}><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    return f'<dl class="bd-provenance">{"".join(lines)}</dl>'


def shown_value(value: Any) -> str:
    """A setting or a count for people."""
    if isinstance(value, list | tuple):
        return ", ".join(map(shown_value, value)) or "–"
    if isinstance(value, bool) or value is None:
        return "–" if value is None else str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def deleting(run: SeenRun, stored: int) -> str:
    """What is lost when a run is deleted."""
    kept = "its adapter, " if run.has_adapter else ""
    return (
        f'<div class="bd-error" role="alert"><b>Delete run {escape(run.id)}?</b> Lost are {kept}its checkpoints, curves, log '
        f"and its snapshot of the data ({escape(size(stored))} in all). Nothing brings them back.</div>"
    )


def log(text: str) -> str:
    """The end of train.log."""
    if not text.strip():
        return render.note("The log is empty so far.")
    return f'<pre class="bd-log" tabindex="0" aria-label="The last lines of train.log">{escape(text)}</pre>'


def evaluate_command(run: SeenRun) -> str:
    """The command that measures the run's adapter, to be copied; or why there is nothing to measure it on."""
    if run.held_none_out:
        return render.note(
            "This run held no pairs out, so there are none to measure it on: Retry with changes, with a held-out share of 0.1 or "
            "more."
        )
    model = run.config.model if run.config else "MODEL"
    names = f"--model {shlex.quote(model)} --adapter {shlex.quote(run.id)}"
    data = f"--benchmark preference --dataset {shlex.quote(str(run.folder.snapshot))}"
    command = f"python -m biasdpo evaluate {names} {data} --out {shlex.quote(run.id)}.json"
    return (
        f'<div class="bd-command"><span>Measure it:</span><code>{escape(command)}</code>'
        f'<button type="button" class="bd-copy" data-text="{escape(command)}" aria-label="Copy the command">Copy</button></div>'
    )
