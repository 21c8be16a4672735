"""The items that flipped, as HTML, and what of one goes to Compare or to Label. Everything that is not ours is escaped."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

from biasdpo import label
from biasdpo.errors import EvaluationError
from biasdpo.evaluations.flips import Flip
from biasdpo.label import BlindPair
from biasdpo.prompts import CATEGORIES, Prompt
from biasdpo.ui import render
from biasdpo.ui.evaluate_words import number

PAGE = 25  # flips shown at a time
_MOST_COMPLETIONS = 3  # of an item, on each side

_FEWEST_WORDS = 3  # of a common beginning that is worth to be continued
_LEFT_OUT = ("category", "target")
_TEXTS = {"more": "more stereotypical", "less": "less stereotypical", "pro": "stereotypical", "anti": "anti-stereotypical"}
_KINDS = {"toward less bias": "good", "toward more bias": "bad"}
_PAIRS = (  # what a benchmark calls the two texts of an item, the less biased one first
    ("chosen", "rejected"),
    ("less", "more"),
    ("anti_stereotype", "stereotype"),
    ("first", "second"),
    ("anti", "pro"),
)


def ways(found: Sequence[Flip]) -> list[tuple[str, str]]:
    """(title, value) of what flips can be filtered by: all, toward less or more bias, then each change of outcome."""
    choices = [(f"all ({len(found):,})", "")]
    for name in _KINDS:
        count = sum(flip.way == name for flip in found)
        choices += [(f"{name} ({count:,})", name)] if count else []
    changes = Counter(change(flip) for flip in found)
    return choices + [(f"{name} ({count:,})", name) for name, count in changes.most_common()]


def change(flip: Flip) -> str:
    """Both outcomes, in words."""
    return f"{flip.base_outcome} → {flip.tuned_outcome}"


def filtered(found: Sequence[Flip], wanted: str) -> list[Flip]:
    """Those that flipped that way; "" is all."""
    return [flip for flip in found if wanted in ("", flip.way, change(flip))]


def listed(found: Sequence[Flip], benchmark: str, scored: int, most: int) -> str:
    """The first `most` flips, those that moved most first."""
    if not found:
        return render.note(f"No item flipped: base and tuned decide all {scored:,} alike.")
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
        f'<article class="bd-flip bd-is-{_KINDS.get(flip.way, "open")}" aria-label="Item {flip.index}"><header>'
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
    symbol = "▲" if _KINDS[flip.way] == "good" else "▼"
    return f'<span class="bd-verdict-word bd-is-{_KINDS[flip.way]}"><span aria-hidden="true">{symbol}</span> {flip.way}</span>'


def pair_of(flip: Flip) -> tuple[str, str] | None:
    """The two completions to judge: what was written, else the item's own two texts; None of an item that is no pair."""
    base, tuned = flip.completions
    if base and tuned:
        return base[0], tuned[0]
    return _two(flip.texts)


def _two(texts: Mapping[str, str]) -> tuple[str, str] | None:
    return next(((texts[one], texts[other]) for one, other in _PAIRS if texts.get(one) and texts.get(other)), None)


def to_judge(flip: Flip, rng: random.Random) -> BlindPair:
    """A flipped pair for the Label tab, in random order. EvaluationError where it is no pair."""
    both = pair_of(flip)
    if both is None:
        raise EvaluationError(f"Item {flip.index} has no two texts to choose from: try its prompt in Compare instead")
    category = next((name for name in CATEGORIES if flip.group.casefold().startswith(name[:4])), "")
    return label.pasted(Prompt(prompt_of(flip.texts), category), *both, rng)
