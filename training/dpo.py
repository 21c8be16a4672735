"""One training run, from its folder to its adapter: DPO with LoRA (arXiv:2305.18290, arXiv:2106.09685) by TRL's DPOTrainer.

    accelerate launch --config_file training/accelerate/cpu.yaml -m training WORKSPACE/runs/ID

The folder holds config.json and dataset.jsonl; the run adds status.json, metrics.jsonl, probes.jsonl, checkpoints/, best/ and
adapter/. The reference is the base model, which is the policy with its adapter switched off.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from transformers import PrinterCallback
from trl import DPOConfig

from biasdpo import config as run_config
from biasdpo import counterfactuals, models
from biasdpo.backends.hf_loading import encode_completion, hf_copy, load_base, load_config, load_tokenizer, padding
from biasdpo.config import TrainConfig
from biasdpo.data import splits
from biasdpo.errors import ConfigError, DatasetError, ModelError, plural
from biasdpo.jobs.job import JobFolder
from biasdpo.model_files import weight_files
from biasdpo.models import ModelSpec
from biasdpo.workspace import Workspace, sha256_of
from training import callbacks
from training.finish import bake, held_out_metrics, write_adapter
from training.reference import open_cache
from training.resume import RestoreUnlogged, checkpoint_step, prepare_resume
from training.rows import RunRows, TokenRow, everyday_prompts, tokenize_run
from training.status import StatusWriter, StoppedError
from training.trainer import ExtraTerms, TokenizedDPOTrainer


def train(folder: JobFolder, writer: StatusWriter) -> None:
    """Train a run, from its last checkpoint if there is one. Raises StoppedError if a stop was requested."""
    config = run_config.load_json(folder.config)
    workspace = Workspace(folder.path.parent.parent)
    if config.threads:
        torch.set_num_threads(config.threads)
    on_cpu = trains_on_cpu(config)
    writer.update(phase="reading the data", notes=(), device="cpu" if on_cpu else torch.cuda.get_device_name())
    spec = models.find(config.model)
    origin = check_unchanged(folder, config, spec, writer)
    writer.check_stop()

    snapshot = splits.read_snapshot(folder.path)
    held_out_pairs = snapshot.split.held_out
    writer.update(phase="preparing the model's files")
    model_folder = hf_copy(spec, workspace)
    tokenizer = load_tokenizer(model_folder)
    writer.update(phase="tokenizing")
    rows = tokenize_run(snapshot.epoch(config.seed), held_out_pairs, tokenizer, spec.template, config)
    note_counts(rows, config, writer)
    writer.check_stop()

    writer.update(phase="loading the model")
    model = load_policy(model_folder, config, use_cpu=on_cpu)
    trainer = build_trainer(config, folder, model, tokenizer, rows, writer, use_cpu=on_cpu)
    compute_reference(trainer, workspace, origin["base_sha256"], writer, use_cpu=on_cpu)
    if config.everyday_weight:
        answer_everyday_prompts(trainer, workspace, spec, tokenizer, origin["base_sha256"], writer)

    checkpoint = prepare_resume(folder, writer, config.keep, sharded=config.accelerate == "fsdp")
    trainer.add_callback(RestoreUnlogged(trainer, checkpoint))
    if trainer.eval_dataset is not None:
        trainer.add_callback(callbacks.BestCallback(trainer, writer, config))
    if prompts := origin.get("probe_prompts"):
        trainer.add_callback(callbacks.ProbeCallback(trainer, writer, tokenizer, spec.template, prompts, config.probe_every))
    trainer.add_callback(callbacks.EndCallback(writer, config))
    writer.check_stop()
    run_steps(trainer, checkpoint, writer)

    last_step = trainer.state.global_step
    step, reason = callbacks.choose_step(folder, config, last_step)
    trained = callbacks.adapter_tensors(trainer.model) if step == last_step else callbacks.load_best(folder, step)
    if not writer.is_main:
        return
    writer.note(f"The adapter is that of step {step:,} of {last_step:,}")
    adapter = bake(trained, config)
    if not any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name):
        writer.note("The adapter changes nothing (all of lora_B is 0): raise learning_rate, strength or the number of steps")
    held_out = None
    if not trainer.is_packed:  # under FSDP no process holds the whole model
        writer.note("The held-out pairs are not scored at the end under FSDP: run `python -m biasdpo evaluate`")
    else:
        set_peft_model_state_dict(trainer.model, {name: tensor.float() for name, tensor in adapter.items()})
        writer.update(phase="scoring the held-out pairs", eta_seconds=None)
        held_out = held_out_metrics(trainer, rows.held_out.rows, held_out_pairs, config, writer)
    provenance = {
        "model": spec.id,
        "run_id": folder.id,
        **origin,
        "rows": {"train": len(rows.train.rows), "seen": len(rows.used), "held_out": len(rows.held_out.rows)},
        "kept": {"step": step, "of": last_step, "reason": reason},
        # Without folders of this machine.
        "config": config.to_json() | {"datasets": list(map(splits.public_name, config.datasets))},
        "metrics": {"held_out": held_out},
    }
    write_adapter(folder, trainer.model.peft_config["default"], adapter, spec, provenance)


# What it trains on


def trains_on_cpu(config: TrainConfig) -> bool:
    return config.accelerate == "cpu" or not torch.cuda.is_available()


def check_unchanged(folder: JobFolder, config: TrainConfig, spec: ModelSpec, writer: StatusWriter) -> dict[str, Any]:
    """What was resolved when the run started, with the hashes of what it trains on. An error if one of these changed since."""
    origin = folder.read_record().origin()
    if sha256_of(folder.snapshot) != origin["dataset_sha256"]:
        raise DatasetError(f"{folder.snapshot} was changed after the run was started: start a new run on the data you want")
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
    return origin


def base_sha256(spec: ModelSpec) -> str:
    """SHA-256 of the weights that are trained (see `hf_copy`): of the safetensors file or the GGUF; of several files, of their
    hashes in the order of names."""
    files = weight_files(spec.hf_folder) if spec.hf_folder is not None else [spec.require_files().gguf_path]
    hashes = [sha256_of(file) for file in files if file is not None]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def note_counts(rows: RunRows, config: TrainConfig, writer: StatusWriter) -> None:
    writer.note(f"{plural(len(rows.train.rows), 'pair')} to train on, {len(rows.held_out.rows)} held out")
    if len(rows.used) < len(rows.train.rows):
        writer.note(f"seen in {plural(config.max_steps, 'step')}: {len(rows.used):,} of them")
    for name, tokenized in (("training", rows.train), ("held-out", rows.held_out)):
        if tokenized.dropped or tokenized.cut:
            writer.note(
                f"max_length {config.max_length}: {plural(tokenized.dropped, name + ' pair')} dropped (prompt too long), "
                f"{tokenized.cut} with a completion cut"
            )
        if tokenized.equal:
            writer.note(f"{plural(tokenized.equal, name + ' pair')} dropped: within max_length, both completions are the same")


# The model and its trainer


def load_policy(model_folder: Path, config: TrainConfig, *, use_cpu: bool) -> Any:
    """The base model, in bf16 on a GPU if the run asks for it, else in fp32; without attention dropout, as DPO is without any."""
    dtype = torch.bfloat16 if config.precision == "bf16" and not use_cpu else torch.float32
    return load_base(model_folder, dtype=dtype, config=load_config(model_folder, attention_dropout=0.0))


def build_trainer(
    config: TrainConfig, folder: JobFolder, model: Any, tokenizer: Any, rows: RunRows, writer: StatusWriter, *, use_cpu: bool
) -> TokenizedDPOTrainer:
    """The trainer with this run's settings and a fresh LoRA."""
    every = config.target_modules == ("all-linear",)
    missing = [
        name
        for name in config.target_modules
        if not every and not any(n.split(".")[-1] == name for n, _ in model.named_modules())
    ]
    if missing:
        leaves = sorted({n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"})
        raise ConfigError(f"target_modules {', '.join(missing)}: no such layers in {config.model}; choose of {', '.join(leaves)}")
    evaluates = config.eval_every > 0 and bool(rows.held_out.rows)
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
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=0.0,  # TRL's disable_dropout would zero it anyway
        target_modules="all-linear" if every else list(config.target_modules),
        task_type="CAUSAL_LM",
    )
    terms = ExtraTerms(
        text_kl=config.text_kl_weight,
        counterfactual=config.counterfactual_weight,
        question=config.question_weight,
        everyday=config.everyday_weight,
        ending=config.ending_weight,
        texts=rows.anchors,
        end=rows.end,
    )
    pad = padding(tokenizer, model.get_input_embeddings().num_embeddings)
    if tokenizer.pad_token_id != pad:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    trainer = TokenizedDPOTrainer(
        terms=terms,
        note=writer.note,
        model=model,
        args=arguments,
        train_dataset=_dataset(rows.used),
        eval_dataset=_dataset(rows.held_out.rows) if evaluates else None,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[callbacks.FolderCallback(writer, config.max_minutes)],
    )
    trainer.remove_callback(PrinterCallback)  # `FolderCallback` logs instead
    return trainer


def _dataset(rows: Sequence[TokenRow]) -> Dataset:
    return Dataset.from_list([row.to_trl() for row in rows])


def compute_reference(
    trainer: TokenizedDPOTrainer, workspace: Workspace, base_hash: str, writer: StatusWriter, *, use_cpu: bool
) -> None:
    """Compute the reference's log-probabilities of all rows, or find them in the workspace's cache."""

    def report_progress(done: int, total: int) -> None:
        writer.update(phase=f"{phase} ({done:,} of {plural(total, 'pair')})", share=done / total)
        writer.check_stop()

    phase = "computing reference log-probabilities"
    writer.update(phase=phase)
    cache = open_cache(workspace.cache / "reference", base_hash, "cpu" if use_cpu else "cuda", torch.get_num_threads())
    trainer.use_reference(cache, report_progress)


def answer_everyday_prompts(
    trainer: TokenizedDPOTrainer, workspace: Workspace, spec: ModelSpec, tokenizer: Any, base_hash: str, writer: StatusWriter
) -> None:
    """Let base answer the everyday prompts, or find its answers in the workspace's cache."""

    def report_progress(done: int, total: int) -> None:
        writer.update(phase=f"answering everyday prompts ({done} of {total})")
        writer.check_stop()

    prompts = [tuple(encode_completion(tokenizer, spec.template, prompt, "")[0]) for prompt in everyday_prompts()]
    trainer.use_everyday(prompts, workspace.cache / "everyday" / f"{base_hash[:16]}.json", report_progress)


def run_steps(trainer: TokenizedDPOTrainer, checkpoint: Path | None, writer: StatusWriter) -> None:
    """Train to the last step. A stop saves a checkpoint, then raises StoppedError."""
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except callbacks.EndedEarly:
        pass
    except StoppedError:  # within an evaluation or a probe, after a step that must not be lost
        if trainer.state.global_step > (checkpoint_step(checkpoint) if checkpoint else 0):
            trainer._save_checkpoint(trainer.model, trial=None)
        raise
    if writer.stopping:
        raise StoppedError
