"""Logits -> the next token, by transformers' own processors."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from biasdpo.errors import BackendError
from biasdpo.records import Sampling


class Draw:
    """Draws one token after another, in the order that `records.Sampling` states.

    On the CPU, whatever the device of the model, so that a seed means the same everywhere.
    """

    def __init__(self, sampling: Sampling, prompt: list[int]) -> None:
        self._tokens = list(prompt)
        self._greedy = sampling.temperature == 0.0
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._processors = LogitsProcessorList()
        if sampling.repetition_penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if not self._greedy:
            self._processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k > 0:
                self._processors.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1.0:
                self._processors.append(TopPLogitsWarper(float(sampling.top_p)))

    def __call__(self, logits: Any) -> int:
        """The next token after logits (V,)."""
        if not bool(torch.isfinite(logits).all()):
            raise BackendError("The model gave logits that are not numbers: lower the strength, or choose another adapter")
        scores = self._processors(torch.tensor([self._tokens]), logits[None])
        chosen = scores.argmax(-1) if self._greedy else torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
        token = int(chosen.item())
        self._tokens.append(token)
        return token
