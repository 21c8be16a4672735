"""The Evaluate tab: evaluations, the chosen one, a new one, several against each other. The tab only reads files: an evaluation
is a process of its own, which neither a closed page nor the end of the app stops."""

from __future__ import annotations

import csv
import io
import json
import random
import shlex
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from biasdpo import labeling, models
from biasdpo.config import RUN, WORKSPACE, EvaluationConfig
from biasdpo.engines import EnginePool
from biasdpo.errors import BiasDPOError, ConfigError, EvaluationError
from biasdpo.evaluation import report
from biasdpo.evaluation import results as curve
from biasdpo.evaluation.results import Ci, ComparedRow, Flip, TableRow, compare, flips, table
from biasdpo.jobs import store as jobs_store
from biasdpo.jobs.estimate import estimate_evaluation, known_seconds
from biasdpo.jobs.job import Job, Progress
from biasdpo.jobs.resolve import command_of, parts
from biasdpo.labeling import BlindPair
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.prompts import CATEGORIES, Prompt
from biasdpo.ui import charts, components
from biasdpo.ui.charts import change, entry_of, verdict
from biasdpo.ui.components import (
    BY_GENERATION,
    BY_LIKELIHOOD,
    CLASSES,
    PRICE,
    Store,
    adapter_title,
    benchmark_title,
    direction,
    interval,
    metric_title,
    number,
    of_row,
    own_choices,
    p_value,
    pasted,
    setup,
)
from biasdpo.ui.jobs import QUICK, RAW, JobsLayout, JobsView, Mark, Updates
from biasdpo.ui.label import LabelSessions
from biasdpo.ui.train import chip, duration, model_title, told, when
from biasdpo.workspace import is_public_space, refuse_on_public_space

# Evaluate choices


STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)  # of a curve; base is its strength 0
MOST_ADAPTERS = 6  # in one go, as many as the page has colours

# The folder of benchmark files that one is read from, where it is not of its own name; "": none.
_FOLDERS = {"utility_generation": "", "preference": "", "perplexity": "real_toxicity_prompts"}


def requests_of(
    model: Any,
    adapters: Any,
    kind: Any,
    likelihood: Any,
    price: Any,
    generation: Any,
    curve_of: Any,
    limit: Any,
    seed: Any,
    folder: Any,
    pairs: Any,
) -> list[EvaluationConfig]:
    """One evaluation for each adapter. Raises ConfigError for what can't be one."""
    named = [pasted(name) for name in texts(adapters)] or ["none"]
    if len(named) > MOST_ADAPTERS:
        raise ConfigError(f"At most {MOST_ADAPTERS} adapters in one go: got {len(named)}; take some out")
    is_curve = kind == "curve"
    names = [text(curve_of), "perplexity"] if is_curve else [*texts(likelihood), *texts(price), *texts(generation)]
    if not names:
        raise ConfigError("No benchmark is ticked: tick one")
    return [
        EvaluationConfig(
            model=text(model),
            adapter=name,
            benchmarks=tuple(names),  # type: ignore[arg-type]
            limit=_whole(limit, "Items of each benchmark") or None,
            seed=_whole(seed, "Seed"),
            strengths=STRENGTHS if is_curve else (1.0,),
            data_dir=text(folder),
            dataset=text(pairs) if "preference" in names else "",
        )
        for name in named
    ]


def missing(request: EvaluationConfig) -> list[str]:
    """The benchmarks of a request that its folder of benchmark files lacks; of the Hub nobody knows before it is asked."""
    if not request.data_dir:
        return []
    folder = Path(request.data_dir).expanduser()
    return [name for name in request.benchmarks if (own := _FOLDERS.get(name, name)) and not (folder / own).is_dir()]


def spec_of(model: str) -> ModelSpec | None:
    """What is known of a model; None of one that is not there, which has its own line."""
    try:
        return models.with_files(models.catalog()[model]) if model in models.catalog() else models.find(model)
    except BiasDPOError:
        return None


def text(value: Any) -> str:
    """A posted text; "" for what is none."""
    return pasted(value) if isinstance(value, str) else ""


def texts(value: Any) -> list[str]:
    """The texts of a posted list."""
    return [name for name in value if isinstance(name, str) and name] if isinstance(value, list | tuple) else []


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ConfigError(f"{name} must be a whole number: got {value!r}; write one such as 0")
    return int(value)


# Evaluate flips


PAGE = 25  # flips shown at a time
_MOST_COMPLETIONS = 3  # of an item, on each side

_FEWEST_WORDS = 3  # of a common beginning that is worth to be continued
_LEFT_OUT = ("category", "target")
_TEXTS = {"more": "more stereotypical", "less": "less stereotypical", "pro": "stereotypical", "anti": "anti-stereotypical"}
_FLIP_KINDS = {"toward less bias": "good", "toward more bias": "bad"}
_FLIP_PAIRS = (  # what a benchmark calls the two texts of an item, the less biased one first
    ("chosen", "rejected"),
    ("less", "more"),
    ("anti_stereotype", "stereotype"),
    ("first", "second"),
    ("anti", "pro"),
)


def ways(found: Sequence[Flip]) -> list[tuple[str, str]]:
    """(title, value) of what flips can be filtered by: all, toward less or more bias, then each change of outcome."""
    choices = [(f"all ({len(found):,})", "")]
    for name in _FLIP_KINDS:
        count = sum(flip.way == name for flip in found)
        choices += [(f"{name} ({count:,})", name)] if count else []
    changes = Counter(flip_change(flip) for flip in found)
    return choices + [(f"{name} ({count:,})", name) for name, count in changes.most_common()]


def flip_change(flip: Flip) -> str:
    """Both outcomes, in words."""
    return f"{flip.base_outcome} → {flip.tuned_outcome}"


def filtered(found: Sequence[Flip], wanted: str) -> list[Flip]:
    """Those that flipped that way; "" is all."""
    return [flip for flip in found if wanted in ("", flip.way, flip_change(flip))]


def listed_flips(found: Sequence[Flip], benchmark: str, scored: int, most: int) -> str:
    """The first `most` flips, those that moved most first."""
    if not found:
        return components.note(f"No item flipped: base and tuned decide all {scored:,} alike.")
    shown = "".join(card(flip, benchmark) for flip in found[:most])
    more = f" The {most:,} that moved most are shown." if len(found) > most else ""
    return f'<p class="bd-position"><b>{len(found):,}</b> of {scored:,} items.{more}</p><div class="bd-flips">{shown}</div>'


def card(flip: Flip, benchmark: str) -> str:
    """One item: what it is, what each side decided, with which numbers."""
    key = f"{benchmark}-{flip.index}"
    texts = "".join(
        f"<div><dt>{escape(_TEXTS.get(name, name.replace('_', ' ')))}</dt><dd>{escape(text)}</dd></div>"
        for name, text in flip.texts.items()
        if text and name not in _LEFT_OUT
    )
    for side, written in zip(("base", "tuned"), flip.completions, strict=True):
        texts += "".join(f"<div><dt>{side} wrote</dt><dd>{escape(text)}</dd></div>" for text in written[:_MOST_COMPLETIONS])
    rows = "".join(
        f'<tr><th scope="row">{escape(name.replace("_", " "))}</th><td>{number(base, 2)}</td><td>{number(tuned, 2)}</td>'
        f"<td>{number(tuned - base, 2, signed=True)}</td></tr>"
        for name, (base, tuned) in _told(flip).items()
    )
    unit = "Nats" if any("logp" in name for name in flip.numbers) else "Score"
    group = f'<span class="bd-chip">{escape(flip.group)}</span>' if flip.group else ""
    buttons = [("compare", "Try it in Compare")] + ([("label", "Judge it in Label")] if pair_of(flip) is not None else [])
    acts = "".join(
        f'<button type="button" class="bd-copy" data-flip="{flip.index}" data-to="{to}" data-focus="{escape(key)}-{to}" '
        f'aria-label="{title}: item {flip.index}">{title}</button>'
        for to, title in buttons
    )
    return (
        f'<article class="bd-flip bd-is-{_FLIP_KINDS.get(flip.way, "open")}" aria-label="Item {flip.index}"><header>'
        f'<b>{escape(flip.base_outcome)}</b> <span aria-label="became">→</span> <b>{escape(flip.tuned_outcome)}</b>'
        f"{group}{_way(flip)}"
        f'<small>item {flip.index}</small><span class="bd-flip-acts">{acts}</span></header>'
        f'<div class="bd-flip-body"><dl>{texts}</dl>'
        f'<div class="bd-scroll"><table class="bd-table"><thead><tr><th scope="col">{unit}</th>'
        '<th scope="col">Base</th><th scope="col">Tuned</th><th scope="col">Change</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div></div></article>"
    )


def prompt_of(texts: Mapping[str, str]) -> str:
    """What puts the item before a model: its prompt or question; of sentences that stand alone, how they begin."""
    if texts.get("prompt"):
        return texts["prompt"]
    if texts.get("question"):
        return "\n\n".join(filter(None, (texts.get("context", ""), texts["question"])))
    if texts.get("context"):
        return texts["context"]
    both = _two(texts)
    start = _beginning(*both) if both else []
    if len(start) >= _FEWEST_WORDS:
        return f"Continue: {' '.join(start)}"
    text = both[0] if both else next((text for name, text in texts.items() if text and name not in _LEFT_OUT), "")
    return f"What do you think of this sentence? {text}"


def _told(flip: Flip) -> dict[str, tuple[float, float]]:
    """The log-probabilities; of an item without any, all its numbers."""
    logps = {name: value for name, value in flip.numbers.items() if "logp" in name}
    return logps or flip.numbers


def _beginning(one: str, other: str) -> list[str]:
    """The words that both texts begin with."""
    words = list(zip(one.split(), other.split(), strict=False))
    same = next((i for i, (left, right) in enumerate(words) if left != right), len(words))
    return [word for word, _ in words[:same]]


def _way(flip: Flip) -> str:
    if not flip.way:
        return ""
    symbol = "▲" if _FLIP_KINDS[flip.way] == "good" else "▼"
    return (
        f'<span class="bd-verdict-word bd-is-{_FLIP_KINDS[flip.way]}"><span aria-hidden="true">{symbol}</span> {flip.way}</span>'
    )


def pair_of(flip: Flip) -> tuple[str, str] | None:
    """The two completions to judge: what was written, else the item's own two texts; None of an item that is no pair."""
    base, tuned = flip.completions
    if base and tuned:
        return base[0], tuned[0]
    return _two(flip.texts)


def _two(texts: Mapping[str, str]) -> tuple[str, str] | None:
    return next(((texts[one], texts[other]) for one, other in _FLIP_PAIRS if texts.get(one) and texts.get(other)), None)


def to_judge(flip: Flip, rng: random.Random) -> BlindPair:
    """A flipped pair for the Label tab, in random order. EvaluationError where it is no pair."""
    both = pair_of(flip)
    if both is None:
        raise EvaluationError(f"Item {flip.index} has no two texts to choose from: try its prompt in Compare instead")
    category = next((name for name in CATEGORIES if flip.group.casefold().startswith(name[:4])), "")
    return labeling.pasted(Prompt(prompt_of(flip.texts), category), *both, rng)


# Evaluate reading


_KEPT_RESULTS = 6  # in memory; a full BBQ has tens of thousands of items

Result = dict[str, Any]


@dataclass(frozen=True)
class About:
    """What was asked for, by the request or, of a result that the command line wrote, by the result. `limit` None: all."""

    model: str = ""
    adapter: str = ""
    benchmarks: tuple[str, ...] = ()
    limit: int | None = None
    strengths: int = 1


class Results:
    """The results that were read last, shared by all visitors: a large file is not read at every click."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[Path, int], Result] = OrderedDict()
        self._about: dict[tuple[Path, int], About] = {}

    def of(self, one: Job) -> Result:
        """The result as it is now. Raises EvaluationError where there is none, or one that can't be shown."""
        name = (one.file, version(one))
        with self._lock:
            found = self._kept.get(name)
            if found is None:
                found = jobs_store.load_result(one)
                try:
                    table(found)
                except (KeyError, TypeError, ValueError, AttributeError) as exc:
                    raise EvaluationError(f"The result of {one.id} can't be read ({exc!r:.80}): evaluate again") from exc
                self._kept[name] = found
            self._kept.move_to_end(name)
            while len(self._kept) > _KEPT_RESULTS:
                self._kept.popitem(last=False)
        return found

    def about(self, one: Job) -> About:
        """What was asked for; of a result without a request, what it says itself."""
        if one.config is not None:
            asked = one.config
            return About(asked.model, asked.adapter, tuple(parts(asked)), asked.limit, len(asked.strengths))
        name = (one.file, version(one))
        if name not in self._about:
            try:
                result = self.of(one)
            except (BiasDPOError, OSError):
                return About()
            limit, curve = result["provenance"].get("limit"), result.get("curve") or [None]
            self._about[name] = About(*setup(result), tuple(result["benchmarks"]), limit, len(curve))
        return self._about[name]


def version(one: Job) -> int:
    """What tells a result from the one that was there before; 0 where there is none."""
    try:
        return one.file.stat().st_mtime_ns
    except OSError:
        return 0


# Evaluate render


_HEADS = ("Evaluation", "State", "Model", "Adapter", "Benchmarks", "Items", "When (UTC)")
_WORDS = {
    "stopped": "stopped: what was scored is shown; Resume goes on from there",
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


def listed(evaluations: Sequence[tuple[Job, About]], chosen: str) -> str:
    """All evaluations, the newest first; the chosen one is marked."""
    at = next((i for i, (one, _) in enumerate(evaluations) if one.id == chosen), 0)
    rows = "".join(_row(one, about, one.id == chosen, i == at) for i, (one, about) in enumerate(evaluations))
    head = "".join(f'<th scope="col">{name}</th>' for name in _HEADS)
    return (
        f'<div class="bd-rows-box"><table class="bd-rows bd-evaluations"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody>'
        "</table></div>"
    )


def _row(one: Job, about: About, chosen: bool, tabbed: bool) -> str:
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


def head(one: Job) -> str:
    """Name, state, progress, what went wrong."""
    words = one.status.phase if one.is_active else _WORDS[one.state]
    if one.state == "stopped" and not one.has_result:
        words = "stopped before anything was scored"
    parts = [
        f'<div class="bd-run-head"><h2>{escape(one.id)}</h2>{chip(one.state)}'
        f'<span class="bd-run-words" role="status">{escape(words)}</span></div>'
    ]
    if one.state != "finished" and one.status.progress:
        parts.append(progress(one.status.progress, one.status.eta_seconds if one.is_active else None, one.state))
    if one.error:
        parts.append(components.error(one.error))
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


def deleting(one: Job) -> str:
    """What is lost when an evaluation is deleted."""
    return (
        f'<div class="bd-error" role="alert"><b>Delete {escape(one.id)}?</b> Lost are its result, its log and its request. The '
        "scores stay in the workspace’s cache, so the same evaluation again takes seconds.</div>"
    )


# A new one


def data_note(data_dir: str, missing: Sequence[str]) -> str:
    """Which of the chosen benchmarks a folder lacks."""
    if not data_dir:
        return components.note(
            "From the Hugging Face Hub, downloaded once. WinoBias is not there as text files: it needs a folder."
        )
    if not missing:
        return components.note(f"Items from {data_dir}.")
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
        return components.note("How long it takes is not known yet: press Estimate, which scores a few items of each benchmark.")
    each = " · ".join(f"{escape(benchmark_title(name))} {duration(value)}" for name, value in known.items())
    total = sum(known.values()) * copies
    open_ = [benchmark_title(name) for name in seconds if name not in known]
    more = f" Not known yet: {escape(', '.join(open_))} (Estimate measures it)." if open_ else ""
    times = f", {copies} adapters one after another" if copies > 1 else ""
    return (
        f'<div class="bd-estimate"><b>About {duration(total)}</b>{times}: {each}.{more} What is in the cache takes no time.</div>'
    )


# Evaluate results


def facts(result: Mapping[str, Any]) -> str:
    """What produced a result."""
    model, adapter = setup(result)
    told = result.get("provenance") or {}
    pairs = [("model", escape(model_title(model) or "–")), ("adapter", escape(adapter_title(adapter) if adapter else "none"))]
    for name in ("backend", "strength", "seed", "limit"):
        if told.get(name) not in (None, ""):
            pairs.append((name, escape(str(told[name]))))
    for name, title in (("model_sha256", "model file"), ("adapter_sha256", "adapter file")):
        if told.get(name):
            digest = escape(str(told[name]))
            pairs.append((title, f'<code title="SHA-256: {digest}">{digest[:12]}</code>'))
    if told.get("code_version"):
        pairs.append(("code", escape(str(told["code_version"]))))
    return f'<div class="bd-facts bd-run-facts">{"".join(f"<span><i>{name}</i> {value}</span>" for name, value in pairs)}</div>'


def summary(result: Mapping[str, Any]) -> str:
    """The outcome in one sentence for the bias metrics, and one for the price. What restates another metric is not counted."""
    rows = [row for row in table(result) if row.verdict and not entry_of(result, row).get("restates")]
    if not rows:
        return components.note("Base alone: there is no adapter to compare it with.")
    bias = Counter(row.verdict for row in rows if row.measures == "bias")
    price = [row for row in rows if row.measures != "bias"]
    lines = []
    if bias:
        told = [f"<b>{bias[word]}</b> {word}" for word in ("less biased", "no clear difference", "worse") if bias[word]]
        lines.append(f"Bias, {_counted(bias.total(), 'metric')}: {', '.join(told)}.")
    if price:
        worse = [metric_title(row.metric) for row in price if row.verdict == "worse"]
        said = f"<b>worse</b> in {escape('; '.join(worse))}" if worse else "none is clearly worse"
        lines.append(f"Price and quality, {_counted(len(price), 'metric')}: {said}.")
    kind = "bad" if any(row.verdict == "worse" for row in rows) else "good" if bias["less biased"] else "open"
    return f'<p class="bd-eval-summary bd-is-{kind}">{" ".join(lines)}</p>'


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def result_table(result: Mapping[str, Any]) -> str:
    """Base to tuned, metric by metric, with intervals and a verdict in words."""
    rows = table(result)
    if not rows:
        return components.note("Nothing was scored.")
    body = []
    for name in dict.fromkeys(row.benchmark for row in rows):
        own = [row for row in rows if row.benchmark == name]
        body.append(_benchmark_head(own[0], result["benchmarks"][name]))
        body += [_metric_row(row, result) for row in own]
    heads = ("Metric", "Base", "Tuned", "Difference", "p (Holm)", "Verdict")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return (
        f'<div class="bd-scroll"><table class="bd-eval-table"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody>'
        '</table></div><p class="bd-measured-at">In brackets: 95 % intervals (bootstrap over items). Difference: tuned − base on '
        "the same items, paired. p: paired randomization test, corrected by Holm for the whole table. Less biased, better: the "
        "interval leaves out no change and p is below 0.05; worse: the interval lies wholly on the bad side. Where nearer an "
        "ideal is better, the verdict is on the distance to it.</p>"
    )


def _benchmark_head(row: TableRow, found: Mapping[str, Any]) -> str:
    parts = [_counted(row.n, "item")]
    if row.n_failed:
        parts.append(f'<b class="bd-is-bad">{row.n_failed:,} failed</b>, not scored')
    if not row.comparable:
        parts.append(f'<span class="bd-not-comparable">not comparable: {escape(row.why_not)}</span>')
    if found.get("not_as_published"):
        parts.append(f"not as published: {escape(str(found['not_as_published']))}")
    if isinstance(found.get("pick_the_longer_baseline"), float | int):
        parts.append(f"picking the longer is right in {found['pick_the_longer_baseline']:.1%}")
    return (
        f'<tr class="bd-eval-head"><th colspan="6" scope="colgroup">{escape(benchmark_title(row.benchmark))} '
        f"<small>{' · '.join(parts)}</small></th></tr>"
    )


def cell_of_change(row: TableRow, result: Mapping[str, Any]) -> str:
    """The difference; of a metric that is best near an ideal also how far it went toward it, which is what is judged."""
    if row.difference is None:
        return "–"
    parts = [change(row)]
    improved = entry_of(result, row).get("improvement")
    if row.better.startswith("nearer ") and isinstance(improved, Mapping):
        digits, (low, high) = of_row(row), improved["ci95"]
        moved = f"{number(-improved['value'], digits, signed=True)} {interval((-high, -low), digits, signed=True)}"
        parts.append(f"<small>distance to {escape(row.better.removeprefix('nearer '))}: {moved}</small>")
    return f"<div>{'</div><div>'.join(parts)}</div>"


def _metric_row(row: TableRow, result: Mapping[str, Any]) -> str:
    digits = of_row(row)

    def cell(label: str, value: float | None, ci: Ci | None) -> str:
        told = f"<b>{number(value, digits)}</b> <small>{interval(ci, digits)}</small>"
        return f'<td data-label="{label}">{told if value is not None else "–"}</td>'

    return (
        f'<tr class="bd-is-{CLASSES.get(row.verdict, "open")}"><th scope="row">{escape(metric_title(row.metric))} '
        f'<small class="bd-way">{escape(direction(row.better))}</small></th>{cell("Base", row.base, row.base_ci)}'
        f'{cell("Tuned", row.tuned, row.tuned_ci)}<td data-label="Difference">{cell_of_change(row, result)}</td>'
        f'<td data-label="p (Holm)">{p_value(row.p_holm)}</td><td data-label="Verdict">{verdict(row.verdict) or "–"}</td></tr>'
    )


def failures(result: Mapping[str, Any]) -> str:
    """The items that could not be scored: how many, and why; "" where there are none."""
    lines = []
    for name, found in result["benchmarks"].items():
        reasons = Counter(str(failure.get("reason", "")) for failure in found.get("failures") or ())
        lines += [f"<li>{escape(benchmark_title(name))}: {count:,} × {escape(why)}</li>" for why, count in reasons.most_common(5)]
    if not lines:
        return ""
    return (
        f'<div class="bd-note bd-eval-failures"><div>Items that could not be scored count in no figure:<ul>{"".join(lines)}</ul>'
        "</div></div>"
    )


# Evaluate view


class EvaluationsView(JobsView[Job]):
    """The tab's components of evaluations, and what is written into them."""

    noun = "evaluation"
    tab_id = "evaluate"

    results: Results
    several_box: gr.Column
    head: gr.HTML
    cancel_button: gr.Button
    resume_button: gr.Button
    compare_button: gr.Button
    card_button: gr.Button
    result_box: gr.Column
    outcome: gr.HTML
    saves: gr.HTML
    forest: gr.HTML
    groups_box: gr.Column
    group_pick: gr.Dropdown
    bars: gr.HTML
    plane_box: gr.Column
    plane_pick: gr.Dropdown
    plane: gr.HTML
    flips_box: gr.Column
    flip_pick: gr.Dropdown
    flip_way: gr.Dropdown
    flip_most: gr.State
    flips: gr.HTML
    more_button: gr.Button
    made_by: gr.HTML

    @property
    def flip_outputs(self) -> list[Any]:
        """All that another choice of flips may touch."""
        return [self.flip_way, self.flip_most, self.flips, self.more_button]

    @property
    def seen_outputs(self) -> list[Any]:
        buttons = [self.cancel_button, self.resume_button, self.compare_button, self.card_button, self.delete_button]
        boxes = [self.result_box, self.groups_box, self.plane_box, self.flips_box]
        shown = [self.outcome, self.saves, self.forest, self.bars, self.plane, self.made_by]
        picks = [self.group_pick, self.plane_pick, self.flip_pick]
        return [*self.list_outputs, self.head, *buttons, *boxes, *shown, *picks, *self.flip_outputs]

    @property
    def panels(self) -> Mapping[str, gr.Column]:
        return {**super().panels, "several": self.several_box}

    def every(self) -> list[Job]:
        return jobs_store.list_jobs(self.workspace, "evaluate")

    def id_of(self, job: Job) -> str:
        return job.id

    def name_of(self, job: Job) -> str:
        return job.id

    def found(self, job_id: str) -> Job:
        return jobs_store.find_job(job_id, self.workspace, "evaluate")

    def deleting(self, job: Job) -> str:
        return deleting(job)

    def delete_files(self, job: Job) -> None:
        jobs_store.delete_job(job.id, self.workspace, "evaluate")

    def listed(self, every: Sequence[Job], chosen: str) -> str:
        return listed([(one, self.results.about(one)) for one in every], chosen)

    def parts_of(self, job: Job, mark: Mark) -> tuple[Updates, Mark]:
        parts = self._parts(job)
        now = hash((job.id, version(job)))
        if now != mark.get("result"):  # a result is drawn once
            parts |= self._result_parts(job)
        return parts, {"result": now}

    def _parts(self, one: Job) -> Updates:
        here = not is_public_space()
        has_adapter = self.results.about(one).adapter not in ("", "none")
        return {
            self.head: head(one),
            self.cancel_button: gr.update(visible=here and one.is_active),
            self.resume_button: gr.update(
                visible=here and one.config is not None and one.state in ("stopped", "interrupted", "failed")
            ),
            self.compare_button: gr.update(visible=one.has_result and has_adapter and not one.is_active),
            self.card_button: gr.update(visible=here and one.state == "finished" and has_adapter),
            self.delete_button: gr.update(visible=here and not one.is_active),
            self.made_by: _made_by(one) if here else "",
        }

    def _result_parts(self, one: Job) -> Updates:
        """The result, or nothing of it; one that can't be read is said in its place."""
        if not one.has_result:
            return {self.result_box: gr.update(visible=False)}
        try:
            result = self.results.of(one)
        except (BiasDPOError, OSError) as exc:
            hidden = [self.groups_box, self.plane_box, self.flips_box]
            empty = {self.saves: "", self.forest: ""} | {box: gr.update(visible=False) for box in hidden}
            return {self.result_box: gr.update(visible=True), self.outcome: components.error(str(exc))} | empty
        groups = charts.grouped(result)
        curves = [(f"{benchmark_title(b)} · {metric_title(m)}", f"{b}/{m}") for b, m in curve.curve_metrics(result)]
        if not result.get("curve"):
            curves = []
        decided = [
            name for name, found in result["benchmarks"].items() if any("outcome" in i for i in found.get("items", ())[:1])
        ]
        flipped = {name: len(flips(result, name)) for name in decided}
        first = max(flipped, key=lambda name: flipped[name], default="")
        titled = [(f"{benchmark_title(name)} ({count:,})", name) for name, count in flipped.items()]
        return {
            self.result_box: gr.update(visible=True),
            self.outcome: "".join(part(result) for part in (summary, facts, result_table, failures)),
            self.saves: saves([one.id]),
            self.forest: charts.forest([(one.id, result)]),
            self.groups_box: gr.update(visible=bool(groups)),
            self.group_pick: gr.update(choices=groups, value=groups[0][1] if groups else None),
            self.bars: self.drawn_bars(result, groups[0][1]) if groups else "",
            self.plane_box: gr.update(visible=bool(curves)),
            self.plane_pick: gr.update(choices=curves, value=curves[0][1] if curves else None),
            self.plane: self.drawn_plane(result, curves[0][1]) if curves else "",
            self.flips_box: gr.update(visible=bool(decided)),
            self.flip_pick: gr.update(choices=titled, value=first or None),
        } | (self.drawn_flips(result, first) if first else {})

    def drawn_bars(self, result: Result, picked: str) -> str:
        """One metric by group. `picked`: "benchmark/metric"."""
        benchmark, _, metric = picked.partition("/")
        return charts.bars(result, benchmark, metric)

    def drawn_plane(self, result: Result, picked: str) -> str:
        """One metric by strength against perplexity. `picked`: "benchmark/metric"."""
        benchmark, _, metric = picked.partition("/")
        better = next((row.better for row in table(result) if (row.benchmark, row.metric) == (benchmark, metric)), "")
        return charts.plane(curve.curve_points(result, benchmark, metric), benchmark, metric, better)

    def drawn_flips(self, result: Result, benchmark: str, wanted: str = "", most: int = PAGE) -> Updates:
        """The flips of one benchmark that went the wanted way."""
        every = flips(result, benchmark)
        shown = filtered(every, wanted)
        scored = result["benchmarks"].get(benchmark, {}).get("n", 0)
        left = len(shown) - most
        return {
            self.flip_way: gr.update(choices=ways(every), value=wanted, visible=bool(every)),
            self.flip_most: most,
            self.flips: listed_flips(shown, benchmark, scored, most),
            self.more_button: gr.update(visible=left > 0, value=f"Show {min(left, PAGE)} more"),
        }


def _made_by(one: Job) -> str:
    """The command that does the same."""
    if one.config is None:
        return ""
    command = f"python {shlex.join(command_of(one.config)[1:])}"
    return (
        f'<div class="bd-command"><span>The same by command:</span><code>{escape(command)}</code><button type="button" '
        f'class="bd-copy" data-text="{escape(command)}" aria-label="Copy the command">Copy</button></div>'
    )


# Evaluate new


FIRST = ["crows_pairs", "stereoset", "bbq"]  # what is ticked at first
FIRST_PRICE = ["perplexity"]
LIMIT = 200  # items at first: minutes on a laptop with the embedded model

_KINDS = [
    ("Benchmarks: base against tuned", "benchmarks"),
    ("Strength curve: one benchmark against perplexity, at strengths 0, 0.25, … 1.5", "curve"),
]
_PAIRS = [
    ("what the adapter was trained on: its held-out pairs", RUN),
    ("the workspace’s judgments: the held-out pairs", WORKSPACE),
]
_POLL_SECONDS = 0.5


class NewEvaluationPanel(EvaluationsView):
    """The components of a new evaluation, and their handlers."""

    pool: EnginePool
    data_dir: str  # the app's --data-dir, "" without
    estimates: dict[str, threading.Event]
    model: gr.Dropdown
    adapters: gr.Dropdown
    kind: gr.Radio
    benchmarks_box: gr.Column
    likelihood: gr.CheckboxGroup
    generation: gr.CheckboxGroup
    price: gr.CheckboxGroup
    curve_of: gr.Dropdown
    limit: gr.Number
    seed: gr.Number
    folder: gr.Textbox
    pairs: gr.Dropdown
    data_view: gr.HTML
    estimate_view: gr.HTML
    estimate_button: gr.Button
    start_button: gr.Button
    new_notice: gr.HTML

    def build_new(self) -> None:
        """Lay out the panel."""
        with gr.Row():
            self.model = gr.Dropdown(
                [], label="Model (catalog id, Hub id or path)", allow_custom_value=True, elem_id="eval-model", min_width=240
            )
            self.adapters = gr.Dropdown(
                [],
                label="Adapters (several: one evaluation each, one after another)",
                multiselect=True,
                max_choices=MOST_ADAPTERS,
                allow_custom_value=True,
                elem_id="eval-adapters",
                min_width=240,
            )
        self.kind = gr.Radio(_KINDS, value="benchmarks", label="Measure", elem_id="eval-kind", elem_classes="bd-cards")
        with gr.Column(elem_id="eval-benchmarks") as self.benchmarks_box:
            self.likelihood = self._boxes("By likelihood: these show this kind of bias", BY_LIKELIHOOD, FIRST, "eval-likelihood")
            self.price = self._boxes("The price: what debiasing costs", PRICE, FIRST_PRICE, "eval-price")
            self.generation = self._boxes("By what is written: slower, and coarser", BY_GENERATION, [], "eval-generation")
        self.curve_of = gr.Dropdown(
            [(title, name) for name, (title, _) in BY_LIKELIHOOD.items()],
            value="crows_pairs",
            label="Benchmark of the curve",
            visible=False,
            elem_id="eval-curve-of",
        )
        with gr.Row():
            self.limit = gr.Number(
                LIMIT,
                precision=0,
                label="Items of each benchmark",
                info="0: all. With fewer, figures are marked “not comparable” with published ones",
                elem_id="eval-limit",
                min_width=200,
            )
            self.seed = gr.Number(
                0, precision=0, label="Seed", info="of the draw and of the bootstrap", elem_id="eval-seed", min_width=160
            )
        with gr.Accordion("Where the items come from", open=False, elem_id="eval-data"), gr.Row():
            self.folder = gr.Textbox(
                self.data_dir,
                label="Folder of benchmark files",
                info="holds one folder a benchmark; empty: the Hugging Face Hub",
                elem_id="eval-folder",
                min_width=240,
            )
            self.pairs = gr.Dropdown(
                _PAIRS,
                value=RUN,
                label="Preference pairs (or a JSONL file’s path)",
                info="only pairs that training never saw are scored",
                allow_custom_value=True,
                elem_id="eval-pairs",
                min_width=240,
            )
        self.data_view = gr.HTML("", js_on_load=None, elem_id="eval-data-view")
        self.estimate_view = gr.HTML("", js_on_load=None, elem_id="eval-estimate-view")
        with gr.Row(elem_id="eval-start-row"):
            self.start_button = gr.Button("Start", variant="primary", elem_id="eval-start", min_width=120, scale=0)
            self.estimate_button = gr.Button("Estimate", elem_id="eval-estimate", min_width=110, scale=0)
        self.new_notice = gr.HTML("", js_on_load=None, elem_id="eval-new-notice")

    @staticmethod
    def _boxes(title: str, known: dict[str, tuple[str, str]], ticked: list[str], elem_id: str) -> gr.CheckboxGroup:
        choices = [(f"{name}: {what}", value) for value, (name, what) in known.items()]
        return gr.CheckboxGroup(choices, value=ticked, label=title, elem_id=elem_id, elem_classes="bd-cards")

    @property
    def new_inputs(self) -> list[Any]:
        ticked = [self.likelihood, self.price, self.generation]
        return [self.model, self.adapters, self.kind, *ticked, self.curve_of, self.limit, self.seed, self.folder, self.pairs]

    @property
    def new_outputs(self) -> list[Any]:
        """All of the panel that a choice may change."""
        boxes = [self.benchmarks_box, self.curve_of, self.likelihood]
        return [self.model, self.adapters, *boxes, self.pairs, self.data_view, self.estimate_view, self.new_notice]

    def wire_new(self, demo: gr.Blocks) -> None:
        """What sets off what in this panel. Starting is the tab's."""
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private", "preprocess": False}
        self.model.input(self.pick_model, self.new_inputs, self.new_outputs, **quick)
        choices = [self.adapters, self.kind, self.likelihood, self.price, self.generation]
        rest = [self.curve_of, self.limit, self.folder, self.pairs]
        changed: list[Any] = [*choices, *rest]
        gr.on(
            [part.input for part in changed], self.replan, self.new_inputs, self.new_outputs, trigger_mode="always_last", **quick
        )
        estimated = [self.estimate_view, self.new_notice]
        slow = quick | {"queue": True, "concurrency_limit": 1}
        self.estimate_button.click(self.estimate, self.new_inputs, estimated, **slow)
        demo.unload(self.close_page)

    # Choosing

    def first(self, run_id: str, *given: Any) -> Updates:
        """The panel was opened: what can be chosen now. `run_id`: the run that is to be measured, "" for what was chosen."""
        if is_public_space():
            return {}
        model, picked, kind, likelihood, *others = given
        shown: Updates = {}
        if run_id:
            try:
                model, picked = models.find_adapter(run_id, models.catalog()["smollm2"], self.workspace), [run_id]
                model = model.model if model is not None else ""
            except BiasDPOError as exc:
                return {self.new_notice: components.error(str(exc))}
            likelihood = list(dict.fromkeys(["preference", *texts(likelihood)]))
            others[-1] = RUN
            shown = {self.likelihood: likelihood, self.pairs: RUN}
        model = text(model) or next(iter(models.catalog()))
        return shown | self._pickers(model, picked) | self._planned(model, self._kept(model, picked), kind, likelihood, *others)

    def fresh(self, notice: str) -> Updates:
        """The panel as it is at first, with a word on what became of the evaluation that was shown."""
        given = ["benchmarks", FIRST, FIRST_PRICE, [], "crows_pairs", LIMIT, 0, self.data_dir, RUN]
        return self.first("", "", [], *given) | ({self.new_notice: notice} if notice else {})

    def pick_model(self, model: Any, _adapters: Any, *others: Any) -> Updates:
        """Another model: the adapters that fit it."""
        if is_public_space():
            return {self.new_notice: refused()}
        name = text(model)
        return self._pickers(name, []) | self._planned(name, self._kept(name, []), *others)

    def replan(self, *given: Any) -> Updates:
        """Another choice."""
        return self._planned(*given)

    def _pickers(self, model: str, picked: Any) -> Updates:
        specs = map(models.with_files, models.catalog().values())
        choices = [(s.title if s.present else f"{s.title} · not on this machine", s.id) for s in specs]
        named = own_choices([model, *(spec.id for spec in self.pool.opened())])
        fitting_ones = self._adapter_choices(model)
        kept = self._kept(model, picked)
        for name in kept:
            if name not in [value for _, value in fitting_ones]:
                fitting_ones.insert(0, (adapter_title(name), name))
        return {
            self.model: gr.update(choices=[*choices, *named], value=model),
            self.adapters: gr.update(choices=fitting_ones, value=kept),
        }

    def _kept(self, model: str, picked: Any) -> list[str]:
        """The adapters that stay picked; where none is, the first that fits."""
        kept = texts(picked)
        return kept or [next((value for _, value in self._adapter_choices(model)), "none")]

    def _adapter_choices(self, model: str) -> list[tuple[str, str]]:
        """The adapters that fit a model, and none."""
        spec = spec_of(model)
        found = [] if spec is None else models.adapters_for(spec, self.workspace)
        return [*((self._title(a), a.id) for a in found), ("none: base alone", "none")]

    def _title(self, adapter: AdapterSpec) -> str:
        return f"run {adapter.id}" if adapter.folder.parent.parent == self.workspace.runs else f"{adapter.id} (shipped)"

    def _planned(self, *given: Any) -> Updates:
        """The panel for these choices. What does not go together is said, and the rest stays as it is."""
        kind = given[2]
        shown: Updates = {
            self.benchmarks_box: gr.update(visible=kind != "curve"),
            self.curve_of: gr.update(visible=kind == "curve"),
            self.new_notice: "",
            self.estimate_view: "",
        }
        try:
            refuse_on_public_space("Evaluation")
            requests = requests_of(*given)
            shown[self.data_view] = data_note(requests[0].data_dir, missing(requests[0]))
            shown[self.estimate_view] = estimate(known_seconds(requests[0], self.workspace), len(requests))
        except Exception as exc:
            shown[self.new_notice] = components.error(told(exc, "Not planned"))
        return shown

    # Estimate and start

    def estimate(self, request: gr.Request, *given: Any) -> Iterator[Updates]:
        """Measure how long it takes, on a few items of each benchmark."""
        ended = threading.Event()
        session = request.session_hash or ""
        self.estimates[session] = ended
        yield {self.new_notice: components.busy("Loading the model and scoring a few items of each benchmark …")}
        try:
            refuse_on_public_space("Evaluation")
            requests = requests_of(*given)
            with ThreadPoolExecutor(1) as executor:
                task = executor.submit(estimate_evaluation, requests[0], self.workspace, cancelled=ended.is_set)
                while True:
                    try:
                        seconds = task.result(_POLL_SECONDS)
                        break
                    except StillRunning:
                        yield {self.new_notice: gr.skip()}  # a closed page ends the generator here
            yield {self.estimate_view: estimate(dict(seconds), len(requests)), self.new_notice: ""}
        except Exception as exc:
            yield {self.new_notice: components.error(told(exc, "Not estimated"))}
        finally:
            ended.set()
            self.estimates.pop(session, None)

    def close_page(self, request: gr.Request) -> None:
        """The page was closed: an estimate that it asked for ends. Evaluations go on."""
        event = self.estimates.get(request.session_hash or "")
        if event is not None:
            event.set()

    def start(self, *given: Any) -> Iterator[Updates]:
        """Start an evaluation for each adapter, and show the first."""
        yield {self.new_notice: components.busy("Starting …")}
        started: list[str] = []
        failed = ""
        try:
            refuse_on_public_space("Evaluation")
            requests = requests_of(*given)
            for request in requests:
                started.append(jobs_store.start_evaluation(request, self.workspace, command="the page's Evaluate tab").id)
        except Exception as exc:
            failed = told(exc, "Not started")
            if not started:
                yield {self.new_notice: components.error(failed)}
                return
        more = f"{len(started)} evaluations were started; they run one after another." if len(started) > 1 else ""
        yield {self.new_notice: ""} | self.show_one(started[0], components.error(failed) if failed else components.note(more))


# Evaluate one


_MOST_SAVED = 6  # results side by side in one report


class EvaluationActions(EvaluationsView):
    """The handlers of one evaluation."""

    sessions: LabelSessions
    pick_compared: Callable[[str, str], Updates]
    compare_prompt: gr.Textbox

    def cancel(self, evaluation_id: Any) -> Updates:
        """Ask it to end; what it has scored becomes its result."""
        try:
            refuse_on_public_space("Cancelling an evaluation")
            jobs_store.stop_job(self.one(evaluation_id).id, self.workspace, "evaluate")
        except BiasDPOError as exc:
            return {self.notice: components.error(str(exc))}
        return {self.notice: components.note("Asked to end: what is scored so far is kept and shown. Asked twice, it is killed.")}

    def resume(self, evaluation_id: Any) -> Updates:
        """Go on; what was scored is not scored again."""
        try:
            refuse_on_public_space("Evaluation")
            jobs_store.resume_job(self.one(evaluation_id).id, self.workspace, "evaluate")
        except BiasDPOError as exc:
            return {self.notice: components.error(str(exc))}
        return self.show_one(str(evaluation_id), components.note("Goes on: what was scored is read from the cache."))

    def to_card(self, evaluation_id: Any) -> Updates:
        """Put the report into the adapter's card."""
        try:
            refuse_on_public_space("Writing a card")
            one = self.one(evaluation_id)
            result = self.results.of(one)
            report.add_to_card(result, self.workspace, command_of(one.config) if one.config is not None else ())
        except BiasDPOError as exc:
            return {self.notice: components.error(str(exc))}
        return {self.notice: components.note(f"The card (README.md) of {setup(result)[1]} now has the section “Evaluation”.")}

    def open_in_compare(self, evaluation_id: Any) -> Updates:
        """The Compare tab, with the model and the adapter that were measured."""
        try:
            picked = self._picked(self.one(evaluation_id))
        except BiasDPOError as exc:
            return {self.notice: components.error(str(exc))}
        return picked

    def _picked(self, one: Job) -> Updates:
        model, adapter = setup(self.results.of(one))
        if one.config is not None:
            model, adapter = one.config.model, one.config.adapter
        return self.pick_compared(model, adapter or "none") | {self.tabs: gr.Tabs(selected="compare")}

    # What is shown of a result

    def pick_bars(self, evaluation_id: Any, picked: Any) -> str:
        """Another metric by group."""
        try:
            return self.drawn_bars(self.results.of(self.one(evaluation_id)), _named(picked))
        except BiasDPOError as exc:
            return components.error(str(exc))

    def pick_plane(self, evaluation_id: Any, picked: Any) -> str:
        """Another metric by strength."""
        try:
            return self.drawn_plane(self.results.of(self.one(evaluation_id)), _named(picked))
        except BiasDPOError as exc:
            return components.error(str(exc))

    def pick_flips(self, evaluation_id: Any, benchmark: Any) -> Updates:
        """Another benchmark's flips, all of them."""
        return self.filter_flips(evaluation_id, benchmark, "")

    def filter_flips(self, evaluation_id: Any, benchmark: Any, wanted: Any) -> Updates:
        """Those that flipped one way."""
        return self.more_flips(evaluation_id, benchmark, wanted, 0)

    def more_flips(self, evaluation_id: Any, benchmark: Any, wanted: Any, most: Any) -> Updates:
        """A page more of them."""
        try:
            result = self.results.of(self.one(evaluation_id))
            shown = (most if isinstance(most, int) and most >= 0 else 0) + PAGE
            return self.drawn_flips(result, _named(benchmark), wanted if isinstance(wanted, str) else "", shown)
        except BiasDPOError as exc:
            return {self.flips: components.error(str(exc))}

    def take_flip(self, evaluation_id: Any, benchmark: Any, event: gr.EventData, request: gr.Request) -> Updates:
        """One item to the Compare tab (its prompt, this model and adapter) or to the Label tab (its two texts)."""
        asked = event._data if isinstance(event._data, dict) else {}
        try:
            one = self.one(evaluation_id)
            flip = self._flip(one, _named(benchmark), asked.get("id"))
            if asked.get("to") == "compare":
                return self._picked(one) | {self.compare_prompt: prompt_of(flip.texts)}
            session = self.sessions.of(request.session_hash)
            with session.lock:
                session.show_before(to_judge(flip, session.rng))
        except BiasDPOError as exc:
            return {self.notice: components.error(str(exc))}
        if benchmark != "preference":
            gr.Warning("This is a benchmark’s item: whoever trains on it can no longer measure with it.")
        return {self.tabs: gr.Tabs(selected="label"), self.notice: ""}

    def _flip(self, one: Job, benchmark: str, index: Any) -> Flip:
        found = next((flip for flip in flips(self.results.of(one), benchmark) if str(flip.index) == str(index)), None)
        if found is None:
            raise EvaluationError(f"No flipped item {index!r:.20} of {benchmark} in {one.id}: choose one of the list")
        return found

    # Files

    def saved(self, asked: Any) -> dict[str, str]:
        """A result as a file, or several side by side. `asked`: {"kind": "md", "csv" or "json", "ids": evaluation ids}."""
        kind, ids = (asked.get("kind"), asked.get("ids")) if isinstance(asked, dict) else (None, None)
        if kind not in ("md", "csv", "json") or not isinstance(ids, list) or not 1 <= len(ids) <= _MOST_SAVED:
            raise ConfigError(f"A kind of file and evaluations are needed: got {asked!r:.80}; use the page's own button")
        found = [(one, self.results.of(one)) for one in map(self.one, ids)]
        (one, result), *others = found
        name = one.id if not others else f"{one.id}-and-{len(others)}-more"
        if kind == "md":
            command = command_of(one.config) if one.config is not None and not is_public_space() else ()
            labelled = [(other.id, its) for other, its in found]
            text = report.markdown(labelled) if others else report.markdown(result, command)
        elif kind == "csv":
            text = _csv(report.csv_rows(result))
        else:
            text = json.dumps(result, ensure_ascii=False, indent=1)
        return {"name": f"{name}.{kind}", "text": text}


def _csv(rows: list[dict[str, Any]]) -> str:
    written = io.StringIO()
    writer = csv.DictWriter(written, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue()


def _named(picked: Any) -> str:
    return picked if isinstance(picked, str) else ""


# Evaluate several


MOST = 6  # as many as the page has colours

Labelled = tuple[str, Mapping[str, Any]]


class CompareEvaluations(EvaluationsView):
    """The handlers of the panel."""

    picked: gr.Dropdown
    comparison: gr.HTML
    several_saves: gr.HTML

    @property
    def several_outputs(self) -> list[Any]:
        return [self.comparison, self.several_saves]

    def open_several(self, picked: Any) -> Updates:
        """The panel was opened: all results can be picked; the two newest are, at first."""
        try:
            every = [one for one in self.every() if one.has_result]
        except (BiasDPOError, OSError) as exc:
            return {self.comparison: components.error(str(exc))}
        known = [one.id for one in every]
        kept = [name for name in picked or () if name in known] if isinstance(picked, list) else []
        kept = kept or known[:2]
        return (
            self.turn_to("several")
            | {self.table: self.listed(self.every(), ""), self.picked: gr.update(choices=known, value=kept)}
            | self.compare(kept)
        )

    def compare(self, picked: Any) -> Updates:
        """The evaluations that were picked."""
        try:
            names = [name for name in picked if isinstance(name, str)] if isinstance(picked, list) else []
            if len(names) > MOST:
                raise ConfigError(f"At most {MOST} evaluations side by side: got {len(names)}; take some out")
            found = {one.id: one for one in self.every() if one.has_result}
            labelled = [(name, self.results.of(found[name])) for name in names if name in found]
            if not labelled:
                return {self.comparison: components.note("Choose two or more evaluations to compare."), self.several_saves: ""}
            return {self.comparison: comparison(labelled), self.several_saves: saves([name for name, _ in labelled])}
        except (BiasDPOError, OSError) as exc:
            return {self.comparison: components.error(str(exc)), self.several_saves: ""}


def comparison(labelled: Sequence[Labelled]) -> str:
    """A column an evaluation, then the forest."""
    why_not = {row.benchmark: row.why_not for row in compare(labelled)}
    forest = charts.forest(labelled, why_not)
    return f'{several_table(labelled)}<h3 class="bd-compared">Differences, tuned − base</h3>{forest}'


def several_table(labelled: Sequence[Labelled]) -> str:
    """Metric by metric: base to tuned of each, with the verdict; what must not be set side by side says why."""
    rows = compare(labelled)
    heads = "".join(
        f'<th scope="col" class="bd-c{i % 6}">{escape(name)}<small>{escape(adapter_title(setup(result)[1]))}</small></th>'
        for i, (name, result) in enumerate(labelled)
    )
    body = []
    for name in dict.fromkeys(row.benchmark for row in rows):
        own = [row for row in rows if row.benchmark == name]
        why = f' <span class="bd-not-comparable">not side by side: {escape(own[0].why_not)}</span>' if own[0].why_not else ""
        body.append(
            f'<tr class="bd-eval-head"><th colspan="{len(labelled) + 1}" scope="colgroup">{escape(benchmark_title(name))} '
            f"<small>{_items(own[0])}{why}</small></th></tr>"
        )
        body += map(_several_row, own)
    return (
        '<div class="bd-scroll"><table class="bd-eval-table bd-eval-several"><thead><tr><th scope="col">Metric</th>'
        f"{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _items(row: ComparedRow) -> str:
    counts = [f"{cell.n:,}" for cell in row.cells if cell is not None]
    told = f"{counts[0]} items" if len(set(counts)) == 1 else f"{' / '.join(counts)} items"
    limited = any(cell is not None and not cell.comparable for cell in row.cells)
    return told + (" · not comparable with published figures" if limited else "")


def _several_row(row: ComparedRow) -> str:
    cells = "".join(f"<td>{_cell(cell)}</td>" for cell in row.cells)
    way = f'<small class="bd-way">{escape(direction(row.better))}</small>' if row.better else ""
    return f'<tr><th scope="row">{escape(metric_title(row.metric))} {way}</th>{cells}</tr>'


def _cell(row: TableRow | None) -> str:
    if row is None:
        return "–"
    digits = of_row(row)
    if row.base is None:
        told = charts.change(row)
    elif row.tuned is None:
        told = f"<b>{number(row.base, digits)}</b> <small>{interval(row.base_ci, digits)}</small>"
    else:
        told = f"{number(row.base, digits)} → <b>{number(row.tuned, digits)}</b> <small>{interval(row.tuned_ci, digits)}</small>"
    return f"{told} {charts.verdict(row.verdict)}"


# Evaluate tab


class EvaluateTab(NewEvaluationPanel, EvaluationActions, CompareEvaluations, JobsLayout[Job]):
    """One tab over the workspace's evaluations; `build` is called once, inside the page's Blocks."""

    prefix = "eval"

    def __init__(
        self,
        store: Store,
        pool: EnginePool,
        sessions: LabelSessions,
        data_dir: Path | None,
        pick_adapter: Callable[[str, str], Updates],
        compare_outputs: list[Any],
        compare_prompt: gr.Textbox,
    ) -> None:
        """`pick_adapter`, `compare_outputs`, `compare_prompt`: how the Compare tab takes over a model, an adapter, a prompt."""
        self.store = store
        self.pool = pool
        self.sessions = sessions
        self.data_dir = "" if data_dir is None else str(data_dir)
        self.pick_compared = pick_adapter
        self.compare_outputs = compare_outputs
        self.compare_prompt = compare_prompt
        self.results = Results()
        self.estimates: dict[str, threading.Event] = {}

    def build(self, demo: gr.Blocks, tabs: gr.Tabs, tab: gr.Tab) -> None:
        """Lay out the tab, then wire it."""
        self.tabs = tabs
        here = not is_public_space()
        self.build_state()
        gr.HTML("" if here else refused(), js_on_load=None, elem_id="eval-machine")
        self.build_list(empty=no_evaluations(self.data_dir) if here else "")
        with gr.Column(visible=False, elem_id="eval-new") as self.new_box:
            gr.HTML("<h2>New evaluation</h2>", js_on_load=None)
            self.build_new()
        with gr.Column(visible=False, elem_id="eval-one") as self.one_box:
            self._build_one()
        with gr.Column(visible=False, elem_id="eval-side-by-side") as self.several_box:
            gr.HTML("<h2>Several against each other</h2>", js_on_load=None)
            self.picked = gr.Dropdown(
                [], multiselect=True, max_choices=MOST, label="Evaluations", elem_id="eval-picked", min_width=300
            )
            self.several_saves = self._saves("eval-several-saves")
            self.comparison = gr.HTML("", js_on_load=None, apply_default_css=False, elem_id="eval-comparison")
        self.timer = gr.Timer(active=False)  # goes once the tab was opened
        self._wire(demo, tab)

    def build_list_buttons(self) -> None:
        self.several_button = gr.Button("Compare several", size="sm", elem_id="eval-several", min_width=120, scale=0)

    def _build_one(self) -> None:
        self.head = gr.HTML("", js_on_load=None, elem_id="eval-head")
        with gr.Row(elem_id="eval-actions"):
            self.cancel_button = self.action("Cancel", "cancel", variant="stop")
            self.resume_button = self.action("Resume", "resume", variant="primary")
            self.compare_button = self.action("Open in Compare", "to-compare")
            self.card_button = self.action("Put it into the adapter’s card", "card")
            self.delete_button = self.action("Delete …", "delete")
        self.build_asking()
        with gr.Column(visible=False, elem_id="eval-result") as self.result_box:
            self.outcome = gr.HTML("", js_on_load=None, apply_default_css=False, elem_id="eval-outcome")
            self.saves = self._saves("eval-saves")
            gr.HTML("<h3>What changed: tuned − base</h3>", js_on_load=None)
            self.forest = gr.HTML("", js_on_load=None, apply_default_css=False, elem_id="eval-forest")
            with gr.Column(visible=False, elem_id="eval-plane-box") as self.plane_box:
                gr.HTML("<h3>Bias and fluency by strength</h3>", js_on_load=None)
                self.plane_pick = gr.Dropdown([], label="Metric of the curve", elem_id="eval-plane-pick", min_width=240)
                self.plane = gr.HTML("", js_on_load=None, apply_default_css=False, elem_id="eval-plane")
            with gr.Column(visible=False, elem_id="eval-groups-box") as self.groups_box:
                gr.HTML("<h3>By category and group</h3>", js_on_load=None)
                self.group_pick = gr.Dropdown([], label="Metric by group", elem_id="eval-group-pick", min_width=240)
                self.bars = gr.HTML("", js_on_load=None, apply_default_css=False, elem_id="eval-bars")
            with gr.Column(visible=False, elem_id="eval-flips-box") as self.flips_box:
                gr.HTML("<h3>Items that flipped</h3>", js_on_load=None)
                with gr.Row():
                    self.flip_pick = gr.Dropdown([], label="Benchmark", elem_id="eval-flip-pick", min_width=200)
                    self.flip_way = gr.Dropdown([], label="Which way", elem_id="eval-flip-way", min_width=260)
                self.flip_most = gr.State(0)
                self.flips = gr.HTML(
                    "", js_on_load="window.bdFlips(element, trigger)", apply_default_css=False, elem_id="eval-flips"
                )
                self.more_button = gr.Button("More", size="sm", visible=False, elem_id="eval-more")
        self.made_by = gr.HTML("", js_on_load=None, apply_default_css=False, elem_id="eval-made-by")

    def _saves(self, elem_id: str) -> gr.HTML:
        """Buttons that ask for a file and save it: it is made when it is asked for."""

        def saved(asked: Any) -> dict[str, str]:  # Gradio marks the function, and a method can't be marked
            try:
                return self.saved(asked)
            except (BiasDPOError, OSError) as exc:
                return {"error": str(exc)}

        load = "window.bdSaves(element, server)"
        return gr.HTML("", js_on_load=load, apply_default_css=False, elem_id=elem_id, server_functions=[saved])

    @property
    def all_outputs(self) -> list[Any]:
        return [*self.one_outputs, *self.new_outputs]

    def _wire(self, demo: gr.Blocks, tab: gr.Tab) -> None:
        demo.load(self.open_page, None, [self.tabs, self.chosen], **QUICK)
        self.wire_list(tab, self.new_inputs)
        self.chosen.change(None, self.chosen, None, js="(id) => window.bdEvaluation(id)", api_visibility="private")
        shown = self.all_outputs
        self.several_button.click(self.open_several, self.picked, [*shown, self.picked, *self.several_outputs], **RAW).then(
            None, None, None, js="() => window.bdShow('eval-side-by-side')", api_visibility="private"
        )
        self.picked.input(self.compare, self.picked, self.several_outputs, trigger_mode="always_last", **RAW)
        self.wire_new(demo)
        self.start_button.click(self.start, self.new_inputs, shown, concurrency_limit=1, **RAW | {"queue": True})
        self.wire_deleting()
        self._wire_one()

    def _wire_one(self) -> None:
        self.cancel_button.click(self.cancel, self.chosen, self.notice, **QUICK)
        self.resume_button.click(self.resume, self.chosen, self.all_outputs, **QUICK)
        self.card_button.click(self.to_card, self.chosen, self.notice, **QUICK)
        away = [self.notice, self.tabs, *self.compare_outputs, self.compare_prompt]
        self.compare_button.click(self.open_in_compare, self.chosen, away, **QUICK)
        self.group_pick.input(self.pick_bars, [self.chosen, self.group_pick], self.bars, **RAW)
        self.plane_pick.input(self.pick_plane, [self.chosen, self.plane_pick], self.plane, **RAW)
        picked = [self.chosen, self.flip_pick]
        self.flip_pick.input(self.pick_flips, picked, self.flip_outputs, **RAW)
        self.flip_way.input(self.filter_flips, [*picked, self.flip_way], self.flip_outputs, **RAW)
        self.more_button.click(self.more_flips, [*picked, self.flip_way, self.flip_most], self.flip_outputs, **RAW)
        # Through the queue, since gr.Warning travels with its messages.
        taken = RAW | {"queue": True, "concurrency_limit": None, "trigger_mode": "multiple"}
        self.flips.click(self.take_flip, picked, away, **taken)

    # Opening

    def open_page(self, request: gr.Request) -> Updates:
        """A link that names an evaluation opens it."""
        evaluation_id = request.query_params.get("evaluation", "")
        return {self.tabs: gr.Tabs(selected="evaluate"), self.chosen: evaluation_id} if evaluation_id else {self.chosen: ""}
