"""What a training run is told: one frozen dataclass, checked once, saved with its run as config.json and read back by it."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from biasdpo.errors import ConfigError

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


def check_together(config: TrainConfig) -> None:
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


CONFIGS = Path(__file__).resolve().parent.parent / "training" / "configs"


@dataclass(frozen=True)
class TrainConfig:
    """All that decides a run's result, beside its data.

    model                 catalog id, Hub id, HF folder or .gguf
    datasets              JSONL files, hub:OWNER/NAME, or workspace; their rows are joined
    dataset_weights       how often a source's training pairs are seen an epoch, one a dataset, (0, 10]; empty: 1 each. 2: twice,
                          0.5: half of them, drawn by the seed. Held-out pairs count once
    held_out_share        share of prompts kept from training, [0, 0.5]
    loss_type             TRL's names (LOSS_TYPES); several are summed with loss_weights
    loss_weights          one weight a loss type; empty: 1 each
    beta                  pull to the reference, per nat; higher stays closer. For sigmoid_norm it multiplies nats per token
    text_kl_weight        weight of KL(base || policy), nats per token, on bare text (the training rows' prompts and chosen
                          completions without the template), added to the loss; 0: off
    counterfactual_weight weight of KL(base averaged over two groups || policy), nats per token, on sentences of our own in which
                          groups change places (bare text, twice as many as pairs), added to the loss; 0: off
    question_weight       weight of a ranking loss on questions of our own (twice as many as pairs), of which the text answers
                          four in five; 0: off
    ending_weight         weight of KL(base || policy) of "the completion ends here", nats a completion, over what the policy
                          writes in every fourth step to its prompts: keeps completions as long as base's; 0: off
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
    end_of_text           whether the token that ends a completion is trained on as part of it (ENDS). `left_out` changes when
                          completions end less: BiasDPO's are half as long as what SmolLM2 writes by itself
    max_length            tokens of prompt + completion; longer completions are cut, longer prompts dropped, both counted
    eval_every            steps between evaluations on the held-out rows, and one at the last step; 0: none while it trains
    early_stopping        evaluations in a row without a better held-out reward accuracy that end the training; 0: never
    keep                  whose adapter is saved: that of the best evaluation (highest held-out reward accuracy; of equals the
                          larger reward margin, then the earlier), or of the last step; without evaluations the last
    probe_every           steps between probes, which let the policy so far complete probe_prompts, beside the base; 0: none
    probe_prompts         at most three; empty: one each on gender, race and religion
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
    dataset_weights: tuple[float, ...] = ()
    held_out_share: float = 0.1
    loss_type: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] = ()
    beta: float = 0.1
    text_kl_weight: float = 0.0
    counterfactual_weight: float = 0.0
    question_weight: float = 0.0
    ending_weight: float = 0.0
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
    end_of_text: str = "trained"
    max_length: int = 512
    eval_every: int = 0
    early_stopping: int = 0
    keep: str = "best"
    probe_every: int = 0
    probe_prompts: tuple[str, ...] = ()
    logging_steps: int = 1
    save_steps: int = 50
    seed: int = 0
    precision: str = "fp32"
    threads: int = 0
    num_processes: int = 1
    accelerate: str = "auto"

    def __post_init__(self) -> None:
        """Check every field, then those that depend on each other; the first that is wrong is a ConfigError that names it, the
        rule and what was got."""
        for name, check in CHECKS.items():
            check(name, getattr(self, name))
        check_together(self)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_mapping` reads back to an equal config."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def from_mapping(values: Mapping[str, Any], base: TrainConfig | None = None) -> TrainConfig:
    """A config of these values over `base` (default: the defaults). Unknown names are a ConfigError that lists the known."""
    return replace(base or TrainConfig(), **_cleaned(values))


def _cleaned(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values in the types of their fields: lists become tuples, whole numbers floats where floats are wanted."""
    known = {field.name: field for field in fields(TrainConfig)}
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
    return clean


def load_toml(path: Path) -> TrainConfig:
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


def load_json(path: Path) -> TrainConfig:
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


@dataclass(frozen=True)
class Preset:
    """A shipped run config. `id`: its file's name; `values`: what it sets, over the defaults."""

    id: str
    title: str
    model: str
    description: str
    values: dict[str, Any]


def presets() -> list[Preset]:
    """The configs of training/configs: by model in the catalog's order of the file names, the quickest first. A file's first
    comment line is its title, the comment lines after it its description."""
    found = []
    for path in CONFIGS.glob("*.toml"):
        values = read_toml(path)
        lines = path.read_text(encoding="utf-8").split("\n")
        comment = [
            line.removeprefix("#").strip() for line in lines[: next(i for i, x in enumerate(lines) if not x.startswith("#"))]
        ]
        found.append(Preset(path.stem, comment[0], values.get("model", ""), " ".join(comment[1:]), values))
    paces = ("quick", "standard", "thorough")
    order = {pace: i for i, pace in enumerate(paces)}
    return sorted(
        found, key=lambda preset: (preset.model != "smollm2", preset.model, order.get(preset.id.split("-")[-1], len(paces)))
    )


def explained() -> dict[str, str]:
    """One line a setting, from TrainConfig's docstring."""
    lines: dict[str, str] = {}
    name = ""
    for line in (TrainConfig.__doc__ or "").split("\n")[1:]:
        if match := re.match(r" {4}(\w+) +(\S.*)", line):
            name = match[1]
            lines[name] = match[2]
        elif name and line.strip():
            lines[name] += " " + line.strip()
    return lines


def check_setting(name: str, value: Any) -> None:
    """Raise ConfigError where a value can't be that setting's, whatever the others are."""
    clean = _cleaned({name: value})
    CHECKS[name](name, clean[name])
