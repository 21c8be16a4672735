"""One annotator's pairs: while one is judged, the next are generated in spare time.

Visitors who wait for a completion go first; an annotator who has nothing to judge is such a visitor.
"""

from __future__ import annotations

import random
import sys
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from biasdpo import label
from biasdpo.backends.base import Cancellation
from biasdpo.compare import SpareTime, Waiting, stream_pair, stream_samples
from biasdpo.dataset.coverage import Cell, thinnest
from biasdpo.engines import EngineKey, EnginePool, Loading
from biasdpo.errors import BackendError, BiasDPOError, ConfigError, DatasetError, PromptError
from biasdpo.label import BlindPair, PairSource
from biasdpo.prompts import Prompt
from biasdpo.records import SEED_RANGE, GenerationPair, Sampling, Side

AHEAD = 2  # pairs kept ready: one to show, one for an annotator who is quick once
_TRIES = 4  # seeds tried where both completions come out the same, or one empty


@dataclass(frozen=True)
class Recipe:
    """What pairs are made of. The seed is drawn anew for each pair."""

    prompts: tuple[Prompt, ...]
    source: PairSource
    key: EngineKey
    sampling: Sampling
    system: str = ""
    strength: float = 1.0


class PairQueue:
    """Made for one annotator. A thread works while there is something to generate, and ends when there is not."""

    def __init__(self, pool: EnginePool, rng: random.Random, counts: Callable[[], Mapping[Cell, int]]) -> None:
        """`counts` tells how many judgments each cell of the coverage matrix holds: the thinnest is offered first."""
        self._pool = pool
        self._rng = rng
        self._counts = counts
        self._lock = threading.Lock()
        self._recipe: Recipe | None = None
        self._ready: deque[BlindPair] = deque()
        self._round: list[Prompt] = []  # what this round still has to offer
        self._planned: Counter[Cell] = Counter()  # ready, or being generated
        self._wanted = False  # somebody waits with nothing to judge
        self._paused = False
        self._cancellation: Cancellation | None = None
        self._spare: SpareTime | None = None
        self._worker: threading.Thread | None = None
        self.latest: Waiting | GenerationPair | None = None  # how far the next pair has come
        self.error: BiasDPOError | None = None
        self.exhausted = False  # greedy prompts give one pair each
        self.skipped = 0  # prompts in a row that gave nothing to judge

    def begin(self, recipe: Recipe) -> None:
        """From now on pairs come of this recipe; what was made of another is dropped. A model that failed is loaded again."""
        self._pool.load(recipe.key)
        with self._lock:
            self._recipe = recipe
            self._ready.clear()
            self._planned.clear()
            self._round = list(recipe.prompts)
            self.error, self.latest, self.skipped, self.exhausted = None, None, 0, False
            self._paused = False
            self._stop_generating()
            self._go_on()

    @property
    def begun(self) -> bool:
        return self._recipe is not None

    @property
    def goes_on(self) -> bool:
        """Whether another pair will come."""
        return self.begun and self.error is None and (bool(self._ready) or not self.exhausted)

    def take(self) -> BlindPair | None:
        """The next pair if it is ready; else None, and from then on this annotator counts as one who waits."""
        with self._lock:
            self._paused = False
            pair = self._ready.popleft() if self._ready else None
            if pair is not None:
                self._planned[_cell(pair.prompt)] -= 1
            self._wanted = pair is None and self.begun and self.error is None
            if self._wanted and self._spare is not None:
                self._spare.want()
            self._go_on()
            return pair

    def prompt_of(self, text: str) -> Prompt | None:
        """The prompt of this text among those that are being judged."""
        recipe = self._recipe
        return next((p for p in recipe.prompts if p.text == text), None) if recipe is not None else None

    def loading(self) -> Loading | None:
        """How far the model has come, while it is being loaded."""
        recipe = self._recipe
        state = None if recipe is None else self._pool.state(recipe.key)
        return state if state is not None and not state.done else None

    def pause(self) -> None:
        """The annotator has left, or seems to: generate no more until a pair is asked for."""
        with self._lock:
            self._paused = True
            self._stop_generating()

    def _stop_generating(self) -> None:
        if self._cancellation is not None:
            self._cancellation.set()

    def _go_on(self) -> None:
        """Start the worker where there is something to do and none works. The lock must be held."""
        if self._worker is None and self._has_work():
            self._worker = threading.Thread(target=self._work, name="pairs ahead", daemon=True)
            self._worker.start()

    def _has_work(self) -> bool:
        return self.begun and not self._paused and self.error is None and not self.exhausted and len(self._ready) < AHEAD

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._has_work():
                    self._worker = None
                    return
                recipe = self._recipe
                assert recipe is not None  # else there were no work
            pair: BlindPair | None = None
            prompt: Prompt | None = None
            error: BiasDPOError | None = None
            try:
                prompt = self._next_prompt(recipe)
                if prompt is not None:
                    pair = self._draw(recipe, prompt)
            except BiasDPOError as exc:
                error = exc
            except Exception as exc:  # a fault of ours: one line for the annotator, the trace for the terminal
                traceback.print_exc(file=sys.stderr)
                error = BackendError(f"The app failed ({type(exc).__name__}: {exc}): begin again; the terminal shows where")
            self._settle(recipe, prompt, pair, error)

    def _settle(self, recipe: Recipe, prompt: Prompt | None, pair: BlindPair | None, error: BiasDPOError | None) -> None:
        """Take what was generated into the queue, unless another recipe has begun meanwhile."""
        with self._lock:
            self._cancellation, self._spare, self.latest = None, None, None
            if self._recipe is not recipe:
                return
            if pair is not None:
                self._ready.append(pair)
                self.skipped = 0
                self._wanted = False  # the next one is made in spare time again
                return
            if prompt is not None:
                self._planned[_cell(prompt)] -= 1
            if isinstance(error, DatasetError | PromptError) and prompt is not None:  # nothing to judge in it, or too long
                self.skipped += 1
                if self.skipped >= len(recipe.prompts):
                    self.error = error
            elif error is not None:
                self.error = error
            elif prompt is not None:  # it gave way to a visitor
                self._round.insert(0, prompt)

    def _next_prompt(self, recipe: Recipe) -> Prompt | None:
        """The prompt of the thinnest cell; None where all were greedily answered, so that nothing new can come."""
        counts = Counter(self._counts())
        with self._lock:
            if self._recipe is not recipe:
                return None
            if not self._round:
                if recipe.sampling.temperature == 0.0:
                    self.exhausted = True
                    return None
                self._round = list(recipe.prompts)
            prompt = thinnest(self._round, counts + self._planned)[0]
            self._round.remove(prompt)
            self._planned[_cell(prompt)] += 1
            return prompt

    def _draw(self, recipe: Recipe, prompt: Prompt) -> BlindPair | None:
        """A pair of this prompt; None where it was stopped. DatasetError where no seed gave anything to judge."""
        nothing: DatasetError | None = None
        for _ in range(_TRIES if recipe.sampling.temperature > 0 else 1):
            sampling = replace(recipe.sampling, seed=self._rng.randint(*SEED_RANGE))
            pair = self._generate(recipe, prompt.text, sampling)
            if pair is None:
                return None
            try:
                return label.blind(pair, prompt, self._rng)
            except DatasetError as exc:
                nothing = exc
        assert nothing is not None
        raise nothing

    def _generate(self, recipe: Recipe, prompt: str, sampling: Sampling) -> GenerationPair | None:
        """Both completions, whole; None where it was stopped."""
        with self._lock:
            if self._paused or self._recipe is not recipe:
                return None
            self._cancellation, self._spare = Cancellation(), SpareTime()
            if self._wanted:
                self._spare.want()
            cancellation, spare = self._cancellation, self._spare
        with self._pool.lease(recipe.key, cancellation) as engine:
            if recipe.source != "base_base" and not engine.backend.has_adapter:
                raise ConfigError(
                    f"“{label.PAIR_SOURCES[recipe.source]}” needs an adapter, and none is chosen: choose one on the Compare tab, "
                    "or judge two samples of base"
                )
            settings: dict[str, Any] = {
                "system": recipe.system,
                "strength": recipe.strength,
                "cancellation": cancellation,
                "spare": spare,
            }
            if recipe.source == "base_tuned":
                stream = stream_pair(engine, prompt, sampling, **settings)
            else:
                side: Side = "base" if recipe.source == "base_base" else "tuned"
                stream = stream_samples(engine, prompt, sampling, side, **settings)
            for event in stream:
                self.latest = event
        pair = self.latest
        if not isinstance(pair, GenerationPair) or not pair.finished:
            return None
        written = [c for c in (pair.left, pair.right) if c is not None]
        return None if any(c.finish_reason == "cancelled" for c in written) else pair


def _cell(prompt: Prompt) -> Cell:
    return prompt.category, prompt.target_group
