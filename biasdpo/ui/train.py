"""The Train tab: runs, the chosen one, a new one, several compared. The tab only reads run folders: training is a process of its
own, which neither a closed page nor the end of the app stops."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import tempfile
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache

from biasdpo import config as train_config
from biasdpo import models
from biasdpo.config import Preset, Setting, TrainConfig
from biasdpo.data import splits
from biasdpo.data.importing import HUB
from biasdpo.data.splits import WORKSPACE, Mixture
from biasdpo.engines import EnginePool
from biasdpo.errors import BiasDPOError, ConfigError, RunError
from biasdpo.jobs import store as jobs_store
from biasdpo.jobs.estimate import Estimate, estimate_training
from biasdpo.jobs.job import ACTIVE, Job, JobFolder, State, Status
from biasdpo.labeling import DiffPiece, word_diff
from biasdpo.ui import charts as train_charts
from biasdpo.ui import components
from biasdpo.ui.charts import charts_of_run, charts_of_runs, logged_csv
from biasdpo.ui.components import LABELS, Store, mapping, own_choices, pasted, read_or_none
from biasdpo.ui.jobs import key, news
from biasdpo.workspace import ASSETS, Workspace, is_public_space, refuse_on_public_space

# Train reading


SEED_SET = ASSETS / "seed_pairs.jsonl"


@dataclass(frozen=True)
class SeenRun:
    """A run as its folder shows it now.

    config    None where config.json is missing or can't be read
    origin    of the data: hash, counts, confounds; {} where unknown
    held_out  the final results on the held-out pairs; {} where there are none
    """

    folder: JobFolder
    status: Status
    config: TrainConfig | None
    origin: dict[str, Any]
    held_out: dict[str, Any]

    @property
    def id(self) -> str:
        return self.folder.id

    @property
    def active(self) -> bool:
        return self.status.state in ACTIVE

    @property
    def has_adapter(self) -> bool:
        return (self.folder.adapter / "adapter_model.safetensors").is_file()

    @property
    def model(self) -> str:
        """The base model's title."""
        return model_title(self.config.model) if self.config else "–"

    @property
    def data(self) -> str:
        """The sources' names, in short."""
        return ", ".join(source_title(name) for name in self.config.datasets) if self.config else "–"

    @property
    def started_at(self) -> str:
        """UTC, ISO 8601; "" where unknown."""
        return str(self.origin.get("started_at", ""))

    @property
    def accuracy(self) -> float | None:
        """Held-out reward accuracy: the final one, else the best so far."""
        final = self.held_out.get("reward_accuracy")
        return final if isinstance(final, float | int) else self.status.best_accuracy

    @property
    def held_none_out(self) -> bool:
        """Whether the run is known to have kept no pair from training."""
        return not self.held_out and self.origin.get("held_out_longer_baseline", "unknown") is None

    @property
    def baseline(self) -> float | None:
        """The accuracy of picking the longer completion on the held-out pairs."""
        value = self.origin.get("held_out_longer_baseline", self.held_out.get("reward_accuracy_of_picking_the_longer"))
        return float(value) if isinstance(value, float | int) else None


def see(run: Job) -> SeenRun:
    """Read what there is."""
    folder = run.folder
    metrics = mapping(mapping(read_or_none(folder.adapter / "provenance.json")).get("metrics"))
    return SeenRun(folder, run.status, run.config, run.record.origin(), mapping(metrics.get("held_out")))


def model_title(name: str) -> str:
    """A catalog model's title, else the last part of a path or the Hub id."""
    known = models.catalog().get(name)
    if known is not None:
        return known.title
    return Path(name).name if name.startswith(("/", "~", ".")) else name


def source_title(source: str) -> str:
    """A data source for people: never a folder of this machine."""
    if source == str(SEED_SET):
        return "seed set"
    path = Path(source)
    if path.name == "dataset.jsonl" and path.parent.parent.name == "runs":
        return f"data of run {path.parent.name}"
    return source if source.startswith("hub:") else path.name


def differing(configs: dict[str, TrainConfig]) -> dict[str, dict[str, Any]]:
    """The settings that are not the same in all of these configs: {setting: {run: value}}."""
    table = {name: {run: getattr(config, name) for run, config in configs.items()} for name in TrainConfig.settings()}
    return {name: values for name, values in table.items() if len({repr(value) for value in values.values()}) > 1}


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder; what goes away meanwhile counts nothing."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue
    return total


def seconds_since(moment: str) -> float | None:
    """Since a UTC time in ISO 8601; None where there is none."""
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()
    except (ValueError, TypeError):
        return None


# Train render


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
        parts.append(components.error(status.error))
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


def size_text(count: float) -> str:
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
        own = run.config.changed()
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
        f"and its snapshot of the data ({escape(size_text(stored))} in all). Nothing brings them back.</div>"
    )


def log(text: str) -> str:
    """The end of log.txt."""
    if not text.strip():
        return components.note("The log is empty so far.")
    return f'<pre class="bd-log" tabindex="0" aria-label="The last lines of log.txt">{escape(text)}</pre>'


def evaluate_command(run: SeenRun) -> str:
    """The command that measures the run's adapter, to be copied; or why there is nothing to measure it on."""
    if run.held_none_out:
        return components.note(
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


# Train plan render


def preset_html(chosen: Preset | None) -> str:
    """What a preset does and costs."""
    if chosen is None:
        return components.note("No preset for this model: the fields below are the defaults. Lower them for a first look.")
    return f'<div class="bd-preset"><p>{escape(chosen.description)}</p></div>'


def mixture(found: Mixture) -> str:
    """How many pairs there are to train on, where from, and what they have in common beside their meaning."""
    counts = [
        ("to train on", found.pairs_train, "different pairs"),
        ("held out", found.pairs_held_out, "pairs whose prompts are kept from training, to measure on"),
        ("rows read", found.rows_read, "in all sources together"),
        ("repeats", found.repeats, "rows that say again what another says: left out"),
        ("contradictions", found.contradictions, "pairs that are judged both ways equally often: left out"),
        ("bridging", found.dropped, "pairs whose prompt is nearly one on either side of the split: left out"),
    ]
    if found.rows_per_epoch != found.pairs_train:
        counts.insert(1, ("rows an epoch", found.rows_per_epoch, "the training pairs, each as often as its source's weight says"))
    shown = "".join(
        f'<span class="bd-count" title="{escape(tip)}"><b>{number:,}</b> {escape(name)}</span>' for name, number, tip in counts
    )
    sources = ""
    if len(found.per_source) > 1:
        sources = "".join(f"<span>{escape(source_title(name))}: <b>{rows:,}</b> rows</span>" for name, rows in found.per_source)
        sources = f'<div class="bd-per-source">{sources}</div>'
    return f'<div class="bd-mixture" role="status">{shown}{sources}</div>{components.meter(found.confounds)}'


def measuring(seconds: float) -> str:
    """An estimate is under way."""
    return components.busy(f"Measuring real steps of this run (the model is loaded for it): {seconds:.0f} s so far …")


def estimate(known: Estimate) -> str:
    """Time, memory against what is free, and what was measured; where it can't fit, why."""
    total = max(known.memory_bytes, known.memory_free_bytes, 1)
    used = 100 * known.memory_bytes / total
    free = 100 * known.memory_free_bytes / total
    needs, has = size_text(known.memory_bytes), size_text(known.memory_free_bytes)
    bar = f'<i class="{"" if known.fits else "bd-too-much"}" style="width: {used:.1f}%"></i><b style="left: {free:.1f}%"></b>'
    memory = (
        f'<div class="bd-memory"><span>Memory</span><span class="bd-memory-track" role="img" aria-label="{needs} needed, {has} '
        f'free">{bar}</span><span><b>{needs}</b> at the peak, of {has} free</span></div>'
    )
    facts: list[tuple[str, str]] = [
        ("Time", f"<b>{duration(known.seconds_total)}</b>"),
        ("Steps", f"{known.steps:,} of {known.seconds_per_step:.2g} s"),
        ("Pairs", f"{known.pairs_train:,} to train, {known.pairs_held_out:,} held out"),
        ("Tokens an epoch", f"{known.tokens_per_epoch:,}"),
        ("Device", escape(device(known.device))),
    ]
    if known.dropped or known.cut:
        facts.append(("Too long", f"{known.dropped:,} pairs dropped, {known.cut:,} cut"))
    listed = "".join(f"<span><i>{name}</i> {value}</span>" for name, value in facts)
    refusal = "" if known.fits else components.error(known.refusal)
    parts = " · ".join(f"{escape(name)} {duration(seconds)}" for name, seconds in known.parts.items() if seconds >= 0.5)
    measured = f"Measured {escape(known.measured_at[:16].replace('T', ' '))} UTC on real steps of this run, not guessed."
    return (
        f'<div class="bd-estimate" role="status"><div class="bd-facts">{listed}</div>{memory}'
        f'<p class="bd-measured-at">{f"Of the time: {parts}. " if parts else ""}{measured}</p></div>{refusal}'
    )


def field_errors(lines: Iterable[str]) -> str:
    """What is wrong with which fields, so that one that is folded away is found, too."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<div class="bd-error" role="alert"><b>Not started.</b><ul>{items}</ul></div>' if items else ""


# The settings of a run as fields of the form, generated from TrainConfig


GROUPS: dict[str, list[Setting]] = {}
for _one in TrainConfig.settings().values():
    if _one.group != "Model and data":  # these have pickers of their own
        GROUPS.setdefault(_one.group, []).append(_one)
SETTINGS: tuple[Setting, ...] = tuple(one for group in GROUPS.values() for one in group)
DECIDING = tuple(dict.fromkeys(name for one in SETTINGS for name in one.when))  # a change of these shows and hides fields


def build_field(setting: Setting, value: Any, visible: bool) -> gr.components.Component:
    """The field of one setting. Text and number boxes show a validator's message themselves, so the range needs no slider."""
    limits = f" Range: {setting.range} {setting.unit}".rstrip() + "." if setting.kind in ("integer", "number") else ""
    shown: dict[str, Any] = {
        "label": setting.label,
        "info": setting.help + limits,
        "elem_id": f"train-{setting.name.replace('_', '-')}",
        "min_width": 190,
        "value": value,
        "visible": visible,
    }
    if setting.kind == "choice":
        return gr.Dropdown(list(setting.choices), multiselect=setting.is_list or None, **shown)
    if setting.kind == "integer" and not setting.is_list:
        return gr.Number(**shown)
    lines = 3 if setting.separator == "\n" else 1
    return gr.Textbox(lines=lines, max_lines=lines, **shown)


def to_field(setting: Setting, value: Any) -> Any:
    """A config's value as its field shows it."""
    if setting.kind == "choice":
        return list(value) if setting.is_list else value
    return value if setting.kind == "integer" and not setting.is_list else setting.format(value)


def from_field(setting: Setting, value: Any) -> Any:
    """A field's value as the config takes it; the config checks it."""
    if setting.kind == "choice" or not isinstance(value, str):
        if setting.is_list and value is None:
            return ()
        return int(value) if setting.kind == "integer" and isinstance(value, float) and value.is_integer() else value
    return setting.parse(value)


def problem(setting: Setting, value: Any) -> str:
    """What is wrong with a field's value by itself, in one line; "" if nothing is."""
    try:
        TrainConfig.check_setting(setting.name, from_field(setting, value))
    except ConfigError as exc:
        return str(exc)
    return ""


def form_values(given: Sequence[Any]) -> dict[str, Any]:
    """The fields' values by name, in the order of SETTINGS."""
    return dict(zip((setting.name for setting in SETTINGS), given, strict=True))


def problems(given: Sequence[Any]) -> list[str]:
    """One line (or "") per field; a field without effect has no problem."""
    values = form_values(given)
    return [problem(one, values[one.name]) if one.has_effect(values) else "" for one in SETTINGS]


def to_values(given: Sequence[Any]) -> dict[str, Any]:
    """The config's values; settings without effect are at their defaults."""
    values = form_values(given)
    return {s.name: from_field(s, values[s.name]) if s.has_effect(values) else s.default for s in SETTINGS}


def visible_settings(values: Mapping[str, Any]) -> dict[str, bool]:
    """Whether each setting has an effect, by name; `values`: those of DECIDING at least."""
    return {setting.name: setting.has_effect(values) for setting in SETTINGS}


def from_config(config: TrainConfig) -> list[Any]:
    """What the fields show of a config, in the order of SETTINGS."""
    return [to_field(setting, getattr(config, setting.name)) for setting in SETTINGS]


# Train sources


MOST_SOURCES = 5
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")

Rows = list[tuple[str, float]]


@cache
def seed_pairs() -> int:
    """Lines of the shipped seed set."""
    with SEED_SET.open(encoding="utf-8") as file:
        return sum(1 for line in file if line.strip())


def source_choices(store: Store, named: Sequence[str] = ()) -> list[tuple[str, str]]:
    """What a row offers; `named`: sources beside, such as an uploaded file. Others may be typed."""
    try:
        usable = store.confounds().pairs
        mine = f"Workspace: {usable:,} usable judgment{'' if usable == 1 else 's'}" if usable else "Workspace: nothing judged yet"
    except BiasDPOError:
        mine = "Workspace: its journal can't be read"
    offered = [(f"Shipped seed set: {seed_pairs():,} pairs", str(SEED_SET)), (mine, WORKSPACE)]
    known = [value for _, value in offered]
    return offered + [(source_title(name), name) for name in dict.fromkeys(named) if name and name not in known]


def read_rows(given: Sequence[Any]) -> Rows:
    """The rows that name something, as config values: (source, weight). `given`: source, weight, source, weight, …

    Raises ConfigError for what is no source or no weight. That a source can be read is `dataset`'s to say.
    """
    rows: Rows = []
    for source, weight in zip(given[::2], given[1::2], strict=True):
        if source in (None, ""):
            continue
        if not isinstance(source, str):
            raise ConfigError(f"A data source is text: got {source!r}; choose one, or type hub:OWNER/NAME or a file's path")
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ConfigError(
                f"The weight of {source_title(source)} must be a number: got {weight!r}; 1 sees each pair once an epoch"
            )
        rows.append((absolute(source.strip()), float(weight)))
    if not rows:
        raise ConfigError("No data to train on: choose a source under Data")
    names = [name for name, _ in rows]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{source_title(twice)} is named twice: name it once, with a weight")
    return rows


def absolute(source: str) -> str:
    """A file's path as the training process finds it; other sources as they are. ConfigError for a Hub name that is none."""
    if source.startswith(HUB):
        if not _HUB_NAME.fullmatch(source.removeprefix(HUB)):
            raise ConfigError(f"A data set of the Hub is hub:OWNER/NAME: got {source[:60]!r}; write such a name")
        return source
    return source if source == WORKSPACE else str(Path(source).expanduser().resolve())


def config_values(rows: Rows) -> dict[str, Any]:
    """`datasets` and `dataset_weights` of a config; weights of 1 throughout are left out, as they are the default."""
    weights = tuple(weight for _, weight in rows)
    return {"datasets": tuple(name for name, _ in rows), "dataset_weights": () if set(weights) == {1.0} else weights}


def rows_of(datasets: Sequence[str], weights: Sequence[float]) -> Rows:
    """The other way round: a config's data as rows."""
    return list(zip(datasets, weights or (1.0,) * len(datasets), strict=True))


def is_there(source: str) -> bool:
    """Whether a config's source can still be read: a file must exist; of the Hub and the workspace that is theirs to say."""
    return source == WORKSPACE or source.startswith(HUB) or Path(source).is_file()


def titles(sources: Sequence[str]) -> str:
    """Sources for people."""
    return ", ".join(map(source_title, sources))


# Train data


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
        choices = source_choices(self.store, named)
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
            return {self.new_notice: components.error(str(exc))}
        return self.rows_shown([*rows, (path, 1.0)], [*given[::2], path]) | {self.new_notice: ""}

    def show_mixture(self, shown: int, held_out_share: Any, seed: Any, *given: Any) -> Iterator[str]:
        """The data was changed: count it, and measure what its pairs have in common."""
        yield components.busy("Reading the data …")
        try:
            refuse_on_public_space("Training")
            values = {"held_out_share": held_out_share, "seed": seed}
            read = {s.name: from_field(s, values[s.name]) for s in SETTINGS if s.name in values}
            rows = read_rows(given[: 2 * shown])
            config = TrainConfig(**read | config_values(rows))
            yield mixture(splits.resolve(config, self.store.workspace).mixture())
        except Exception as exc:
            yield components.error(told(exc, "The data could not be read"))


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


# Train probes


_DIFF_CHARACTERS = 4_000  # as on Compare: difflib's time grows with the square

ProbeRows = Sequence[Mapping[str, Any]]


def steps(rows: ProbeRows) -> list[int]:
    """The steps at which there was a probe, in order."""
    return sorted({row["step"] for row in rows if isinstance(row.get("step"), int)})


def step_shown(rows: ProbeRows, wanted: int | None) -> int | None:
    """The probe that is shown: the wanted one, else (None, or it is gone after a resume) the latest; None where there is none."""
    known = steps(rows)
    return wanted if wanted in known else (known[-1] if known else None)


def turned(rows: ProbeRows, shown: int | None, by: int) -> int | None:
    """The probe `by` places later (or earlier), as `wanted`: None is the latest, and stays the latest as others follow."""
    known = steps(rows)
    at = step_shown(rows, shown)
    if at is None:
        return None
    place = min(max(known.index(at) + by, 0), len(known) - 1)
    return None if place == len(known) - 1 else known[place]


def position(rows: ProbeRows, wanted: int | None) -> str:
    """Which of the probes is shown."""
    known, at = steps(rows), step_shown(rows, wanted)
    if at is None:
        return ""
    number = known.index(at) + 1
    latest = ", the latest" if number == len(known) else ""
    return f'<span class="bd-position">After step <b>{at:,}</b> · probe {number} of {len(known)}{latest}</span>'


def probes_html(rows: ProbeRows, wanted: int | None, expected: bool) -> str:
    """The prompts with both completions; words that only one of them has are marked. `expected`: the run makes probes."""
    at = step_shown(rows, wanted)
    if at is None:
        return components.note(
            "The first probe comes before the first step." if expected else "This run makes no probes (probe_every 0)."
        )
    return "".join(_probe(row) for row in rows if row.get("step") == at)


def _probe(row: Mapping[str, Any]) -> str:
    prompt, base, tuned = (str(row.get(name, "")) for name in ("prompt", "base", "tuned"))
    category = f'<span class="bd-chip">{escape(str(row["category"]))}</span>' if row.get("category") else ""
    if base == tuned:
        left = right = escape(base)
    elif max(len(base), len(tuned)) > _DIFF_CHARACTERS:
        left, right = escape(base), escape(tuned)
    else:
        pieces = word_diff(base, tuned)
        left, right = _side(pieces, "out", "del"), _side(pieces, "in", "ins")
    same = ' <span class="bd-same">the same so far</span>' if base == tuned else ""
    return (
        f'<article class="bd-probe"><h4>{escape(prompt)} {category}</h4><div class="bd-probe-sides">'
        f'<div class="bd-probe-base"><h5>Base</h5><p>{left}</p></div>'
        f'<div class="bd-probe-tuned"><h5>Tuned so far{same}</h5><p>{right}</p></div></div></article>'
    )


def _side(pieces: Sequence[DiffPiece], own: str, tag: str) -> str:
    kept = (f"<{tag}>{escape(text)}</{tag}>" if kind == own else escape(text) for kind, text in pieces if kind in ("same", own))
    return "".join(kept)


# Train watch


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
        return [see(run) for run in jobs_store.list_jobs(self.workspace, "train")]

    def watch(self, view: str, chosen: str, mark: dict[str, int], probe_at: int | None, log_open: bool) -> Updates:
        """A tick of the clock."""
        try:
            every = self.every()
            return self._news(every, chosen if view == "run" else "", mark, probe_at, log_open)
        except (BiasDPOError, OSError) as exc:
            return self.unlisted(exc, mark)

    def unlisted(self, exc: Exception, mark: dict[str, int]) -> Updates:
        """The runs can't be read: said in place of the list, which the next tick that can read them brings back."""
        line = str(exc) if isinstance(exc, BiasDPOError) else f"The runs can't be read: {exc}; the list comes back when they can"
        said = (self.table, self.list_box)
        kept = {name: value for name, value in mark.items() if name not in map(key, said)}
        return {self.table: components.error(line), self.list_box: gr.update(visible=True), self.mark: kept}

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
            self.table: table(every, chosen),
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
            self.head: head(run),
            self.stop_button: gr.update(visible=here and state in ("queued", "running", "stopping")),
            self.resume_button: gr.update(visible=here and state in ("stopped", "interrupted", "failed")),
            self.retry_button: gr.update(visible=here and run.config is not None),
            self.compare_button: gr.update(visible=run.has_adapter and not run.active),
            self.evaluate_button: gr.update(visible=here and run.has_adapter and not run.active),
            self.export_button: gr.update(visible=here and run.has_adapter and not run.active),
            self.zip_button: gr.update(visible=here and run.has_adapter and not run.active),
            self.delete_button: gr.update(visible=here and not run.active),
            self.charts: train_charts.charts(drawn, _NO_CURVES, [run.id]),
            self.probe_position: position(probes, probe_at),
            self.probe_buttons: gr.update(visible=len(steps(probes)) > 1),
            self.probes: probes_html(probes, probe_at, expected),
            self.log: self.log_of(run) if log_open else "",
            self.details: details(run),
            self.evaluate: evaluate_command(run) if here and run.has_adapter and not run.active else "",
        }

    def log_of(self, run: SeenRun) -> str:
        """The end of a run's log; on a public Space it may name folders that are none of a visitor's business."""
        if is_public_space():
            return components.note("Logs are not shown on a public Space.")
        return log(run.folder.log_tail(LOG_LINES))

    def machine_note(self) -> str:
        """What a run does to the models that are loaded."""
        return refused() if is_public_space() else machine(models.free_gpu_memory_gb())

    def logged_csv(self, asked: Any) -> str:
        """The numbers of one chart as the runs logged them, for its download. `asked`: {"chart": its id, "runs": run ids}."""
        chart, names = (asked.get("chart"), asked.get("runs")) if isinstance(asked, dict) else (None, None)
        if not isinstance(chart, str) or not isinstance(names, list):
            raise ConfigError(f"A chart's id and its runs are needed: got {asked!r:.80}; use the chart's own button")
        folders = [jobs_store.find_job(str(name), self.workspace, "train").folder for name in names]
        return logged_csv(chart, ((folder.id, folder.read_metrics(), folder.read_speed()) for folder in folders))


# Train compare


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
            return {self.comparison: components.error(str(exc))}
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
            return comparison(chosen) if chosen else components.note("Choose two or more runs to compare.")
        except BiasDPOError as exc:
            return components.error(str(exc))


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
        return components.note("Their settings and their data are the same.") if len(chosen) > 1 else ""
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


# Train start


FIRST_MODEL = "smollm2"
_TELL_SECONDS = 0.5


def presets_of(model: str) -> list[Preset]:
    """The presets made for a model; for one from elsewhere, those of the catalog model of its architecture."""
    own = [preset for preset in train_config.presets() if preset.model == model]
    if own or model in models.catalog():
        return own
    try:
        architecture = models.find(model).architecture
    except BiasDPOError:
        return []
    like = [spec.id for spec in models.catalog().values() if spec.architecture == architecture]
    return [preset for preset in train_config.presets() if preset.model in like]


def first_preset(model: str) -> Preset | None:
    """The quickest."""
    return next(iter(presets_of(model)), None)


class StartActions(DataActions, ABC):
    """The handlers. `source_rows`, `fields` and the like are the panel's, in `train_new`."""

    pool: EnginePool
    model: gr.Dropdown
    preset: gr.Radio
    preset_text: gr.HTML
    fields: list[Any]
    groups: list[gr.Accordion]
    run_id: gr.Textbox
    proposed: gr.State
    trouble: gr.HTML
    estimate_view: gr.HTML
    estimate_button: gr.Button
    cancel_button: gr.Button
    estimates: dict[str, threading.Event]

    @abstractmethod
    def after_start(self, run_id: str, notice: str) -> Updates:
        """What the tab shows once a run has started."""

    # Model and preset

    def model_choices(self, picked: str = "") -> list[tuple[str, str]]:
        """The catalog with what is here, then models of one's own: the picked one and those that are loaded."""
        specs = map(models.with_files, models.catalog().values())
        choices = [(s.title if s.present else f"{s.title} · not on this machine", s.id) for s in specs]
        return choices + own_choices([picked, *(spec.id for spec in self.pool.opened())])

    def pick_model(self, model: Any, run_id: Any, proposed: str) -> Updates:
        """Another model: its presets, the quickest filled in."""
        try:
            refuse_on_public_space("Training")
            if not isinstance(model, str) or not model.strip():
                raise ConfigError("No model is named: choose one, or type a Hub id, an HF folder or a .gguf file")
            model = models.absolute_name(pasted(model))
            if model not in models.catalog():
                models.find(model)
        except BiasDPOError as exc:
            return {self.new_notice: components.error(str(exc))}
        chosen = first_preset(model)
        shown = self._filled(chosen) | {
            self.model: gr.update(choices=self.model_choices(model), value=model),
            self.preset: gr.update(choices=_choices(model), value=_id(chosen)),
            self.new_notice: "",
        }
        if not run_id or run_id == proposed:  # a name of the visitor's own stays
            shown |= self._proposal(model)
        return shown

    def pick_preset(self, preset_id: Any, model: Any) -> Updates:
        """Another preset: its values, over the defaults."""
        if is_public_space():  # a model of any path would be looked at
            return {self.new_notice: refused()}
        return self._filled(next((p for p in presets_of(str(model)) if p.id == preset_id), None))

    def _filled(self, preset: Preset | None) -> Updates:
        config = TrainConfig(**preset.values | {"model": ""} if preset else {})
        return {self.preset_text: preset_html(preset), self.estimate_view: ""} | self._fields_of(config)

    def _fields_of(self, config: TrainConfig) -> Updates:
        values = from_config(config)
        effects = visible_settings(form_values(values)).values()
        return {f: gr.update(value=v, visible=e) for f, v, e in zip(self.fields, values, effects, strict=True)}

    def _proposal(self, model: str) -> Updates:
        free = jobs_store.free_id("train", model, self.store.workspace)
        return {self.run_id: free, self.proposed: free}

    def open_new(self, model: Any, run_id: Any, proposed: str, *sources: Any) -> Updates:
        """The panel was opened: what can be chosen now, and a name that is free now."""
        named = [name for name in sources[::2] if isinstance(name, str)]
        shown: Updates = {source: gr.update(choices=source_choices(self.store, named)) for _, source, _, _ in self.source_rows}
        shown |= {self.model: gr.update(choices=self.model_choices(model if isinstance(model, str) else "")), self.new_notice: ""}
        if isinstance(model, str) and (not run_id or run_id == proposed):
            shown |= self._proposal(model)
        return shown

    def fill_from(self, config: TrainConfig, snapshot: str) -> Updates:
        """The panel with a run's config, to start another like it. A file that is gone is replaced by the run's own snapshot.
        What can't be taken over is said."""
        rows = rows_of(config.datasets, config.dataset_weights)
        told: list[str] = []
        missing = [name for name, _ in rows if not is_there(name)]
        if missing:
            told.append(f"{titles(missing)}: not there any more, so the run's own copy of its data is chosen.")
            if config.dataset_weights:
                weights = ", ".join(f"{titles([name])} {weight:g}" for name, weight in rows)
                told.append(f"That copy is one source, with a weight of 1: the run's own weights are lost ({weights}).")
            rows = [(snapshot, 1.0)]
        elif len(rows) > MOST_SOURCES:
            left_out = titles([name for name, _ in rows[MOST_SOURCES:]])
            told.append(f"The run has {len(rows)} sources and there is room for {MOST_SOURCES} here: {left_out} left out.")
            rows = rows[:MOST_SOURCES]
        return (
            self._fields_of(config)
            | self.rows_shown(rows, [name for name, _ in rows])
            | self._proposal(config.model)
            | {
                self.model: gr.update(choices=self.model_choices(config.model), value=config.model),
                self.preset: gr.update(choices=_choices(config.model), value=None),
                self.preset_text: components.note("The settings of the run that is tried again: change what you want to."),
                self.new_notice: components.note(" ".join(told)),
                self.estimate_view: "",
            }
        )

    # Settings

    def show_effects(self, *deciding: Any) -> list[Any]:
        """Only settings that have an effect are shown."""
        effects = visible_settings(dict(zip(DECIDING, deciding, strict=True)))
        return [gr.update(visible=effects[setting.name]) for setting in SETTINGS if setting.when]

    def checking(self, setting: Setting) -> Callable[[Any], Any]:
        """The validator of one field, for when it is left."""

        def check(value: Any) -> Any:
            line = problem(setting, value)
            return gr.validate(not line, line)

        return check

    def check_everything(self, *given: Any) -> list[Any]:
        """The validator of Start and Estimate: a word on each input."""
        before = len(given) - len(SETTINGS)
        lines = [""] * before + problems(given[before:])
        return [gr.validate(not line, line) for line in lines]

    def point_out(self, *given: Any) -> list[Any]:
        """What is wrong, in one place, with its group unfolded; nothing where all is well."""
        lines = dict(zip(SETTINGS, problems(given[-len(SETTINGS) :]), strict=True))
        opened = [gr.update(open=True) if any(lines[s] for s in group) else gr.skip() for group in GROUPS.values()]
        return [field_errors(line for line in lines.values() if line), *opened]

    def _config(self, given: Sequence[Any]) -> tuple[TrainConfig, str]:
        """The run that is asked for, and its name."""
        model, run_id, shown, *rest = given
        if not isinstance(model, str) or not model.strip():
            raise ConfigError("No model to train: choose one under Model")
        sources, fields = rest[: 2 * MOST_SOURCES], rest[2 * MOST_SOURCES :]
        rows = read_rows(sources[: 2 * shown])
        values = to_values(fields) | config_values(rows)
        config = TrainConfig(**values | {"model": models.absolute_name(pasted(model))})
        return config, run_id.strip() if isinstance(run_id, str) else ""

    def show_config(self, *given: Any) -> str:
        """The config file that makes `train --config` start the same run."""
        try:
            refuse_on_public_space("Training")
            return self._config(given)[0].to_toml()
        except BiasDPOError as exc:
            return f"# {exc}"

    # Estimate and start

    def estimate(self, request: gr.Request, *given: Any) -> Iterator[Updates]:
        """Measure real steps in a process of their own; Cancel, or closing the page, ends it."""
        cancelled, ended = threading.Event(), threading.Event()  # by the visitor; because nobody waits for it any more
        self.estimates[request.session_hash or ""] = cancelled
        buttons = {self.estimate_button: gr.update(interactive=False), self.cancel_button: gr.update(visible=True)}
        yield {self.new_notice: measuring(0), self.estimate_view: ""} | buttons
        shown: Updates
        try:
            refuse_on_public_space("Training")
            config, _name = self._config(given)
            began = time.monotonic()
            with ThreadPoolExecutor(1) as executor:
                task = executor.submit(
                    estimate_training, config, self.store.workspace, cancelled=lambda: cancelled.is_set() or ended.is_set()
                )
                try:
                    while wait([task], _TELL_SECONDS).not_done:
                        yield {self.new_notice: measuring(time.monotonic() - began)}
                finally:
                    ended.set()  # before the executor waits for its task
            view = estimate(task.result())
            shown = {self.estimate_view: view, self.new_notice: ""}
        except Exception as exc:
            line = components.note("Cancelled.") if cancelled.is_set() else components.error(told(exc, "Not estimated"))
            shown = {self.new_notice: line}
        finally:
            self.estimates.pop(request.session_hash or "", None)
        yield shown  # the buttons are set back when all is over: see `wire_new`

    def cancel_estimate(self, request: gr.Request) -> None:
        """Cancel, or the page was closed."""
        event = self.estimates.get(request.session_hash or "")
        if event is not None:
            event.set()

    def start(self, *given: Any) -> Iterator[Updates]:
        """Start the run, and show it."""
        yield {self.new_notice: components.busy("Reading the data and starting …")}
        try:
            refuse_on_public_space("Training")
            config, run_id = self._config(given)
            run_id = jobs_store.start_training(config, self.store.workspace, run_id, command="the page's Train tab").id
        except Exception as exc:
            yield {self.new_notice: components.error(told(exc, "Not started"))}
            return
        yield {self.new_notice: "", self.estimate_view: ""} | self.after_start(run_id, "")


def _choices(model: str) -> list[tuple[str, str]]:
    return [(preset.title, preset.id) for preset in presets_of(model)]


def _id(preset: Preset | None) -> str | None:
    return preset.id if preset else None


# Train new


_READY_AGAIN = "() => [{__type__: 'update', interactive: true}, {__type__: 'update', visible: false}]"
_FILES = [".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet"]


class NewRunPanel(StartActions):
    """One column of the Train tab."""

    def build_new(self) -> None:
        """Lay the panel out, with the first preset of the first model filled in."""
        preset = first_preset(FIRST_MODEL)
        config = TrainConfig(**preset.values if preset else {})
        values = dict(zip(SETTINGS, from_config(config), strict=True))
        visible = visible_settings(dict(config))
        with gr.Row(elem_id="train-what"):
            here = "catalog id" if is_public_space() else "catalog id, Hub id, HF folder or .gguf"
            self.model = gr.Dropdown(
                self.model_choices(),
                value=FIRST_MODEL,
                label=f"Model ({here})",
                allow_custom_value=True,
                elem_id="train-model",
                min_width=260,
            )
            self.preset = gr.Radio(
                [(shipped.title, shipped.id) for shipped in presets_of(FIRST_MODEL)],
                value=preset.id if preset else None,
                label="Preset",
                elem_id="train-preset",
                min_width=300,
            )
        self.preset_text = gr.HTML(preset_html(preset), js_on_load=None, elem_id="train-preset-text")
        self._build_data()
        self.fields: list[Any] = []
        self.groups: list[gr.Accordion] = []
        for group, settings in GROUPS.items():
            slug = group.split()[0].lower()
            with (
                gr.Accordion(group, open=not settings[0].is_advanced, elem_id=f"train-group-{slug}") as box,
                gr.Row(elem_classes="bd-fields"),
            ):
                self.groups.append(box)
                self.fields += [build_field(one, values[one], visible[one.name]) for one in settings]
        with gr.Accordion("Config file", open=False, elem_id="train-config-file"):
            self.config_button = gr.Button("Show the config file of these settings", size="sm", elem_id="train-config-show")
            self.config_view = gr.Code("", language=None, label="For python -m biasdpo train --config FILE", interactive=False)
        self.estimate_view = gr.HTML("", js_on_load=None, elem_id="train-estimate-view")
        with gr.Row(elem_id="train-start-row"):
            self.run_id = gr.Textbox("", label="Name of the run", max_lines=1, elem_id="train-run-id", min_width=180, scale=2)
            self.estimate_button = gr.Button("Estimate time and memory", elem_id="train-estimate", min_width=170, scale=1)
            self.cancel_button = gr.Button("Cancel", elem_id="train-cancel", visible=False, min_width=80, scale=0)
            self.start_button = gr.Button("Start", variant="primary", elem_id="train-start", min_width=150, scale=1)
        self.proposed = gr.State("")
        self.trouble = gr.HTML("", js_on_load=None, elem_id="train-trouble")
        self.new_notice = gr.HTML("", js_on_load=None, elem_id="train-new-notice")

    def _build_data(self) -> None:
        self.shown_sources = gr.State(1)
        self.source_rows: list[tuple[gr.Row, gr.Dropdown, gr.Number, gr.Button]] = []
        with gr.Column(elem_id="train-data"):
            for i in range(MOST_SOURCES):
                with gr.Row(visible=i == 0, elem_id=f"train-source-row-{i + 1}", elem_classes="bd-source") as row:
                    source = gr.Dropdown(
                        source_choices(self.store),
                        value=str(SEED_SET) if i == 0 else "",
                        label="Data (choose, or type hub:OWNER/NAME or a file's path)" if i == 0 else f"Data {i + 1}",
                        allow_custom_value=True,
                        elem_id=f"train-source-{i + 1}",
                        min_width=220,
                        scale=5,
                    )
                    weight = gr.Number(
                        1, label="Weight", elem_id=f"train-weight-{i + 1}", min_width=90, scale=1, step=0.5, minimum=None
                    )
                    remove = gr.Button("Remove", size="sm", elem_id=f"train-remove-{i + 1}", min_width=80, scale=0, visible=i > 0)
                self.source_rows.append((row, source, weight, remove))
            with gr.Row(elem_id="train-data-buttons"):
                self.add_button = gr.Button("+ Another source", size="sm", elem_id="train-add-source", min_width=130, scale=0)
                self.upload = gr.UploadButton(
                    "+ A file of mine", file_types=_FILES, size="sm", elem_id="train-upload", min_width=130, scale=0
                )
            self.mixture_view = gr.HTML("", js_on_load=None, elem_id="train-mixture")

    @property
    def source_fields(self) -> list[Any]:
        """Source, weight, source, weight, …"""
        return [field for _, source, weight, _ in self.source_rows for field in (source, weight)]

    @property
    def mixture_inputs(self) -> list[Any]:
        """What the data's counts hang on."""
        by_name = dict(zip((s.name for s in SETTINGS), self.fields, strict=True))
        return [self.shown_sources, by_name["held_out_share"], by_name["seed"], *self.source_fields]

    @property
    def source_outputs(self) -> list[Any]:
        """All that a change of the rows may touch."""
        return [self.shown_sources, *(row for row, *_ in self.source_rows), *self.source_fields, self.add_button]

    @property
    def plan_outputs(self) -> list[Any]:
        """All of the panel that a preset, another run or a start fills."""
        return [
            self.model,
            self.preset,
            self.preset_text,
            *self.fields,
            *self.source_outputs,
            self.run_id,
            self.proposed,
            self.new_notice,
            self.mixture_view,
            self.estimate_view,
        ]

    def wire_new(self, run_outputs: list[Any]) -> None:
        """`run_outputs`: what a started run fills beside this panel."""
        raw: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "preprocess": False}
        quick = raw | {"queue": False}
        named = [self.run_id, self.proposed]
        # Progress is shown nowhere near a field: Gradio would wipe what a validator has said there.
        filling = quick | {"show_progress_on": self.new_notice}
        self.model.input(self.pick_model, [self.model, *named], self.plan_outputs, **filling)
        self.preset.input(self.pick_preset, [self.preset, self.model], self.plan_outputs, **filling)
        by_name = dict(zip((s.name for s in SETTINGS), self.fields, strict=True))
        gr.on(
            [by_name[name].change for name in DECIDING],
            self.show_effects,
            [by_name[name] for name in DECIDING],
            [field for setting, field in zip(SETTINGS, self.fields, strict=True) if setting.when],
            trigger_mode="always_last",
            **filling,
        )
        gr.on(
            [field.change for field in (self.model, *self.source_fields, *self.fields)],
            None,
            None,
            self.estimate_view,
            js="() => ''",  # what was measured is of another run; in the browser, so that it costs no request
            api_visibility="private",
        )
        for setting, field in zip(SETTINGS, self.fields, strict=True):
            if setting.kind != "choice":  # a list offers nothing wrong
                field.blur(_checked, field, None, validator=self.checking(setting), concurrency_limit=None, **raw)

        rows = [self.shown_sources, *self.source_fields]
        self.add_button.click(self.add_source, rows, self.source_outputs, **quick)
        self.upload.upload(self.add_file, [self.upload, *rows], [*self.source_outputs, self.new_notice], **quick)
        for i, (_row, _source, _weight, remove) in enumerate(self.source_rows):
            remove.click(self.removing(i), rows, self.source_outputs, **quick)
        # Files may be long and the Hub far away: through the queue.
        gr.on(
            [field.change for field in (*self.source_fields, by_name["held_out_share"], by_name["seed"])],
            self.show_mixture,
            self.mixture_inputs,
            self.mixture_view,
            trigger_mode="always_last",
            concurrency_limit=4,
            **raw,
        )
        everything = [self.model, self.run_id, self.shown_sources, *self.source_fields, *self.fields]
        checked = {"validator": self.check_everything, **raw}
        # A validator speaks at the field, which may lie in a folded group: say it here, too, and unfold that group.
        # First, since Gradio leaves out what comes after a validator's no.
        self.config_button.click(self.show_config, everything, self.config_view, **quick)
        both = [self.start_button.click, self.estimate_button.click]
        gr.on(both, self.point_out, everything, [self.trouble, *self.groups], **quick)
        outcome = [self.new_notice, self.estimate_view, self.estimate_button, self.cancel_button]
        # Not with the last word of the estimate: a moment longer Gradio takes it to be under way, and would drop a click.
        self.estimate_button.click(self.estimate, everything, outcome, concurrency_limit=1, **checked).then(
            None, None, [self.estimate_button, self.cancel_button], js=_READY_AGAIN, api_visibility="private"
        )
        self.cancel_button.click(self.cancel_estimate, None, None, **quick)
        self.start_button.click(self.start, everything, [*outcome, *run_outputs], concurrency_limit=4, **checked)
        self.run_id.submit(None, None, None, js="() => document.getElementById('train-start').click()", api_visibility="private")


def _checked(_value: Any) -> None:
    """Nothing: the validator before it has said what there is to say."""


# Train run


class RunActions(RunsView):
    """The handlers of one run's buttons."""

    pick_adapter: Callable[[str, str], Updates]
    tabs: gr.Tabs

    def _run(self, run_id: Any) -> SeenRun:
        if not isinstance(run_id, str) or not run_id:
            raise ConfigError("No run is chosen: choose one of the list")
        return see(jobs_store.find_job(run_id, self.workspace, "train"))

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
            jobs_store.stop_job(self._run(run_id).id, self.workspace, "train")
        except BiasDPOError as exc:
            return {self.run_notice: components.error(str(exc))}
        return self._again(run_id, log_open, components.note("Asked to stop: a checkpoint is saved after this step."))

    def resume(self, run_id: Any, log_open: bool) -> Updates:
        """Go on from the last checkpoint."""
        try:
            refuse_on_public_space("Training")
            run = self._run(run_id)
            jobs_store.resume_job(run.id, self.workspace, "train")
        except BiasDPOError as exc:
            return {self.run_notice: components.error(str(exc))}
        return self._again(run_id, log_open, components.note("Goes on from the last checkpoint."))

    # Delete

    def ask_delete(self, run_id: Any) -> Updates:
        """Ask first, and say what is lost. The answer is of this run, whichever is chosen meanwhile."""
        try:
            run = self._run(run_id)
        except BiasDPOError as exc:
            return {self.run_notice: components.error(str(exc))}
        text = deleting(run, size_of(run.folder.path))
        return {self.asked: run.id, self.confirm_box: gr.update(visible=True), self.confirm_text: text}

    def keep(self) -> Updates:
        """Nothing is to be deleted."""
        return {self.asked: "", self.confirm_box: gr.update(visible=False), self.confirm_text: ""}

    def delete(self, asked: Any) -> Updates:
        """Delete it; the newest of the others is shown, or the panel for a new one."""
        try:
            run = self._run(asked)
            jobs_store.delete_job(run.id, self.workspace, "train")
        except BiasDPOError as exc:
            return self.keep() | {self.run_notice: components.error(str(exc))}
        others = self.every()
        return self.keep() | self.show_run(others[0].id if others else "", False, components.note(f"Run {run.id} was deleted."))

    # Note, log, probes

    def save_note(self, run_id: Any, text: Any) -> str:
        """What the user writes about a run."""
        try:
            jobs_store.write_note(self._run(run_id).id, self.workspace, text if isinstance(text, str) else "", "train")
        except BiasDPOError as exc:
            return components.error(str(exc))
        return components.note(f"Saved with run {run_id}.")  # its name, since another may be shown by now

    def open_log(self, run_id: Any) -> Updates:
        """The log was unfolded."""
        try:
            return {self.log_open: True, self.log: self.log_of(self._run(run_id))}
        except BiasDPOError as exc:
            return {self.log_open: True, self.log: components.error(str(exc))}

    def turning(self, by: int) -> Callable[..., Updates]:
        """The handler of "earlier" and "later"."""

        def turn(run_id: Any, probe_at: int | None) -> Updates:
            try:
                rows = self._run(run_id).folder.read_probes()
            except BiasDPOError as exc:
                return {self.run_notice: components.error(str(exc))}
            at = turned(rows, probe_at, by)
            return {self.probe_at: at, self.probe_position: position(rows, at), self.probes: probes_html(rows, at, expected=True)}

        return turn

    # What next

    def open_in_compare(self, run_id: Any) -> Updates:
        """The Compare tab, with this run's model and adapter."""
        try:
            run = self._run(run_id)
            if run.config is None or not run.has_adapter:
                raise RunError(f"Run {run.id!r} has no adapter yet: wait until it has finished")
        except BiasDPOError as exc:
            return {self.run_notice: components.error(str(exc))}
        return self.pick_adapter(run.config.model, run.id) | {self.tabs: gr.Tabs(selected="compare")}

    def export_zip(self, run_id: Any) -> Iterator[Updates]:
        """The adapter's folder as it is, for PEFT. (As a GGUF, for llama.cpp: the Export tab.)"""
        yield {self.run_notice: components.busy("Exporting …"), self.download: gr.update(visible=False)}
        try:
            refuse_on_public_space("Export")
            run = self._run(run_id)
            with tempfile.TemporaryDirectory(prefix="biasdpo-export-") as folder:
                file = self._zip(run, Path(folder))
                # Gradio serves its own cache to whoever has the address, and nothing else: the workspace stays closed.
                served = save_file_to_cache(file, self.download.GRADIO_CACHE)
                size = size_text(file.stat().st_size)
        except Exception as exc:
            yield {self.run_notice: components.error(told(exc, "Not exported"))}
            return
        yield {
            self.run_notice: components.note(f"Ready: {file.name}, {size}."),
            self.download: gr.update(label=f"Download {file.name}", value=served, visible=True),
        }

    def _zip(self, run: SeenRun, folder: Path) -> Path:
        models.from_run(self.workspace, run.id)  # a folder that is no adapter has its own line
        return Path(shutil.make_archive(str(folder / f"{run.id}-adapter"), "zip", run.folder.adapter))


# Train tab


_FOCUS_DELETE = "() => window.bdFocus('#train-delete', '#train-new-button')"
_FOCUS_LIST = "() => window.bdFocus('#train-table tr[aria-current] button', '#train-new-button')"


class TrainTab(NewRunPanel, RunActions, CompareRuns):
    """One tab over the workspace's run folders; `build` is called once, inside the page's Blocks."""

    def __init__(
        self, store: Store, pool: EnginePool, pick_adapter: Callable[[str, str], Updates], compare_outputs: list[Any]
    ) -> None:
        """`pick_adapter`, `compare_outputs`: how the Compare tab takes over a model and an adapter."""
        self.store = store
        self.pool = pool
        self.pick_adapter = pick_adapter
        self.compare_outputs = compare_outputs
        self.estimates: dict[str, threading.Event] = {}

    def build(self, demo: gr.Blocks, tabs: gr.Tabs, tab: gr.Tab) -> None:
        """Lay out the tab, then wire it."""
        self.tabs = tabs
        self.view = gr.State("")
        self.mark = gr.State({})
        self.probe_at = gr.State(None)
        self.log_open = gr.State(False)
        self.asked = gr.State("")
        self.chosen = gr.Textbox("", elem_id="train-chosen")  # hidden by CSS; kept by the page across restarts of the app
        self.machine = gr.HTML(refused() if is_public_space() else "", js_on_load=None, elem_id="train-machine")
        self.empty = gr.HTML(
            no_runs_here() if is_public_space() else no_runs(), js_on_load=None, visible=False, elem_id="train-empty"
        )
        with gr.Column(visible=False, elem_id="train-list") as self.list_box:
            with gr.Row(elem_id="train-list-top"):
                gr.HTML("<h2>Runs</h2>", js_on_load=None)
                self.new_button = gr.Button(
                    "New run", size="sm", elem_id="train-new-button", min_width=90, scale=0, visible=not is_public_space()
                )
                self.several_button = gr.Button("Compare runs", size="sm", elem_id="train-several", min_width=110, scale=0)
            self.table = gr.HTML(
                "", js_on_load="window.bdTable(element, trigger)", apply_default_css=False, elem_id="train-table"
            )
        with gr.Column(visible=False, elem_id="train-new") as self.new_box:
            gr.HTML("<h2>New run</h2>", js_on_load=None)
            self.build_new()
        with gr.Column(visible=False, elem_id="train-run") as self.run_box:
            self._build_run()
        with gr.Column(visible=False, elem_id="train-compare") as self.compare_box:
            gr.HTML("<h2>Compare runs</h2>", js_on_load=None)
            self.picked = gr.Dropdown(
                [], multiselect=True, max_choices=MOST_RUNS, label="Runs", elem_id="train-picked", min_width=300
            )
            self.comparison = self._charts("train-comparison")
        self.timer = gr.Timer(active=False)  # goes once the tab was opened
        self._wire(demo, tab)

    def _build_run(self) -> None:
        self.head = gr.HTML("", js_on_load=None, elem_id="train-head")
        with gr.Row(elem_id="train-actions"):
            self.stop_button = self._action("Stop", "train-stop", variant="stop")
            self.resume_button = self._action("Resume", "train-resume", variant="primary")
            self.compare_button = self._action("Compare base and tuned", "train-to-compare", variant="primary")
            self.evaluate_button = self._action("Evaluate", "train-to-evaluate")
            self.export_button = self._action("Export as GGUF", "train-export-gguf")
            self.zip_button = self._action("Export adapter (.zip)", "train-export-zip")
            self.retry_button = self._action("Retry with changes", "train-retry")
            self.delete_button = self._action("Delete …", "train-delete")
        self.confirm_text = gr.HTML("", js_on_load=None, elem_id="train-confirm-text")
        with gr.Row(visible=False, elem_id="train-confirm") as self.confirm_box:
            self.really_button = gr.Button(
                "Really delete", variant="stop", size="sm", elem_id="train-really-delete", min_width=60
            )
            self.keep_button = gr.Button("Keep it", size="sm", elem_id="train-keep", min_width=60)
        self.run_notice = gr.HTML("", js_on_load=None, elem_id="train-notice")
        self.download = gr.DownloadButton("", visible=False, elem_id="train-download", min_width=60)
        self.evaluate = gr.HTML("", js_on_load=None, elem_id="train-evaluate")
        self.charts = self._charts("train-charts")
        with gr.Row(elem_id="train-probe-top"):
            gr.HTML("<h3>Live probe: base beside the model so far</h3>", js_on_load=None)
            self.probe_position = gr.HTML("", js_on_load=None, elem_id="train-probe-position")
            with gr.Row(visible=False, elem_id="train-probe-buttons") as self.probe_buttons:
                self.earlier_button = gr.Button("← Earlier", size="sm", elem_id="train-probe-earlier", min_width=60, scale=0)
                self.later_button = gr.Button("Later →", size="sm", elem_id="train-probe-later", min_width=60, scale=0)
        self.probes = gr.HTML("", js_on_load=None, apply_default_css=False, elem_id="train-probes")
        with gr.Row(elem_id="train-note-row"):
            self.note = gr.Textbox(
                label="Note on this run", lines=2, max_lines=8, elem_id="train-note", scale=5, interactive=not is_public_space()
            )
            self.note_button = gr.Button(
                "Save note", size="sm", elem_id="train-save-note", min_width=90, scale=0, visible=not is_public_space()
            )
        self.note_saved = gr.HTML("", js_on_load=None, elem_id="train-note-saved")
        with gr.Accordion("Log (the last lines)", open=False, elem_id="train-log") as self.log_box:
            self.log = gr.HTML("", js_on_load=None, apply_default_css=False, autoscroll=True, max_height=420)
        with gr.Accordion("Data and settings", open=False, elem_id="train-details"):
            self.details = gr.HTML("", js_on_load=None, apply_default_css=False)

    @staticmethod
    def _action(title: str, elem_id: str, variant: Any = "secondary") -> gr.Button:
        return gr.Button(title, size="sm", variant=variant, elem_id=elem_id, min_width=60, visible=False)

    def _charts(self, elem_id: str) -> gr.HTML:
        """Charts whose CSV button asks for the logged numbers, which are too many to be sent with each tick."""

        def logged_csv(asked: Any) -> dict[str, str]:  # Gradio marks the function, and a method can't be marked
            try:
                return {"csv": self.logged_csv(asked)}
            except (BiasDPOError, OSError) as exc:
                return {"error": str(exc)}

        load = "window.bdCurves(element, server)"
        return gr.HTML("", js_on_load=load, apply_default_css=False, elem_id=elem_id, server_functions=[logged_csv])

    def _wire(self, demo: gr.Blocks, tab: gr.Tab) -> None:
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        seen, shown = self.seen_outputs, self.run_outputs
        here = [self.view, self.chosen, self.mark, self.probe_at, self.log_open]
        new_inputs = [self.model, self.run_id, self.proposed, *self.source_fields]
        new_outputs = self.plan_outputs
        demo.load(self.open_page, None, [self.tabs, self.chosen], **quick)
        demo.unload(self.close_page)
        filling = quick | {"show_progress_on": self.new_notice}  # see `wire_new`
        tab.select(self.open_tab, [*here, *new_inputs], [self.machine, *shown, *new_outputs], **filling).then(
            self.first_mixture, [self.mixture_view, *self.mixture_inputs], self.mixture_view, api_visibility="private",
            show_progress="hidden", preprocess=False,
        )  # fmt: skip
        self.timer.tick(self.watch, here, seen, **quick)
        self.chosen.change(None, self.chosen, None, js="(run) => window.bdAddress(run)", api_visibility="private")
        # `choose` needs the event's data, and so takes the page's inputs by place.
        # Not "always_last": for a click during another one Gradio would send the first one's row again.
        self.table.click(self.choose_row, self.log_open, shown, trigger_mode="multiple", **quick).success(
            None, None, None, js="() => window.bdShow('train-run')", api_visibility="private"
        )
        self.new_button.click(self.open_new_run, new_inputs, [*shown, *new_outputs], **filling).then(
            self.first_mixture, [self.mixture_view, *self.mixture_inputs], self.mixture_view, api_visibility="private",
            show_progress="hidden", preprocess=False,
        )  # fmt: skip
        several = [self.view, self.new_box, self.run_box, self.compare_box, self.table, self.picked, self.comparison]
        self.several_button.click(self.open_compare, self.picked, several, **quick)
        self.picked.change(self.compare, self.picked, self.comparison, trigger_mode="always_last", **quick, preprocess=False)
        self.wire_new(shown)

        one = [self.chosen, self.log_open]
        self.stop_button.click(self.stop, one, shown, **quick)
        self.resume_button.click(self.resume, one, shown, **quick)
        self.retry_button.click(self.retry, self.chosen, [*shown, *new_outputs], **filling).then(
            None, None, None, js="() => window.bdShow('train-new')", api_visibility="private"
        )
        asking = [self.asked, self.confirm_box, self.confirm_text, self.run_notice]
        self.delete_button.click(self.ask_delete, self.chosen, asking, **quick).then(
            None, None, None, js="() => window.bdFocus('#train-keep')", api_visibility="private"
        )
        self.keep_button.click(self.keep, None, asking[:3], **quick).then(
            None, None, None, js=_FOCUS_DELETE, api_visibility="private"
        )
        self.really_button.click(self.delete, self.asked, shown, **quick).then(
            None, None, None, js=_FOCUS_LIST, api_visibility="private"
        )
        gr.on([self.note.blur, self.note_button.click], self.save_note, [self.chosen, self.note], self.note_saved, **quick)
        self.log_box.expand(self.open_log, self.chosen, [self.log_open, self.log], **quick)
        self.log_box.collapse(lambda: False, None, self.log_open, **quick)
        probed = [self.probe_at, self.probe_position, self.probes, self.run_notice]
        for button, by in ((self.earlier_button, -1), (self.later_button, 1)):
            button.click(self.turning(by), [self.chosen, self.probe_at], probed, **quick)
        self.compare_button.click(self.open_in_compare, self.chosen, [self.run_notice, self.tabs, *self.compare_outputs], **quick)
        exported: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": 2}
        self.zip_button.click(self.export_zip, self.chosen, [self.run_notice, self.download], **exported)

    # Opening

    def open_page(self, request: gr.Request) -> Updates:
        """A link that names a run opens it."""
        run_id = request.query_params.get("run", "")
        return {self.tabs: gr.Tabs(selected="train"), self.chosen: run_id} if run_id else {self.chosen: ""}

    def close_page(self, request: gr.Request) -> None:
        """The page was closed: an estimate that it asked for ends. Runs go on."""
        self.cancel_estimate(request)

    def open_tab(self, view: str, chosen: str, mark: dict[str, int], probe_at: int | None, log_open: bool, *new: Any) -> Updates:
        """The tab was chosen: the run that was on, else the one that trains, else the newest, else the panel for the first."""
        machine = {self.machine: self.machine_note()}
        try:
            every = self.every()
            if view in ("new", "compare"):
                fresh = self.open_new(*new) if view == "new" else {}
                return machine | self.watch(view, chosen, mark, probe_at, log_open) | fresh
            known = [run.id for run in every]
            training = [run.id for run in every if run.status.state in ("running", "stopping")]
            queued = [run.id for run in every if run.active][::-1]  # the first in the queue
            run_id = chosen if chosen in known else next(iter([*training, *queued, *known]), "")
            if not run_id:
                return machine | self.open_new_run(*new)
            gone = f"No run {chosen!r} any more: {run_id} is shown." if chosen and chosen not in known else ""
            return machine | self.show_run(run_id, log_open, components.note(gone))
        except (BiasDPOError, OSError) as exc:
            return machine | self.unlisted(exc, mark)

    def open_new_run(self, *new: Any) -> Updates:
        """The panel for a new run."""
        return self._news(self.every(), "", {}, None, False) | self.turn_to("new") | self.open_new(*new)

    def first_mixture(self, shown: Any, *mixed: Any) -> Any:
        """The data's counts, once: later they follow the rows."""
        if shown:
            yield gr.skip()
            return
        yield from self.show_mixture(*mixed)

    def choose_row(self, log_open: bool, event: gr.EventData) -> Updates:
        """A row of the list was chosen."""
        return self.choose(event, log_open)

    def after_start(self, run_id: str, notice: str) -> Updates:
        """Show the run that was started."""
        return self.show_run(run_id, False, notice)

    def retry(self, run_id: Any) -> Updates:
        """The panel for a new run, filled with this one's config."""
        try:
            refuse_on_public_space("Training")
            run = see(jobs_store.find_job(str(run_id), self.workspace, "train"))
            if run.config is None:
                return {self.run_notice: components.error(f"Run {run.id}'s config can't be read: start a new run instead")}
            filled = self.fill_from(run.config, str(run.folder.snapshot))
        except BiasDPOError as exc:
            return {self.run_notice: components.error(str(exc))}
        return self._news(self.every(), "", {}, None, False) | self.turn_to("new") | filled
