"""Resuming a run exactly: finds the last intact checkpoint, rolls the run's files back to it, restores the unlogged steps."""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import TrainerCallback

from biasdpo.jobs.job import JobFolder
from biasdpo.workspace import read_json, replacing, write_json
from training.callbacks import best_evaluation, load_best, metrics_line, prune_best, read_evaluations
from training.status import StatusWriter

logger = logging.getLogger(__name__)

UNLOGGED = "window.json"
STATE = "trainer_state.json"  # written last
# Without its optimizer or scheduler the Trainer would start them anew, and say nothing.
_REQUIRED = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", UNLOGGED)
UNFINISHED = "unfinished"


def checkpoint_step(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def prepare_resume(folder: JobFolder, writer: StatusWriter, keep: str, *, sharded: bool = False) -> Path | None:
    """The last intact checkpoint, with the run's files rolled back to it; None to start from the beginning.

    Damaged checkpoints are deleted and named in a note. `sharded`: FSDP, which saves optimizer states of its own.
    """
    checkpoint = None
    for path in sorted(folder.checkpoints.glob("checkpoint-*"), key=checkpoint_step, reverse=True):
        fault = checkpoint_fault(path, sharded=sharded)
        if not fault:
            checkpoint = checkpoint or path
        elif writer.is_main:
            if fault != UNFINISHED:
                writer.note(f"{path.name} is damaged ({fault}) and was deleted")
            shutil.rmtree(path)
    if writer.is_main:
        roll_back(folder, checkpoint)
        prune_best(folder)
    if checkpoint is None:
        return None
    writer.note(f"resumed after step {checkpoint_step(checkpoint)}")
    best = best_evaluation(read_evaluations(folder, checkpoint_step(checkpoint)))
    if best is not None:
        writer.update(best_step=best.step, best_accuracy=best.accuracy)
        if keep == "best":
            load_best(folder, best.step)  # raises now rather than after the training
    return checkpoint


def checkpoint_fault(checkpoint: Path, *, sharded: bool = False) -> str:
    """Why a checkpoint can't be resumed from, "" if it can. Reads every file: torch's are zip archives with checksums."""
    if not (checkpoint / STATE).is_file():
        return UNFINISHED  # the process was killed while it saved
    missing = [name for name in _REQUIRED if not (checkpoint / name).is_file()]
    if missing and not sharded:
        return f"{', '.join(missing)} missing"
    for file in list(checkpoint.glob("*")):
        try:
            if file.suffix == ".json":
                content = json.loads(file.read_text(encoding="utf-8"))
                if file.name == STATE and content["global_step"] != checkpoint_step(checkpoint):
                    return f"{file.name} is of step {content['global_step']}"
            elif file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass
            elif file.suffix in (".pt", ".pth", ".bin"):
                with zipfile.ZipFile(file) as archive:
                    if damaged := archive.testzip():
                        return f"{file.name}: {damaged} has a wrong checksum"
        except Exception as exc:  # safetensors has an error of its own
            return f"{file.name}: {str(exc).splitlines()[0] if str(exc) else type(exc).__name__}"
    return ""


def roll_back(folder: JobFolder, checkpoint: Path | None) -> None:
    """Drop what was written after the checkpoint, which the resumed run writes again.

    The metrics are those of the checkpoint's own history, so damage to metrics.jsonl is repaired.
    """
    step = checkpoint_step(checkpoint) if checkpoint else 0
    history = read_json(checkpoint / STATE)["log_history"] if checkpoint else []
    lines = {folder.metrics: [line for logs in history if (line := metrics_line(logs["step"], logs))]}
    for path in (folder.speed, folder.probes):
        lines[path] = [row for row in _intact_rows(path) if row["step"] <= step]
    for path, rows in lines.items():
        if path.is_file() or rows:
            with replacing(path) as temporary:
                temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _intact_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; damaged ones are logged. The last may have been truncated by a kill."""
    rows, damaged = [], 0
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
            int(row["step"])
            rows.append(row)
        except (ValueError, TypeError, KeyError, RecursionError):
            damaged += 1
    if damaged:
        logger.warning("%s: %d damaged lines dropped", path.name, damaged)
    return rows


def save_unlogged(trainer: Any, checkpoint: Path) -> None:
    """Write what the next log line will average over the steps before this checkpoint. Called by every process, since their
    losses are averaged as the log line would."""
    loss = trainer.accelerator.gather(trainer._tr_loss.detach().reshape(1)).mean().item()
    if trainer.args.should_save:
        unlogged = {
            "loss": loss,  # summed over the steps
            "logged_at_step": trainer._globalstep_last_logged,
            "tokens": trainer._total_train_tokens,  # since the run's start; TRL would count them anew
            "metrics": trainer._metrics["train"],
        }
        write_json(checkpoint / UNLOGGED, unlogged)


class RestoreUnlogged(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Gives a resumed trainer the unlogged steps back, so that it logs as an uninterrupted one. Must be the first callback that
    may log."""

    def __init__(self, trainer: Any, checkpoint: Path | None) -> None:
        self.trainer = trainer
        self.file = checkpoint / UNLOGGED if checkpoint else None

    def on_train_begin(self, _args: Any, _state: Any, _control: Any, **_kwargs: Any) -> None:
        if self.file is None:
            return
        unlogged = read_json(self.file)
        self.trainer._tr_loss += torch.tensor(unlogged["loss"], device=self.trainer._tr_loss.device)  # 0.0 until here
        self.trainer._globalstep_last_logged = unlogged["logged_at_step"]
        self.trainer._total_train_tokens = unlogged["tokens"]
        self.trainer._metrics["train"].update(unlogged["metrics"])
