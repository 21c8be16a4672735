"""From hidden states to log-probabilities, and texts of like length into batches: the likelihoods of the transformers backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_LOGIT_ROWS = 256  # positions whose logits over the whole vocabulary are held at a time


def logits_of(head: Any, hidden: Any, _scored: list[int]) -> NDArray[np.float32]:
    """Logits (T, V) of hidden states (T, H)."""
    logits: NDArray[np.float32] = head(hidden).float().cpu().numpy()
    return logits


def logp_of(head: Any, hidden: Any, scored: list[int]) -> float:
    """Log-probability of the scored tokens (T), summed, nats, from hidden states (T, H)."""
    total = 0.0
    for begin in range(0, len(scored), _LOGIT_ROWS):
        targets = torch.tensor(scored[begin : begin + _LOGIT_ROWS], device=hidden.device)[:, None]
        logits = head(hidden[begin : begin + _LOGIT_ROWS]).double()
        total += float(logits.log_softmax(-1).gather(1, targets).sum())
    return total


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices in batches of like length, each of at most `tokens` padded tokens (one row at least), longest first."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
