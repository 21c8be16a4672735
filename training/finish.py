"""The end of a run: the adapter as it will be used, what it changed on the held-out pairs, and its folder."""

from __future__ import annotations

import hashlib
import shutil
from typing import Any

import torch
from safetensors.torch import save_file

from biasdpo import dataset, models, rewards, run_card
from biasdpo.run_config import RunConfig
from biasdpo.run_folder import RunFolder
from biasdpo.workspace import sha256_of, write_json
from training.rows import TokenRow
from training.scoring import PairScores, score_base_and_tuned
from training.status import StatusWriter

DTYPES = {"float16": torch.float16, "float32": torch.float32}


def bake(state: dict[str, torch.Tensor], config: RunConfig) -> dict[str, torch.Tensor]:
    """The adapter's tensors as they are saved: lora_B times `strength`, in `adapter_dtype`."""
    dtype = DTYPES[config.adapter_dtype]
    return {
        name: (tensor.float() * (config.strength if "lora_B" in name else 1.0)).to(dtype).contiguous()
        for name, tensor in state.items()
    }


def held_out_metrics(
    trainer: Any, rows: tuple[TokenRow, ...], pairs: tuple[dataset.PreferencePair, ...], config: RunConfig, writer: StatusWriter
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
        "reward_accuracy_of_picking_the_longer": dataset.longer_baseline(pairs),
        "reward_margin_nats": float(margins.mean()),
        "logratio_margin_nats": float(margins.mean() / config.beta),
        "length_normalised_accuracy_base": normalised_accuracy(base),
        "length_normalised_accuracy_tuned": normalised_accuracy(tuned),
        "kl_base_to_tuned_nats_per_token": tuned.kl,
    }
    return {"held_out": held_out}


def write_adapter(
    folder: RunFolder, lora: Any, tensors: dict[str, torch.Tensor], spec: models.ModelSpec, provenance: dict[str, Any]
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
    run_card.write(unfinished, spec, provenance, folder.read_metrics())
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
