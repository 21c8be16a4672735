"""A generation pair as an annotator sees it, blind, and what becomes of their answer."""

from __future__ import annotations

import difflib
import json
import random
import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from biasdpo import dataset, prompts
from biasdpo.dataset.pairs import shown_pair_id
from biasdpo.errors import ConfigError, DatasetError
from biasdpo.prompts import CATEGORIES, Prompt
from biasdpo.records import GenerationPair, Judgment, JudgmentMeta, Verdict

Answer = Literal["left", "right", "tie", "both_biased"]
ANSWERS: tuple[Answer, ...] = ("left", "right", "tie", "both_biased")

DiffPiece = tuple[Literal["same", "out", "in"], str]

PairSource = Literal["base_tuned", "base_base", "tuned_tuned"]
PAIR_SOURCES: dict[PairSource, str] = {
    "base_tuned": "Base vs tuned",
    "base_base": "Two samples of base",
    "tuned_tuned": "Two samples of tuned",
}

LENGTH_GUARD = 1.3  # a chosen completion longer than this many times the rejected one teaches "write more"
REPEAT_SHARE = 0.05  # of the pairs shown are hidden repeats
_REPEAT_GAP = 5  # an annotator's latest judgments are too fresh to be asked again
_COUNTERPARTS = {"base": "tuned", "base 1": "base 2", "tuned 1": "tuned 2", "pasted 1": "pasted 2", "given 1": "given 2"}
_COUNTERPARTS |= {right: left for left, right in _COUNTERPARTS.items()}
_MAX_FIELD = 200  # characters of a pseudonym or a group
_MAX_NOTE = 2_000


@dataclass(frozen=True)
class BlindPair:
    """What stands left and right, and what produced each: to be shown without its sides until the verdict.

    left_side, right_side   base or tuned; "base 1" and "base 2" of two samples; "pasted 1" and "pasted 2"; "given 1" and
                            "given 2" of a pair that was imported
    sides_known             the annotator has seen which is which: on the Compare tab, or after a verdict that was undone
    sampling                JSON of the `Sampling`; "" where nothing was generated here
    repeat_of               pair id, where this annotator judged the pair before
    """

    prompt: Prompt
    left: str
    right: str
    left_side: str
    right_side: str
    model: str = ""
    adapter: str = ""
    backend: str = ""
    sampling: str = ""
    seed: int = 0
    repeat_of: str = ""
    sides_known: bool = False

    @property
    def pair_id(self) -> str:
        return dataset.pair_id_of(self.prompt.text, self.left, self.right)

    def swapped(self) -> BlindPair:
        """Left and right exchanged."""
        return replace(self, left=self.right, right=self.left, left_side=self.right_side, right_side=self.left_side)


def blind(pair: GenerationPair, prompt: Prompt, rng: random.Random) -> BlindPair:
    """A finished pair with its sides in random order. DatasetError where there is nothing to judge."""
    shown = known(pair, prompt)
    return shown.swapped() if rng.random() < 0.5 else shown


def known(pair: GenerationPair, prompt: Prompt) -> BlindPair:
    """A finished pair as it stands, base left. DatasetError where there is nothing to judge."""
    if pair.right is None:
        raise ConfigError("A pair of base and tuned needs an adapter: choose one, or judge two samples of base")
    sides: list[str] = [pair.left.side, pair.right.side]
    if sides[0] == sides[1]:
        sides = [f"{sides[0]} 1", f"{sides[1]} 2"]
    texts = [pair.left.text.strip(), pair.right.text.strip()]
    if not all(texts):
        raise DatasetError("One of the completions is empty, so there is nothing to judge: generate again with another seed")
    if texts[0] == texts[1]:
        raise DatasetError("Both completions are the same text, so there is nothing to judge: take another seed")
    return BlindPair(
        prompt,
        texts[0],
        texts[1],
        sides[0],
        sides[1],
        model=pair.model,
        adapter=pair.adapter,
        backend=pair.backend,
        sampling=json.dumps(asdict(pair.sampling) | {"system": pair.system, "strength": pair.strength}, sort_keys=True),
        seed=pair.sampling.seed,
    )


def pasted(prompt: Prompt, one: str, other: str, rng: random.Random) -> BlindPair:
    """A pair that somebody brought along, in random order."""
    for name, text in (("prompt", prompt.text), ("first completion", one), ("second completion", other)):
        dataset.check_text(text, name, "Your pair")
    if one.strip() == other.strip():
        raise DatasetError("Your pair: both completions are the same text; change one")
    shown = BlindPair(prompt, one.strip(), other.strip(), "pasted 1", "pasted 2")
    return shown.swapped() if rng.random() < 0.5 else shown


def repeat(rows: Sequence[dict[str, Any]], rng: random.Random) -> BlindPair | None:
    """Now and then (REPEAT_SHARE) one of an annotator's earlier pairs once more, its sides swapped; else None.

    rows   the annotator's standing judgments in their order; a pair comes back once
    """
    repeated = {row["repeat_of"] for row in rows}
    old = [row for row in rows[:-_REPEAT_GAP] if not row["repeat_of"] and shown_pair_id(row) not in repeated]
    if not old or rng.random() >= REPEAT_SHARE:
        return None
    shown = shown_pair(rng.choice(old))
    return replace(shown.swapped(), repeat_of=shown.pair_id)


def second_opinion(row: dict[str, Any], rng: random.Random) -> BlindPair:
    """The pair of somebody else's judgment, its sides in random order."""
    shown = shown_pair(row)
    return shown.swapped() if rng.random() < 0.5 else shown


def shown_pair(row: dict[str, Any]) -> BlindPair:
    """The pair of an earlier judgment as it was shown: before edits, on the sides where it stood. Its prompt says no more than is
    known of it without that judgment. Of an imported pair nobody knows how it was shown."""
    chosen, rejected = row["original_chosen"] or row["chosen"], row["original_rejected"] or row["rejected"]
    meta = row["meta"]
    left_was_chosen = meta["chosen_side"] == meta["left_side"] if meta["chosen_side"] else True
    left_side = meta["left_side"] or "given 1"
    left, right = (chosen, rejected) if left_was_chosen else (rejected, chosen)
    return BlindPair(
        prompts.known(row["prompt"]),
        left,
        right,
        left_side,
        _COUNTERPARTS.get(left_side, ""),
        model=meta["model"],
        adapter=meta["adapter"],
        backend=meta["backend"],
        sampling=meta["sampling"],
        seed=meta["seed"],
    )


@dataclass(frozen=True)
class Details:
    """What an annotator says beside the answer; checked here, since anyone can post anything to a page."""

    category: str = ""
    target_group: str = ""
    note: str = ""
    annotator: str = ""

    def __post_init__(self) -> None:
        if self.category not in ("", *CATEGORIES):
            raise ConfigError(f"category must be one of {', '.join(CATEGORIES)}: got {self.category!r}; choose one")
        for name, text, most in (
            ("target_group", self.target_group, _MAX_FIELD),
            ("annotator", self.annotator, _MAX_FIELD),
            ("note", self.note, _MAX_NOTE),
        ):
            if len(text) > most:
                raise ConfigError(f"{name} must have at most {most:,} characters: got {len(text):,}; shorten it")
            if text.strip():
                dataset.check_text(text, name, "This judgment")


def judgment(
    pair: BlindPair, answer: Answer, details: Details, *, left: str | None = None, right: str | None = None, seconds: float = 0.0
) -> Judgment:
    """The row that an answer becomes. `left` and `right` are the texts after an edit, where they were edited. Its source is
    `label` where the sides were hidden, `compare` where they were known.

    For a tie, or where both are biased, `chosen` and `rejected` hold left and right. Raises DatasetError where an edited text
    can't be stored.
    """
    if answer not in ANSWERS:
        raise ConfigError(f"An answer is one of {', '.join(ANSWERS)}: got {answer!r}; choose one")
    if not details.annotator.strip():
        raise ConfigError("No pseudonym yet: write one, so that your judgments can be told from others'")
    edited = [pair.left if left is None else left.strip(), pair.right if right is None else right.strip()]
    shown, sides = [pair.left, pair.right], [pair.left_side, pair.right_side]
    if answer == "right":
        edited, shown, sides = edited[::-1], shown[::-1], sides[::-1]
    if not all(edited):
        raise DatasetError("After the edit a completion is empty: write something, or switch editing off to bring the text back")
    if edited[0] == edited[1]:
        raise DatasetError("After the edit both completions are the same text, which teaches nothing: change one back")
    preferred = answer in ("left", "right")
    verdict: Verdict = "preferred" if preferred else "tie" if answer == "tie" else "both_biased"
    meta = JudgmentMeta(
        model=pair.model,
        adapter=pair.adapter,
        backend=pair.backend,
        sampling=pair.sampling,
        seed=pair.seed,
        left_side=pair.left_side,
        chosen_side=sides[0] if preferred else "",
        seconds=round(max(0.0, seconds), 3),
    )
    return dataset.new_judgment(
        pair.prompt.text,
        edited[0],
        edited[1],
        original_chosen=shown[0] if edited[0] != shown[0] else "",
        original_rejected=shown[1] if edited[1] != shown[1] else "",
        verdict=verdict,
        category=details.category,
        target_group=details.target_group.strip(),
        annotator=details.annotator.strip(),
        note=details.note.strip(),
        source="compare" if pair.sides_known else "label",
        repeat_of=pair.repeat_of,
        meta=meta,
    )


def length_warning(left: str, right: str) -> str:
    """A line where one completion is more than LENGTH_GUARD times as long as the other, else ""."""
    lengths = len(left.strip()), len(right.strip())
    if min(lengths) == 0:
        return "One completion is empty: write something, or undo the edit."
    ratio = max(lengths) / min(lengths)
    if ratio <= LENGTH_GUARD:
        return ""
    name = "Left" if lengths[0] > lengths[1] else "Right"
    return (
        f"{name} is {ratio:.2f} times as long as the other. If you choose it, the pair also teaches “write more”: "
        f"trim it below {LENGTH_GUARD:g} times, or lengthen the other."
    )


def word_diff(one: str, other: str) -> list[DiffPiece]:
    """What of `one` goes out and what of `other` comes in, word by word (white space kept): Ratcliff-Obershelp, by difflib."""
    out, into = (re.findall(r"\s+|[\w'’]+|[^\w\s]", text) for text in (one, other))
    pieces: list[DiffPiece] = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, out, into, autojunk=False).get_opcodes():
        if tag == "equal":
            pieces.append(("same", "".join(out[a:b])))
            continue
        if a < b:
            pieces.append(("out", "".join(out[a:b])))
        if c < d:
            pieces.append(("in", "".join(into[c:d])))
    return pieces


def new_random() -> random.Random:
    """A source of order that nobody can foresee: a visitor must not be able to reckon which side is which."""
    return random.Random(secrets.randbits(128))
