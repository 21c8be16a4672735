"""The training process: a run folder with config.json and dataset.jsonl in, an adapter out. Reads top to bottom.

    accelerate launch --config_file training/accelerate/cpu.yaml -m training.dpo WORKSPACE/runs/ID

`biasdpo.runs.start` makes the folder and starts this; it talks to nobody, and writes status.json, metrics.jsonl, checkpoints/
and adapter/. The method is DPO with LoRA (arXiv:2305.18290, arXiv:2106.09685) by TRL's DPOTrainer; the reference is the
base model, which is the policy with its adapter switched off. Left out, for now: precomputed reference log-probabilities.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from trl import DPOConfig

from biasdpo import dataset, models, rewards, run_config
from biasdpo.backends.hf_copy import encode_text, hf_copy, load_tokenizer
from biasdpo.errors import BiasDPOError, ConfigError, DatasetError
from biasdpo.run_config import RunConfig
from biasdpo.run_folder import RunFolder
from biasdpo.workspace import Workspace, read_json, sha256_of, write_json
from training.callbacks import FolderCallback, StatusWriter, StoppedError, cut_metrics
from training.rows import PairScores, TokenRow, score_base_and_tuned, tokenise
from training.trainer import TokenisedDPOTrainer

DTYPES = {"float16": torch.float16, "float32": torch.float32}


def main(folder: RunFolder) -> int:
    """Train one run to its end; every outcome is written to status.json. Returns the exit status."""
    writer = StatusWriter(folder, is_main=int(os.environ.get("RANK", "0")) == 0)
    try:
        train(folder, writer)
    except StoppedError:
        writer.update(state="stopped", phase="", eta_seconds=None)
        return 0
    except Exception as exc:
        traceback.print_exc()
        writer.update(state="failed", phase="", eta_seconds=None, error=cause_and_remedy(exc))
        return 1
    writer.update(state="finished", phase="", eta_seconds=0.0)
    return 0


def train(folder: RunFolder, writer: StatusWriter) -> None:
    """Everything between the config and the adapter. Raises StoppedError where the run was asked to stop."""
    config = run_config.load_json(folder.config)
    origin = read_json(folder.origin)
    workspace = Workspace(folder.path.parent.parent)
    if config.threads:
        torch.set_num_threads(config.threads)

    # Data: the snapshot, unchanged since the start; split by prompt; tokenised with the model's own template.
    if sha256_of(folder.snapshot) != origin["dataset_sha256"]:
        raise DatasetError(f"{folder.snapshot} was changed after the run was started: start a new run on the data you want")
    writer.update(phase="loading the model", notes=())
    spec = models.find(config.model)
    model_folder = hf_copy(spec, workspace)
    tokenizer = load_tokenizer(model_folder)
    pairs = dataset.split(dataset.load_jsonl(folder.snapshot), config.held_out_share)
    train_rows = tokenise(pairs.train, tokenizer, spec.template, config.max_length)
    held_out_rows = tokenise(pairs.held_out, tokenizer, spec.template, config.max_length)
    if not train_rows.rows:
        raise DatasetError(
            f"No rows to train on: {len(pairs.held_out)} held out, {train_rows.dropped} dropped as too long; add rows, lower "
            "held_out_share or raise max_length"
        )
    writer.note(f"{len(train_rows.rows)} pairs to train on, {len(held_out_rows.rows)} held out")
    for name, tokenised in (("training", train_rows), ("held-out", held_out_rows)):
        if tokenised.dropped or tokenised.cut:
            writer.note(
                f"max_length {config.max_length}: {tokenised.dropped} {name} pairs dropped (prompt too long), {tokenised.cut} "
                "with a completion cut"
            )

    # Model and trainer.
    on_cpu = config.accelerate == "cpu" or not torch.cuda.is_available()
    low_precision = config.precision == "bf16"
    dtype = torch.bfloat16 if low_precision and not on_cpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
    anchor_texts = [encode_text(tokenizer, text) for pair in pairs.train for text in (pair.prompt, pair.chosen)]
    trainer = build_trainer(
        config, folder, model, tokenizer, train_rows.rows, held_out_rows.rows, anchor_texts, writer, use_cpu=on_cpu
    )

    # Train, or go on where the last checkpoint ended.
    checkpoint = folder.last_checkpoint()
    if checkpoint is not None:
        step = int(read_json(checkpoint / "trainer_state.json")["global_step"])
        writer.note(f"resumed after step {step}")
        cut_metrics(folder, step)
    else:
        cut_metrics(folder, 0)
    writer.check_stop()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    writer.check_stop()

    # The adapter as it will be used: its strength baked in, rounded to the type it is saved in. Then measured.
    adapter = bake(trainer.model, config)
    set_peft_model_state_dict(trainer.model, {name: tensor.float() for name, tensor in adapter.items()})
    if not writer.is_main:
        return
    writer.update(phase="scoring the held-out pairs", eta_seconds=None)
    metrics = held_out_metrics(trainer.model, held_out_rows.rows, pairs.held_out, config, writer)
    provenance = {
        "model": spec.id,
        "base_sha256": base_sha256(spec),
        "run_id": folder.id,
        **origin,
        "rows": {"train": len(train_rows.rows), "held_out": len(held_out_rows.rows)},
        "config": public_config(config),
        "metrics": metrics,
    }
    write_adapter(folder, trainer.model.peft_config["default"], adapter, spec, provenance)


def build_trainer(
    config: RunConfig,
    folder: RunFolder,
    model: Any,
    tokenizer: Any,
    train_rows: tuple[TokenRow, ...],
    held_out_rows: tuple[TokenRow, ...],
    anchor_texts: list[list[int]],
    writer: StatusWriter,
    *,
    use_cpu: bool,
) -> TokenisedDPOTrainer:
    """TRL's trainer with this run's settings, and a fresh LoRA."""
    missing = [name for name in config.target_modules if not any(n.split(".")[-1] == name for n, _ in model.named_modules())]
    if missing:
        leaves = sorted({n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"})
        raise ConfigError(f"target_modules {', '.join(missing)}: no such layers in {config.model}; choose of {', '.join(leaves)}")
    evaluates = config.eval_every > 0 and bool(held_out_rows)
    arguments = DPOConfig(
        output_dir=str(folder.checkpoints),
        loss_type=list(config.loss_type),
        loss_weights=list(config.loss_weights) or None,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_share if config.warmup_share < 1 else 0.999999,  # TRL: below 1 it is a share
        max_grad_norm=config.max_grad_norm,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        max_length=config.max_length,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=config.eval_every if evaluates else None,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,  # a NaN loss must be seen
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        seed=config.seed,
        bf16=config.precision == "bf16",
        use_cpu=use_cpu,
        activation_checkpointing=False,
        dataloader_pin_memory=not use_cpu,
        report_to="none",
        disable_tqdm=True,
    )
    return TokenisedDPOTrainer(
        text_kl_weight=config.text_kl_weight,
        anchor_texts=[text for text in anchor_texts if text],
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([row.as_trl() for row in train_rows]),
        eval_dataset=Dataset.from_list([row.as_trl() for row in held_out_rows]) if evaluates else None,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=0.0,  # TRL's disable_dropout would zero it anyway
            target_modules=list(config.target_modules),
            task_type="CAUSAL_LM",
        ),
        callbacks=[FolderCallback(writer)],
    )


def bake(model: Any, config: RunConfig) -> dict[str, torch.Tensor]:
    """The adapter's tensors as they are saved: lora_B times `strength`, in `adapter_dtype`."""
    state = get_peft_model_state_dict(model)
    dtype = DTYPES[config.adapter_dtype]
    return {
        name: (tensor.detach().float() * (config.strength if "lora_B" in name else 1.0)).to(dtype).cpu().contiguous()
        for name, tensor in state.items()
    }


def held_out_metrics(
    model: Any, rows: tuple[TokenRow, ...], pairs: tuple[dataset.PreferencePair, ...], config: RunConfig, writer: StatusWriter
) -> dict[str, Any]:
    """What the adapter changed on the held-out pairs. Nats; see `biasdpo.rewards`. None where nothing was held out."""
    if not rows:
        return {"held_out": None}

    def progress(done: int) -> None:
        writer.update(phase=f"scoring the held-out pairs ({done} of {len(rows)})")
        writer.check_stop()

    base, tuned = score_base_and_tuned(model, rows, batch_size=config.batch_size, on_batch=progress)
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
    """Write adapter/ whole or not at all: weights, config, provenance. No pickle, and no path of this machine."""
    unfinished = folder.path / ".adapter"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    lora.base_model_name_or_path = spec.hub_id or spec.title
    lora.inference_mode = True
    lora.save_pretrained(unfinished)
    save_file(tensors, unfinished / "adapter_model.safetensors", metadata={"format": "pt"})
    (unfinished / "adapter_model.safetensors").chmod(0o644)  # safetensors makes it private
    write_json(unfinished / "provenance.json", provenance)
    shutil.rmtree(folder.adapter, ignore_errors=True)
    unfinished.rename(folder.adapter)


def public_config(config: RunConfig) -> dict[str, Any]:
    """The config without folders of this machine: of a path, the file's name stays."""
    values = config.to_json()
    values["datasets"] = [name if name.startswith(dataset.HUB) else Path(name).name for name in config.datasets]
    return values


def base_sha256(spec: models.ModelSpec) -> str:
    """SHA-256 of the base weights: of the GGUF, else of the safetensors, whose hashes are hashed in their names' order."""
    if spec.gguf_path is not None:
        return sha256_of(spec.gguf_path)
    import hashlib

    assert spec.hf_folder is not None
    files = sorted(spec.hf_folder.glob("*.safetensors"))
    if len(files) == 1:
        return sha256_of(files[0])
    return hashlib.sha256("".join(sha256_of(file) for file in files).encode()).hexdigest()


def cause_and_remedy(exc: BaseException) -> str:
    """One line for status.json."""
    if isinstance(exc, BiasDPOError):
        return str(exc)
    if isinstance(exc, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(exc):
        return "Out of memory: lower batch_size (and raise gradient_accumulation as much) or max_length, and start again"
    if isinstance(exc, OSError) and exc.errno == errno.ENOSPC:
        return "The disk is full: free some space, then resume the run; its checkpoints are kept"
    first_line = (str(exc).strip() or type(exc).__name__).split("\n")[0]
    return f"{type(exc).__name__}: {first_line[:300]}; the whole story is in the run's train.log"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: accelerate launch -m training.dpo WORKSPACE/runs/ID")
    sys.exit(main(RunFolder(Path(sys.argv[1]).resolve())))
