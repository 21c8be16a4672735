"""The end of a run: the adapter as it will be used, what it changed on the held-out pairs, and its folder."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from biasdpo import model_card, models, rewards
from biasdpo.backends.hf_loading import encode_completion, encode_prompt, encode_text
from biasdpo.chat import PromptTemplate
from biasdpo.config import TrainConfig
from biasdpo.data.pairs import PreferencePair, longer_baseline
from biasdpo.jobs.job import JobFolder
from biasdpo.workspace import sha256_of, write_json
from training.callbacks import StatusWriter
from training.packing import Branches, kl_of_tokens, pack, score_tokens

# --- rows: Preference pairs to token ids: the over-long ones counted, and those that no step would see lef


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
    """Token ids of each pair, prompt + completion within max_length. `ends`: TrainConfig's `end_of_text`."""
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


def anchor_texts(pairs: Sequence[PreferencePair], tokenizer: Any, config: TrainConfig) -> list[list[int]]:
    """Token ids of the bare texts that text_kl_weight holds the policy to its base on, within max_length; none where it is 0."""
    if not config.text_kl_weight:
        return []
    texts = (encode_text(tokenizer, text)[: config.max_length] for pair in pairs for text in (pair.prompt, pair.chosen))
    return [text for text in texts if text]


def rows_seen(rows: Sequence[TokenRow], config: TrainConfig) -> tuple[TokenRow, ...]:
    """The rows that a run's steps reach: all, or where `max_steps` ends it within the first epoch as many as it needs, drawn by
    the seed, in their order. So nothing is computed for rows that no step would see."""
    needed = config.max_steps * config.batch_size * config.gradient_accumulation * config.num_processes
    if not config.max_steps or needed >= len(rows):
        return tuple(rows)
    return tuple(rows[i] for i in sorted(random.Random(config.seed).sample(range(len(rows)), needed)))


# --- scoring: A model without and with its adapter, on preference pairs: log-probabilities of the completions


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


# --- finish: The end of a run: the adapter as it will be used, what it changed on the held-out pairs, and it


DTYPES = {"float16": torch.float16, "float32": torch.float32}


def bake(state: dict[str, torch.Tensor], config: TrainConfig) -> dict[str, torch.Tensor]:
    """The adapter's tensors as they are saved: lora_B times `strength`, in `adapter_dtype`."""
    dtype = DTYPES[config.adapter_dtype]
    return {
        name: (tensor.float() * (config.strength if "lora_B" in name else 1.0)).to(dtype).contiguous()
        for name, tensor in state.items()
    }


def held_out_metrics(
    trainer: Any, rows: tuple[TokenRow, ...], pairs: tuple[PreferencePair, ...], config: TrainConfig, writer: StatusWriter
) -> dict[str, Any]:
    """What the adapter changed on the held-out pairs. Nats; see `biasdpo.rewards`. None where nothing was held out."""
    if not rows:
        return {"held_out": None}

    def progress(done: int) -> None:
        writer.update(phase=f"scoring the held-out pairs ({done} of {len(rows)})")
        writer.check_stop_alone()

    base, tuned = score_base_and_tuned(
        trainer.model, rows, is_packed=trainer.is_packed, batch_size=config.batch_size, on_batch=progress
    )
    margins = rewards.reward_margin(tuned.chosen_logps, tuned.rejected_logps, base.chosen_logps, base.rejected_logps, config.beta)

    def normalised_accuracy(scores: PairScores) -> float:
        return rewards.length_normalised_accuracy(
            scores.chosen_logps, scores.rejected_logps, scores.chosen_lengths, scores.rejected_lengths
        )

    held_out = {
        "pairs": len(rows),
        "reward_accuracy": rewards.reward_accuracy(margins),
        "reward_accuracy_of_picking_the_longer": longer_baseline(pairs),
        "reward_margin_nats": float(margins.mean()),
        "logratio_margin_nats": float(margins.mean() / config.beta),
        "length_normalised_accuracy_base": normalised_accuracy(base),
        "length_normalised_accuracy_tuned": normalised_accuracy(tuned),
        "kl_base_to_tuned_nats_per_token": tuned.kl,
    }
    return {"held_out": held_out}


def write_adapter(
    folder: JobFolder, lora: Any, tensors: dict[str, torch.Tensor], spec: models.ModelSpec, provenance: dict[str, Any]
) -> None:
    """Write adapter/ whole or not at all: weights, config, provenance, card. No pickle, and no path of this machine."""
    unfinished = folder.path / ".adapter"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    lora.base_model_name_or_path = spec.hub_id or spec.title
    lora.inference_mode = True
    lora.save_pretrained(unfinished)
    save_file(tensors, unfinished / "adapter_model.safetensors", metadata={"format": "pt"})
    (unfinished / "adapter_model.safetensors").chmod(0o644)  # safetensors makes it private
    write_json(unfinished / "provenance.json", provenance)
    model_card.write_card(unfinished, spec, provenance, folder.read_metrics())
    shutil.rmtree(folder.adapter, ignore_errors=True)
    unfinished.rename(folder.adapter)


def base_sha256(spec: models.ModelSpec) -> str:
    """SHA-256 of the base weights: of the GGUF, else of the safetensors, whose hashes are hashed in their names' order."""
    if spec.gguf_path is not None:
        return sha256_of(spec.gguf_path)
    assert spec.hf_folder is not None
    files = sorted(spec.hf_folder.glob("*.safetensors"))
    if len(files) == 1:
        return sha256_of(files[0])
    return hashlib.sha256("".join(sha256_of(file) for file in files).encode()).hexdigest()
