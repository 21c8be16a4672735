"""Resolving: a config's names become a definite model, adapter, device and dataset, once, when a job is started."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biasdpo import benchmarks, models, prompts
from biasdpo.backends import choose_backend, require_llama_cpp
from biasdpo.config import RUN, WORKSPACE, EvaluationConfig, ExportConfig, TrainConfig
from biasdpo.data import splits
from biasdpo.data.splits import RunData
from biasdpo.errors import ConfigError, ModelError
from biasdpo.gguf.write import source_path
from biasdpo.jobs.job import Device, Resolved
from biasdpo.model_files import is_gguf
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.workspace import Workspace, is_public_space


@dataclass(frozen=True)
class ResolvedTraining:
    """`data` is written into the run's folder as its snapshot and its split."""

    config: TrainConfig
    spec: ModelSpec
    data: RunData
    resolved: Resolved


def resolve_training(config: TrainConfig, workspace: Workspace) -> ResolvedTraining:
    """Raises ConfigError, ModelError or DatasetError for what can't be trained."""
    if not config.model:
        raise ConfigError("No model to train: name one with --model, e.g. smollm2")
    spec = models.find(config.model)
    config = absolute(config)
    data = splits.resolve(config, workspace)
    config.check_warmup(len(data.epoch))
    origin = {**data.provenance(), "probe_prompts": prompts.probe_prompts(config)}
    return ResolvedTraining(config, spec, data, Resolved(model=config.model, device=device_of_training(config), data=origin))


def absolute(config: TrainConfig) -> TrainConfig:
    """The config as a process with another working folder must be given it."""
    return config.replace(model=models.absolute_name(config.model), datasets=tuple(map(_absolute_source, config.datasets)))


def resolve_evaluation(config: EvaluationConfig, workspace: Workspace) -> tuple[EvaluationConfig, Resolved]:
    """The config with a definite model, adapter and data, as a process with another working folder finds them.

    Raises ConfigError, ModelError or AdapterError for what can't be evaluated. Faults in the data show when they are read.
    """
    name = models.choose_auto()[0].id if config.model == "auto" else config.model
    spec = models.find(name)
    adapter = models.find_adapter(config.adapter, spec, workspace)
    adapter_name = "none"
    if adapter is not None:
        models.check_fits(adapter, spec)
        known = {one.id: one.folder for one in models.adapters(workspace)}
        adapter_name = adapter.id if known.get(adapter.id) == adapter.folder else str(adapter.folder.resolve())
    data_dir = Path(config.data_dir).expanduser().resolve() if config.data_dir else None
    if data_dir is not None and not data_dir.is_dir():
        raise ConfigError(f"No folder {data_dir}: name with --data-dir the one that holds a folder a benchmark, or leave it out")
    is_file = config.dataset not in ("", RUN, WORKSPACE)
    config = config.replace(
        model=models.absolute_name(name),
        adapter=adapter_name,
        benchmarks=config.benchmarks or benchmarks.default_benchmarks(data_dir),
        data_dir="" if data_dir is None else str(data_dir),
        dataset=str(Path(config.dataset).expanduser().resolve()) if is_file else config.dataset,
    )
    data = {"data_dir": config.data_dir, "dataset": config.dataset}
    return config, Resolved(model=config.model, adapter=adapter_name, device=device_of_evaluation(config), data=data)


def resolve_export(config: ExportConfig, workspace: Workspace) -> tuple[ExportConfig, ModelSpec, AdapterSpec | None]:
    """The config with absolute paths and a definite quantization, its model and its adapter. An export runs on the CPU.

    Raises ConfigError, ModelError or AdapterError for what can't be exported.
    """
    require_llama_cpp()  # it verifies what is written
    if config.out.is_dir():
        raise ConfigError(f"An export is one file: got the folder {config.out}; name a file in it, e.g. model.gguf")
    config = config.replace(
        out=config.out.expanduser().resolve(),
        model=_absolute_path(config.model) if config.model not in models.catalog() else config.model,
        adapter=_absolute_path(config.adapter) if "/" in config.adapter or config.adapter.startswith("~") else config.adapter,
    )
    if config.run:
        adapter: AdapterSpec | None = models.from_run(workspace, config.run)
    else:
        adapter = models.find_adapter(config.adapter, models.catalog()["smollm2"], workspace)
    name = config.model or (adapter.model if adapter is not None else "")
    if not name:
        raise ConfigError(f"{config.adapter or config.run} does not say which model it was made for: name it with --model")
    spec = models.find(name)
    if spec.gguf_path is not None and config.out == spec.gguf_path.resolve():
        raise ConfigError(f"{config.out} is the base model's own file: name another --out")
    if adapter is not None:
        models.check_fits(adapter, spec)
    if config.format == "merged":
        source_path(spec, config.quantization, config.source)
    elif spec.gguf_path is None:
        raise ModelError(
            f"{spec.title} has no GGUF file here, which a LoRA GGUF is made for: name a .gguf with --model, or export merged"
        )
    return config, spec, adapter


def _absolute_source(source: str) -> str:
    """A dataset file's absolute path; other sources as they are."""
    return source if source == WORKSPACE or source.startswith("hub:") else str(Path(source).expanduser().resolve())


def _absolute_path(name: str) -> str:
    """A folder's or GGUF's absolute path; ids as they are."""
    path = Path(name).expanduser()
    is_path = bool(name) and (path.is_dir() or is_gguf(path) or path.is_absolute())
    return str(path.resolve()) if is_path else name


# The device, checked again whenever a job is resumed: a machine's GPU may have come or gone


def device_of(config: Any) -> Device:
    """The device whose queue a job of this config joins."""
    if isinstance(config, TrainConfig):
        return device_of_training(config)
    return device_of_evaluation(config) if isinstance(config, EvaluationConfig) else "cpu"


def training_refusal() -> str:
    """Why nothing is trained on this machine; "" where it can be."""
    if not is_public_space() or models.free_gpu_memory_gb() > 0:
        return ""
    return (
        "This Space can't train: it has no GPU of its own, and its disk is lost when it restarts. Train on your own machine, or "
        "on Hugging Face Jobs: `python -m biasdpo train ... --on hf-jobs --flavor a10g-small --push-to OWNER/NAME`"
    )


def device_of_training(config: TrainConfig) -> Device:
    return "gpu" if config.accelerate != "cpu" and models.free_gpu_memory_gb() > 0 else "cpu"


def device_of_evaluation(config: EvaluationConfig) -> Device:
    on_cpu = choose_backend(models.find(config.model), config.backend) == "llamacpp" or models.free_gpu_memory_gb() <= 0
    return "cpu" if on_cpu else "gpu"


def threads_of(config: TrainConfig) -> int:
    """CPU threads of each training process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return config.threads or max(1, cores // config.num_processes)


def training_environment(threads: int) -> dict[str, str]:
    return {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads)}


# What else follows from a config


def parts(config: EvaluationConfig) -> list[str]:
    """An evaluation's benchmarks as its result names them: `utility` stands for two, `perplexity` for its quick half."""
    return ["utility" if name == "perplexity" else name for name in benchmarks.expand(config.benchmarks)]


def command_of(config: EvaluationConfig | ExportConfig, out: Path | None = None, workspace: Path | None = None) -> list[str]:
    """The foreground command that does the same, with this very Python. An evaluation's `out` None: result.json."""
    given = config.to_arguments() + ([] if workspace is None else [f"--workspace={workspace}"])
    if isinstance(config, ExportConfig):
        return [sys.executable, "-m", "biasdpo", "export", *given]
    return [sys.executable, "-m", "biasdpo", "evaluate", *given, f"--out={out or 'result.json'}"]
