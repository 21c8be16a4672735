"""Completions of one prompt, computed together: a row each of one batch, over one KV cache.

The two sides of a pair are two streams, read by two threads. They meet (`Meeting`), and from then on whoever needs a token
computes the next one for both, and leaves the other's for it to fetch: nobody waits for the slower reader. A row that ends, or
whose reader has left or was cancelled, is taken out between two steps, and the rest goes on.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from biasdpo.backends.base import Cancellation
from biasdpo.backends.hf_sampling import Draw
from biasdpo.errors import BackendError
from biasdpo.records import Side

PREFILL_TOKENS = 256  # a prompt is computed in chunks of this many, which bounds the memory it takes
MEETING_SECONDS = 0.2  # how long a stream waits for the other side of its pair; two threads started together need a few ms

# (tokens of each row, cache, rows) -> logits (rows, V) after each row's last token, float32 on the CPU
Step = Callable[[Sequence[list[int]], Any, Sequence["Row"]], Any]


class CancelledError(Exception):
    """The cancellation was set."""


class Row:
    """One completion under way.

    strength   of the adapter: 0 for the base side
    limit      tokens to draw at most
    """

    def __init__(self, side: Side, strength: float, draw: Draw, limit: int, cancellation: Cancellation) -> None:
        self.side = side
        self.strength = strength
        self.cancellation = cancellation
        self.limit = limit
        self.fetchable: deque[int] = deque()  # drawn, and not fetched by the reader yet
        self.over = False  # nothing more is computed for it
        self.failure = ""  # why its reader gets no more tokens
        self.last = -1  # the token drawn last
        self._draw = draw

    def take(self, logits: Any, ends: frozenset[int]) -> None:
        """Draw the next token from logits (V,)."""
        try:
            self.last = self._draw(logits)
        except BackendError as exc:  # logits that are no numbers: the other row is none the worse
            self.failure, self.over = str(exc), True
            return
        self.fetchable.append(self.last)
        self.limit -= 1
        self.over = self.over or self.limit == 0 or self.last in ends


class Batch:
    """The rows of one prompt. `next_token` may be called from a thread a row."""

    def __init__(self, prompt: Sequence[int], rows: Sequence[Row], step: Step, ends: frozenset[int]) -> None:
        self._prompt: list[int] = list(prompt)  # empty once computed
        self._rows = list(rows)  # as they lie in the cache
        self._step = step
        self._ends = ends
        self._cache: Any = DynamicCache()
        self._changed = threading.Condition()
        self._computing = False  # by one thread at a time

    def next_token(self, row: Row) -> int:
        """The next token of a row: fetched where the other reader has computed it, else computed for both.

        Raises CancelledError, or BackendError where a step failed.
        """
        while True:
            if row.cancellation.is_set():
                raise CancelledError
            with self._changed:
                if row.fetchable:
                    return row.fetchable.popleft()
                if row.failure:
                    raise BackendError(row.failure)
                if self._computing:
                    self._changed.wait()
                    continue
                self._computing = True
            try:
                self._advance()
            except CancelledError:  # inside a step: of all of its rows
                self._end("")
            except BaseException as exc:
                self._end(str(exc) or type(exc).__name__)
                raise
            finally:
                with self._changed:
                    self._computing = False
                    self._changed.notify_all()

    def leave(self, row: Row) -> None:
        """The reader of this row wants no more."""
        with self._changed:
            row.over = True
            if not self._computing and all(other.over for other in self._rows):
                self._cache = None

    def _advance(self) -> None:
        """One token for every row that is left."""
        if self._prompt:
            for begin in range(0, len(self._prompt), PREFILL_TOKENS):
                if not self._keep_those_left():
                    return
                chunk = self._prompt[begin : begin + PREFILL_TOKENS]
                logits = self._step([chunk] * len(self._rows), self._cache, self._rows)
            self._prompt = []
        else:
            if not self._keep_those_left():
                return
            logits = self._step([[row.last] for row in self._rows], self._cache, self._rows)
        for row, row_logits in zip(self._rows, logits, strict=True):
            row.take(row_logits, self._ends)

    def _keep_those_left(self) -> bool:
        """Take the rows out of the cache that nothing more is computed for; whether any is left."""
        left = [i for i, row in enumerate(self._rows) if not row.over and not row.cancellation.is_set()]
        if len(left) < len(self._rows):
            self._rows = [self._rows[i] for i in left]
            if left:
                self._cache.batch_select_indices(torch.tensor(left))
            else:
                self._cache = None
        return bool(left)

    def _end(self, failure: str) -> None:
        """Nothing more comes: a step that broke off leaves a cache that is of no use."""
        for row in self._rows:
            row.over, row.failure = True, failure
        self._rows, self._cache = [], None


class _Seat:
    def __init__(self, prompt: list[int], row: Row) -> None:
        self.prompt = prompt
        self.row = row
        self.batch: Batch | None = None


class Meeting:
    """Where the two sides of a pair find each other: whoever comes first waits a short while for the other."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._seats: list[_Seat] = []

    def batch_of(self, prompt: list[int], row: Row, begin: Callable[[list[Row]], Batch]) -> Batch:
        """The batch that a row is computed in: with the other side's row of the same prompt, base first; alone where none
        comes in time. `begin` makes a batch of rows."""
        with self._changed:
            for seat in self._seats:
                if seat.prompt == prompt and seat.row.side != row.side:
                    self._seats.remove(seat)
                    seat.batch = begin([row, seat.row] if row.side == "base" else [seat.row, row])
                    self._changed.notify_all()
                    return seat.batch
            mine = _Seat(prompt, row)
            self._seats.append(mine)
            self._changed.wait_for(lambda: mine.batch is not None, MEETING_SECONDS)
            if mine.batch is None:
                self._seats.remove(mine)
                mine.batch = begin([row])
            return mine.batch
