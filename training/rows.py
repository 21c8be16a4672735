"""Preference pairs to token ids: the over-long ones counted, and those that no step would see left out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from biasdpo.backends.hf_copy import encode_completion, encode_prompt, encode_text
from biasdpo.dataset import PreferencePair
from biasdpo.run_config import RunConfig
from biasdpo.template import PromptTemplate


@dataclass(frozen=True)
class TokenRow:
    """One pair as token ids. The end-of-text token ends both completions, unless they were cut to `max_length` or it is left
    out."""

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


def tokenise(
    pairs: Sequence[PreferencePair], tokenizer: Any, template: PromptTemplate, max_length: int, ends: str = "trained"
) -> Tokenised:
    """Token ids of each pair, prompt + completion within max_length. `ends`: RunConfig's `end_of_text`."""
    rows, dropped, cut = [], 0, 0
    for pair in pairs:
        prompt = encode_prompt(tokenizer, template, pair.prompt)
        room = max_length - len(prompt)
        if room <= 0:
            dropped += 1
            continue
        chosen, rejected = (
            encode_completion(tokenizer, template, text, ends == "trained") for text in (pair.chosen, pair.rejected)
        )
        cut += len(chosen) > room or len(rejected) > room
        rows.append(TokenRow(prompt, chosen[:room], rejected[:room]))
    return Tokenised(tuple(rows), dropped, cut)


def anchor_texts(pairs: Sequence[PreferencePair], tokenizer: Any, config: RunConfig) -> list[list[int]]:
    """Token ids of the bare texts that text_kl_weight holds the policy to its base on, within max_length; none where it is 0."""
    if not config.text_kl_weight:
        return []
    texts = (encode_text(tokenizer, text)[: config.max_length] for pair in pairs for text in (pair.prompt, pair.chosen))
    return [text for text in texts if text]


def rows_seen(rows: Sequence[TokenRow], config: RunConfig) -> tuple[TokenRow, ...]:
    """The rows that a run's steps reach: all, or where `max_steps` ends it within the first epoch as many as it needs, drawn by
    the seed, in their order. So nothing is computed for rows that no step would see."""
    needed = config.max_steps * config.batch_size * config.gradient_accumulation * config.num_processes
    if not config.max_steps or needed >= len(rows):
        return tuple(rows)
    return tuple(rows[i] for i in sorted(random.Random(config.seed).sample(range(len(rows)), needed)))
