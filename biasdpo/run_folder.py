"""A run's folder: the files through which the page, the command line and the training process talk, and nothing else."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from biasdpo.errors import RunError
from biasdpo.workspace import as_json, read_json, replacing, write_json

State = Literal["queued", "running", "stopping", "stopped", "finished", "failed", "interrupted"]
ACTIVE: tuple[State, ...] = ("queued", "running", "stopping")

RESERVE_BYTES = 64 * 1024
MAX_TAIL_BYTES = 256 * 1024
MAX_LINES_BYTES = 64 * 1024 * 1024
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Status:
    """status.json, replaced as a whole.

    pid, pid_created   the process that does the work, and its creation time (seconds since 1970), since pids are reused
    phase              what it does now, for people: "loading the model", "training", …
    step, total_steps  of the optimizer
    eta_seconds        until the last step, None before the first
    error              one line of cause and remedy, "" where all is well
    notes              what the user should know of the data or the machine
    tokens_per_second  of the last steps, all processes together; None before the first
    device             "cpu", or the GPU's name
    best_step          the evaluation with the highest held-out reward accuracy so far, None before the first evaluation
    best_accuracy      its held-out reward accuracy
    waits_for          id of the run that has the device, "" where this one need not wait
    memory_kills       processes that had been killed for want of memory when this one began, by the file that counts them
    """

    state: State
    pid: int = 0
    pid_created: float = 0.0
    phase: str = ""
    step: int = 0
    total_steps: int = 0
    eta_seconds: float | None = None
    error: str = ""
    notes: tuple[str, ...] = ()
    updated_at: str = ""
    tokens_per_second: float | None = None
    device: str = ""
    best_step: int | None = None
    best_accuracy: float | None = None
    waits_for: str = ""
    memory_kills: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFolder:
    """WORKSPACE/runs/ID and the files in it."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def snapshot(self) -> Path:
        return self.path / "dataset.jsonl"

    @property
    def origin(self) -> Path:
        """The data's hash and counts, the command, the code's version: what the config does not say."""
        return self.path / "origin.json"

    @property
    def status_file(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def speed(self) -> Path:
        """Tokens per second, step by step: apart from the metrics, which do not depend on the clock."""
        return self.path / "speed.jsonl"

    @property
    def probes(self) -> Path:
        return self.path / "probes.jsonl"

    @property
    def note(self) -> Path:
        """What the user wrote about the run."""
        return self.path / "note.txt"

    @property
    def best(self) -> Path:
        """The adapter's tensors as they were at the best evaluations: step-N.safetensors."""
        return self.path / "best"

    @property
    def reserve(self) -> Path:
        """Blocks of the disk that are ours already: on a full one, status.json can still say so in them."""
        return self.path / ".reserve"

    @property
    def log(self) -> Path:
        return self.path / "train.log"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def stop_request(self) -> Path:
        """Its presence asks the process to stop."""
        return self.path / "stop"

    def read_status(self) -> Status:
        """status.json as written; `runs.poll` also looks whether the process still lives."""
        values = read_json(self.status_file)
        known = {known_field.name for known_field in fields(Status)}
        numbers = ("pid", "pid_created", "step", "total_steps")
        if (
            not isinstance(values, dict)
            or values.get("state") not in get_args(State)
            or not all(isinstance(values.get(name, 0), int | float) for name in numbers)
        ):
            raise RunError(f"{self.status_file} holds no run status: restore it from a backup, or delete the run's folder")
        clean: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if name in known
        }
        return Status(**clean)

    def write_status(self, status: Status) -> None:
        """Replace status.json; the time of writing is added."""
        write_json(self.status_file, _status_values(status))

    def write_last_status(self, status: Status) -> None:
        """The same, of a process that ends: on a full disk it is written over the reserve, which then takes status.json's place.

        To remove the reserve and write anew would be a race: whoever fills the disk may be first to take the room."""
        try:
            self.write_status(status)
        except OSError:
            if not self.reserve.exists():
                raise
            with self.reserve.open("r+", encoding="utf-8") as file:
                file.write(as_json(_status_values(status)))
                file.truncate()
                os.fsync(file.fileno())
            self.reserve.replace(self.status_file)

    def keep_reserve(self) -> None:
        """Set the reserve aside again. Raises OSError on a full disk."""
        if not self.reserve.exists():
            with replacing(self.reserve) as temporary:
                temporary.write_bytes(bytes(RESERVE_BYTES))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: TRL's keys, and `step`."""
        return _json_lines(self.metrics)

    def read_speed(self) -> list[dict[str, Any]]:
        """The lines of speed.jsonl: `step`, `tokens_per_second`, `seconds` (since the process began to train)."""
        return _json_lines(self.speed)

    def read_probes(self) -> list[dict[str, Any]]:
        """The lines of probes.jsonl: `step`, `prompt`, `category`, `base`, `tuned`; one a prompt and probe."""
        return _json_lines(self.probes)

    def read_note(self) -> str:
        """What the user wrote about the run, "" where nothing."""
        try:
            return self.note.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as exc:
            raise RunError(f"Can't read the note {self.note}: {exc}; write it anew") from exc

    def log_tail(self, lines: int) -> str:
        """The last lines of train.log. What a progress bar wrote over, and control characters, are left out."""
        text = _end_of(self.log, MAX_TAIL_BYTES).decode("utf-8", "replace")
        shown = [line.rpartition("\r")[2] for line in text.rstrip("\r\n").replace("\r\n", "\n").split("\n")]
        printable = ("".join(c for c in _ANSI.sub("", line) if c.isprintable() or c == "\t") for line in shown)
        return "\n".join(list(printable)[-lines:]) if lines > 0 else ""

    def whole_checkpoints(self) -> list[Path]:
        """The checkpoints that can be gone on from, by step. The trainer writes trainer_state.json last; a torn one is none."""
        whole = []
        for file in self.checkpoints.glob("checkpoint-*/trainer_state.json"):
            try:
                json.loads(file.read_text(encoding="utf-8"))["global_step"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            whole.append(file.parent)
        return sorted(whole, key=checkpoint_step)

    def last_checkpoint(self) -> Path | None:
        """The latest whole checkpoint, or None."""
        return next(reversed(self.whole_checkpoints()), None)


def checkpoint_step(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def _status_values(status: Status) -> dict[str, Any]:
    return {**asdict(status), "updated_at": datetime.now(UTC).isoformat(timespec="seconds")}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file that may be being written; half a line is left out, of an endless file the end is read."""
    read = _end_of(path, MAX_LINES_BYTES)
    rows = []
    for line in read.split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except ValueError:  # torn by a crash, or the first of an endless file
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _end_of(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read(size)
    except FileNotFoundError:
        return b""
