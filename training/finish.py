"""The end of a run: the adapter as it will be used, what it changed on the held-out pairs, and its folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from biasdpo import model_card, models, rewards
from biasdpo.config import TrainConfig
from biasdpo.data.pairs import PreferencePair, longer_baseline
from biasdpo.jobs.job import JobFolder
from biasdpo.workspace import sha256_of, write_json
from training.packing import Branches, kl_of_tokens, pack, score_tokens
from training.rows import TokenRow
from training.status import StatusWriter


def bake(tensors: dict[str, torch.Tensor], config: TrainConfig) -> dict[str, torch.Tensor]:
    """The adapter's tensors as they are saved: lora_B times `strength`, in `adapter_dtype`."""
    dtype = getattr(torch, config.adapter_dtype)
    return {
        name: (tensor.float() * (config.strength if "lora_B" in name else 1.0)).to(dtype).contiguous()
        for name, tensor in tensors.items()
    }


def held_out_metrics(
    trainer: Any, rows: Sequence[TokenRow], pairs: Sequence[PreferencePair], config: TrainConfig, writer: StatusWriter
) -> dict[str, Any] | None:
    """What the adapter changed on the held-out pairs, in nats (see `biasdpo.rewards`); None if nothing was held out."""
    if not rows:
        return None

    def report_progress(done: int) -> None:
        writer.update(phase=f"scoring the held-out pairs ({done} of {len(rows)})")
        writer.check_stop_alone()

    scores = score_base_and_tuned(trainer.model, rows, batch_size=config.batch_size, on_batch=report_progress)
    (base_chosen, base_rejected), (tuned_chosen, tuned_rejected) = scores.base, scores.tuned
    margins = rewards.reward_margin(tuned_chosen, tuned_rejected, base_chosen, base_rejected, config.beta)
    by_length = rewards.length_normalised_accuracy
    return {
        "pairs": len(rows),
        "reward_accuracy": rewards.reward_accuracy(margins, config.beta),
        "reward_accuracy_of_picking_the_longer": longer_baseline(pairs),
        "reward_margin_nats": float(margins.mean()),
        "logratio_margin_nats": float(margins.mean() / config.beta),
        "length_normalised_accuracy_base": by_length(base_chosen, base_rejected, *scores.lengths),
        "length_normalised_accuracy_tuned": by_length(tuned_chosen, tuned_rejected, *scores.lengths),
        "kl_base_to_tuned_nats_per_token": scores.kl,
    }


@dataclass(frozen=True)
class PairScores:
    """Scores of N pairs, without and with the adapter.

    base, tuned   (2, N) log-probabilities summed over the tokens of chosen and rejected, nats
    lengths       (2, N) these tokens' counts
    kl            KL(base || tuned), nats, mean over the tokens of the chosen completions
    """

    base: NDArray[np.float64]
    tuned: NDArray[np.float64]
    lengths: NDArray[np.float64]
    kl: float


def score_base_and_tuned(model: Any, rows: Sequence[TokenRow], *, batch_size: int, on_batch: Callable[[int], None]) -> PairScores:
    """Score N > 0 rows under a PeftModel with `add_packed_forward`, without and with its adapter. `on_batch` gets the number of
    pairs done."""
    logps = np.zeros((2, 2, len(rows)))  # side, completion, pair
    lengths = np.array([[len(ids) for ids in _completions(row)] for row in rows], dtype=np.float64).T
    head = model.get_base_model().get_output_embeddings()
    kl_sum = 0.0
    was_training = model.training
    model.eval()
    # Pairs of similar length share a batch; results go back by index.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt_ids) + max(map(len, _completions(rows[i]))))
    for start in range(0, len(rows), batch_size):
        indices = order[start : start + batch_size]
        batch = [rows[i] for i in indices]
        pairs = [Branches(tuple(row.prompt_ids), (tuple(row.chosen_ids), tuple(row.rejected_ids))) for row in batch]
        packing = pack(pairs, model.device)
        sizes = [len(ids) for row in batch for ids in _completions(row)]
        is_chosen = torch.tensor([i % 2 == 0 for i, size in enumerate(sizes) for _ in range(size)], device=model.device)
        with torch.inference_mode():
            with model.disable_adapter():
                base = model(packing=packing)[0, packing.sources]
            tuned = model(packing=packing)[0, packing.sources]
            for side, hidden in enumerate((base, tuned)):
                sums = [part.sum().item() for part in torch.split(score_tokens(hidden, head, packing.targets).logps, sizes)]
                logps[side][:, indices] = np.reshape(sums, (-1, 2)).T
            kl = kl_of_tokens(base[is_chosen], tuned[is_chosen], head)
            kl_sum += sum(part.sum().item() for part in torch.split(kl, sizes[::2]))
        on_batch(start + len(indices))
    model.train(was_training)
    return PairScores(logps[0], logps[1], lengths, kl_sum / lengths[0].sum())


def _completions(row: TokenRow) -> tuple[list[int], list[int]]:
    return row.chosen_ids, row.rejected_ids


def write_adapter(
    folder: JobFolder, lora: Any, tensors: dict[str, torch.Tensor], spec: models.ModelSpec, provenance: dict[str, Any]
) -> None:
    """Write adapter/ atomically: weights, config, provenance, card. No pickle, and no path of this machine."""
    unfinished = folder.path / ".adapter"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    lora.base_model_name_or_path = spec.hub_id or spec.title
    lora.inference_mode = True
    lora.save_pretrained(unfinished)
    weights = unfinished / "adapter_model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors makes it private
    write_json(unfinished / "provenance.json", provenance | {"adapter_sha256": sha256_of(weights)})
    model_card.write_card(unfinished, spec, provenance, folder.read_metrics())
    shutil.rmtree(folder.adapter, ignore_errors=True)
    unfinished.rename(folder.adapter)
