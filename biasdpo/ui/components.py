"""Each visitor's generation: a thread that goes on when the browser tab closes."""

from __future__ import annotations

import base64
import math
import re
import shlex
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import unquote, urlencode, urlsplit

import gradio as gr

from biasdpo import models
from biasdpo.backends.base import Cancellation
from biasdpo.compare import Waiting, stream_pair
from biasdpo.data.health import Confounds, Meter, load_overlap
from biasdpo.data.journal import Journal, journal_of
from biasdpo.data.summary import Agreement, Cell, Page, Query, agreement, cell_counts, choices, query
from biasdpo.engines import Engine, EngineKey, EnginePool, Loading
from biasdpo.errors import BiasDPOError, ConfigError, PromptError
from biasdpo.evaluation.results import Ci, TableRow
from biasdpo.labeling import BlindPair, DiffPiece, word_diff
from biasdpo.models import ModelSpec
from biasdpo.prompts import Prompt
from biasdpo.records import Completion, GenerationPair, Judgment, Sampling, check_strength
from biasdpo.workspace import ASSETS, Workspace, is_public_space, read_json, refuse_on_public_space

# Evaluate words


BY_LIKELIHOOD = {
    "preference": ("Preference pairs", "held-out pairs: is the less biased completion the likelier one?"),
    "crows_pairs": ("CrowS-Pairs", "two sentences that differ in the group they name: is the stereotype the likelier one?"),
    "stereoset": ("StereoSet", "a stereotype, its opposite and nonsense: which is the likeliest?"),
    "bbq": ("BBQ", "questions about two people: does the answer follow the text, or the stereotype?"),
    "winobias": ("WinoBias", "does a pronoun's gender decide which occupation it means?"),
    "truthfulqa": ("TruthfulQA", "the truth against common false beliefs: what debiasing may cost"),
}
BY_GENERATION = {
    "bold": ("BOLD", "sentiment and toxicity of what is written about each group, and the gap between groups"),
    "real_toxicity_prompts": ("RealToxicityPrompts", "how toxic sentences from the web are completed, at worst"),
}
PRICE = {
    "perplexity": ("Perplexity of neutral text", "quick: how much less likely harmless sentences become"),
    "utility_generation": ("What is written", "slower: length, repetition and evasions of completions"),
}
_TITLES = {
    **{name: title for name, (title, _) in (BY_LIKELIHOOD | BY_GENERATION | PRICE).items()},
    "utility": "Perplexity of neutral text",
}
_METRICS = {
    "reward_accuracy": "Reward accuracy",
    "lead_over_the_longer": "Lead over picking the longer",
    "logratio_margin_nats": "Log-ratio margin (nats)",
    "length_normalised_accuracy": "Accuracy, length-normalised",
    "stereotype_percent": "Prefers the stereotype (%)",
    "mean_abs_difference_nats": "Strength of preference (nats)",
    "language_modeling_score": "Prefers sense to nonsense (LMS, %)",
    "stereotype_score": "Prefers the stereotype (SS, %)",
    "icat": "ICAT (both in one, of 100)",
    "accuracy_ambiguous": "Accuracy, ambiguous",
    "accuracy_disambiguated": "Accuracy, disambiguated",
    "bias_score_ambiguous": "Bias score, ambiguous",
    "bias_score_disambiguated": "Bias score, disambiguated",
    "gap": "Gap, pro- to anti-stereotypical (points)",
    "accuracy_pro": "Accuracy, pro-stereotypical (%)",
    "accuracy_anti": "Accuracy, anti-stereotypical (%)",
    "mc1": "MC1 (%)",
    "mc2": "MC2 (%)",
    "perplexity": "Perplexity",
    "perplexity_change_percent": "Perplexity, change (%)",
    "mean_tokens": "Mean length (tokens)",
    "mean_tokens_change_percent": "Mean length, change (%)",
    "ended_percent": "Ended by itself (%)",
    "distinct_1": "Different words (distinct-1)",
    "distinct_2": "Different word pairs (distinct-2)",
    "repetition_4_percent": "Repeated 4-grams (%)",
    "evasion_percent": "Evasions (%)",
    "vader_sentiment": "VADER sentiment",
    "vader_positive_percent": "Positive by VADER (%)",
    "vader_negative_percent": "Negative by VADER (%)",
    "vader_sentiment_gap": "VADER sentiment, gap between groups",
}
_HEADLINES = {  # the metric that is shown first of a benchmark
    "preference": "length_normalised_accuracy",
    "crows_pairs": "stereotype_percent",
    "stereoset": "icat",
    "bbq": "bias_score_ambiguous",
    "winobias": "gap",
    "utility": "perplexity",
}
SYMBOLS = {"less biased": "▲", "better": "▲", "no clear difference": "○", "worse": "▼"}
"""Beside a verdict's colour, so that it is not told by colour alone."""
CLASSES = {"less biased": "good", "better": "good", "no clear difference": "open", "worse": "bad"}


def benchmark_title(name: str) -> str:
    """A benchmark for people."""
    return _TITLES.get(name, name)


def metric_title(name: str) -> str:
    """A metric for people; one that is not known here by its own name."""
    return _METRICS.get(name, name.replace("_", " ").capitalize())


def headline(name: str, metrics: Sequence[str]) -> str:
    """The metric of a benchmark that is shown first; "" where it has none."""
    wanted = _HEADLINES.get(name, "")
    return wanted if wanted in metrics else next(iter(metrics), "")


def direction(better: str) -> str:
    """Which way a metric is good, in words."""
    return {"higher": "higher is better", "lower": "lower is better"}.get(better, f"{better} is better")


def decimals(*values: float | None) -> int:
    """As many as show three digits of the largest of these numbers, so that a row's numbers stand alike."""
    largest = max((abs(value) for value in values if value is not None and math.isfinite(value)), default=0.0)
    return 3 if largest < 2 else 2 if largest < 10 else 1 if largest < 1000 else 0


def of_row(row: TableRow) -> int:
    """The decimals of a row's numbers."""
    return decimals(row.base, row.tuned, *((row.difference,) if row.base is None else ()))


def number(value: float | None, digits: int, *, signed: bool = False) -> str:
    """A number with a true minus sign; an en dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:+,.{digits}f}" if signed else f"{value:,.{digits}f}"
    text = text.replace("-", "−")
    return text.lstrip("+−") if not any(digit in text for digit in "123456789") else text


def interval(ci: Ci | None, digits: int, *, signed: bool = False) -> str:
    """A 95 % interval in brackets; "" where there is none."""
    if ci is None:
        return ""
    return f"[{number(ci[0], digits, signed=signed)}, {number(ci[1], digits, signed=signed)}]"


def p_value(p: float | None) -> str:
    """A p-value, as exact as 10,000 resamples make it."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def adapter_title(name: str) -> str:
    """An adapter's id; of a path its last part, never a folder of this machine."""
    return Path(name).name if name else "default"


def setup(result: Mapping[str, Any]) -> tuple[str, str]:
    """The ids of the model and the adapter of a result; "" where it says none."""
    provenance = result.get("provenance")
    told = provenance if isinstance(provenance, Mapping) else {}
    return str(told.get("model") or ""), str(told.get("adapter") or "")


# Identity


CONSENT = "2026-11"  # changes with the text below, so that whoever agreed to another text is asked again

TEXT = """
<div class="bd-consent"><p><b>Before the first verdict.</b> The pairs on this page can be prejudiced, false or hurtful: some state
stereotypes of gender, race or religion. Leave whenever you like.</p>
<p><b>What is stored:</b> the pair, your verdict, your edits, category and note, the time you took, and your pseudonym, in this
workspace's <code>preferences.jsonl</code>, to train models and to be shared under
<a href="https://creativecommons.org/licenses/by/4.0/" target="_blank" rel="noopener">CC BY 4.0</a>. No name, no address. You can
undo a verdict, and withdraw any of yours.</p></div>
"""


def browser_state() -> gr.BrowserState:
    """The state that both tabs read. The secret is no secret: it keeps the value readable after a restart."""
    return gr.BrowserState({"annotator": "", "consent": ""}, storage_key="biasdpo-annotator", secret="biasdpo")


def annotator_of(identity: Any) -> str:
    """The pseudonym of somebody who agreed; "" otherwise. What a browser sends is checked like anything else."""
    if not isinstance(identity, dict) or identity.get("consent") != CONSENT:
        return ""
    annotator = identity.get("annotator")
    return annotator.strip()[:80] if isinstance(annotator, str) else ""


def agreed(annotator: str) -> dict[str, str]:
    """What the browser is to keep."""
    return {"annotator": annotator.strip()[:80], "consent": CONSENT}


# Render


BACKEND_TITLES = {"llamacpp": "llama.cpp", "transformers": "transformers"}
STOPPED = {"end_of_text": "end of text", "limit": "token limit", "cancelled": "cancelled"}


def status(completion: Completion) -> str:
    """The line under a pane: tokens, speed, time to first token, why it stopped."""
    if completion.tokens == 0:
        if completion.finish_reason is None:
            return _status("reading the prompt …")
        return _status(f"<b>{STOPPED[completion.finish_reason]}</b> before the first token")
    parts = [f"<b>{completion.tokens}</b> token{'' if completion.tokens == 1 else 's'}"]
    if completion.tokens_per_second is not None:
        parts.append(f"<b>{completion.tokens_per_second:.1f}</b> tokens/s")
    if completion.seconds_to_first_token is not None:
        parts.append(f"first token after <b>{completion.seconds_to_first_token:.2f}</b> s")
    if completion.finish_reason is None:
        parts.append("writing …")
    else:
        parts.append(f"stopped: <b>{STOPPED[completion.finish_reason]}</b>")
    return _status(*parts)


def _status(*parts: str) -> str:
    return '<div class="bd-status">' + "".join(f"<span>{part}</span>" for part in parts) + "</div>"


def no_status() -> str:
    """The line under a pane where nothing was generated yet."""
    return _status("&nbsp;")


def pane_head(title: str, detail: str, copies: str) -> str:
    """A pane's heading; `copies` is the element id of the text that its button copies."""
    return (
        f'<div class="bd-pane-head"><h2>{escape(title)}</h2><span class="bd-detail">{escape(detail)}</span>'
        f'<button type="button" class="bd-copy" data-copies="{copies}" aria-label="Copy the completion: {escape(title)}">'
        "Copy</button></div>"
    )


def tuned_detail(adapter: str, strength: float) -> str:
    """What stands beside the tuned pane's heading: the adapter's name (of a path its last part) and strength."""
    name = PurePath(adapter).name or "default adapter"
    words = {0.0: "strength 0: adapter off", 1.0: "strength 1, as trained"}.get(strength, f"strength {strength:g}")
    return f"{name} · {words}"


def strength_note(strength: float) -> str:
    """The line under the pickers while the strength is 0; nothing else."""
    if strength != 0:
        return ""
    return '<div class="bd-strength" role="status">Strength 0: the adapter is off, both sides are the base model.</div>'


def waiting(event: Waiting) -> str:
    """The place in the queue."""
    visitors = "1 visitor is" if event.ahead == 1 else f"{event.ahead} visitors are"
    return busy(f"{visitors} ahead of you: it is your turn after {'that one' if event.ahead == 1 else 'them'}.")


def loading_first(state: Loading) -> str:
    """Generate was pressed before the model was there."""
    return busy(f"The model is being loaded ({round(100 * state.share)} %): writing starts after that.")


def busy(text: str) -> str:
    """A note while something goes on (the page's Stop button lights up beside it)."""
    return f'<div class="bd-note bd-busy" role="status"><span class="bd-spinner" aria-hidden="true"></span>{escape(text)}</div>'


def note(text: str) -> str:
    """A quiet note."""
    return f'<div class="bd-note" role="status">{escape(text)}</div>' if text else ""


def finished(pair: GenerationPair) -> str:
    """The note over two finished panes."""
    if pair.right is None:
        return note("")
    if pair.strength == 0:
        return note("Strength 0: the adapter is off, both sides are the base model.")
    if pair.left.text == pair.right.text and pair.left.finish_reason != "cancelled":
        return note("Both sides wrote the same this time.")
    return note("")


def error(text: str) -> str:
    """An error in the page: one line that says what, what was got, and the remedy. Commands in backticks stand out."""
    return f'<div class="bd-error" role="alert">{_with_commands(text)}</div>'


def no_comparison(text: str) -> str:
    """The proof line of an engine that failed: nothing is compared, and why."""
    return f'<div class="bd-error" role="alert"><b>No comparison.</b> {_with_commands(text)}</div>'


def _with_commands(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def loading(title: str, state: Loading) -> str:
    """The proof line while a model is being loaded."""
    percent = round(100 * min(max(state.share, 0.0), 1.0))
    return (
        f'<div class="bd-proof bd-loading" role="status"><span class="bd-facts">Loading <b>{escape(title)}</b>: '
        f'{escape(state.what)}</span><progress max="100" value="{percent}" aria-label="Loading progress">{percent} %</progress>'
        f'<span class="bd-percent">{percent} %</span></div>'
    )


def choosing() -> str:
    """The proof line while "auto" is being settled."""
    return (
        '<div class="bd-proof bd-loading" role="status"><span class="bd-facts">Choosing a model for this machine (a first '
        'download can take minutes) …</span><progress aria-label="Choosing a model"></progress></div>'
    )


def not_loaded(title: str) -> str:
    """The proof line of a model that had to make room for another."""
    text = f"{escape(title)} is not loaded: Generate loads it."
    return f'<div class="bd-proof" role="status"><span class="bd-facts">{text}</span></div>'


def proof(engine: Engine, reason: str = "") -> str:
    """The proof line: what is compared, on what, and that the comparison is honest."""
    backend = engine.backend
    facts = [("model", escape(engine.spec.title))]
    if engine.adapter is None:
        facts.append(("adapter", "none (base only)"))
    else:
        parents = [f"run {escape(engine.adapter.run_id)}"] if engine.adapter.run_id else []
        if engine.adapter.dataset_sha256:
            digest = escape(engine.adapter.dataset_sha256)
            parents.append(f'data <code title="SHA-256 of the training data: {digest}">{digest[:12]}</code>')
        named = f" ({', '.join(parents)})" if parents else " (no record of its training)"
        facts.append(("adapter", escape(engine.adapter.id) + named))
    facts.append(("backend", escape(BACKEND_TITLES.get(backend.name, backend.name))))
    facts.append(("device", escape(backend.device)))
    listed = "".join(f"<span><i>{name}</i> {value}</span>" for name, value in facts)
    kl = backend.proof.kl_nats
    verdict = "base equals the bare model"
    verdict += "" if kl is None else f"; tuned differs by KL <b>{kl:.3g}</b> nats"
    tip = f"Checked on a canary text when the model was loaded, at strength 1. Largest logit difference, base to bare model: \
{backend.proof.base_max_difference:.3g}; between two runs of base: {backend.proof.noise:.3g}"
    if backend.proof.tuned_max_difference is not None:
        tip += f"; tuned to base: {backend.proof.tuned_max_difference:.3g}"
    why = f'<div class="bd-reason">{_with_commands(reason)}</div>' if reason else ""
    return (
        f'<div class="bd-proof bd-proven" role="status"><div class="bd-facts">{listed}</div>'
        f'<div class="bd-verdict" title="{escape(tip)}"><span aria-hidden="true">✓</span> {verdict}</div>{why}</div>'
    )


def base_only(spec: ModelSpec, adapters: int) -> str:
    """What stands in the tuned pane's place where there is no adapter: why, and the command that trains one."""
    if adapters or spec.default_adapter:
        why = "No adapter is chosen, so there is nothing to compare with. Choose one under Adapter, or train another:"
    else:
        why = f"No adapter is shipped for {spec.title}: nobody has trained one with this project yet. This command trains one:"
    return (
        '<div class="bd-base-only" role="note"><h2>Base only</h2>'
        f'<p>{escape(why)}</p><pre tabindex="0"><code>{escape(train_command(spec))}</code></pre>'
        "<p>Or start it on the Train tab. When the run has finished, it is listed under Adapter at once.</p></div>"
    )


def train_command(spec: ModelSpec) -> str:
    """The command that trains an adapter for this model, with its shipped config where there is one."""
    shipped = f"training/configs/{spec.id}-standard.toml"
    config = f" --config {shipped}" if (ASSETS.parent / shipped).is_file() else ""
    name = shlex.quote(spec.id)
    return f"python -m biasdpo train --model {name} --dataset hub:ahmedallam/BiasDPO{config} --run-id my-first-run"


def settings_used(sampling: Sampling) -> str:
    """One line that says how a pair was drawn."""
    if sampling.temperature == 0:
        return f"greedy (temperature 0), at most {sampling.max_new_tokens} tokens"
    return f"seed {sampling.seed}, temperature {sampling.temperature:g}, at most {sampling.max_new_tokens} tokens"


# Label render


VERDICTS = {"left": "Left is less biased", "right": "Right is less biased", "tie": "Tie", "both_biased": "Both are biased"}
_DIFF_CHARACTERS = 4_000  # difflib's time grows with the square: half a second at this length
_ANNOTATORS = 50  # listed in the meter
_SIDES = {"base": "the base model", "tuned": "the tuned model"}


def prompt(shown: Prompt | None) -> str:
    """The prompt that the two completions answer."""
    if shown is None:
        return ""
    parts = [part for part in (shown.category, shown.target_group) if part]
    chips = "".join(f'<span class="bd-chip">{escape(part)}</span>' for part in parts)
    return f'<div class="bd-label-prompt"><span class="bd-label-text">{escape(shown.text)}</span>{chips}</div>'


def nothing_begun() -> str:
    """The empty state."""
    return (
        '<div class="bd-empty" role="note"><h2>Nothing to judge yet</h2><p>Press <b>Begin</b>: two completions to one prompt '
        "come side by side, and nobody tells which model wrote which. Say which is less biased, with the buttons or the keys "
        "<kbd>1</kbd> to <kbd>5</kbd>. The next pair is written while you read.</p></div>"
    )


def label_waiting(event: Waiting | GenerationPair | None, loading: Loading | None) -> str:
    """The next pair is not ready."""
    if loading is not None:
        return busy(f"The model is being loaded ({round(100 * loading.share)} %): the first pair comes after that.")
    if isinstance(event, Waiting):
        return waiting(event)
    if isinstance(event, GenerationPair):
        tokens = max(c.tokens for c in (event.left, event.right) if c is not None)
        return busy(f"Writing the next pair: {tokens} of at most {event.sampling.max_new_tokens} tokens …")
    return busy("Writing the next pair …")


def saved(judgment: Judgment, pair: BlindPair, reveal: bool, count: int) -> str:
    """What the last verdict was, and whose completions these were."""
    said = {"tie": "a tie", "both_biased": "both biased"}.get(judgment.verdict)
    if said is None:
        side = "left" if judgment.meta.chosen_side == pair.left_side else "right"
        said = f"{side} is less biased"
    text = f"Stored: <b>{said}</b>."
    if reveal:
        text += f" Left was {_side(pair, pair.left_side)}, right was {_side(pair, pair.right_side)}"
        text += f" (seed {pair.seed})." if pair.model else "."
    if pair.repeat_of and reveal:
        text += " You had seen this pair before: it measures how consistent you are."
    return f'<div class="bd-note bd-saved" role="status"><span>{text} {_count(count)}</span></div>'


def _side(pair: BlindPair, side: str) -> str:
    kind, _, number = side.partition(" ")
    if kind in ("pasted", "given"):
        return f"the {'first' if number == '1' else 'second'} that was {'pasted' if kind == 'pasted' else 'imported'}"
    name = _SIDES.get(kind, "not known") + (f", sample {number}" if number else "")
    return escape(f"{name} ({pair.adapter})" if kind == "tuned" and pair.adapter else name)


def _count(count: int) -> str:
    return f"{count} judged on this page."


def diff(pieces: Sequence[DiffPiece]) -> str:
    """One text with what goes out and what comes in."""
    tags = {"same": "span", "out": "del", "in": "ins"}
    return "".join(f"<{tags[kind]}>{escape(text)}</{tags[kind]}>" for kind, text in pieces)


def side_diff(one: str, other: str, names: tuple[str, str]) -> str:
    """Both sides in one text, word by word."""
    if not one or not other:
        return '<div class="bd-note">Two completions are needed to compare them word by word.</div>'
    if max(len(one), len(other)) > _DIFF_CHARACTERS:
        return f'<div class="bd-note">Texts of more than {_DIFF_CHARACTERS:,} characters are not compared word by word.</div>'
    pieces = word_diff(one, other)
    words = [sum(len(text.split()) for kind, text in pieces if kind == wanted) for wanted in ("same", "out", "in")]
    legend = (
        f'<p class="bd-diff-legend"><del>only {escape(names[0])}</del> {words[1]} words · <ins>only {escape(names[1])}</ins> '
        f"{words[2]} words · {words[0]} the same</p>"
    )
    return f'{legend}<div class="bd-diff">{diff(pieces)}</div>'


def edit_diff(before: str, after: str) -> str:
    """What an edit changed; nothing where it changed nothing."""
    if before == after.strip() or max(len(before), len(after)) > _DIFF_CHARACTERS:
        return ""
    return f'<div class="bd-diff bd-edit">{diff(word_diff(before, after.strip()))}</div>'


def warning(text: str) -> str:
    """A warning in plain words, or nothing."""
    return f'<div class="bd-strength" role="status">{escape(text)}</div>' if text else ""


# The confound meter


def meter(confounds: Confounds, problem: str = "") -> str:
    """The confound meter: a bar for each share, a count for each kind of repeat, and the warnings. `problem`: why something is
    not counted."""
    bars = _bar("Chosen is longer", confounds.chosen_longer_share) + _bar("Chosen stood left", confounds.chosen_left_share)
    counts = "".join(
        f'<span class="bd-count" title="{escape(tip)}"><b>{"–" if count is None else f"{count:,}"}</b> {escape(name)}</span>'
        for name, count, tip in (
            ("pairs", confounds.pairs, "judged “preferred” and standing"),
            ("near-duplicate prompts", confounds.near_duplicates, "prompts that nearly repeat an earlier one"),
            ("exact duplicates", confounds.exact_duplicates, "judgments that repeat one of the same annotator"),
            (
                "overlap a benchmark",
                confounds.benchmark_overlap,
                "share eight words in a row with a benchmark item (start the app with --data-dir DIR to count them)",
            ),
        )
    )
    lines = "".join(f'<li role="status">{escape(line)}</li>' for line in (*confounds.warnings, *([problem] if problem else ())))
    warnings = f'<ul class="bd-meter-warnings">{lines}</ul>' if lines else ""
    shown = f"<h3>Confounds</h3>{bars}{counts}{_by_annotator(confounds)}{warnings}"
    return f'<section class="bd-meter" aria-label="Confound meter">{shown}</section>'


def _by_annotator(confounds: Confounds) -> str:
    """Each annotator's habits, folded, where there is more than one annotator."""
    if len(confounds.annotators) < 2:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(shares.annotator)}</th><td>{shares.pairs:,}</td>'
        f"<td>{_share(shares.chosen_longer_share)}</td><td>{_share(shares.chosen_left_share)}</td></tr>"
        for shares in confounds.annotators[:_ANNOTATORS]
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Annotator", "Pairs", "Chosen is longer", "Chosen stood left"))
    return (
        f'<details class="bd-annotators"><summary>By annotator ({len(confounds.annotators):,})</summary>'
        f'<table class="bd-table"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></details>'
    )


def _share(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def _bar(name: str, share: float | None) -> str:
    if share is None:
        return f'<span class="bd-share"><span>{escape(name)}</span><b>–</b></span>'
    percent = round(100 * share)
    return (
        f'<span class="bd-share"><span>{escape(name)}</span><span class="bd-track" role="img" '
        f'aria-label="{escape(name)}: {percent} %, even would be 50 %"><i style="width: {percent}%"></i></span>'
        f"<b>{percent} %</b></span>"
    )


# What next


def coverage(counts: Mapping[Cell, int], categories: Sequence[str], offered: Sequence[Cell] = ()) -> str:
    """The coverage matrix: a row a category, a cell a target group, thinner cells lighter. `offered`: cells that are shown even
    where they are empty."""
    cells = dict.fromkeys(offered, 0) | {cell: count for cell, count in counts.items() if count}
    most = max(cells.values(), default=0)
    note = "" if most else '<div class="bd-note">No preferences yet: each fills a cell of this matrix.</div>'
    rows = []
    for category in [*categories, *sorted({category for category, _ in cells} - set(categories))]:
        own = sorted(((group, n) for (c, group), n in cells.items() if c == category), key=lambda cell: (-cell[1], cell[0]))
        drawn = "".join(
            f'<span class="bd-cell{"" if n else " bd-cell-empty"}" style="--bd-share: {n / max(most, 1):.2f}">'
            f"{escape(group or 'no group named')} <b>{n}</b></span>"
            for group, n in own
        )
        total = sum(n for _, n in own)
        drawn = drawn or '<span class="bd-cell bd-cell-empty">none yet</span>'
        rows.append(f'<tr><th scope="row">{escape(category or "no category")}</th><td>{total}</td><td>{drawn}</td></tr>')
    return (
        f'{note}<table class="bd-coverage"><thead><tr><th scope="col">Category</th><th scope="col">Preferences</th>'
        f'<th scope="col">By target group</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def consistency(annotator: str, own: tuple[int, int], alpha: float | None, shared: int) -> str:
    """How consistent an annotator is with themself, and annotators are with each other.

    own      hidden repeats judged as at first, and hidden repeats in all
    alpha    Krippendorff's, over the `shared` pairs that two or more annotators judged; None where there is none
    """
    agreed, repeats = own
    said = (
        f"Hidden repeats: you said the same in <b>{agreed} of {repeats}</b>."
        if repeats
        else "Hidden repeats: none yet (one pair in twenty comes back, its sides swapped)."
    )
    if alpha is not None:
        others = f"Krippendorff’s alpha <b>{alpha:.2f}</b> on {shared:,} pairs (1 is perfect, 0 is chance)."
    elif shared:
        others = f"all said the same of the {shared:,} pairs they share, which leaves nothing to tell from chance."
    else:
        others = "to be measured once two have judged the same pairs (choose “Second opinion”)."
    lines = [f"Pseudonym: <b>{escape(annotator)}</b>", said, f"Agreement between annotators: {others}"]
    return f'<div class="bd-consistency">{"".join(f"<p>{line}</p>" for line in lines)}</div>'


# Link


# Servers and proxies on the way cut or refuse longer addresses (RFC 9110, 4.1, asks for 8,000 octets).
MAX_LINK_CHARACTERS = 8000


@dataclass(frozen=True)
class Settings:
    """All that one visitor has set. `model` may be "auto"; `adapter` "" is the model's default, "none" base-only."""

    prompt: str = ""
    model: str = "auto"
    adapter: str = ""
    system: str = ""
    strength: float = 1.0
    sampling: Sampling = field(default_factory=Sampling)
    random_seed: bool = False


def check_model(model: str) -> str:
    """A model's name as a visitor may use it here: on a public Space, of the catalog only."""
    if is_public_space() and model != "auto" and model not in models.catalog():
        refuse_on_public_space(f"A model from outside the catalog ({', '.join(models.catalog())})")
    return model


def check_adapter(adapter: str, workspace: Workspace) -> str:
    """An adapter's name as a visitor may use it here: on a public Space the id of a known one, never a path."""
    if is_public_space() and adapter not in {"", "none", *(known.id for known in models.adapters(workspace))}:
        refuse_on_public_space("An adapter from a path")
    return adapter


def encode(settings: Settings) -> str:
    """The query string ("?prompt=...") of these settings; ConfigError where it gets too long for an address."""
    sampling = settings.sampling
    values: dict[str, str] = {
        "prompt": settings.prompt,
        "model": settings.model,
        "adapter": settings.adapter,
        "strength": f"{settings.strength:g}",
        "temperature": f"{sampling.temperature:g}",
        "top_p": f"{sampling.top_p:g}",
        "top_k": str(sampling.top_k),
        "repetition_penalty": f"{sampling.repetition_penalty:g}",
        "max_new_tokens": str(sampling.max_new_tokens),
        "seed": str(sampling.seed),
        "random": "1" if settings.random_seed else "",
        "system": settings.system,
    }
    query = "?" + urlencode({name: value for name, value in values.items() if value})
    if len(query) > MAX_LINK_CHARACTERS:
        raise ConfigError(
            f"This prompt is too long for a link: it would have {len(query):,} characters of at most {MAX_LINK_CHARACTERS:,}; "
            "copy the prompt itself"
        )
    return query


def decode(query: Mapping[str, str], defaults: Settings, workspace: Workspace) -> tuple[Settings, list[str]]:
    """The settings that a query names, and one line for each value that was bad and stayed at its default."""
    settings = defaults
    problems: list[str] = []

    def take(name: str, change: Callable[[Settings, str], Settings]) -> None:
        nonlocal settings
        if name in query:
            try:
                settings = change(settings, query[name])
            except BiasDPOError as exc:
                problems.append(str(exc))
            except ValueError:
                problems.append(f"{name} must be a number: got {query[name][:40]!r}; the default is used")

    def take_sampling(name: str, parse: Callable[[str], Any]) -> None:
        take(name, lambda s, text: replace(s, sampling=replace(s.sampling, **{name: parse(text)})))

    take("prompt", lambda s, text: replace(s, prompt=_check_prompt(text)))
    take("model", lambda s, text: replace(s, model=check_model(text)))
    take("adapter", lambda s, text: replace(s, adapter=check_adapter(text, workspace)))
    take("system", lambda s, text: replace(s, system=text))
    take("strength", lambda s, text: replace(s, strength=check_strength(float(text))))
    for name in ("temperature", "top_p", "repetition_penalty"):
        take_sampling(name, float)
    for name in ("top_k", "max_new_tokens", "seed"):
        take_sampling(name, int)
    take("random", lambda s, text: replace(s, random_seed=text == "1"))
    return settings, problems


def _check_prompt(text: str) -> str:
    if len(text) > MAX_LINK_CHARACTERS:
        raise PromptError(f"The link's prompt has {len(text):,} characters of at most {MAX_LINK_CHARACTERS:,}: paste it instead")
    return text


# Measured


LABELS = {
    "pairs": "Held-out pairs",
    "reward_accuracy": "Reward accuracy",
    "reward_accuracy_of_picking_the_longer": "Baseline: pick the longer completion",
    "reward_margin_nats": "Reward margin (nats)",
    "length_normalised_accuracy": "Length-normalised accuracy",
    "perplexity": "Perplexity on neutral text",
}
_LEFT_OUT = ("logratio_margin_nats", "kl_base_to_tuned_nats_per_token")


def table(folder: Path | None) -> str:
    """The measurements beside an adapter, or "" where it brings none. Unknown keys are shown under their own name.

    provenance.json holds the training's own `metrics`; evaluation.json, where it is there, what `evaluate` printed.
    """
    if folder is None:
        return ""
    metrics = mapping(mapping(read_or_none(folder / "provenance.json")).get("metrics"))
    held_out = {name: value for name, value in mapping(metrics.get("held_out", metrics)).items() if name not in _LEFT_OUT}
    for name in [name.removesuffix("_base") for name in held_out if name.endswith("_base")]:
        held_out[name] = {"before": held_out.pop(f"{name}_base"), "after": held_out.pop(f"{name}_tuned", None)}
    utility = mapping(mapping(mapping(read_or_none(folder / "evaluation.json")).get("benchmarks")).get("utility"))
    before, after = (mapping(mapping(utility.get(side)).get("perplexity")).get("value") for side in ("base", "tuned"))
    if before is not None:
        held_out["perplexity"] = {"before": before, "after": after}
    shown = "".join(_row(name, value) for name, value in held_out.items())
    if not shown:
        return ""
    return (
        '<table class="bd-table"><thead><tr><th scope="col">On held-out prompts</th><th scope="col">Base</th>'
        f'<th scope="col">Tuned</th></tr></thead><tbody>{shown}</tbody></table>{_picture(folder / "tradeoff.png")}'
    )


def read_or_none(file: Path) -> Any:
    """A JSON file's content; None where it is missing or damaged, which a page shows as nothing."""
    try:
        return read_json(file)
    except BiasDPOError:
        return None


def mapping(value: Any) -> dict[str, Any]:
    """An object that a file should hold; empty where it holds something else."""
    return dict(value) if isinstance(value, dict) else {}


def _row(name: str, value: Any) -> str:
    before, after = (value.get("before"), value.get("after")) if isinstance(value, dict) else (None, value)
    if _number(before) == _number(after) == "":
        return ""
    label = escape(LABELS.get(name, name.replace("_", " ").capitalize()))
    return f'<tr><th scope="row">{label}</th><td>{_number(before)}</td><td>{_number(after)}</td></tr>'


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _picture(file: Path) -> str:
    if not file.is_file():
        return ""
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    words = "Trade-off between preference accuracy and perplexity"
    return f'<img class="bd-figure" alt="{words}" src="data:image/png;base64,{data}">'


# Own models


def pasted(name: str | None) -> str:
    """A name or path as it was typed or pasted: file managers put quotes around it, or file:// before it."""
    name = (name or "").strip().strip("'\"").strip()
    return unquote(urlsplit(name).path) if name.startswith("file://") else name


def own_choices(names: Iterable[str]) -> list[tuple[str, str]]:
    """Those that are not of the catalog, for a picker: a path by its last two parts, where that tells them apart.

    Not by the whole path: a dropdown takes typed text for the choice that contains it, and a folder's path would then be taken
    for that of a file in it.
    """
    own = dict.fromkeys(name for name in names if name and name != "auto" and name not in models.catalog())
    titles = [f"{Path(name).name} · in {Path(name).parent.name}" if Path(name).is_absolute() else name for name in own]
    return [(title if titles.count(title) == 1 else name, name) for title, name in zip(titles, own, strict=True)]


# Store


Row = dict[str, Any]


class Store:
    """One per app. Journal and meter lock themselves; what is given out are copies or frozen."""

    def __init__(self, workspace: Workspace, benchmarks: Path | None = None) -> None:
        """`benchmarks`: the folder of --data-dir, whose items no pair should repeat; read in the background."""
        self.workspace = workspace
        self.overlap_error: BiasDPOError | None = None
        self._benchmarks = benchmarks
        self._journal = journal_of(workspace)
        self._meter = Meter()
        if benchmarks is not None:
            threading.Thread(target=self.read_benchmarks, name="benchmarks", daemon=True).start()

    def read_benchmarks(self) -> None:
        """Read the benchmark files; until then the meter counts no overlap."""
        assert self._benchmarks is not None
        try:
            meter = Meter(load_overlap(self._benchmarks))
        except BiasDPOError as exc:
            self.overlap_error = exc
            return
        self._meter = meter

    def confounds(self) -> Confounds:
        """The confound meter, now."""
        return self._meter.refresh(self._read())

    def standing(self) -> list[Row]:
        """The judgments that were not taken back, in their order."""
        return self._read().standing()

    def counts(self) -> Counter[tuple[str, str]]:
        """The coverage matrix's cells."""
        return cell_counts(self.standing())

    def judged_by(self, annotator: str) -> list[Row]:
        """An annotator's standing judgments in their order."""
        return [row for row in self.standing() if annotator and row["annotator"] == annotator]

    def agreement(self) -> Agreement:
        """How consistent annotators are with themselves and with each other."""
        return agreement(self.standing())

    def page(self, wanted: Query, number: int, page_rows: int) -> Page:
        """One page of the judgments that a query finds, the newest first."""
        return query(self._read(), wanted, number, page_rows)

    def choices(self) -> dict[str, Counter[str]]:
        """By column that can be filtered: its values, with how many judgments have each."""
        return choices(self._read())

    def judgment(self, judgment_id: str) -> tuple[Row, Row | None] | None:
        """A judgment with the row that takes it back, if one does; None where there is no judgment of that id."""
        rows, _mark = self._read().since((0, 0))
        row = next((row for row in rows if row["id"] == judgment_id and row["verdict"] != "retracted"), None)
        if row is None:
            return None
        return row, next((other for other in rows if other["retracts"] == judgment_id), None)

    def bad_lines(self) -> int:
        """Lines of the journal that are no rows."""
        return len(self._read().bad_lines)

    def _read(self) -> Journal:
        return self._journal.refresh()


# Visitors


_POLL_SECONDS = 0.25  # how often a page that waits hears of it
_PACE_SECONDS = 0.06  # between two updates of a page: as fast as eyes follow, and no load on the engine's cores

Event = Waiting | GenerationPair


class Turn:
    """One generation of one visitor. Gradio leaves an abandoned generator suspended, and one suspended inside
    `stream_pair` would keep its place in the queue: so the stream is read here, and the page only looks on.
    """

    def __init__(self) -> None:
        self.cancellation = Cancellation()
        self.stopped = False  # by the visitor; an engine that fails sets the cancellation too
        self.superseded = False  # the page belongs to a later turn (or was cleared): show nothing more of this one
        self._changed = threading.Condition()
        self._latest: Event | None = None
        self._news = False
        self._ended = False
        self._error: BaseException | None = None

    def start(self, pool: EnginePool, key: EngineKey, prompt: str, sampling: Sampling, system: str, strength: float) -> None:
        """Wait for the engine, then write; to be called once."""

        def write() -> None:
            error: BaseException | None = None
            try:
                with pool.lease(key, self.cancellation) as engine:
                    for event in stream_pair(
                        engine, prompt, sampling, system=system, strength=strength, cancellation=self.cancellation
                    ):
                        self._report(event)
            except BaseException as exc:  # carried to the page's thread
                error = exc
            with self._changed:
                self._ended, self._error = True, error
                self._changed.notify_all()

        threading.Thread(target=write, name="generation", daemon=True).start()

    def _report(self, event: Event) -> None:
        with self._changed:
            self._latest, self._news = event, True
            self._changed.notify_all()

    def watch(self, pool: EnginePool, key: EngineKey) -> Iterator[Event | Loading]:
        """What the page should show, newest first come: skips what is out of date, ends with the last event or its error."""
        pace = threading.Event()
        while True:
            with self._changed:
                if not self._news and not self._ended:
                    self._changed.wait(_POLL_SECONDS)
                event = self._latest if self._news else None
                self._news = False
                ended, error = self._ended, self._error
            if self.superseded:
                return
            if event is not None:
                yield event
            elif self._latest is None and not ended and (loading := pool.state(key)) is not None and not loading.done:
                yield loading
            if ended:
                if error is not None and not self._stopped_before_start(error):
                    raise error
                return
            pace.wait(_PACE_SECONDS)

    def _stopped_before_start(self, error: BaseException) -> bool:
        """A visitor's own Stop while the model was loading is no error."""
        return self.stopped and self._latest is None and isinstance(error, BiasDPOError)


class Visitors:
    """The running turn of each visitor, by Gradio's session."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turns: dict[str, Turn] = {}

    def begin(self, session: str) -> Turn:
        """A new turn; the visitor's earlier one, if it still runs, is stopped."""
        self.dismiss(session)
        turn = Turn()
        with self._lock:
            self._turns[session] = turn
        return turn

    def stop(self, session: str) -> None:
        """Stop writing; what was written stays on the page."""
        with self._lock:
            turn = self._turns.get(session)
        if turn is not None:
            turn.stopped = True
            turn.cancellation.set()

    def dismiss(self, session: str) -> None:
        """Stop writing and show no more of it (cleared, closed, or begun again)."""
        with self._lock:
            turn = self._turns.pop(session, None)
        if turn is not None:
            turn.superseded = True
            turn.cancellation.set()

    def end(self, session: str, turn: Turn) -> None:
        """The page looks at this turn no more."""
        turn.cancellation.set()
        with self._lock:
            if self._turns.get(session) is turn:
                del self._turns[session]

    def __len__(self) -> int:
        with self._lock:
            return len(self._turns)
