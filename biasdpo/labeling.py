"""Labeling: blind pairs, the judgments made of them, the queue that generates pairs ahead, and an annotator's session."""

from __future__ import annotations

import difflib
import json
import logging
import random
import re
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from biasdpo import prompts
from biasdpo.backends.base import Cancellation
from biasdpo.compare import Prefetch, Waiting, stream_pair, stream_samples
from biasdpo.data import journal
from biasdpo.data.journal import Row, new_judgment
from biasdpo.data.pairs import check_text, pair_id_of, shown_pair_id
from biasdpo.data.reader import DatasetReader
from biasdpo.data.summary import Cell
from biasdpo.engines import EngineKey, EnginePool, Loading
from biasdpo.errors import BackendError, BiasDPOError, ConfigError, DatasetError, PromptError, RefusedError
from biasdpo.prompts import CATEGORIES, Prompt, least_covered
from biasdpo.records import SEED_RANGE, Completion, GenerationPair, Judgment, JudgmentMeta, Sampling, Side, Verdict

logger = logging.getLogger(__name__)

Answer = Literal["left", "right", "tie", "both_biased", "both_unusable"]
ANSWERS: tuple[Answer, ...] = ("left", "right", "tie", "both_biased", "both_unusable")

DiffPiece = tuple[Literal["same", "out", "in"], str]

PairSource = Literal["base_tuned", "base_base", "tuned_tuned"]
PAIR_SOURCES: dict[PairSource, str] = {
    "base_tuned": "Base and tuned",
    "base_base": "Two samples of base",
    "tuned_tuned": "Two samples of tuned",
}

LENGTH_GUARD = 1.3  # a chosen completion that is longer than this many times the rejected one teaches "write more"
REPEAT_SHARE = 0.05  # share of the pairs shown that are hidden repeats
MIN_KEPT_SHARE = 1 / 3  # of a completion that its limit cut off: less than that is an opening ("Sure!"), not an answer
_REPEAT_GAP = 5  # latest judgments of an annotator that are too recent to be repeated
_COUNTERPARTS = {"base": "tuned", "base 1": "base 2", "tuned 1": "tuned 2", "pasted 1": "pasted 2", "given 1": "given 2"}
_COUNTERPARTS |= {right: left for left, right in _COUNTERPARTS.items()}
_MAX_CHARACTERS = {"target_group": 200, "annotator": 200, "note": 2_000}
# Columns of `JudgmentMeta` that a pair brings along.
_ORIGIN = ("model", "adapter", "backend", "sampling", "seed", "left_finish", "right_finish")

# Pairs to show


@dataclass(frozen=True)
class BlindPair:
    """Two completions on their sides, and what produced them; the sides stay hidden until the verdict.

    left_side, right_side      base or tuned; "base 1" and "base 2" of two samples; "pasted 1" and "pasted 2"; "given 1" and
                               "given 2" of an imported pair
    left_finish, right_finish  why each completion ended, as in `JudgmentMeta`
    sampling                   JSON of the `Sampling`; "" if nothing was generated here
    repeat_of                  pair id, if this annotator judged the pair before
    sides_known                the annotator has seen which is which: on the Compare tab, or after a verdict that was undone
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
    left_finish: str = ""
    right_finish: str = ""
    repeat_of: str = ""
    sides_known: bool = False

    @property
    def pair_id(self) -> str:
        return pair_id_of(self.prompt.text, self.left, self.right)

    def swapped(self) -> BlindPair:
        """The pair with left and right exchanged."""
        return replace(
            self,
            left=self.right,
            right=self.left,
            left_side=self.right_side,
            right_side=self.left_side,
            left_finish=self.right_finish,
            right_finish=self.left_finish,
        )

    def shuffled(self, rng: random.Random) -> BlindPair:
        """The pair with its sides in random order."""
        return self.swapped() if rng.random() < 0.5 else self


def blind(pair: GenerationPair, prompt: Prompt, rng: random.Random) -> BlindPair:
    """A finished pair with its sides in random order. DatasetError if there is nothing to judge."""
    return known(pair, prompt).shuffled(rng)


def known(pair: GenerationPair, prompt: Prompt) -> BlindPair:
    """A finished pair, base on the left; both completions end with a sentence. DatasetError if there is nothing to judge."""
    if pair.right is None:
        raise ConfigError("A pair of base and tuned needs an adapter: choose one, or judge two samples of base")
    sides: list[str] = [pair.left.side, pair.right.side]
    if sides[0] == sides[1]:
        sides = [f"{sides[0]} 1", f"{sides[1]} 2"]
    texts = [_whole(pair.left), _whole(pair.right)]
    if texts[0] == texts[1]:
        raise DatasetError("Both answers are the same text, so there is nothing to judge: use another seed")
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
        left_finish=pair.left.finish_reason or "",
        right_finish=pair.right.finish_reason or "",
    )


def _whole(completion: Completion) -> str:
    """A completion's text; if the token limit cut it off, only up to its last complete sentence."""
    text = completion.text.strip()
    if completion.finish_reason not in ("end_of_text", "limit"):
        raise DatasetError("An answer was stopped before its end, so there is nothing to judge: generate again")
    if not text:
        raise DatasetError("One of the answers is empty, so there is nothing to judge: generate again with another seed")
    if completion.finish_reason == "end_of_text":
        return text
    kept = complete_sentences(text)
    if len(kept) < MIN_KEPT_SHARE * len(text):
        raise DatasetError(
            f"The token limit ({completion.tokens}) cut an answer off before a sentence ended, so there is nothing to judge: "
            "raise the limit, or use another seed"
        )
    return kept


# Where sentences end

_END = re.compile(r"""(?:[.!?…]+|[。！？]+)["'”’»)\]*_]*(?=\s|$)|[。！？]+[”’」』）]*""")
_ABBREVIATION = re.compile(
    r"m(r|rs|s|x|t)|dr|prof|rev|hon|st|[sj]r|sen|rep|gov|gen|col|lt|sgt|capt|vs|approx|dept|est|fig|nos|vol|pp|eds?|inc|ltd|co"
    r"|corp|e\.g|i\.e|cf|viz|al|jan|feb|mar|apr|ju[nl]|aug|sept?|oct|nov|dec|u\.[skn]|d\.c|ph\.d|[mb]\.[ad]|[ap]\.m",
    re.IGNORECASE,
)
_PAIRS = (("(", ")"), ("[", "]"), ("“", "”"), ("«", "»"), ("「", "」"))
_EVEN = ('"', "**", "```")


def complete_sentences(text: str) -> str:
    """The text up to the end of its last complete sentence; "" if no sentence ends in it.

    A period ends no sentence after an abbreviation, an initial, a list number ("2.") or a number at the very end (which may go
    on), nor where a lowercase word follows. Text that would leave a quotation, a bracket or bold type open is cut earlier.
    """
    text = text.rstrip()
    for match in reversed(list(_END.finditer(text))):
        if _ends_sentence(text, match) and _is_closed(kept := text[: match.end()]):
            return kept
    return ""


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    rest = text[match.end() :].lstrip()
    if rest[:1].islower():  # "e.g. this", "wait... what"
        return False
    if not match.group().startswith(".") or match.group().startswith(".."):
        return True
    line = text[: match.start()].rpartition("\n")[2]
    word = line.split()[-1].lstrip("\"'“‘«([*_") if line.split() else ""
    if word.isdigit() and (not rest or line.strip(" -*_#>") == word):  # "2." of a list; "3." that may become "3.5"
        return False
    if word.casefold() == "no" and rest[:1].isdigit():  # "No. 5"
        return False
    is_initial = len(word) == 1 and word.isalpha() and word != "I"
    return bool(word) and not is_initial and not _ABBREVIATION.fullmatch(word)


def _is_closed(text: str) -> bool:
    return all(text.count(opening) <= text.count(closing) for opening, closing in _PAIRS) and all(
        text.count(mark) % 2 == 0 for mark in _EVEN
    )


# Pairs of other origins


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
        raise ConfigError("No nickname yet: enter one, to keep your verdicts apart from those of others")
    edited = [pair.left if left is None else left.strip(), pair.right if right is None else right.strip()]
    shown, sides = [pair.left, pair.right], [pair.left_side, pair.right_side]
    if answer == "right":
        edited, shown, sides = edited[::-1], shown[::-1], sides[::-1]
    if not all(edited):
        raise DatasetError("After the edit an answer is empty: write something, or turn editing off to restore the text")
    if edited[0] == edited[1]:
        raise DatasetError("After the edit both answers are the same text, which teaches nothing: change one back")
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
        return "One answer is empty: write something, or turn editing off."
    ratio = max(lengths) / min(lengths)
    if ratio <= LENGTH_GUARD:
        return ""
    name = "Left" if lengths[0] > lengths[1] else "Right"
    return (
        f"{name} is {ratio:.1f} times as long as the other: if you choose it, the pair also teaches length. "
        f"Shorten it to less than {LENGTH_GUARD:g} times, or lengthen the other."
    )


def is_alike(one: str, other: str) -> bool:
    """Whether at least half of the shorter text's words are in the other: unrelated answers share up to 0.4, and below that a
    word-by-word comparison marks nearly everything."""
    words = [Counter(re.findall(r"[\w'’]+", text.casefold())) for text in (one, other)]
    return (words[0] & words[1]).total() >= max(1, min(found.total() for found in words)) / 2


def word_diff(one: str, other: str) -> list[DiffPiece]:
    """What of `one` is removed and what of `other` is inserted, word by word, including white space; each as a whole where they
    are not alike."""
    if one != other and not is_alike(one, other):
        whole: list[DiffPiece] = [("out", one), ("in", other)]
        return [piece for piece in whole if piece[1]]
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


Progress = Loading | Waiting | GenerationPair | None

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

    def __post_init__(self) -> None:
        if self.source not in PAIR_SOURCES:
            raise ConfigError(f"A source of pairs is one of {', '.join(PAIR_SOURCES)}: got {self.source!r}; choose one")
        if self.source != "base_tuned" and self.sampling.temperature == 0:
            raise ConfigError("Two samples of one model are the same at temperature 0: set a temperature above 0")


class PairQueue:
    """Generates one annotator's pairs ahead in spare time, in a thread that ends when there is nothing to generate.

    Visitors who wait for a completion go first; an annotator who has nothing to judge is such a visitor.
    """

    def __init__(self, pool: EnginePool, rng: random.Random, counts: Callable[[], Mapping[Cell, int]]) -> None:
        """`counts` returns the judgments in each cell of the coverage matrix: the least-covered one is offered first."""
        self._pool = pool
        self._rng = rng
        self._counts = counts
        self._lock = threading.Condition()  # notified when a pair is ready, or none will be
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
                self._planned[pair.prompt.cell] -= 1
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
            self._lock.notify_all()

    def wait(self, seconds: float) -> None:
        """Wait until a pair is ready or the queue has ended, but no longer than this."""
        with self._lock:
            self._lock.wait_for(lambda: self._ready or not self.has_more or self._paused, seconds)

    def prompt_of(self, text: str) -> Prompt | None:
        """The prompt with this text among those of the recipe."""
        recipe = self._recipe
        return next((p for p in recipe.prompts if p.text == text), None) if recipe is not None else None

    def progress(self) -> Progress:
        """The state of the next pair: its model is being loaded, others go first, or it is being generated."""
        recipe = self._recipe
        loading = None if recipe is None else self._pool.state(recipe.key)
        return loading if loading is not None and not loading.done else self.latest

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
            self._lock.notify_all()
            if self._recipe is not recipe:
                return
            if pair is not None:
                self._ready.append(pair)
                self.skipped = 0
                self._wanted = False  # the next one is generated in spare time again
                return
            if prompt is not None:
                self._planned[prompt.cell] -= 1
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
                    self._lock.notify_all()
                    return None
                self._remaining = list(recipe.prompts)
            prompt = least_covered(self._remaining, counts + self._planned)[0]
            self._remaining.remove(prompt)
            self._planned[prompt.cell] += 1
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
                    f"“{PAIR_SOURCES[recipe.source]}” needs an adapter, and this model has none: choose an adapter, or judge two "
                    "samples of base"
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


# Sessions


_REPORT_SECONDS = 0.5  # how often a waiting annotator's progress is updated
_KEPT_SECONDS = 3600.0  # of an unused session: a laptop that sleeps, or a proxy that cuts a stream, comes back
_KEPT = 500  # sessions, the latest used ones


@dataclass(frozen=True)
class Judged:
    """A stored judgment with its pair, and what the annotator said and wrote."""

    judgment: Judgment
    pair: BlindPair
    details: Details
    left: str | None = None  # after an edit
    right: str | None = None


class LabelSession:
    """One page's sequence of pairs. Hold `lock` while using it, except for `wait_for_pair`.

    `token` names the pair that is shown: an answer to another one (a key pressed twice) is ignored.
    """

    def __init__(self, pool: EnginePool, reader: DatasetReader) -> None:
        self.rng = random.Random(secrets.randbits(128))  # a visitor must not be able to compute which side is which
        self.queue = PairQueue(pool, self.rng, reader.counts)
        self.first: deque[BlindPair] = deque()  # undone or pasted, or put back for one of those
        self.given: deque[BlindPair] = deque()  # second opinions, which need no model
        self.shown: BlindPair | None = None
        self.token = ""
        self.judged: list[Judged] = []
        self.goal = 24  # verdicts
        self.lock = threading.Lock()
        self.used_at = time.monotonic()
        self._reader = reader
        self._shown_at = 0.0
        self._waits = 0  # number of the latest `wait_for_pair`, which replaces earlier ones
        self._unsaved: tuple[object, Judgment] | None = None

    def start(self, recipe: Recipe) -> None:
        """Show pairs by this recipe from now on."""
        self.given.clear()
        self.queue.start(recipe)
        self.show(None)

    def start_second_opinions(self, browser: str, annotator: str) -> int:
        """Show the pairs that others judged and this annotator did not, in random order; return their number."""
        rows = [row for row in self._reader.standing() if not row["repeat_of"]]
        own = {shown_pair_id(row) for row in rows if self._reader.is_own(row, browser, annotator)}
        others = {pair_id: row for row in reversed(rows) if (pair_id := shown_pair_id(row)) not in own}
        if not others:
            raise ConfigError("No pairs for a second opinion: nobody else has judged a pair that you have not; change Pairs")
        pairs = [shown_pair(row).shuffled(self.rng) for row in others.values()]
        self.rng.shuffle(pairs)
        self.given = deque(pairs)
        self.show(None)
        return len(pairs)

    @property
    def goes_on(self) -> bool:
        """Whether another pair will come."""
        return bool(self.first or self.given) or self.queue.has_more

    def next(self, own: Sequence[Row]) -> BlindPair | None:
        """Show the next pair after a verdict: now and then a hidden repeat of the annotator's own, else what is ready."""
        pair = repeat(own, self.rng) if self.judged and not self.first else None
        if pair is not None:
            return self.show(replace(pair, prompt=self.queue.prompt_of(pair.prompt.text) or pair.prompt))
        return self.take()

    def take(self) -> BlindPair | None:
        """Show the next pair if one is ready."""
        waiting = self.first or self.given
        return self.show(waiting.popleft() if waiting else self.queue.take())

    def wait_for_pair(self) -> Iterator[Progress | BlindPair]:
        """Show the next pair as soon as it is ready, yielding progress and finally the pair.

        Ends without one if another pair is shown meanwhile, if none will come, or if the page is left.
        """
        with self.lock:
            self._waits += 1
            own = self._waits
        while True:
            with self.lock:
                if own != self._waits or self.shown is not None:
                    return
                pair = self.take()
                ended = pair is not None or not self.goes_on
            if pair is not None:
                yield pair
            if ended:
                return
            yield self.queue.progress()
            self.queue.wait(_REPORT_SECONDS)

    def leave(self) -> None:
        """The page was closed or reloaded, or its connection dropped: generate nothing ahead until it asks again."""
        with self.lock:
            self._waits += 1
        self.queue.pause()

    def show(self, pair: BlindPair | None) -> BlindPair | None:
        """Show a pair; the clock runs from here."""
        self.shown, self._unsaved = pair, None
        self.token = f"{self.rng.randrange(2**64):016x}" if pair is not None else ""
        self._shown_at = time.monotonic()
        return pair

    def show_before(self, pair: BlindPair) -> None:
        """Show this pair, and then again the one that was shown."""
        if self.shown is not None:
            self.first.appendleft(self.shown)
        self.show(pair)

    def store_answer(self, answer: Answer, details: Details, left: str | None = None, right: str | None = None) -> Judged:
        """Store the answer to the shown pair. If that fails, the pair stays, and the same answer again stores one row."""
        pair = self.shown
        if pair is None:
            raise ConfigError("There is no pair to judge: press Start first")
        asked = (self.token, answer, details, left, right)
        if self._unsaved is None or self._unsaved[0] != asked:
            seconds = time.monotonic() - self._shown_at
            self._unsaved = (asked, judgment(pair, answer, details, left=left, right=right, seconds=seconds))
        judged = Judged(self._unsaved[1], pair, details, left, right)
        journal.append(self._reader.workspace, judged.judgment)
        self.judged.append(judged)
        self.show(None)
        return judged

    def undo(self, *, revealed: bool) -> Judged:
        """Withdraw the latest judgment and show its pair again. `revealed`: its sides were revealed after the verdict."""
        if not self.judged:
            raise ConfigError("There is no verdict to undo on this page: withdraw earlier ones under “My verdicts”")
        last = self.judged[-1]
        journal.undo(self._reader.workspace, last.judgment.id, last.judgment.pair_id, last.judgment.annotator)
        self.judged.pop()
        self.show_before(replace(last.pair, sides_known=last.pair.sides_known or revealed))
        return last

    def withdraw(self, judgment_id: str, browser: str, annotator: str) -> None:
        """Withdraw one of this browser's own judgments, made on this page or before."""
        row = next((row for row in self._reader.standing() if row["id"] == judgment_id), None)
        if row is None:
            raise ConfigError("No verdict is selected: select one in the table")
        if not self._reader.is_own(row, browser, annotator):
            raise RefusedError("Only verdicts of this browser can be withdrawn here: use the browser that made it")
        journal.undo(self._reader.workspace, row["id"], row["pair_id"], row["annotator"], row["source"])
        self.judged = [judged for judged in self.judged if judged.judgment.id != judgment_id]


class LabelSessions:
    """Sessions by page, created on first use. Thread-safe."""

    def __init__(self, pool: EnginePool, reader: DatasetReader) -> None:
        self._pool, self._reader = pool, reader
        self._lock = threading.Lock()
        self._sessions: dict[str, LabelSession] = {}  # in order of last use

    def of(self, page: str | None) -> LabelSession:
        """The page's session; RefusedError without a page. Long unused ones are dropped, first those without a verdict."""
        if not page:
            raise RefusedError("A request to label needs a session_hash, as the page sends it: add one")
        now = time.monotonic()
        with self._lock:
            session = self._sessions.pop(page, None) or LabelSession(self._pool, self._reader)
            self._sessions[page] = session
            session.used_at = now
            for name, old in sorted(self._sessions.items(), key=lambda item: bool(item[1].judged)):
                if old is not session and (now - old.used_at >= _KEPT_SECONDS or len(self._sessions) > _KEPT):
                    old.queue.pause()
                    del self._sessions[name]
        return session

    def leave(self, page: str | None) -> None:
        """The page was closed, or seems to be."""
        with self._lock:
            session = self._sessions.get(page or "")
        if session is not None:
            session.leave()

    def __len__(self) -> int:
        with self._lock:
            return len(self._sessions)
