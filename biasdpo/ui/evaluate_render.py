"""What the Evaluate tab shows of evaluations, as HTML: pure functions of records. Everything that is not ours is escaped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from biasdpo.evaluations import Evaluation, Progress
from biasdpo.ui import render
from biasdpo.ui.evaluate_reading import About
from biasdpo.ui.evaluate_words import adapter_title, benchmark_title
from biasdpo.ui.train_reading import model_title
from biasdpo.ui.train_render import chip, duration, when

_HEADS = ("Evaluation", "State", "Model", "Adapter", "Benchmarks", "Items", "When (UTC)")
_WORDS = {
    "cancelled": "cancelled: what was scored is shown; Resume goes on from there",
    "interrupted": "its process is gone; Resume goes on with what is not scored yet",
    "failed": "what was scored is kept: Resume scores the rest",
    "finished": "",
}


def refused() -> str:
    """What stands first on a public Space."""
    return (
        '<div class="bd-space" role="note"><b>Evaluating is off on this public Space.</b> Duplicate the Space, or run BiasDPO on '
        "your own machine, to measure a model. What was measured can be read.</div>"
    )


def no_evaluations(data_dir: str) -> str:
    """The empty state; on a machine of one's own with how to get the items."""
    where = (
        f"Items come from <code>{escape(data_dir)}</code>, one folder a benchmark."
        if data_dir
        else "Items come from the Hugging Face Hub, downloaded once; or start the app with <code>--data-dir FOLDER</code>, which "
        "holds a folder for each benchmark (<code>crows_pairs/</code>, <code>bbq/</code>, …) in its upstream format."
    )
    return (
        '<div class="bd-empty" role="note"><h2>Nothing measured yet</h2><p>An evaluation puts the base model and an adapter '
        "before the same items and says, with intervals, what changed: less biased, no clear difference, or worse, and at what "
        f"price in fluency. {where} Below, a model and four benchmarks are chosen: press <b>Start</b>.</p></div>"
    )


# The list


def listed(evaluations: Sequence[tuple[Evaluation, About]], chosen: str) -> str:
    """All evaluations, the newest first; the chosen one is marked."""
    at = next((i for i, (one, _) in enumerate(evaluations) if one.id == chosen), 0)
    rows = "".join(_row(one, about, one.id == chosen, i == at) for i, (one, about) in enumerate(evaluations))
    head = "".join(f'<th scope="col">{name}</th>' for name in _HEADS)
    return (
        f'<div class="bd-rows-box"><table class="bd-rows bd-evaluations"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody>'
        "</table></div>"
    )


def _row(one: Evaluation, about: About, chosen: bool, tabbed: bool) -> str:
    names = ", ".join(map(benchmark_title, about.benchmarks)) or "–"
    if about.strengths > 1:
        names = f"{about.strengths} strengths · {names}"
    cells = (
        chip(one.state),
        escape(model_title(about.model) or "–"),
        escape(adapter_title(about.adapter) if about.adapter else "–"),
        escape(names),
        "all" if about.limit is None else f"{about.limit:,} each",
        escape(when(one.started_at)),
    )
    current = ' aria-current="true"' if chosen else ""
    name = escape(one.id)
    button = f'<button type="button" tabindex="{0 if tabbed else -1}" data-focus="{name}">{name}</button>'
    tip = f' title="{escape(names)}"'
    return f'<tr data-id="{name}"{current}{tip}><td>{button}</td>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


# One evaluation


def head(one: Evaluation) -> str:
    """Name, state, progress, what went wrong."""
    words = one.phase if one.is_active else _WORDS[one.state]
    if one.state == "cancelled" and not one.has_result:
        words = "cancelled before anything was scored"
    parts = [
        f'<div class="bd-run-head"><h2>{escape(one.id)}</h2>{chip(one.state)}'
        f'<span class="bd-run-words" role="status">{escape(words)}</span></div>'
    ]
    if one.state != "finished" and one.progress:
        parts.append(progress(one.progress, one.seconds_left if one.is_active else None, one.state))
    if one.error:
        parts.append(render.error(one.error))
    return f'<section class="bd-run" aria-label="Evaluation {escape(one.id)}">{"".join(parts)}</section>'


def progress(every: Iterable[Progress], seconds_left: float | None, state: str) -> str:
    """A bar a benchmark."""
    rows = []
    for one in every:
        percent = min(100.0, 100 * one.done / one.total) if one.total else 0.0
        told = f"{one.done:,} of {one.total:,}" if one.total else "waits"
        title = escape(benchmark_title(one.name))
        rows.append(
            f'<div class="bd-eval-bar bd-is-{escape(state)}"><span>{title}</span><div class="bd-progress-track" '
            f'role="progressbar" aria-label="{title}" aria-valuenow="{percent:.0f}" aria-valuemin="0" aria-valuemax="100">'
            f'<i style="width: {percent:.1f}%"></i></div><span>{told}</span></div>'
        )
    left = "" if seconds_left is None else f'<p class="bd-measured-at">about {duration(seconds_left)} left</p>'
    return f'<div class="bd-eval-bars">{"".join(rows)}</div>{left}'


def saves(ids: Sequence[str]) -> str:
    """Buttons that save one result, or several side by side, as files."""
    kinds = [("md", "Report (Markdown)"), ("csv", "Table (CSV)"), ("json", "All (JSON)")]
    buttons = "".join(
        f'<button type="button" class="bd-copy" data-save="{kind}" data-focus="save-{kind}">{title}</button>'
        for kind, title in kinds[: 3 if len(ids) == 1 else 1]
    )
    return (
        f'<div class="bd-saves" data-ids="{escape(json.dumps(list(ids)))}"><span>Save:</span>{buttons}<span role="status"></span>'
        "</div>"
    )


def deleting(one: Evaluation) -> str:
    """What is lost when an evaluation is deleted."""
    return (
        f'<div class="bd-error" role="alert"><b>Delete {escape(one.id)}?</b> Lost are its result, its log and its request. The '
        "scores stay in the workspace’s cache, so the same evaluation again takes seconds.</div>"
    )


# A new one


def data_note(data_dir: str, missing: Sequence[str]) -> str:
    """Which of the chosen benchmarks a folder lacks."""
    if not data_dir:
        return render.note("From the Hugging Face Hub, downloaded once. WinoBias is not there as text files: it needs a folder.")
    if not missing:
        return render.note(f"Items from {data_dir}.")
    return (
        f'<div class="bd-warning"><p>{escape(data_dir)} has no folder for {escape(", ".join(map(benchmark_title, missing)))}: '
        "put the upstream files there, leave the benchmark out, or leave the folder empty for the Hub.</p></div>"
    )


def estimate(seconds: Mapping[str, float | None], copies: int) -> str:
    """How long it takes, benchmark by benchmark; `copies`: adapters, each an evaluation of its own."""
    known = {name: value for name, value in seconds.items() if value is not None}
    if not seconds:
        return ""
    if not known:
        return render.note("How long it takes is not known yet: press Estimate, which scores a few items of each benchmark.")
    each = " · ".join(f"{escape(benchmark_title(name))} {duration(value)}" for name, value in known.items())
    total = sum(known.values()) * copies
    open_ = [benchmark_title(name) for name in seconds if name not in known]
    more = f" Not known yet: {escape(', '.join(open_))} (Estimate measures it)." if open_ else ""
    times = f", {copies} adapters one after another" if copies > 1 else ""
    return (
        f'<div class="bd-estimate"><b>About {duration(total)}</b>{times}: {each}.{more} What is in the cache takes no time.</div>'
    )
