"""The time and memory of a job, measured by a process of its own and remembered in WORKSPACE/cache/.

Training: time and memory of a run, by `python -m training.estimate`, in cache/estimates/KEY.json. Evaluation: seconds per item of
each benchmark, by `python -m biasdpo.jobs.estimate`, in cache/evaluation_speeds/KEY.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from biasdpo import models
from biasdpo.access import require_owner
from biasdpo.backends import choose_backend
from biasdpo.config import EvaluationConfig, TrainConfig
from biasdpo.data import importing, splits
from biasdpo.errors import BiasDPOError, EvaluationError, RunError
from biasdpo.jobs.job import ROOT, last_error
from biasdpo.jobs.memory import request_memory
from biasdpo.jobs.resolve import absolute, device_of_training, parts, resolve_evaluation, threads_of, training_environment
from biasdpo.jobs.worker import build_benchmarks, jobs_on
from biasdpo.model_files import weight_files
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.workspace import Workspace, read_json, write_json

if TYPE_CHECKING:
    from biasdpo.benchmarks.base import Benchmark
    from biasdpo.engines import Engine

FORMAT = 2  # of a remembered estimate; raise it where the cost of training changes
_SPEED_FORMAT = 1  # the same for scoring
_POLL_SECONDS = 0.1


# A training run


@dataclass(frozen=True)
class Estimate:
    """Time and memory of a run, from steps measured on its own median and longest rows.

    steps              of the optimizer
    pairs_train        rows that an epoch sees; pairs_held_out, dropped, equal, cut: as in `training.rows.Tokenized`
    tokens_per_epoch   prompt, chosen and rejected completion of every training row
    seconds_per_step   of a step of mean length
    seconds_total      loading, reference pass, steps, evaluations, probes, scoring; without early stopping
    memory_bytes       at the peak, all processes of this machine; on a GPU its memory
    memory_free_bytes  when it was measured
    refusal            why it can't fit, one line with a remedy; "" where it fits
    parts              seconds by activity: loading, reference, training, evaluations, probes, scoring
    """

    steps: int
    pairs_train: int
    pairs_held_out: int
    dropped: int
    equal: int
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


def estimate_training(config: TrainConfig, workspace: Workspace, *, cancelled: Callable[[], bool] = lambda: False) -> Estimate:
    """Measure what a run will take, unless it is known. Raises what `start_training` would, RunError where it fails or is
    cancelled."""
    require_owner("Training")
    config = absolute(config)
    remembered = known_estimate(config, workspace)
    if remembered is not None:
        return remembered
    device = device_of_training(config)
    if device == "gpu":  # measured as the run will be: with all of its memory
        request_memory(workspace, device)
    refuse_oversized_weights(config, models.find(config.model), workspace)
    shared = bool(jobs_on(workspace, device))
    answer = _measured_by(
        "training.estimate", config, workspace, "estimates", cancelled, training_environment(threads_of(config))
    )
    if "error" in answer:
        raise RunError(answer["error"])
    found = Estimate(**answer)
    if not shared and not jobs_on(workspace, device):  # else a job took some of the device's time and memory
        write_json(_estimate_file(config, workspace), found.to_json())
    return found


def known_estimate(config: TrainConfig, workspace: Workspace) -> Estimate | None:
    """The remembered estimate for a run that costs the same: this model, these data, this machine."""
    with suppress(BiasDPOError, OSError, TypeError):
        path = _estimate_file(config, workspace)
        return Estimate(**read_json(path)) if path.is_file() else None
    return None


def refuse_oversized_run(config: TrainConfig, spec: ModelSpec, workspace: Workspace) -> None:
    """Raise RunError where the weights alone, or a remembered estimate, exceed the free memory. Measures nothing.

    Nothing is refused while another job has the device: this one would wait for it, and what is free then is unknown.
    """
    device = device_of_training(config)
    if jobs_on(workspace, device):
        return
    refuse_oversized_weights(config, spec, workspace)
    remembered = known_estimate(config, workspace)
    if remembered is not None:
        free = _free_memory_for(remembered.memory_bytes, config, workspace)
        if refusal := refusal_of(remembered.memory_bytes, free, remembered.device):
            raise RunError(refusal)


def refuse_oversized_weights(config: TrainConfig, spec: ModelSpec, workspace: Workspace) -> None:
    """Raise RunError where the frozen weights alone exceed the free memory."""
    device = device_of_training(config)
    bytes_each = 2 if device == "gpu" and config.precision == "bf16" else 4
    copies = config.num_processes if device == "cpu" and config.accelerate != "fsdp" else 1
    needed = spec.parameters * bytes_each * copies
    free = _free_memory_for(needed, config, workspace)
    if needed > free:
        each = f", {copies} times" if copies > 1 else ""
        raise RunError(
            f"{spec.title} can't be trained here: its weights alone take {needed / 1e9:.1f} GB ({bytes_each} bytes each{each}), "
            f"{free / 1e9:.1f} GB of {'GPU ' if device == 'gpu' else ''}memory are free; choose a smaller model, or free memory"
        )


def _free_memory_for(needed: int, config: TrainConfig, workspace: Workspace) -> int:
    """Free memory, after asking open apps for theirs where it is too little."""
    device = device_of_training(config)
    free = free_memory_bytes(device)
    if free < needed:
        request_memory(workspace, device)
        free = free_memory_bytes(device)
    return free


def refusal_of(memory_bytes: int, free_bytes: int, device: str) -> str:
    """Why a run of this peak can't fit, one line with the remedy; "" where it fits."""
    if memory_bytes <= free_bytes:
        return ""
    return (
        f"The run needs {memory_bytes / 1e9:.1f} GB of memory at its peak on {device}, {free_bytes / 1e9:.1f} GB are free: lower "
        "batch_size (and raise gradient_accumulation as much) or max_length, choose a smaller model, or free memory"
    )


def peak_resident_bytes() -> int:
    """The most memory that this process has had. Not `ru_maxrss` on Linux, which counts the parent's from before exec, too."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory_bytes(device: str) -> int:
    """Memory that a new process can have: a GPU's free memory, else the machine's, within its control group's limit."""
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


def _estimate_file(config: TrainConfig, workspace: Workspace) -> Path:
    spec = models.find(config.model)
    key = {
        "format": FORMAT,
        "config": config.cost_settings(),
        "data": [_identity_of_source(source, workspace) for source in config.datasets],
        "model": _identity_of_model(spec, gguf=spec.hf_folder is None),
        "machine": [platform.node(), platform.machine(), os.cpu_count(), device_of_training(config), threads_of(config)],
    }
    return _file_of(key, workspace.cache / "estimates")


def _identity_of_source(source: str, workspace: Workspace) -> list[Any]:
    if source.startswith(importing.HUB):
        return [source]
    return _identity(workspace.preferences if source == splits.WORKSPACE else Path(source).expanduser())


# An evaluation


_WARM_UP_ITEMS, _MORE_ITEMS = 2, 16  # the first also tell whether more can be afforded
_AFFORDED_SECONDS = 2.0


@dataclass(frozen=True)
class Speed:
    """Of one benchmark: all its items, and seconds per item of each side (tuned None: not measured)."""

    items: int
    base: float
    tuned: float | None

    def seconds(self, limit: int | None, rounds: int) -> float | None:
        """Base scored once and tuned `rounds` times; None where that was not measured."""
        if rounds and self.tuned is None:
            return None
        items = self.items if limit is None else min(limit, self.items)
        return items * (self.base + rounds * (self.tuned or 0.0))


def known_seconds(config: EvaluationConfig, workspace: Workspace) -> dict[str, float | None]:
    """Remembered seconds by benchmark (`parts`); None where it was not measured yet. Measures nothing.

    Raises ModelError or AdapterError where what is named is not here.
    """
    from biasdpo.evaluation import run

    _spec, adapter = _subject(config, workspace)
    rounds = 0 if adapter is None else len(run.strength_order(config.strengths))
    speeds = {name: _remembered_speed(_speed_file(config, name, workspace)) for name in parts(config)}
    return {name: None if speed is None else speed.seconds(config.limit, rounds) for name, speed in speeds.items()}


def estimate_evaluation(
    config: EvaluationConfig, workspace: Workspace, *, cancelled: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """Seconds by benchmark, where nothing is scored yet. What is unknown is measured on a few items, in a process of its own;
    benchmarks that can't be loaded are left out.

    Raises RefusedError for a visitor, ConfigError, ModelError or AdapterError for what can't be evaluated, EvaluationError
    where it fails or is cancelled.
    """
    require_owner("Evaluation")
    config, _ = resolve_evaluation(config, workspace)
    unknown = [name for name, seconds in known_seconds(config, workspace).items() if seconds is None]
    if unknown:
        missing = tuple("perplexity" if name == "utility" else name for name in unknown)  # which stands for that one alone
        changed = config.replace(benchmarks=missing)
        answer = _measured_by("biasdpo.jobs.estimate", changed, workspace, "evaluation_speeds", cancelled)
        if "error" in answer:
            raise EvaluationError(f"Nothing could be measured: {answer['error']}")
        for name, speed in answer.items():
            write_json(_speed_file(config, name, workspace), speed)
    return {name: seconds for name, seconds in known_seconds(config, workspace).items() if seconds is not None}


def measure(engine: Engine, benchmarks: Sequence[Benchmark[Any]]) -> dict[str, Any]:
    """`Speed` by benchmark, as JSON, on items drawn with seed 0. No score is kept."""
    base_only = replace(engine, adapter=None)
    found = {}
    for benchmark in benchmarks:
        base = _seconds_per_item(base_only, benchmark)
        tuned = None if engine.adapter is None else max(0.0, _seconds_per_item(engine, benchmark) - base)
        found[benchmark.name] = asdict(Speed(len(benchmark.items), base, tuned))
    return found


def _seconds_per_item(engine: Engine, benchmark: Benchmark[Any]) -> float:
    """From the first call of `should_stop`, which comes when all is ready, to the last item."""
    from biasdpo.evaluation import run

    done_at: list[tuple[int, float]] = []  # items done, and when

    def on_item(_name: str, done: int, _total: int) -> None:
        done_at.append((done, time.monotonic()))

    def should_stop() -> bool:
        if not done_at:
            done_at.append((0, time.monotonic()))
        return False

    for limit in (_WARM_UP_ITEMS, _MORE_ITEMS):
        done_at.clear()
        run.run(engine, [benchmark], limit=limit, on_item=on_item, should_stop=should_stop)
        (_, started), *_, (items, ended) = done_at
        if ended - started > _AFFORDED_SECONDS:
            break
    return (ended - started) / items


def _subject(config: EvaluationConfig, workspace: Workspace) -> tuple[ModelSpec, AdapterSpec | None]:
    spec = models.find(models.choose_auto()[0].id if config.model == "auto" else config.model)
    return spec, models.find_adapter(config.adapter, spec, workspace)


def _remembered_speed(file: Path) -> Speed | None:
    try:
        return Speed(**read_json(file))
    except (BiasDPOError, TypeError):
        return None


def _speed_file(config: EvaluationConfig, benchmark: str, workspace: Workspace) -> Path:
    """By all that the speed depends on: not on the adapter, except that it decides which pairs `preference` scores."""
    spec, adapter = _subject(config, workspace)
    backend = choose_backend(spec, config.backend)
    source = config.dataset if benchmark == "preference" else config.data_dir
    key = {
        "format": _SPEED_FORMAT,
        "benchmark": benchmark,
        "quick": benchmark == "utility" and "utility" not in config.benchmarks,  # that of `perplexity` may have other texts
        "source": str(Path(source).expanduser().resolve()) if "/" in source else source,
        "pairs_of": str(adapter.folder) if benchmark == "preference" and adapter is not None else "",
        "backend": backend,
        "generation": [config.samples, config.max_new_tokens, config.toxicity_scorer],
        "model": _identity_of_model(spec, gguf=backend == "llamacpp" or spec.hf_folder is None),
        "machine": [platform.node(), platform.machine(), os.cpu_count(), models.free_gpu_memory_gb() > 0],
    }
    return _file_of(key, workspace.cache / "evaluation_speeds")


# Both


def _identity_of_model(spec: ModelSpec, *, gguf: bool) -> list[list[Any]]:
    files = [spec.gguf_path] if gguf or spec.hf_folder is None else weight_files(spec.hf_folder)
    return [_identity(file) for file in files if file is not None]


def _identity(file: Path) -> list[Any]:
    state = file.stat()
    return [str(file.resolve()), state.st_size, state.st_mtime_ns]


def _file_of(key: dict[str, Any], folder: Path) -> Path:
    return folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.json"


def _measured_by(
    module: str,
    config: TrainConfig | EvaluationConfig,
    workspace: Workspace,
    cache: str,
    cancelled: Callable[[], bool],
    env: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The answer of `python -m MODULE CONFIG.json ANSWER.json WORKSPACE`: {"error": one line} where it fails or is cancelled. Its
    output is in WORKSPACE/cache/CACHE/last.log."""
    folder = workspace.cache / cache
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".measuring-", dir=folder) as scratch:
        request, answer, log = Path(scratch) / "config.json", Path(scratch) / "answer.json", folder / "last.log"
        write_json(request, config.to_json())
        command = [sys.executable, "-m", module, str(request), str(answer), str(workspace.root)]
        with log.open("wb") as out:
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                if cancelled():
                    return {"error": "The estimate was cancelled: ask for it again"}
                time.sleep(_POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if answer.is_file():
            return dict(read_json(answer))
        if process.returncode == -9:
            remedy = "free memory, choose a smaller model or, for a run, lower batch_size or max_length"
            return {"error": f"The estimate was killed, probably for lack of memory: {remedy}"}
        said = log.read_text(encoding="utf-8", errors="replace")
        last = last_error(said) or next(
            (line.strip() for line in reversed(said.split("\n")) if line.strip()), "no reason was given"
        )
        return {"error": f"The estimate failed: {last[:300]}; fix that, then ask for it again"}


def main(arguments: Sequence[str]) -> int:
    """The measuring process of an evaluation: CONFIG.json ANSWER.json WORKSPACE."""
    from biasdpo.engines import EngineKey, open_engine

    request, answer, root = map(Path, arguments)
    workspace = Workspace(root)
    try:
        config = EvaluationConfig(**read_json(request))
        adapter = models.find_adapter(config.adapter, models.find(config.model), workspace)
        benchmarks, _missing = build_benchmarks(config, adapter, workspace)
        engine = open_engine(EngineKey(config.model, config.adapter, config.backend), workspace)
        try:
            write_json(answer, measure(engine, benchmarks))
        finally:
            engine.backend.close()
    except BiasDPOError as exc:
        write_json(answer, {"error": str(exc)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
