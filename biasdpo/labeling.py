"""Labeling: the blind pair that an annotator sees next, what becomes of the answer, and the queue that generates pairs ahead."""

from __future__ import annotations

import difflib
import json
import logging
import random
import re
import secrets
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from biasdpo import prompts
from biasdpo.backends.base import Cancellation
from biasdpo.compare import Prefetch, Waiting, stream_pair, stream_samples
from biasdpo.data.journal import new_judgment
from biasdpo.data.pairs import check_text, pair_id_of, shown_pair_id
from biasdpo.data.summary import Cell, least_covered
from biasdpo.engines import EngineKey, EnginePool, Loading
from biasdpo.errors import BackendError, BiasDPOError, ConfigError, DatasetError, PromptError
from biasdpo.prompts import CATEGORIES, Prompt
from biasdpo.records import SEED_RANGE, GenerationPair, Judgment, JudgmentMeta, Sampling, Side, Verdict

logger = logging.getLogger(__name__)

Answer = Literal["left", "right", "tie", "both_biased", "both_unusable"]
ANSWERS: tuple[Answer, ...] = ("left", "right", "tie", "both_biased", "both_unusable")

DiffPiece = tuple[Literal["same", "out", "in"], str]

PairSource = Literal["base_tuned", "base_base", "tuned_tuned"]
PAIR_SOURCES: dict[PairSource, str] = {
    "base_tuned": "Base vs tuned",
    "base_base": "Two samples of base",
    "tuned_tuned": "Two samples of tuned",
}

LENGTH_GUARD = 1.3  # a chosen completion that is longer than this many times the rejected one teaches "write more"
REPEAT_SHARE = 0.05  # share of the pairs shown that are hidden repeats
_REPEAT_GAP = 5  # latest judgments of an annotator that are too recent to be repeated
_COUNTERPARTS = {"base": "tuned", "base 1": "base 2", "tuned 1": "tuned 2", "pasted 1": "pasted 2", "given 1": "given 2"}
_COUNTERPARTS |= {right: left for left, right in _COUNTERPARTS.items()}
_MAX_CHARACTERS = {"target_group": 200, "annotator": 200, "note": 2_000}
_ORIGIN = ("model", "adapter", "backend", "sampling", "seed")  # columns of `JudgmentMeta` that a pair brings along

# Pairs to show


@dataclass(frozen=True)
class BlindPair:
    """Two completions on their sides, and what produced them; the sides stay hidden until the verdict.

    left_side, right_side   base or tuned; "base 1" and "base 2" of two samples; "pasted 1" and "pasted 2"; "given 1" and
                            "given 2" of an imported pair
    sides_known             the annotator has seen which is which: on the Compare tab, or after a verdict that was undone
    sampling                JSON of the `Sampling`; "" if nothing was generated here
    repeat_of               pair id, if this annotator judged the pair before
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
        return pair_id_of(self.prompt.text, self.left, self.right)

    def swapped(self) -> BlindPair:
        """The pair with left and right exchanged."""
        return replace(self, left=self.right, right=self.left, left_side=self.right_side, right_side=self.left_side)

    def shuffled(self, rng: random.Random) -> BlindPair:
        """The pair with its sides in random order."""
        return self.swapped() if rng.random() < 0.5 else self


def blind(pair: GenerationPair, prompt: Prompt, rng: random.Random) -> BlindPair:
    """A finished pair with its sides in random order. DatasetError if there is nothing to judge."""
    return known(pair, prompt).shuffled(rng)


def known(pair: GenerationPair, prompt: Prompt) -> BlindPair:
    """A finished pair as it is, base on the left. DatasetError if there is nothing to judge."""
    if pair.right is None:
        raise ConfigError("A pair of base and tuned needs an adapter: choose one, or judge two samples of base")
    sides: list[str] = [pair.left.side, pair.right.side]
    if sides[0] == sides[1]:
        sides = [f"{sides[0]} 1", f"{sides[1]} 2"]
    texts = [pair.left.text.strip(), pair.right.text.strip()]
    if not all(texts):
        raise DatasetError("One of the completions is empty, so there is nothing to judge: generate again with another seed")
    if texts[0] == texts[1]:
        raise DatasetError("Both completions are the same text, so there is nothing to judge: use another seed")
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
        check_text(text, name, "Your pair")
    if one.strip() == other.strip():
        raise DatasetError("Your pair: both completions are the same text; change one")
    return BlindPair(prompt, one.strip(), other.strip(), "pasted 1", "pasted 2").shuffled(rng)


def repeat(rows: Sequence[dict[str, Any]], rng: random.Random) -> BlindPair | None:
    """With probability REPEAT_SHARE, one of an annotator's earlier pairs again, its sides swapped; else None.

    rows   the annotator's standing judgments in order; each pair is repeated at most once
    """
    repeated = {row["repeat_of"] for row in rows}
    old = [row for row in rows[:-_REPEAT_GAP] if not row["repeat_of"] and shown_pair_id(row) not in repeated]
    if not old or rng.random() >= REPEAT_SHARE:
        return None
    shown = shown_pair(rng.choice(old))
    return replace(shown.swapped(), repeat_of=shown.pair_id)


def second_opinion(row: dict[str, Any], rng: random.Random) -> BlindPair:
    """The pair of somebody else's judgment, its sides in random order."""
    return shown_pair(row).shuffled(rng)


def shown_pair(row: dict[str, Any]) -> BlindPair:
    """The pair of an earlier judgment as it was shown: before edits, on its sides.

    The prompt has only the category that is known without that judgment. How an imported pair was shown is unknown.
    """
    chosen, rejected = row["original_chosen"] or row["chosen"], row["original_rejected"] or row["rejected"]
    meta = row["meta"]
    left_was_chosen = not meta["chosen_side"] or meta["chosen_side"] == meta["left_side"]
    left, right = (chosen, rejected) if left_was_chosen else (rejected, chosen)
    left_side = meta["left_side"] or "given 1"
    return BlindPair(
        prompts.known(row["prompt"]),
        left,
        right,
        left_side,
        _COUNTERPARTS.get(left_side, ""),
        **{key: meta[key] for key in _ORIGIN},
    )


def new_random() -> random.Random:
    """An unpredictable source of order: a visitor must not be able to compute which side is which."""
    return random.Random(secrets.randbits(128))


# Answers


@dataclass(frozen=True)
class Details:
    """What an annotator says besides the answer; checked here, since anyone can post anything to a page."""

    category: str = ""
    target_group: str = ""
    note: str = ""
    annotator: str = ""
    browser: str = ""  # see `JudgmentMeta`

    def __post_init__(self) -> None:
        if self.category not in ("", *CATEGORIES):
            raise ConfigError(f"category must be one of {', '.join(CATEGORIES)}: got {self.category!r}; choose one")
        for name, most in _MAX_CHARACTERS.items():
            text = getattr(self, name)
            if len(text) > most:
                raise ConfigError(f"{name} must have at most {most:,} characters: got {len(text):,}; shorten it")
            if text.strip():
                check_text(text, name, "This judgment")


def judgment(
    pair: BlindPair, answer: Answer, details: Details, *, left: str | None = None, right: str | None = None, seconds: float = 0.0
) -> Judgment:
    """Build the judgment of an answer. `left` and `right`: the texts after an edit, if they were edited.

    The source is `label` if the sides were hidden, `compare` if they were known. For a tie, or if both are biased, `chosen` and
    `rejected` hold left and right. An edited text that can't be stored is a DatasetError.
    """
    if answer not in ANSWERS:
        raise ConfigError(f"An answer is one of {', '.join(ANSWERS)}: got {answer!r}; choose one")
    if not details.annotator.strip():
        raise ConfigError("No pseudonym yet: enter one, so that your judgments can be distinguished from others'")
    edited = [pair.left if left is None else left.strip(), pair.right if right is None else right.strip()]
    shown, sides = [pair.left, pair.right], [pair.left_side, pair.right_side]
    if answer == "right":
        edited, shown, sides = edited[::-1], shown[::-1], sides[::-1]
    if not all(edited):
        raise DatasetError("After the edit a completion is empty: write something, or switch editing off to bring the text back")
    if edited[0] == edited[1]:
        raise DatasetError("After the edit both completions are the same text, which teaches nothing: change one back")
    verdict: Verdict = "preferred" if answer == "left" or answer == "right" else answer
    meta = JudgmentMeta(
        **{key: getattr(pair, key) for key in _ORIGIN},
        left_side=pair.left_side,
        chosen_side=sides[0] if verdict == "preferred" else "",
        seconds=round(max(0.0, seconds), 3),
        browser=details.browser,
    )
    return new_judgment(
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
    """A warning if one completion is more than LENGTH_GUARD times as long as the other, else ""."""
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
    """What of `one` is removed and what of `other` is inserted, word by word, including white space."""
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


# The queue


AHEAD = 2  # pairs kept ready: one to show, and one for an annotator who is quick once
_TRIES = 4  # seeds tried if both completions are the same, or one is empty


@dataclass(frozen=True)
class Recipe:
    """How to generate pairs. Each pair gets a new random seed."""

    prompts: tuple[Prompt, ...]
    source: PairSource
    key: EngineKey
    sampling: Sampling
    system: str = ""
    strength: float = 1.0


class PairQueue:
    """Generates one annotator's pairs ahead in spare time, in a thread that ends when there is nothing to generate.

    Visitors who wait for a completion go first; an annotator who has nothing to judge is such a visitor.
    """

    def __init__(self, pool: EnginePool, rng: random.Random, counts: Callable[[], Mapping[Cell, int]]) -> None:
        """`counts` returns the judgments in each cell of the coverage matrix: the least-covered one is offered first."""
        self._pool = pool
        self._rng = rng
        self._counts = counts
        self._lock = threading.Lock()
        self._recipe: Recipe | None = None
        self._ready: deque[BlindPair] = deque()
        self._remaining: list[Prompt] = []  # prompts still to offer before all are offered again
        self._planned: Counter[Cell] = Counter()  # ready, or being generated
        self._wanted = False  # the annotator waits with nothing to judge
        self._paused = False
        self._cancellation: Cancellation | None = None
        self._spare: Prefetch | None = None
        self._worker: threading.Thread | None = None
        self.latest: Waiting | GenerationPair | None = None  # progress of the next pair
        self.error: BiasDPOError | None = None
        self.exhausted = False  # at temperature 0, each prompt gives one pair
        self.skipped = 0  # consecutive prompts that gave nothing to judge

    @property
    def is_started(self) -> bool:
        return self._recipe is not None

    @property
    def has_more(self) -> bool:
        """Whether another pair will come."""
        return self.is_started and self.error is None and (bool(self._ready) or not self.exhausted)

    def start(self, recipe: Recipe) -> None:
        """Generate pairs by this recipe from now on; drop those of another. A model that failed to load is loaded again."""
        self._pool.load(recipe.key)
        with self._lock:
            self._recipe = recipe
            self._ready.clear()
            self._planned.clear()
            self._remaining = list(recipe.prompts)
            self.error, self.latest, self.skipped, self.exhausted = None, None, 0, False
            self._paused = False
            self._cancel()
            self._ensure_worker()

    def take(self) -> BlindPair | None:
        """Take the next pair if it is ready; else return None, and from then on the annotator counts as waiting."""
        with self._lock:
            self._paused = False
            pair = self._ready.popleft() if self._ready else None
            if pair is not None:
                self._planned[_cell(pair.prompt)] -= 1
            self._wanted = pair is None and self.is_started and self.error is None
            if self._wanted and self._spare is not None:
                self._spare.promote()
            self._ensure_worker()
            return pair

    def pause(self) -> None:
        """Stop generating until a pair is requested: the annotator has left, or seems to have."""
        with self._lock:
            self._paused = True
            self._cancel()

    def prompt_of(self, text: str) -> Prompt | None:
        """The prompt with this text among those of the recipe."""
        recipe = self._recipe
        return next((p for p in recipe.prompts if p.text == text), None) if recipe is not None else None

    def loading(self) -> Loading | None:
        """The model's progress, while it is being loaded."""
        recipe = self._recipe
        state = None if recipe is None else self._pool.state(recipe.key)
        return state if state is not None and not state.done else None

    def _cancel(self) -> None:
        if self._cancellation is not None:
            self._cancellation.set()

    def _ensure_worker(self) -> None:
        """Start the worker if there is something to do and none is running. The lock must be held."""
        if self._worker is None and self._has_work():
            self._worker = threading.Thread(target=self._work, name="pairs ahead", daemon=True)
            self._worker.start()

    def _has_work(self) -> bool:
        return self.is_started and not self._paused and self.error is None and not self.exhausted and len(self._ready) < AHEAD

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._has_work():
                    self._worker = None
                    return
                recipe = self._recipe
                assert recipe is not None  # else there would be no work
            pair: BlindPair | None = None
            prompt: Prompt | None = None
            error: BiasDPOError | None = None
            try:
                prompt = self._next_prompt(recipe)
                if prompt is not None:
                    pair = self._draw(recipe, prompt)
            except BiasDPOError as exc:
                error = exc
            except Exception as exc:  # a fault of ours: one line for the annotator, the traceback for the log
                logger.exception("Generating a pair failed")
                error = BackendError(f"The app failed ({type(exc).__name__}: {exc}): start again; the terminal shows where")
            self._settle(recipe, prompt, pair, error)

    def _settle(self, recipe: Recipe, prompt: Prompt | None, pair: BlindPair | None, error: BiasDPOError | None) -> None:
        """Add what was generated to the queue, unless another recipe was started meanwhile."""
        with self._lock:
            self._cancellation, self._spare, self.latest = None, None, None
            if self._recipe is not recipe:
                return
            if pair is not None:
                self._ready.append(pair)
                self.skipped = 0
                self._wanted = False  # the next one is generated in spare time again
                return
            if prompt is not None:
                self._planned[_cell(prompt)] -= 1
            if isinstance(error, DatasetError | PromptError) and prompt is not None:  # nothing to judge, or too long
                self.skipped += 1
                if self.skipped >= len(recipe.prompts):
                    self.error = error
            elif error is not None:
                self.error = error
            elif prompt is not None:  # it gave way to a visitor
                self._remaining.insert(0, prompt)

    def _next_prompt(self, recipe: Recipe) -> Prompt | None:
        """The prompt of the least-covered cell; None if all were answered at temperature 0, so that nothing new can come."""
        counts = Counter(self._counts())
        with self._lock:
            if self._recipe is not recipe:
                return None
            if not self._remaining:
                if recipe.sampling.temperature == 0.0:
                    self.exhausted = True
                    return None
                self._remaining = list(recipe.prompts)
            prompt = least_covered(self._remaining, counts + self._planned)[0]
            self._remaining.remove(prompt)
            self._planned[_cell(prompt)] += 1
            return prompt

    def _draw(self, recipe: Recipe, prompt: Prompt) -> BlindPair | None:
        """A pair for this prompt; None if it was stopped. DatasetError if no seed gave anything to judge."""
        tries = _TRIES if recipe.sampling.temperature > 0 else 1
        while pair := self._generate(recipe, prompt.text, replace(recipe.sampling, seed=self._rng.randint(*SEED_RANGE))):
            try:
                return blind(pair, prompt, self._rng)
            except DatasetError:
                tries -= 1
                if not tries:
                    raise
        return None

    def _generate(self, recipe: Recipe, prompt: str, sampling: Sampling) -> GenerationPair | None:
        """Generate both completions; None if that was stopped."""
        with self._lock:
            if self._paused or self._recipe is not recipe:
                return None
            cancellation, spare = self._cancellation, self._spare = Cancellation(), Prefetch()
            if self._wanted:
                spare.promote()
        with self._pool.lease(recipe.key, cancellation) as engine:
            if recipe.source != "base_base" and not engine.backend.has_adapter:
                raise ConfigError(
                    f"“{PAIR_SOURCES[recipe.source]}” needs an adapter, and none is chosen: choose one on the Compare tab, "
                    "or judge two samples of base"
                )
            settings: dict[str, Any] = {"system": recipe.system, "strength": recipe.strength, "cancellation": cancellation}
            side: Side = "base" if recipe.source == "base_base" else "tuned"
            if recipe.source == "base_tuned":
                stream = stream_pair(engine, prompt, sampling, **settings, prefetch=spare)
            else:
                stream = stream_samples(engine, prompt, sampling, side, **settings, prefetch=spare)
            for event in stream:
                self.latest = event
        pair = self.latest
        if not isinstance(pair, GenerationPair) or not pair.finished:
            return None
        completions = [c for c in (pair.left, pair.right) if c is not None]
        return None if any(c.finish_reason == "cancelled" for c in completions) else pair


def _cell(prompt: Prompt) -> Cell:
    return prompt.category, prompt.target_group
