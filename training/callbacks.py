"""What the training process writes into its run folder while it trains: metrics.jsonl, status.json, and the stop request."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import replace
from typing import Any

import psutil
from transformers import TrainerCallback

from biasdpo.errors import RunError
from biasdpo.run_folder import RunFolder, Status


class StoppedError(Exception):
    """The run was asked to stop while it was not in the training loop."""


class StatusWriter:
    """status.json, written by the main process alone."""

    def __init__(self, folder: RunFolder, *, is_main: bool) -> None:
        self.folder = folder
        self.is_main = is_main
        process = psutil.Process()
        self.status = Status("running", pid=os.getpid(), pid_created=process.create_time())

    def update(self, **changes: Any) -> None:
        self.status = replace(self.status, **changes)
        if self.is_main:
            self.folder.write_status(self.status)

    def note(self, text: str) -> None:
        """Tell the user something, in the log and in the status."""
        if self.is_main:
            print(text, flush=True)
        self.update(notes=(*self.status.notes, text))

    def check_stop(self) -> None:
        """Raise StoppedError where a stop was asked for."""
        if self.folder.stop_request.exists():
            raise StoppedError


class FolderCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    """Keeps the run folder up to date, step by step."""

    def __init__(self, writer: StatusWriter) -> None:
        self.writer = writer
        self.started_at = 0.0
        self.started_step = 0

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        self.started_at, self.started_step = time.monotonic(), state.global_step
        self.writer.update(phase="training", step=state.global_step, total_steps=state.max_steps, eta_seconds=None)

    def on_step_end(self, _args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        done = state.global_step - self.started_step
        seconds_per_step = (time.monotonic() - self.started_at) / max(done, 1)
        eta = round(seconds_per_step * (state.max_steps - state.global_step), 1)
        self.writer.update(step=state.global_step, total_steps=state.max_steps, eta_seconds=eta)
        if self.writer.folder.stop_request.exists():
            control.should_training_stop = True
            control.should_save = True

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, Any] | None = None, **_kwargs: Any) -> None:
        if logs is None or not ("loss" in logs or "eval_loss" in logs):
            return  # the closing summary: run times, which differ from run to run
        loss = logs.get("loss", logs.get("eval_loss", 0.0))
        if not math.isfinite(float(loss)):
            raise RunError(
                f"The loss became {loss} at step {state.global_step}: lower learning_rate, or set precision to fp32, and resume"
            )
        if self.writer.is_main:
            with self.writer.folder.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def cut_metrics(folder: RunFolder, step: int) -> None:
    """Drop the lines of metrics.jsonl past `step`: a resumed run writes them again."""
    kept = [row for row in folder.read_metrics() if row["step"] <= step]
    if folder.metrics.is_file():
        folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
