"""What a run's settings may be: a check a field, and those of fields that depend on each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from biasdpo.errors import ConfigError

if TYPE_CHECKING:
    from biasdpo.run_config import RunConfig

# TRL's names; what each is for: `biasdpo.rewards`. Left out: `nca_pair`, `bco_pair`, `aot`, … which change little here.
LOSS_TYPES = ("sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "apo_zero", "sft")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
PRECISIONS = ("fp32", "bf16")
ADAPTER_DTYPES = ("float16", "float32")
ACCELERATE_CONFIGS = ("auto", "cpu", "one_gpu", "multi_gpu", "fsdp")
KEEPS = ("best", "last")
ENDS = ("trained", "left_out")
MAX_PROBES = 3


def _text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be text: got {value!r}")


def _texts(name: str, values: tuple[object, ...], choices: tuple[str, ...] = ()) -> None:
    for value in values:
        if choices:
            _choice(name, value, choices)
        elif not isinstance(value, str) or not value.strip():
            raise ConfigError(f"{name} must be a list of names: got {value!r} in it")
    if not values and name not in ("datasets", "probe_prompts"):
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


def _targets(name: str, values: tuple[object, ...]) -> None:
    _texts(name, values)
    if "lm_head" in values:
        raise ConfigError(f"{name} can't hold 'lm_head' (TRL computes its product past the adapter): leave it out")


def _losses(name: str, values: tuple[object, ...]) -> None:
    _texts(name, values, LOSS_TYPES)
    if values == ("sft",):
        raise ConfigError(f"{name} must hold a preference loss beside 'sft': got ('sft',); use e.g. ['sigmoid', 'sft']")
    if len(set(values)) < len(values):
        raise ConfigError(f"{name} names a loss twice: got {', '.join(map(str, values))}; name it once, with a weight")


def _probes(name: str, values: tuple[object, ...]) -> None:
    _texts(name, values)
    if len(values) > MAX_PROBES:
        raise ConfigError(f"{name} holds at most {MAX_PROBES} prompts: got {len(values)}; leave some out")


def _numbers(low: float, high: float) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        for part in value if isinstance(value, tuple) else (value,):
            _number(name, part, low, high)

    return check


def _integers(low: int, high: int) -> Callable[[str, Any], None]:
    return lambda name, value: _integer(name, value, low, high)


def _one_of(choices: tuple[str, ...]) -> Callable[[str, Any], None]:
    return lambda name, value: _choice(name, value, choices)


CHECKS: dict[str, Callable[[str, Any], None]] = {
    "model": _text,
    "datasets": _texts,
    "dataset_weights": _numbers(0.01, 10.0),
    "held_out_share": _numbers(0.0, 0.5),
    "loss_type": _losses,
    "loss_weights": _numbers(0.0, 1000.0),
    "beta": _numbers(1e-4, 1000.0),
    "text_kl_weight": _numbers(0.0, 1000.0),
    "counterfactual_weight": _numbers(0.0, 1000.0),
    "question_weight": _numbers(0.0, 1000.0),
    "ending_weight": _numbers(0.0, 1000.0),
    "label_smoothing": _numbers(0.0, 0.499),
    "learning_rate": _numbers(1e-9, 1.0),
    "schedule": _one_of(SCHEDULES),
    "warmup_share": _numbers(0.0, 1.0),
    "max_grad_norm": _numbers(1e-6, 1e6),
    "epochs": _numbers(1e-3, 1000.0),
    "max_steps": _integers(0, 10_000_000),
    "batch_size": _integers(1, 4096),
    "gradient_accumulation": _integers(1, 4096),
    "rank": _integers(1, 512),
    "alpha": _integers(1, 4096),
    "target_modules": _targets,
    "strength": _numbers(0.01, 1.5),
    "adapter_dtype": _one_of(ADAPTER_DTYPES),
    "end_of_text": _one_of(ENDS),
    "max_length": _integers(16, 1_000_000),
    "eval_every": _integers(0, 10_000_000),
    "early_stopping": _integers(0, 10_000),
    "keep": _one_of(KEEPS),
    "probe_every": _integers(0, 10_000_000),
    "probe_prompts": _probes,
    "logging_steps": _integers(1, 10_000_000),
    "save_steps": _integers(0, 10_000_000),
    "seed": _integers(0, 2**31 - 1),
    "precision": _one_of(PRECISIONS),
    "threads": _integers(0, 1024),
    "num_processes": _integers(1, 1024),
    "accelerate": _one_of(ACCELERATE_CONFIGS),
}


def check_together(config: RunConfig) -> None:
    """Settings that depend on each other."""
    for name, of in (("dataset_weights", "datasets"), ("loss_weights", "loss_type")):
        weights, names = getattr(config, name), getattr(config, of)
        if weights and len(weights) != len(names):
            what = "dataset" if of == "datasets" else "loss type"
            raise ConfigError(f"{name} must hold one weight a {what}: got {len(weights)} for {len(names)}; give as many, or none")
    if config.label_smoothing and "robust" not in config.loss_type:
        raise ConfigError(
            f"label_smoothing has an effect with loss_type 'robust' alone: got {config.label_smoothing} with "
            f"{', '.join(config.loss_type)}; use 'robust' or set it to 0"
        )
    if config.early_stopping and not config.eval_every:
        raise ConfigError(f"early_stopping needs evaluations: got {config.early_stopping} with eval_every 0; set eval_every")
    if config.accelerate in ("multi_gpu", "fsdp") and config.num_processes < 2:
        raise ConfigError(
            f"accelerate '{config.accelerate}' is for several processes: got num_processes {config.num_processes}; set "
            "num_processes to the number of GPUs, or accelerate to 'auto'"
        )
    if config.save_steps % config.logging_steps:
        near = max(1, round(config.save_steps / config.logging_steps)) * config.logging_steps
        raise ConfigError(
            f"save_steps must be a multiple of logging_steps: got {config.save_steps} and {config.logging_steps}; use {near}"
        )
