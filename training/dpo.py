"""The training process: a run folder with config.json and dataset.jsonl in, an adapter out. Reads top to bottom.

    accelerate launch --config_file training/accelerate/cpu.yaml -m training WORKSPACE/runs/ID

`biasdpo.jobs.store` makes the folder and starts this; it talks to nobody, and writes status.json, metrics.jsonl, probes.jsonl,
checkpoints/, best/ and adapter/. The method is DPO with LoRA (arXiv:2305.18290, arXiv:2106.09685) by TRL's DPOTrainer; the
reference is the base model, which is the policy with its adapter switched off.
"""

from __future__ import annotations

import shutil
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from transformers import AutoModelForCausalLM
from trl import DPOConfig

from biasdpo import config as run_config
from biasdpo import counterfactuals, models
from biasdpo.backends.hf_loading import hf_copy, load_tokenizer
from biasdpo.config import TrainConfig
from biasdpo.data import splits
from biasdpo.errors import ConfigError, DatasetError, ModelError
from biasdpo.jobs.job import JobFolder, checkpoint_step
from biasdpo.workspace import Workspace, sha256_of
from training import callbacks
from training.callbacks import FolderCallback, ProbeCallback, StatusWriter, StoppedError, WindowCallback, cut_after
from training.finish import TokenRow, anchor_texts, bake, base_sha256, held_out_metrics, rows_seen, tokenise, write_adapter
from training.trainer import ReferenceCache, TokenisedDPOTrainer, open_cache


def train(folder: JobFolder, writer: StatusWriter) -> None:
    """Everything between the config and the adapter. Raises StoppedError where the run was asked to stop."""
    config = run_config.load_json(folder.config)
    origin = folder.read_record().origin()
    workspace = Workspace(folder.path.parent.parent)
    if config.threads:
        torch.set_num_threads(config.threads)
    on_cpu = config.accelerate == "cpu" or not torch.cuda.is_available()
    writer.update(phase="reading the data", notes=(), device="cpu" if on_cpu else torch.cuda.get_device_name())

    # What the run was started on, unchanged since: the snapshot of the data, and the base model.
    if sha256_of(folder.snapshot) != origin["dataset_sha256"]:
        raise DatasetError(f"{folder.snapshot} was changed after the run was started: start a new run on the data you want")
    spec = models.find(config.model)
    base = base_sha256(spec)
    if origin.setdefault("base_sha256", base) != base:
        raise ModelError(
            f"The base model {spec.title} was changed after the run was started: restore its files, or start a new run"
        )
    if config.counterfactual_weight or config.question_weight:
        templates = sha256_of(counterfactuals.FILE)
        if origin.setdefault("counterfactuals_sha256", templates) != templates:
            raise DatasetError(f"{counterfactuals.FILE} was changed after the run was started: restore it, or start a new run")
    if writer.is_main:
        folder.add_hashes({name: origin[name] for name in ("base_sha256", "counterfactuals_sha256") if name in origin})
    writer.check_stop()

    # Data: split by prompt; each training pair as often as its weight says; tokenised with the model's own template.
    snapshot = splits.read_snapshot(folder.path)
    pairs, train_pairs = snapshot.split, snapshot.epoch(config.seed)
    writer.update(phase="preparing the model's files")
    model_folder = hf_copy(spec, workspace)
    tokenizer = load_tokenizer(model_folder)
    writer.update(phase="tokenising")
    train_rows = tokenise(train_pairs, tokenizer, spec.template, config.max_length, config.end_of_text)
    held_out_rows = tokenise(pairs.held_out, tokenizer, spec.template, config.max_length, config.end_of_text)
    if not train_rows.rows:
        raise DatasetError(
            f"No rows to train on: {len(pairs.held_out)} held out, {train_rows.dropped} dropped as too long; add rows, lower "
            "held_out_share or raise max_length"
        )
    writer.note(f"{len(train_rows.rows)} pairs to train on, {len(held_out_rows.rows)} held out")
    seen = rows_seen(train_rows.rows, config)
    if len(seen) < len(train_rows.rows):
        writer.note(f"{config.max_steps} steps see {len(seen)} of them")
    for name, tokenised in (("training", train_rows), ("held-out", held_out_rows)):
        if tokenised.dropped or tokenised.cut:
            writer.note(
                f"max_length {config.max_length}: {tokenised.dropped} {name} pairs dropped (prompt too long), {tokenised.cut} "
                "with a completion cut"
            )
    writer.check_stop()

    # Model and trainer.
    writer.update(phase="loading the model")
    model = load_policy(model_folder, config, use_cpu=on_cpu)
    anchors = anchor_texts(train_pairs, tokenizer, config)
    reference = open_cache(workspace.cache / "reference", base, "cpu" if on_cpu else "cuda", torch.get_num_threads())
    trainer = build_trainer(
        config, folder, model, tokenizer, seen, held_out_rows.rows, anchors, writer, use_cpu=on_cpu, reference=reference
    )
    checkpoint = folder.last_checkpoint()
    trainer.add_callback(WindowCallback(trainer, checkpoint))
    if trainer.eval_dataset is not None:
        trainer.add_callback(callbacks.BestCallback(trainer, writer, config))
    if origin.get("probe_prompts"):
        prompts = origin["probe_prompts"]
        trainer.add_callback(ProbeCallback(trainer, writer, tokenizer, spec.template, prompts, config.probe_every))
    trainer.add_callback(callbacks.EndCallback(writer, config))  # after those that make up for what a stop left out

    # Train, or go on where the last checkpoint ended.
    resume_from(checkpoint, folder, trainer, writer)
    writer.check_stop()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except callbacks.EndedEarly:
        pass
    except StoppedError:
        # In an evaluation: the step before it is not to be lost.
        if trainer.state.global_step > (checkpoint_step(checkpoint) if checkpoint else 0):
            trainer._save_checkpoint(trainer.model, trial=None)
        raise
    if writer.stops:
        raise StoppedError

    # The chosen step's adapter as it will be used: its strength baked in, rounded to the type it is saved in. Then measured.
    last_step = trainer.state.global_step
    step, reason = callbacks.choice(folder, config, last_step)
    trained = callbacks.adapter_tensors(trainer.model) if step == last_step else callbacks.load_tensors(folder, step)
    adapter = bake(trained, config)
    if not writer.is_main:
        return
    writer.note(f"The adapter is that of {reason}")
    if trainer.is_fsdp_enabled:  # no process holds the whole model
        metrics: dict[str, Any] = {"held_out": None}
        writer.note("The held-out pairs are not scored at the end under FSDP: run `python -m biasdpo evaluate`")
    else:
        set_peft_model_state_dict(trainer.model, {name: tensor.float() for name, tensor in adapter.items()})
        writer.update(phase="scoring the held-out pairs", eta_seconds=None)
        metrics = held_out_metrics(trainer, held_out_rows.rows, pairs.held_out, config, writer)
    provenance = {
        "model": spec.id,
        "run_id": folder.id,
        **origin,
        "rows": {"train": len(train_rows.rows), "seen": len(seen), "held_out": len(held_out_rows.rows)},
        "kept": {"step": step, "of": last_step, "reason": reason},
        "config": public_config(config),
        "metrics": metrics,
    }
    write_adapter(folder, trainer.model.peft_config["default"], adapter, spec, provenance)


def load_policy(model_folder: Any, config: TrainConfig, *, use_cpu: bool) -> Any:
    """The base model's weights: in bf16 on a GPU where the run asks for it, else in fp32."""
    dtype = torch.bfloat16 if config.precision == "bf16" and not use_cpu else torch.float32
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)


def resume_from(checkpoint: Any, folder: JobFolder, trainer: Any, writer: StatusWriter) -> None:
    """Take back what was written past the checkpoint (past the start, where there is none)."""
    step = checkpoint_step(checkpoint) if checkpoint else 0
    if writer.is_main:
        cut_after(folder, step)
        for torn in set(folder.checkpoints.glob("checkpoint-*")) - set(folder.whole_checkpoints()):
            shutil.rmtree(torn)
        callbacks.prune(folder)
    if checkpoint:
        writer.note(f"resumed after step {step}")
    tokens = [row["num_tokens"] for row in folder.read_metrics() if "num_tokens" in row and row["step"] <= step]
    trainer._total_train_tokens = tokens[-1] if tokens else 0  # TRL counts them anew, and logs them
    chosen = callbacks.best_of([evaluation for evaluation in callbacks.evaluations(folder) if evaluation.step <= step])
    if chosen is not None:
        writer.update(best_step=chosen.step, best_accuracy=chosen.accuracy)


def public_config(config: TrainConfig) -> dict[str, Any]:
    """The config without folders of this machine: of a path, the file's name stays."""
    return config.to_json() | {"datasets": list(map(splits.public_name, config.datasets))}


def build_trainer(
    config: TrainConfig,
    folder: JobFolder,
    model: Any,
    tokenizer: Any,
    train_rows: tuple[TokenRow, ...],
    held_out_rows: tuple[TokenRow, ...],
    anchors: list[list[int]],
    writer: StatusWriter,
    *,
    use_cpu: bool,
    reference: ReferenceCache | None = None,
) -> TokenisedDPOTrainer:
    """The trainer with this run's settings, a fresh LoRA, and the reference's log-probabilities of all rows.

    reference   where these are kept; they are computed here if they are not there. None: they are computed in every step
    """
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
    trainer = TokenisedDPOTrainer(
        text_kl_weight=config.text_kl_weight,
        anchor_texts=anchors,
        counterfactual_weight=config.counterfactual_weight,
        question_weight=config.question_weight,
        ending_weight=config.ending_weight,
        note=writer.note,
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

    def on_reference(done: int, total: int) -> None:
        writer.update(phase=f"computing the reference ({done} of {total} pairs)")
        writer.check_stop()

    if reference is not None:
        trainer.use_reference(reference, on_reference)
    return trainer
