"""The model of a transformers backend, one computation at a time: whoever computes says how much of the adapter each row uses."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from biasdpo.backends.base import Cancellation, missing_side
from biasdpo.backends.hf_adapter import Adapter, load_adapter
from biasdpo.backends.hf_batch import CancelledError
from biasdpo.backends.hf_device import Bits, Placement
from biasdpo.backends.hf_faults import foreign_errors
from biasdpo.backends.hf_load import load_model, undispatched

_Result = TypeVar("_Result")


class _Watch:
    """A hook on every decoder layer, so that a cancel is seen within one layer, however long the prompt's chunk takes."""

    cancellations: Sequence[Cancellation] = ()  # of all that wait for this step

    def __call__(self, _layer: Any, _args: Any) -> None:
        if self.cancellations and all(cancellation.is_set() for cancellation in self.cancellations):
            raise CancelledError


class SharedModel:
    """One copy of the weights, and at most one adapter, for all threads.

    The adapter's switch and scale are global to the model: they are set under the lock, for one computation, and taken back
    before the lock is released. (PEFT's `disable_adapter()` beside a concurrent call gives wrong output.)
    """

    def __init__(self, folder: Path, placement: Placement, bits: Bits | None, report: Callable[[float, str], None]) -> None:
        self._lock = threading.Lock()  # around every computation
        self._watch = _Watch()
        self._adapter: Adapter | None = None
        self.model: Any  # None once closed
        self.model, self.placement = load_model(folder, placement, bits, report)
        self.device = self.placement.device
        for layer in self.model.model.layers:
            layer.register_forward_pre_hook(self._watch)

    def add_adapter(self, folder: Path, *, mix_rows: bool) -> None:
        """Load a PEFT adapter; AdapterError where it does not fit. mix_rows: a batch's rows may differ in strength."""
        with self._lock, undispatched(self.model, self.placement):
            self._adapter = load_adapter(self.model, folder)
            if mix_rows:
                self._adapter.mix_rows()

    def forward(
        self,
        tokens: Sequence[list[int]],
        cache: Any,
        strengths: Sequence[float],
        cancellations: Sequence[Cancellation] = (),
        positions: int = 1,
    ) -> Any:
        """Logits (rows, positions, V), float32 on the CPU, at the last positions of `tokens` (rows, T), which join the cache.

        strengths   of the adapter, one a row: 0 for base
        Raises CancelledError where all the cancellations are set.
        """
        ids = torch.tensor(tokens, device=self.device)
        with self._computing(strengths, cancellations) as model:
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=positions).logits
            return logits.float().cpu()

    def compute(self, strength: float, computation: Callable[[Any, torch.device], _Result]) -> _Result:
        """What `computation` makes of the model and its device, the adapter at `strength` for all rows."""
        with self._computing([strength]) as model:
            return computation(model, self.device)

    def close(self) -> None:
        """Free the weights, once the computation under way is done."""
        with self._lock:
            self.model = self._adapter = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def _computing(self, strengths: Sequence[float], cancellations: Sequence[Cancellation] = ()) -> Iterator[Any]:
        """The model, for this thread alone, its adapter at these strengths (see `Adapter.active`). Nothing of that is left when
        the block ends."""
        with self._lock, foreign_errors(), torch.inference_mode():
            if self.model is None:
                raise missing_side("base", closed=True)
            self._watch.cancellations = cancellations
            try:
                if self._adapter is None:
                    yield self.model
                else:
                    with self._adapter.active(strengths):
                        yield self.model
            finally:
                self._watch.cancellations = ()
