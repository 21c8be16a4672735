"""What the training process writes into its run folder step by step: metrics.jsonl, speed.jsonl, status.json."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from biasdpo.errors import RunError
from biasdpo.run_folder import RunFolder
from biasdpo.workspace import replacing
from training.status import StatusWriter

# What depends on the clock, and is no metric of the run.
CLOCK_KEYS = ("runtime", "samples_per_second", "steps_per_second", "jit_compilation_time")


class FolderCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    """Keeps the run folder up to date, and ends the training where a stop is asked for."""

    def __init__(self, writer: StatusWriter) -> None:
        self.writer = writer
        self.started_at = 0.0
        self.started_step = 0
        self.step_began_at = 0.0
        self.step_seconds = 0.0  # of the steps since the last line of speed.jsonl, without what is done between them
        self.tokens: float | None = None

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        self.started_at, self.started_step = time.monotonic(), state.global_step
        self.writer.update(phase="training", step=state.global_step, total_steps=state.max_steps, eta_seconds=None)

    def on_step_begin(self, _args: Any, _state: Any, _control: Any, **_kwargs: Any) -> None:
        self.writer.stay()
        self.step_began_at = time.monotonic()

    def on_step_end(self, _args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        now = time.monotonic()
        self.step_seconds += now - self.step_began_at
        done = state.global_step - self.started_step
        eta = round((now - self.started_at) / max(done, 1) * (state.max_steps - state.global_step), 1)
        self.writer.update(phase="training", step=state.global_step, total_steps=state.max_steps, eta_seconds=eta)
        if state.global_step >= state.max_steps:
            control.should_save = True  # whatever save_steps: a stop or a fault while it is scored is not to lose the training
        if self.writer.stop_requested():
            control.should_training_stop = True
            control.should_save = True
            control.should_evaluate = False  # a resumed run makes up for it

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, Any] | None = None, **_kwargs: Any) -> None:
        if logs is None or not ("loss" in logs or "eval_loss" in logs):
            return  # the closing summary: run times, which differ from run to run
        for key, name in (("loss", "loss"), ("grad_norm", "gradient of the loss"), ("eval_loss", "held-out loss")):
            # A gradient that is no number makes the weights none: no checkpoint may be saved after it.
            if not math.isfinite(float(logs.get(key, 0.0))):
                raise RunError(
                    f"The {name} became {logs[key]} at step {state.global_step}: start a new run with a lower "
                    "learning_rate, or with precision fp32; the checkpoints before it are kept"
                )
        if not self.writer.is_main:
            return
        folder = self.writer.folder
        append_json(folder.metrics, {"step": state.global_step, **without_clock(logs)})
        if "loss" in logs:
            self._log_speed(state.global_step, logs.get("num_tokens"))

    def _log_speed(self, step: int, tokens: float | None) -> None:
        """`tokens`: seen so far, all processes together."""
        if tokens is not None and self.tokens is not None and self.step_seconds > 0:
            speed = round((tokens - self.tokens) / self.step_seconds, 1)
            seconds = round(time.monotonic() - self.started_at, 2)
            append_json(self.writer.folder.speed, {"step": step, "tokens_per_second": speed, "seconds": seconds})
            self.writer.update(tokens_per_second=speed)
        self.tokens, self.step_seconds = tokens, 0.0


def without_clock(logs: dict[str, Any]) -> dict[str, Any]:
    """A line's metrics, without how long they took."""
    return {key: value for key, value in logs.items() if not key.endswith(CLOCK_KEYS)}


def append_json(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def cut_after(folder: RunFolder, step: int) -> None:
    """Drop what was written past `step`, which a resumed run writes again: of metrics, speed and probes."""
    for path, rows in (
        (folder.metrics, folder.read_metrics()),
        (folder.speed, folder.read_speed()),
        (folder.probes, folder.read_probes()),
    ):
        if path.is_file():
            with replacing(path) as temporary:
                kept = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows if row["step"] <= step)
                temporary.write_text("".join(kept), encoding="utf-8")
