"""A model without and with its adapter, on preference pairs: log-probabilities of the completions, and how far apart the two are.

In the weights' own precision, even where training used autocast: its rounding is as large as a gentle run's margins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training.packing import Branches, pack
from training.projection import kl_of_tokens, score_tokens
from training.rows import TokenRow

Completions = tuple[list[float], list[float], list[float]]
"""Of a batch of N pairs: log-probabilities (2N,) without and with the adapter, chosen and rejected in turn, and KL(base || tuned)
summed over the tokens of each chosen completion (N,); nats."""


@dataclass(frozen=True)
class PairScores:
    """One model's log-probabilities (N,), nats, summed over each completion, and the completions' token counts (N,).

    kl   KL(base || this model), nats, mean over the chosen completions' tokens; None where base was not computed beside
    """

    chosen_logps: NDArray[np.float64]
    rejected_logps: NDArray[np.float64]
    chosen_lengths: NDArray[np.float64]
    rejected_lengths: NDArray[np.float64]
    kl: float | None = None


def score_base_and_tuned(
    model: Any, rows: Sequence[TokenRow], *, is_packed: bool, batch_size: int, on_batch: Callable[[int], None]
) -> tuple[PairScores, PairScores]:
    """Score rows under a PeftModel without and with its adapter. `on_batch` is told how many pairs are done.

    is_packed   whether the base model was given `add_packed_forward`: the prompt is computed once, nothing is padded
    """
    n = len(rows)
    logps = np.zeros((2, 2, n))  # side, completion, pair
    lengths = np.array([[len(r.chosen_ids) for r in rows], [len(r.rejected_ids) for r in rows]], dtype=np.float64)
    kl_sum, done = 0.0, 0
    compute = _packed if is_packed else _padded
    was_training = model.training
    model.eval()
    # Neighbours of like length share a batch: less padding. Results go back by index.
    order = sorted(range(n), key=lambda i: len(rows[i].prompt_ids) + max(len(rows[i].chosen_ids), len(rows[i].rejected_ids)))
    for indices in _chunks(order, batch_size):
        with torch.inference_mode():
            base, tuned, kl = compute(model, [rows[i] for i in indices])
        logps[0][:, indices] = np.reshape(base, (-1, 2)).T
        logps[1][:, indices] = np.reshape(tuned, (-1, 2)).T
        kl_sum += sum(kl)
        done += len(indices)
        on_batch(done)
    model.train(was_training)
    mean_kl = kl_sum / lengths[0].sum() if n else None
    return (
        PairScores(logps[0][0], logps[0][1], lengths[0], lengths[1]),
        PairScores(logps[1][0], logps[1][1], lengths[0], lengths[1], mean_kl),
    )


def _packed(model: Any, batch: Sequence[TokenRow]) -> Completions:
    pairs = [Branches(tuple(row.prompt_ids), (tuple(row.chosen_ids), tuple(row.rejected_ids))) for row in batch]
    packing = pack(pairs, next(model.parameters()).device)
    head = model.get_base_model().get_output_embeddings()
    lengths = [len(completion) for pair in pairs for completion in pair.completions]
    with model.disable_adapter():
        base = model(packing=packing)[0, packing.sources]
    tuned = model(packing=packing)[0, packing.sources]
    base_logps, tuned_logps = (
        [part.sum().item() for part in torch.split(score_tokens(hidden, head, packing.targets).logps, lengths)]
        for hidden in (base, tuned)
    )
    chosen = torch.cat([torch.full((length,), i % 2 == 0) for i, length in enumerate(lengths)]).to(base.device)
    kl = torch.split(kl_of_tokens(base[chosen], tuned[chosen], head), lengths[::2])
    return base_logps, tuned_logps, [part.sum().item() for part in kl]


def _padded(model: Any, batch: Sequence[TokenRow]) -> Completions:
    device = next(model.parameters()).device
    completions = [(row.prompt_ids, ids) for row in batch for ids in (row.chosen_ids, row.rejected_ids)]
    with model.disable_adapter():
        base = _completion_log_softmax(model, completions, device)
    tuned = _completion_log_softmax(model, completions, device)
    targets = [torch.tensor(ids, device=device)[:, None] for _prompt, ids in completions]
    base_logps, tuned_logps = (
        [p.gather(1, target).sum().item() for p, target in zip(side, targets, strict=True)] for side in (base, tuned)
    )
    return base_logps, tuned_logps, [(p.exp() * (p - q)).sum().item() for p, q in zip(base[::2], tuned[::2], strict=True)]


def _completion_log_softmax(model: Any, batch: Sequence[tuple[list[int], list[int]]], device: Any) -> list[Any]:
    """Log-probabilities (len(completion), V) in float32 of every completion's positions."""
    width = max(len(prompt) + len(completion) for prompt, completion in batch)
    ids = torch.zeros((len(batch), width), dtype=torch.long)
    mask = torch.zeros((len(batch), width), dtype=torch.long)
    for i, (prompt, completion) in enumerate(batch):
        row = prompt + completion
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    # The decoder alone, then the vocabulary projection on completion positions: prompts need no logits.
    base_model = model.get_base_model()
    hidden = base_model.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).last_hidden_state
    return [
        base_model.lm_head(hidden[i, len(prompt) - 1 : len(prompt) + len(completion) - 1]).float().log_softmax(-1)
        for i, (prompt, completion) in enumerate(batch)
    ]


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
