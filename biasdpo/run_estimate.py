"""What a run will take in time and memory: measured by a process of its own (training/estimate.py), and remembered."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from biasdpo import data, detached, models, run_queue
from biasdpo.config import TrainConfig
from biasdpo.errors import BiasDPOError, RunError
from biasdpo.models import ModelSpec
from biasdpo.workspace import Workspace, read_json, refuse_on_public_space, write_json

FORMAT = 1  # of a remembered estimate; raise it where training's cost changes


@dataclass(frozen=True)
class Estimate:
    """What a run will take, from steps that were measured on its own median and longest rows.

    steps              of the optimizer
    pairs_train        rows that an epoch sees; pairs_held_out, dropped, cut: counts after tokenising
    tokens_per_epoch   prompt, chosen and rejected completion of every training row
    seconds_per_step   of a step of mean length
    seconds_total      loading, reference pass, steps, evaluations, probes, scoring; without early stopping
    memory_bytes       at the peak, all processes of this machine; on a GPU its memory
    memory_free_bytes  when it was measured
    refusal            why it can't fit, one line with a remedy; "" where it fits
    parts              seconds by what takes them: loading, reference, training, evaluations, probes, scoring
    """

    steps: int
    pairs_train: int
    pairs_held_out: int
    dropped: int
    cut: int
    tokens_per_epoch: int
    seconds_per_step: float
    seconds_total: float
    memory_bytes: int
    memory_free_bytes: int
    fits: bool
    refusal: str
    device: str
    measured_at: str
    parts: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The object of `train --estimate --json`."""
        return asdict(self)


def estimate(config: TrainConfig, workspace: Workspace, *, cancelled: Callable[[], bool] = lambda: False) -> Estimate:
    """Measure what a run will take (or remember it). Raises what `start` would raise, RunError where it fails or is cancelled."""
    refuse_on_public_space("Training")
    remembered = known_estimate(config, workspace)
    if remembered is not None:
        return remembered
    spec = models.find(config.model)
    refuse_weights_that_can_not_fit(config, spec)
    folder = workspace.cache / "estimates"
    folder.mkdir(parents=True, exist_ok=True)
    device = device_of(config)
    shared = bool(run_queue.holders(workspace, device))
    with tempfile.TemporaryDirectory(prefix=".measuring-", dir=folder) as scratch:
        request, answer, log = Path(scratch) / "config.json", Path(scratch) / "estimate.json", folder / "last.log"
        write_json(request, config.to_json())
        command = [sys.executable, "-m", "training.estimate", str(request), str(answer), str(workspace.root)]
        status = detached.run_until(command, log, cancelled, environment(threads_of(config)))
        if status is None:
            raise RunError("The estimate was cancelled: ask for it again")
        if not answer.is_file():
            raise RunError(_why_it_ended(status, log.read_text(encoding="utf-8", errors="replace")))
        values = read_json(answer)
    if "error" in values:
        raise RunError(values["error"])
    found = Estimate(**values)
    if shared or run_queue.holders(workspace, device):  # a run took of the device's time and memory meanwhile
        return found
    write_json(_remembered_at(config, workspace), found.to_json())
    return found


def known_estimate(config: TrainConfig, workspace: Workspace) -> Estimate | None:
    """The estimate that was measured for such a run of this model, these data, on this machine; None where none was."""
    with suppress(BiasDPOError, OSError, TypeError):
        path = _remembered_at(config, workspace)
        return Estimate(**read_json(path)) if path.is_file() else None
    return None


def refuse_what_can_not_fit(config: TrainConfig, spec: ModelSpec, workspace: Workspace) -> None:
    """Raise RunError where the weights alone, or a remembered estimate, exceed the memory that is free now. Measures nothing.

    Nothing is refused while another run has the device: this one would wait for it, and what is free then nobody knows.
    """
    if run_queue.holders(workspace, device_of(config)):
        return
    refuse_weights_that_can_not_fit(config, spec)
    remembered = known_estimate(config, workspace)
    if remembered is not None:
        refusal = refusal_of(remembered.memory_bytes, free_memory_bytes(device_of(config)), remembered.device)
        if refusal:
            raise RunError(refusal)


def refuse_weights_that_can_not_fit(config: TrainConfig, spec: ModelSpec) -> None:
    """Raise RunError where the frozen weights alone exceed the memory that is free."""
    device = device_of(config)
    bytes_each = 2 if device == "gpu" and config.precision == "bf16" else 4
    copies = config.num_processes if device == "cpu" and config.accelerate != "fsdp" else 1
    needed, free = spec.parameters * bytes_each * copies, free_memory_bytes(device)
    if needed > free:
        each = f", {copies} times" if copies > 1 else ""
        raise RunError(
            f"{spec.title} can't be trained here: its weights alone take {needed / 1e9:.1f} GB ({bytes_each} bytes each{each}), "
            f"{free / 1e9:.1f} GB of {'GPU ' if device == 'gpu' else ''}memory are free; choose a smaller model, or free memory"
        )


def refusal_of(memory_bytes: int, free_bytes: int, device: str) -> str:
    """Why a run of this peak can't fit, one line with the remedy; "" where it fits."""
    if memory_bytes <= free_bytes:
        return ""
    return (
        f"The run needs {memory_bytes / 1e9:.1f} GB of memory at its peak on {device}, {free_bytes / 1e9:.1f} GB are free: lower "
        "batch_size (and raise gradient_accumulation as much) or max_length, choose a smaller model, or free memory"
    )


# What it depends on


def device_of(config: TrainConfig) -> str:
    """Where a run would train: "gpu" or "cpu". One run at a time on each."""
    return "gpu" if config.accelerate != "cpu" and models.free_gpu_memory_gb() > 0 else "cpu"


def threads_of(config: TrainConfig) -> int:
    """CPU threads of each training process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return config.threads or max(1, cores // config.num_processes)


def environment(threads: int) -> dict[str, str]:
    """The environment of a training process."""
    return {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads)}


def free_memory_bytes(device: str) -> int:
    """Memory that a new process can have: on a GPU its free memory, else the machine's, within its control group's limit."""
    if device == "gpu":
        return int(models.free_gpu_memory_gb() * 1e9)
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # "max": no limit
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        cached = next(
            int(x.split()[1]) for x in (group / "memory.stat").read_text().split("\n") if x.startswith("inactive_file ")
        )
        free = min(free, limit - used + cached)
    return free


def _remembered_at(config: TrainConfig, workspace: Workspace) -> Path:
    spec = models.find(config.model)
    files = [spec.gguf_path] if spec.hf_folder is None else sorted(spec.hf_folder.glob("*.safetensors"))
    key = {
        "format": FORMAT,
        "config": config.cost_settings(),
        "data": [_identity_of_source(source, workspace) for source in config.datasets],
        "model": [_identity(file) for file in files if file is not None],
        "machine": [platform.node(), platform.machine(), os.cpu_count(), device_of(config), threads_of(config)],
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return workspace.cache / "estimates" / f"{digest[:24]}.json"


def _identity_of_source(source: str, workspace: Workspace) -> list[Any]:
    if source.startswith(data.HUB):
        return [source]
    return _identity(workspace.preferences if source == data.WORKSPACE else Path(source).expanduser())


def _identity(file: Path) -> list[Any]:
    state = file.stat()
    return [str(file.resolve()), state.st_size, state.st_mtime_ns]


def _why_it_ended(status: int, log: str) -> str:
    if status == -9:
        return (
            "The estimate was killed, as it is where memory runs out: lower batch_size or max_length, or choose a smaller model"
        )
    last = next((line.strip() for line in reversed(log.split("\n")) if line.strip()), "without a word")
    return f"The estimate failed: {last[:300]}; mend that, then ask for it again"
