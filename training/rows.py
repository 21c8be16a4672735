"""Preference pairs as token ids: what is too long is counted, what no step would reach is left out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from biasdpo.backends.hf_loading import encode_completion, encode_text, end_of_completion
from biasdpo.chat import PromptTemplate
from biasdpo.config import TrainConfig
from biasdpo.data.pairs import PreferencePair, looks_alike
from biasdpo.errors import DatasetError
from biasdpo.workspace import ASSETS

EVERYDAY_PROMPTS = ASSETS / "everyday_prompts.txt"


@dataclass(frozen=True)
class TokenRow:
    """One pair as token ids. The end of a completion ends both, unless they were truncated or the config leaves it out."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def tokens(self) -> int:
        """The prompt's tokens once, and both completions'."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)

    def to_trl(self) -> dict[str, list[int]]:
        return {"prompt_ids": self.prompt_ids, "chosen_ids": self.chosen_ids, "rejected_ids": self.rejected_ids}


@dataclass(frozen=True)
class Tokenized:
    """Counted pairs.

    dropped   whose prompt alone fills max_length
    equal     dropped, since both completions look alike or are, truncated, the same tokens: they teach nothing
    cut       with a completion that was truncated to max_length
    """

    rows: tuple[TokenRow, ...]
    dropped: int
    equal: int
    cut: int


@dataclass(frozen=True)
class RunRows:
    """A run's rows.

    train     all training rows
    used      the training rows that the run's steps reach
    anchors   token ids of the plain texts for the text KL
    end       the token that ends a completion
    """

    train: Tokenized
    held_out: Tokenized
    used: tuple[TokenRow, ...]
    anchors: list[list[int]]
    end: int


def tokenize_run(
    train: Sequence[PreferencePair],
    held_out: Sequence[PreferencePair],
    tokenizer: Any,
    template: PromptTemplate,
    config: TrainConfig,
) -> RunRows:
    """The rows of an epoch and the held-out rows. Raises DatasetError if nothing is left to train on."""
    train_rows, held_out_rows = (
        tokenize(pairs, tokenizer, template, config.max_length, config.end_of_text) for pairs in (train, held_out)
    )
    if not train_rows.rows:
        raise DatasetError(
            f"No rows to train on: {len(held_out)} held out, {train_rows.dropped} dropped as too long, {train_rows.equal} "
            f"with equal completions within max_length {config.max_length}; add rows, lower held_out_share or raise max_length"
        )
    used = rows_used(train_rows.rows, config)
    config.check_warmup(len(used))
    end = end_of_completion(tokenizer, template)
    return RunRows(train_rows, held_out_rows, used, anchor_texts(train, tokenizer, config), end)


def tokenize(
    pairs: Sequence[PreferencePair], tokenizer: Any, template: PromptTemplate, max_length: int, ends: str = "trained"
) -> Tokenized:
    """Token ids of each pair, prompt + completion within max_length. `ends`: the config's `end_of_text`."""
    rows, dropped, equal, cut = [], 0, 0, 0
    end = [end_of_completion(tokenizer, template)] if ends == "trained" else []
    for pair in pairs:
        (prompt, chosen), (_, rejected) = (
            encode_completion(tokenizer, template, pair.prompt, text) for text in (pair.chosen, pair.rejected)
        )
        room = max_length - len(prompt)
        if room <= 0:
            dropped += 1
            continue
        chosen, rejected = [*chosen, *end], [*rejected, *end]
        if chosen[:room] == rejected[:room] or looks_alike(pair.chosen, pair.rejected):
            equal += 1
            continue
        cut += len(chosen) > room or len(rejected) > room
        rows.append(TokenRow(prompt, chosen[:room], rejected[:room]))
    return Tokenized(tuple(rows), dropped, equal, cut)


def rows_used(rows: Sequence[TokenRow], config: TrainConfig) -> tuple[TokenRow, ...]:
    """The rows that a run's steps reach: if `max_steps` ends it within the first epoch, as many as it needs, drawn by the seed,
    in their order. So no reference is computed for rows that no step would see."""
    needed = config.max_steps * config.batch_size * config.gradient_accumulation * config.num_processes
    if not config.max_steps or needed >= len(rows):
        return tuple(rows)
    return tuple(rows[i] for i in sorted(random.Random(config.seed).sample(range(len(rows)), needed)))


def everyday_prompts() -> list[str]:
    """The built-in prompts of the everyday KL."""
    return [line for line in EVERYDAY_PROMPTS.read_text(encoding="utf-8").splitlines() if line]


def anchor_texts(pairs: Sequence[PreferencePair], tokenizer: Any, config: TrainConfig) -> list[list[int]]:
    """Token ids of the plain texts of the text KL, within max_length; none if its weight is 0."""
    if not config.text_kl_weight:
        return []
    texts = (encode_text(tokenizer, text)[: config.max_length] for pair in pairs for text in (pair.prompt, pair.chosen))
    return [text for text in texts if text]
