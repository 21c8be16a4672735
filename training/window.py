"""The steps since the last log line, kept with each checkpoint: a run stopped between two log lines logs as one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from biasdpo.workspace import read_json, write_json

FILE = "window.json"


def save_window(trainer: Any, checkpoint: Path) -> None:
    """Write checkpoint/window.json, by every process: their losses are averaged, as the log line would average them."""
    loss = trainer.accelerator.gather(trainer._tr_loss.detach().reshape(1)).mean().item()
    if trainer.args.should_save:
        window = {
            "loss": loss,  # summed over the steps
            "logged_at_step": trainer._globalstep_last_logged,
            "tokens": trainer._total_train_tokens,  # since the run's start; TRL would count them anew
            "metrics": trainer._metrics["train"],
        }
        write_json(checkpoint / FILE, window)


class WindowCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    """Gives a resumed trainer the window of its checkpoint back. Checkpoints of earlier versions hold none."""

    def __init__(self, trainer: Any, checkpoint: Path | None) -> None:
        self.trainer = trainer
        self.checkpoint = checkpoint

    def on_train_begin(self, _args: Any, _state: Any, _control: Any, **_kwargs: Any) -> None:
        if self.checkpoint is None or not (self.checkpoint / FILE).is_file():
            return
        window = read_json(self.checkpoint / FILE)
        self.trainer._tr_loss += torch.tensor(window["loss"], device=self.trainer._tr_loss.device)  # 0.0 until here
        self.trainer._globalstep_last_logged = window["logged_at_step"]
        self.trainer._total_train_tokens = window["tokens"]
        self.trainer._metrics["train"].update(window["metrics"])
