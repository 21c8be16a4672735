"""Preference pairs to token ids, the over-long ones counted, and scored by a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from biasdpo.backends.hf_copy import encode_completion, encode_prompt
from biasdpo.dataset import PreferencePair
from biasdpo.template import PromptTemplate


@dataclass(frozen=True)
class TokenRow:
    """One pair as token ids. The end-of-text token ends both completions, unless they were cut to `max_length`."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    def as_trl(self) -> dict[str, list[int]]:
        return {"prompt_ids": self.prompt_ids, "chosen_ids": self.chosen_ids, "rejected_ids": self.rejected_ids}


@dataclass(frozen=True)
class Tokenised:
    """`dropped`: pairs whose prompt alone fills max_length; `cut`: pairs with a completion that was cut to it."""

    rows: tuple[TokenRow, ...]
    dropped: int
    cut: int


def tokenise(pairs: Sequence[PreferencePair], tokenizer: Any, template: PromptTemplate, max_length: int) -> Tokenised:
    """Token ids of each pair, prompt + completion within max_length."""
    rows, dropped, cut = [], 0, 0
    for pair in pairs:
        prompt = encode_prompt(tokenizer, template, pair.prompt)
        room = max_length - len(prompt)
        if room <= 0:
            dropped += 1
            continue
        chosen, rejected = (encode_completion(tokenizer, template, text, True) for text in (pair.chosen, pair.rejected))
        cut += len(chosen) > room or len(rejected) > room
        rows.append(TokenRow(prompt, chosen[:room], rejected[:room]))
    return Tokenised(tuple(rows), dropped, cut)


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
    model: Any, rows: Sequence[TokenRow], *, batch_size: int, on_batch: Callable[[int], None]
) -> tuple[PairScores, PairScores]:
    """Score rows under a PeftModel without and with its adapter. `on_batch` is told how many pairs are done.

    In the weights' own precision, even where training used autocast: its rounding is as large as a gentle run's margins.
    """
    n = len(rows)
    logps = {side: np.zeros((2, n)) for side in ("base", "tuned")}
    lengths = np.array([[len(r.chosen_ids) for r in rows], [len(r.rejected_ids) for r in rows]], dtype=np.float64)
    kl_sum = 0.0
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    # Neighbours of like length share a batch: less padding. Results go back by index.
    order = sorted(range(n), key=lambda i: len(rows[i].prompt_ids) + max(len(rows[i].chosen_ids), len(rows[i].rejected_ids)))
    done = 0
    for indices in _chunks(order, batch_size):
        for side_row, completions in enumerate(("chosen_ids", "rejected_ids")):
            batch = [(rows[i].prompt_ids, getattr(rows[i], completions)) for i in indices]
            with torch.inference_mode():
                with model.disable_adapter():
                    base = _completion_log_softmax(model, batch, device)
                tuned = _completion_log_softmax(model, batch, device)
            for i, (_, ids), p, q in zip(indices, batch, base, tuned, strict=True):
                targets = torch.tensor(ids, device=device)[:, None]
                logps["base"][side_row, i] = p.gather(1, targets).sum().item()
                logps["tuned"][side_row, i] = q.gather(1, targets).sum().item()
                if side_row == 0:
                    kl_sum += (p.exp() * (p - q)).sum().item()
        done += len(indices)
        on_batch(done)
    model.train(was_training)
    kl = kl_sum / lengths[0].sum() if n else None
    return (
        PairScores(logps["base"][0], logps["base"][1], lengths[0], lengths[1]),
        PairScores(logps["tuned"][0], logps["tuned"][1], lengths[0], lengths[1], kl),
    )


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
