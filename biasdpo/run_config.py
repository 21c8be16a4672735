"""What a training run is told: one frozen dataclass, checked once, saved with its run as config.json and read back by it."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from biasdpo.errors import ConfigError

# TRL's names. Left out: `hinge`, `nca_pair`, `aot`, … which change little here, and `exo_pair`, which needs smoothing.
LOSS_TYPES = ("sigmoid", "sigmoid_norm", "ipo", "robust", "apo_zero", "sft")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
PRECISIONS = ("fp32", "bf16")
ADAPTER_DTYPES = ("float16", "float32")
ACCELERATE_CONFIGS = ("auto", "cpu", "one_gpu", "multi_gpu", "fsdp")


@dataclass(frozen=True)
class RunConfig:
    """All that decides a run's result, beside its data.

    model                 catalog id, Hub id, HF folder or .gguf
    datasets              JSONL files, hub:OWNER/NAME, or workspace; their rows are joined
    held_out_share        share of prompts kept from training, [0, 0.5]
    loss_type             TRL's names (LOSS_TYPES); several are summed with loss_weights
    loss_weights          one weight a loss type; empty: 1 each
    beta                  pull to the reference, per nat; higher stays closer. For sigmoid_norm it multiplies nats per token
    text_kl_weight        weight of KL(base || policy), nats per token, on bare text (the training rows' prompts and chosen
                          completions without the template), added to the loss; 0: off
    label_smoothing       share of labels taken to be wrong, [0, 0.5); used by loss type `robust` alone
    learning_rate         AdamW's peak step size
    schedule              of the learning rate after warm-up (SCHEDULES)
    warmup_share          share of the steps in which the learning rate rises, [0, 1]
    max_grad_norm         gradients are clipped to this norm
    epochs                passes over the training rows; ignored where max_steps is set
    max_steps             optimizer steps; 0: as many as `epochs` needs
    batch_size            pairs a process computes at once
    gradient_accumulation batches per optimizer step
    rank                  of the LoRA update, >= 1
    alpha                 LoRA's scale is alpha / rank
    target_modules        names of the linear layers that get an update
    strength              the trained update is saved multiplied by this, (0, 1.5]; 1 is as trained
    adapter_dtype         of the saved adapter (ADAPTER_DTYPES)
    max_length            tokens of prompt + completion; longer completions are cut, longer prompts dropped, both counted
    eval_every            steps between evaluations on the held-out rows; 0: only before and after training
    logging_steps         steps between lines of metrics.jsonl
    save_steps            steps between checkpoints, a multiple of logging_steps; 0: only at the end or at a stop
    seed                  of the order of rows and the LoRA's start
    precision             fp32, or bf16 (autocast; on a GPU the frozen weights too)
    threads               CPU threads; 0: one per core that the process may use
    num_processes         training processes (data parallel)
    accelerate            which of training/accelerate/*.yaml; auto: by the machine
    """

    model: str = ""
    datasets: tuple[str, ...] = ()
    held_out_share: float = 0.1
    loss_type: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] = ()
    beta: float = 0.1
    text_kl_weight: float = 0.0
    label_smoothing: float = 0.0
    learning_rate: float = 3e-5
    schedule: str = "linear"
    warmup_share: float = 0.1
    max_grad_norm: float = 1.0
    epochs: float = 1.0
    max_steps: int = 0
    batch_size: int = 4
    gradient_accumulation: int = 2
    rank: int = 16
    alpha: int = 32
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    strength: float = 1.0
    adapter_dtype: str = "float16"
    max_length: int = 512
    eval_every: int = 0
    logging_steps: int = 1
    save_steps: int = 50
    seed: int = 0
    precision: str = "fp32"
    threads: int = 0
    num_processes: int = 1
    accelerate: str = "auto"

    def __post_init__(self) -> None:
        """Check every field; the first that is wrong is a ConfigError that names it, the rule and what was got."""
        _text("model", self.model)
        _texts("datasets", self.datasets)
        _number("held_out_share", self.held_out_share, 0.0, 0.5)
        _texts("loss_type", self.loss_type, LOSS_TYPES)
        if self.loss_weights and len(self.loss_weights) != len(self.loss_type):
            raise ConfigError(
                f"loss_weights must hold one weight a loss type: got {len(self.loss_weights)} for {len(self.loss_type)}; "
                "give as many, or none"
            )
        for weight in self.loss_weights:
            _number("loss_weights", weight, 0.0, 1000.0)
        if self.loss_type == ("sft",):
            raise ConfigError("loss_type must hold a preference loss beside 'sft': got ('sft',); use e.g. ['sigmoid', 'sft']")
        _number("beta", self.beta, 1e-4, 1000.0)
        _number("text_kl_weight", self.text_kl_weight, 0.0, 1000.0)
        _number("label_smoothing", self.label_smoothing, 0.0, 0.499)
        if self.label_smoothing and "robust" not in self.loss_type:
            raise ConfigError(
                f"label_smoothing has an effect with loss_type 'robust' alone: got {self.label_smoothing} with "
                f"{', '.join(self.loss_type)}; use 'robust' or set it to 0"
            )
        _number("learning_rate", self.learning_rate, 1e-9, 1.0)
        _choice("schedule", self.schedule, SCHEDULES)
        _number("warmup_share", self.warmup_share, 0.0, 1.0)
        _number("max_grad_norm", self.max_grad_norm, 1e-6, 1e6)
        _number("epochs", self.epochs, 1e-3, 1000.0)
        _integer("max_steps", self.max_steps, 0, 10_000_000)
        _integer("batch_size", self.batch_size, 1, 4096)
        _integer("gradient_accumulation", self.gradient_accumulation, 1, 4096)
        _integer("rank", self.rank, 1, 512)
        _integer("alpha", self.alpha, 1, 4096)
        _texts("target_modules", self.target_modules)
        if "lm_head" in self.target_modules:
            raise ConfigError("target_modules can't hold 'lm_head' (TRL computes its product past the adapter): leave it out")
        _number("strength", self.strength, 0.01, 1.5)
        _choice("adapter_dtype", self.adapter_dtype, ADAPTER_DTYPES)
        _integer("max_length", self.max_length, 16, 1_000_000)
        _integer("eval_every", self.eval_every, 0, 10_000_000)
        _integer("logging_steps", self.logging_steps, 1, 10_000_000)
        _integer("save_steps", self.save_steps, 0, 10_000_000)
        if self.save_steps % self.logging_steps:
            near = max(1, round(self.save_steps / self.logging_steps)) * self.logging_steps
            raise ConfigError(
                f"save_steps must be a multiple of logging_steps: got {self.save_steps} and {self.logging_steps}; use {near}"
            )
        _integer("seed", self.seed, 0, 2**31 - 1)
        _choice("precision", self.precision, PRECISIONS)
        _integer("threads", self.threads, 0, 1024)
        _integer("num_processes", self.num_processes, 1, 1024)
        _choice("accelerate", self.accelerate, ACCELERATE_CONFIGS)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_mapping` reads back to an equal config."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def from_mapping(values: Mapping[str, Any], base: RunConfig | None = None) -> RunConfig:
    """A config of these values over `base` (default: the defaults). Unknown names are a ConfigError that lists the known."""
    known = {field.name: field for field in fields(RunConfig)}
    clean: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"Unknown setting {name!r}: choose one of {', '.join(known)}")
        default = known[name].default
        if isinstance(default, tuple):
            clean[name] = tuple(value) if isinstance(value, list | tuple) else (value,)
        elif isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            clean[name] = float(value)
        else:
            clean[name] = value
    return replace(base or RunConfig(), **clean)


def load_toml(path: Path) -> RunConfig:
    """A run config file (training/configs/*.toml)."""
    return from_mapping(read_toml(path))


def read_toml(path: Path) -> dict[str, Any]:
    """The settings that a run config file holds, unchecked."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError as exc:
        raise ConfigError(f"No config file {path}: see training/configs/ for the shipped ones") from exc
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"Can't read {path} as TOML: {exc}; mend it") from exc


def load_json(path: Path) -> RunConfig:
    """A run's saved config.json."""
    try:
        return from_mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"Can't read the run's config {path}: {exc}; restore it, or start a new run") from exc


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """`key=value` strings to values. A value is read as TOML (0.1, true, ["a", "b"]), else taken as text."""
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set wants key=value: got {setting!r}; write e.g. --set beta=0.2")
        try:
            values[name.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            values[name.strip()] = text.strip()
    return values


def _text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be text: got {value!r}")


def _texts(name: str, values: tuple[object, ...], choices: tuple[str, ...] = ()) -> None:
    for value in values:
        if choices:
            _choice(name, value, choices)
        elif not isinstance(value, str) or not value:
            raise ConfigError(f"{name} must be a list of names: got {value!r} in it")
    if not values and name != "datasets":
        raise ConfigError(f"{name} is empty: name at least one")


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}: got {value!r}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
        raise ConfigError(f"{name} must be a number from {low:g} to {high:g}: got {value!r}; choose a value in that range")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} must be a whole number from {low} to {high}: got {value!r}; choose a value in that range")
