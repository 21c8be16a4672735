"""Settings of training runs, evaluations, exports, publications and the app, each declared once.

A declaration holds a setting's type, default, range, unit, help text and place in the form. The command line's options, the form
of the Train tab, the JSON schema, presets, the checks with their messages, and docs/cli.md are generated from it.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from ipaddress import ip_address, ip_network
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from biasdpo.errors import ConfigError, plural
from biasdpo.records import SEED_RANGE, STRENGTH_RANGE
from biasdpo.workspace import is_public_space

CONFIGS = Path(__file__).resolve().parent.parent / "training" / "configs"

# Values that name no file or id.
WORKSPACE = "workspace"  # as a dataset: the judgments in the workspace's journal
RUN = "run"  # as an evaluation's dataset: the pairs that the adapter was trained on

# Declaring a setting


@dataclass(frozen=True, eq=False)
class Setting:
    """One setting: what was declared, and what follows from its field's type.

    label         in the form; default: its name
    group         of the form; "": it has a place of its own there
    when          other settings that decide whether this one has an effect: {name: test of its value}
    affects_cost  whether the time or memory of a run depends on it
    option        its command-line option
    separator     between the values of a list, where it is written as one text
    low, high     the range, ends included; None: unlimited
    """

    label: str = ""
    group: str = ""
    unit: str = ""
    when: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    affects_cost: bool = True
    option: str = ""
    metavar: str = ""
    separator: str = ","
    # From the field:
    name: str = ""
    help: str = ""
    kind: Literal["integer", "number", "choice", "flag", "text"] = "text"
    is_list: bool = False
    is_required: bool = False
    is_optional: bool = False
    default: Any = None
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None

    def __call__(self, schema: dict[str, Any]) -> None:
        """Add to the field's JSON schema what pydantic does not know."""
        schema |= {key: value for key in ("group", "unit") if (value := getattr(self, key))}
        schema |= {"title": self.label} if self.label else {}

    @property
    def is_advanced(self) -> bool:
        """Whether the form shows it only on demand."""
        return self.group not in ("", "Essentials")

    @property
    def range(self) -> str:
        """The allowed values in words; "" for free text."""
        if self.kind == "choice":
            return ", ".join(self.choices)
        if self.low is None or self.high is None:
            return "" if self.low is None else f"{_format(self.low)} or more"
        return f"{_format(self.low)} to {_format(self.high)}"

    def has_effect(self, values: Mapping[str, Any]) -> bool:
        """Whether this setting changes anything beside these values of the settings in `when`."""
        return all(test(values[name]) for name, test in self.when.items())

    def error(self, given: object) -> str:
        """The message for a value that this setting can't have."""
        shown = repr(given) if len(repr(given)) <= 80 else repr(given)[:79] + "…"
        rules = {
            "integer": "a whole number",
            "number": "a number",
            "choice": "one of",
            "flag": "true or false",
            "text": "text, not blank" if given == "" or str(given).isspace() else "text",
        }
        rule = f"{rules[self.kind]} {self.range}"
        if self.kind in ("integer", "number"):
            rule = f"{rules[self.kind]} from {self.range}" if self.high is not None else f"{rules[self.kind]}, {self.range}"
            shown += "; leave it out for the default" if self.is_optional else "; choose a value in that range"
        return f"{self.name} must be {rule.strip()}: got {shown}"

    def parse(self, text: str) -> Any:
        """A value as people write it. Text that is no number is returned as it is, for the check to refuse."""
        if self.is_list:
            parts = (part.strip() for part in text.split(self.separator))
            return tuple(self._parse_one(part) for part in parts if part)
        return self._parse_one(text)

    def _parse_one(self, text: str) -> Any:
        try:
            return {"integer": int, "number": float}[self.kind](text.strip().replace("−", "-"))
        except (KeyError, ValueError):
            return text

    def format(self, value: Any) -> str:
        """The text that `parse` reads back as this value."""
        if self.is_list:
            return (", " if self.separator == "," else self.separator).join(map(_format, value))
        return "" if value is None else _format(value)


def _format(value: Any) -> str:
    """A value as people write it: 1.0 is 1, and 5e-05 is 5e-5. Floats keep all their digits."""
    if isinstance(value, float):
        return repr(value).removesuffix(".0").replace("e-0", "e-")
    return str(value)


def setting(
    default: Any,
    *,
    range: tuple[float, float] | None = None,
    min_length: int | None = None,
    max_length: int | None = None,
    **declared: Any,
) -> Any:
    """Declare one setting; the docstring below it is its help. `default` of `...`: required; `declared`: fields of `Setting`."""
    low, high = range or (None, None)
    lengths: dict[str, Any] = {"min_length": min_length, "max_length": max_length}
    return Field(default, ge=low, le=high, json_schema_extra=Setting(**declared), **lengths)


T = TypeVar("T")


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


ListOf = Annotated[tuple[T, ...], BeforeValidator(_as_tuple)]  # a single value stands for a list of one
Name = Annotated[str, Field(pattern=r"\S")]


class Settings(BaseModel):
    """A frozen set of settings. Whatever is wrong with the given values is a ConfigError of one line."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as exc:
            raise ConfigError(_message(type(self), exc)) from exc

    @classmethod
    @cache
    def settings(cls) -> dict[str, Setting]:
        """All settings by name, in the order of their declaration."""
        return {name: _setting_of(name, info) for name, info in cls.model_fields.items()}

    @classmethod
    def check_setting(cls, name: str, value: Any) -> None:
        """Raise ConfigError if this setting can't have that value, whatever the others are."""
        try:
            cls(**{name: value})
        except ConfigError as exc:
            cause = exc.__cause__
            if not isinstance(cause, ValidationError) or cause.errors()[0]["loc"]:
                raise

    def replace(self, **changes: Any) -> Self:
        """A copy with these values changed, and checked."""
        return type(self)(**(dict(self) | changes))

    def changed(self) -> dict[str, Any]:
        """The settings that are not at their defaults."""
        return {name: getattr(self, name) for name, one in self.settings().items() if getattr(self, name) != one.default}

    def to_json(self) -> dict[str, Any]:
        """A JSON object whose values make an equal config."""
        return self.model_dump(mode="json")

    def to_toml(self) -> str:
        """A config file of the settings that are not at their defaults, for `--config`."""
        values = self.model_dump(mode="json", include=set(self.changed()))
        return "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in values.items())

    def to_arguments(self) -> list[str]:
        """The command-line options that make this config. One word each, since a value may begin with a dash."""
        words = []
        for name, value in self.changed().items():
            one = self.settings()[name]
            parts = [one.format((part,)) for part in value] if one.is_list and one.separator != "," else [one.format(value)]
            words += [f"{one.option}={part}" for part in parts]
        return words


def _setting_of(name: str, info: FieldInfo) -> Setting:
    declared, annotation, limits = info.json_schema_extra, info.annotation, list(info.metadata)
    assert isinstance(declared, Setting), f"{name} is not declared with setting()"
    is_optional = NoneType in get_args(annotation)
    if is_optional:
        annotation = next(one for one in get_args(annotation) if one is not NoneType)
    is_list = get_origin(annotation) is tuple
    if is_list:
        annotation, limits = get_args(annotation)[0], []
        if get_origin(annotation) is Annotated:
            annotation, *extra = get_args(annotation)
            limits = [limit for one in extra for limit in getattr(one, "metadata", ())]
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    return replace(
        declared,
        name=name,
        label=declared.label or name.replace("_", " ").capitalize(),
        help=" ".join((info.description or "").split()),
        option=declared.option or "--" + name.replace("_", "-"),
        kind="choice" if choices else {int: "integer", float: "number", bool: "flag"}.get(annotation, "text"),  # type: ignore[arg-type]
        is_list=is_list,
        is_required=info.is_required(),
        is_optional=is_optional,
        default=None if info.is_required() else info.default,
        choices=tuple(choice for choice in choices if choice),
        low=next((limit.ge for limit in limits if hasattr(limit, "ge")), None),
        high=next((limit.le for limit in limits if hasattr(limit, "le")), None),
    )


def _message(model: type[Settings], exc: ValidationError) -> str:
    """The first problem in one line: which setting, the rule, what was given, what to do."""
    known = model.settings()
    problem = min(exc.errors(), key=lambda one: one["type"] != "extra_forbidden")  # a misspelled name comes first
    if not problem["loc"]:
        return str(problem["ctx"]["error"])
    name, given = str(problem["loc"][0]), problem["input"]
    if problem["type"] == "extra_forbidden":
        return f"Unknown setting {name!r}: choose one of {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{name} is missing: give it with {known[name].option}"
    if problem["type"] == "value_error":
        return f"{name} {problem['ctx']['error']}"
    if problem["type"] in ("too_short", "string_too_short"):
        return f"{name} is empty: name at least one"
    if problem["type"] == "too_long":
        return f"{name} holds at most {problem['ctx']['max_length']} values: got {len(given)}; leave some out"
    return known[name].error(given)


def _each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"names a value twice: got {', '.join(map(_format, values))}; name each once")
    return values


Once = AfterValidator(_each_once)

# Training


LossType = Literal["sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "apo_zero", "sft"]
"""TRL's names; see `biasdpo.rewards`. Left out: `nca_pair`, `bco_pair`, `aot` and others that make little difference here."""
LOSS_TYPES: tuple[LossType, ...] = get_args(LossType)
Weight = Annotated[float, Field(ge=0, le=1000)]


def _preference_losses(values: tuple[str, ...]) -> tuple[str, ...]:
    if values == ("sft",):
        raise ValueError("needs a preference loss beside 'sft': got sft alone; use e.g. sigmoid,sft")
    return values


def _no_lm_head(values: tuple[str, ...]) -> tuple[str, ...]:
    if "lm_head" in values:
        raise ValueError("can't include 'lm_head', since TRL computes its output without the adapter: leave it out")
    return values


def _positive(value: Any) -> bool:
    """Whether a setting is above 0; a form may hold anything."""
    try:
        return float(value) > 0
    except (TypeError, ValueError):
        return False


def _zero(value: Any) -> bool:
    return not _positive(value)


_EVALUATED = {"held_out_share": _positive, "eval_every": _positive}


class TrainConfig(Settings):
    """Everything that determines a run's result, apart from its data."""

    model: str = setting("", group="Model and data", metavar="ID|PATH")
    """Base model: catalog id, Hub id, Hugging Face folder or .gguf file."""
    datasets: ListOf[Name] = setting(
        (), group="Model and data", option="--dataset", metavar="FILE|hub:OWNER/NAME|workspace", separator="\n"
    )
    """Preference pairs: a JSONL file with prompt, chosen and rejected, a Hub dataset, or the workspace's judgments.
    Repeatable."""
    dataset_weights: ListOf[Annotated[float, Field(ge=0.01, le=10)]] = setting(
        (), group="Model and data", when={"datasets": lambda names: len(names or ()) > 1}
    )
    """Times that each dataset's training pairs are seen per epoch, one weight per dataset. 2: twice; 0.5: a random half.
    Default: 1 each. Held-out pairs are never repeated."""
    learning_rate: float = setting(3e-5, range=(1e-9, 1), group="Essentials", affects_cost=False)
    """Peak learning rate of AdamW."""
    beta: float = setting(
        0.1, range=(1e-4, 1000), unit="per nat (sigmoid_norm: per nat per token)", group="Essentials", affects_cost=False
    )
    """DPO's beta: a higher value keeps the policy closer to the reference model."""
    epochs: float = setting(1.0, range=(1e-3, 1000), group="Essentials", when={"max_steps": _zero})
    """Passes over the training pairs. Ignored when max_steps is set."""
    max_steps: int = setting(0, range=(0, 10_000_000), unit="steps", group="Essentials")
    """Optimizer steps. 0: as many as epochs requires."""
    batch_size: int = setting(4, range=(1, 4096), unit="pairs", group="Essentials")
    """Pairs per forward pass and process."""
    gradient_accumulation: int = setting(2, range=(1, 4096), unit="batches", group="Essentials")
    """Batches per optimizer step."""
    max_length: int = setting(512, range=(16, 1_000_000), unit="tokens", group="Essentials")
    """Tokens of prompt and completion together. Longer completions are truncated, pairs with longer prompts dropped; both are
    counted."""
    end_of_text: Literal["trained", "left_out"] = setting("trained", label="End-of-text token", group="Essentials")
    """Whether the end-of-text token of a completion is trained on. left_out changes the length of completions less."""
    held_out_share: float = setting(0.1, range=(0, 0.5), label="Held-out share", group="Essentials")
    """Share of prompts held out from training."""
    seed: int = setting(0, range=SEED_RANGE, label="Seed for shuffling and LoRA init", group="Essentials", affects_cost=False)
    """Seed for shuffling, the held-out split and LoRA initialization."""
    loss_type: Annotated[ListOf[LossType], Once, AfterValidator(_preference_losses)] = setting(
        ("sigmoid",), min_length=1, label="Loss types", group="Loss"
    )
    """Loss functions, by TRL's names. Several are summed, weighted by loss_weights."""
    loss_weights: ListOf[Weight] = setting((), group="Loss", when={"loss_type": lambda names: len(names or ()) > 1})
    """One weight per loss type. Default: 1 each."""
    label_smoothing: float = setting(
        0.0, range=(0, 0.499), group="Loss", when={"loss_type": lambda names: "robust" in (names or ())}, affects_cost=False
    )
    """Assumed share of wrong labels. Used by loss type robust only."""
    text_kl_weight: float = setting(0.0, range=(0, 1000), unit="per nat per token", label="Text KL weight", group="Loss")
    """Weight of KL(base || policy) on plain text (prompts and chosen completions without the template). 0: off."""
    counterfactual_weight: float = setting(0.0, range=(0, 1000), unit="per nat per token", group="Loss")
    """Weight of KL(base averaged over two groups || policy) on built-in sentences in which the groups are swapped. 0: off."""
    question_weight: float = setting(0.0, range=(0, 1000), group="Loss")
    """Weight of a ranking loss on built-in questions, of which the text answers four in five. 0: off."""
    ending_weight: float = setting(0.0, range=(0, 1000), unit="per nat per completion", group="Loss")
    """Weight of KL(base || policy) of ending the completion, on completions sampled every fourth step; preserves the base
    model's completion length. 0: off."""
    everyday_weight: float = setting(0.0, range=(0, 1000), unit="per nat per token", group="Loss")
    """Weight of KL(base || policy) on the base model's own answers to built-in everyday prompts; keeps everyday answers as they
    are. 0: off."""
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = setting(
        "linear", group="Optimizer", affects_cost=False
    )
    """Learning rate schedule after warm-up."""
    warmup_share: float = setting(
        0.1,
        range=(0, 1),
        label="Warm-up share",
        group="Optimizer",
        when={"schedule": lambda name: name != "constant"},
        affects_cost=False,
    )
    """Share of the steps over which the learning rate rises to its peak."""
    max_grad_norm: float = setting(1.0, range=(1e-6, 1e6), label="Max gradient norm", group="Optimizer", affects_cost=False)
    """Gradients are clipped to this norm."""
    rank: int = setting(16, range=(1, 512), group="LoRA")
    """Rank of the LoRA update."""
    alpha: int = setting(32, range=(1, 4096), group="LoRA", affects_cost=False)
    """LoRA alpha: the update is scaled by alpha / rank."""
    target_modules: Annotated[ListOf[Name], AfterValidator(_no_lm_head)] = setting(
        ("q_proj", "k_proj", "v_proj", "o_proj"), min_length=1, group="LoRA"
    )
    """Names of the linear layers that LoRA adapts; all-linear: all of them but the head."""
    strength: float = setting(1.0, range=(0.01, STRENGTH_RANGE[1]), label="Saved strength", group="LoRA", affects_cost=False)
    """The trained update is multiplied by this when it is saved. 1: as trained."""
    adapter_dtype: Literal["float16", "float32"] = setting("float16", group="LoRA", affects_cost=False)
    """Data type of the saved adapter."""
    eval_every: int = setting(
        0, range=(0, 10_000_000), unit="steps", label="Evaluate every", group="Evaluation", when={"held_out_share": _positive}
    )
    """Steps between evaluations on the held-out pairs; the last step is always evaluated. 0: no evaluation during
    training."""
    early_stopping: int = setting(
        0, range=(0, 10_000), unit="evaluations", group="Evaluation", when=_EVALUATED, affects_cost=False
    )
    """Stop after this many evaluations in a row without a better held-out reward accuracy. 0: never."""
    keep: Literal["best", "last"] = setting(
        "best", label="Adapter to keep", group="Evaluation", when=_EVALUATED, affects_cost=False
    )
    """Which adapter to save: that of the best evaluation (highest held-out reward accuracy; ties: larger reward margin, then
    earlier step), or that of the last step. Without evaluations: the last."""
    probe_every: int = setting(0, range=(0, 10_000_000), unit="steps", group="Evaluation")
    """Steps between probes: completions of probe_prompts by the base model and by the current policy. 0: none."""
    probe_prompts: ListOf[Name] = setting(
        (),
        max_length=3,
        label="Probe prompts (one per line)",
        group="Evaluation",
        when={"probe_every": _positive},
        separator="\n",
    )
    """Up to three prompts to probe with. Default: one each on gender, race and religion."""
    logging_steps: int = setting(
        1, range=(1, 10_000_000), unit="steps", label="Log every", group="Evaluation", affects_cost=False
    )
    """Steps between lines of metrics.jsonl."""
    save_steps: int = setting(
        50, range=(0, 10_000_000), unit="steps", label="Checkpoint every", group="Evaluation", affects_cost=False
    )
    """Steps between checkpoints, a multiple of logging_steps. 0: only when the run ends or is stopped."""
    precision: Literal["fp32", "bf16"] = setting("fp32", group="Hardware")
    """Precision of training. bf16 uses autocast; on a GPU the frozen weights are bf16, too."""
    threads: int = setting(0, range=(0, 1024), label="CPU threads", group="Hardware")
    """CPU threads per process. 0: all available cores, divided among the processes."""
    num_processes: int = setting(1, range=(1, 1024), label="Processes", group="Hardware")
    """Training processes (data parallel)."""
    max_minutes: float = setting(
        0.0, range=(0, 100_000), unit="minutes", label="Time limit", group="Hardware", affects_cost=False
    )
    """End the training after this many minutes and finish with the adapter so far. 0: no limit."""
    accelerate: Literal["auto", "cpu", "one_gpu", "multi_gpu", "fsdp"] = setting(
        "auto", label="Accelerate config", group="Hardware"
    )
    """Accelerate config: one of training/accelerate/*.yaml. auto: by the hardware."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        """Refuse settings that contradict each other."""
        for name, of, one in (("dataset_weights", "datasets", "dataset"), ("loss_weights", "loss_type", "loss type")):
            weights, names = getattr(self, name), getattr(self, of)
            if weights and len(weights) != len(names):
                raise ValueError(f"{name} needs one weight per {one}: got {len(weights)} for {len(names)}; give as many, or none")
        if self.label_smoothing and "robust" not in self.loss_type:
            raise ValueError(
                f"label_smoothing is used by loss type 'robust' only: got {self.label_smoothing} with "
                f"{', '.join(self.loss_type)}; use 'robust', or set label_smoothing to 0"
            )
        if self.early_stopping and not self.eval_every:
            raise ValueError(f"early_stopping needs evaluations: got {self.early_stopping} with eval_every 0; set eval_every")
        if self.accelerate in ("multi_gpu", "fsdp") and self.num_processes < 2:
            raise ValueError(
                f"accelerate '{self.accelerate}' is for several processes: got num_processes {self.num_processes}; set "
                "num_processes to the number of GPUs, or accelerate to 'auto'"
            )
        if self.save_steps % self.logging_steps:
            near = max(1, round(self.save_steps / self.logging_steps)) * self.logging_steps
            raise ValueError(
                f"save_steps must be a multiple of logging_steps: got {self.save_steps} and {self.logging_steps}; use {near}"
            )
        return self

    def steps_for(self, rows: int) -> int:
        """Optimizer steps of a run as the Trainer counts them: an epoch's last step may be smaller."""
        if self.max_steps:
            return self.max_steps
        batches = math.ceil(rows / (self.batch_size * self.num_processes))
        return math.ceil(math.ceil(batches / self.gradient_accumulation) * self.epochs)

    def check_warmup(self, rows: int) -> None:
        """Raise ConfigError where the warm-up, whose first step has learning rate 0, takes all steps on so many rows."""
        steps = self.steps_for(rows)
        if self.schedule != "constant" and math.ceil(steps * self.warmup_share) >= steps:
            what = "The run's only step is" if steps == 1 else f"All {steps} steps are"
            raise ConfigError(
                f"{what} warm-up ({plural(rows, 'pair')}, warmup_share {self.warmup_share:g}), so the learning rate never "
                f"reaches {self.learning_rate:g}{' but stays 0' * (steps == 1)}: add pairs or epochs, lower "
                "gradient_accumulation, or set warmup_share to 0"
            )

    def cost_settings(self) -> dict[str, Any]:
        """The settings that the time or memory of a run depends on."""
        return {name: getattr(self, name) for name, one in self.settings().items() if one.affects_cost}


# Evaluation


BackendName = Literal["llamacpp", "transformers", "transformers-8bit", "transformers-4bit"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
Backend = Literal["auto", "llamacpp", "transformers", "transformers-8bit", "transformers-4bit"]
BenchmarkName = Literal[
    "preference",
    "quick_check",
    "counterfactual_gap",
    "crows_pairs",
    "stereoset",
    "bbq",
    "winobias",
    "truthfulqa",
    "group_facts",
    "utility",
    "perplexity",
    "bold",
    "real_toxicity_prompts",
    "utility_generation",
    "overcorrection",
]
BENCHMARKS: tuple[BenchmarkName, ...] = get_args(BenchmarkName)


class EvaluationConfig(Settings):
    """One evaluation: a base model and an adapter on the same items of several benchmarks."""

    model: str = setting("auto", min_length=1, metavar="ID|PATH|auto")
    """Base model: catalog id, Hub id, Hugging Face folder or .gguf file."""
    adapter: str = setting("", metavar="ID|PATH|none")
    """Adapter: its id, a run's id, a PEFT folder, or none for the base model alone. Default: the model's shipped adapter."""
    backend: Backend = setting("auto")
    """Engine that runs the model. auto: by the model's files and the hardware."""
    benchmarks: Annotated[ListOf[BenchmarkName], Once] = setting((), option="--benchmark", metavar="NAME[,NAME]")
    """Benchmarks, separated by commas. utility stands for perplexity and utility_generation. Default: quick_check, perplexity,
    and those of crows_pairs, stereoset, bbq and winobias that are in data_dir or in the Hub's cache."""
    limit: int | None = setting(None, range=(1, 10**9), unit="items")
    """Items per benchmark, sampled with the seed. Default: all."""
    seed: int = setting(0, range=SEED_RANGE)
    """Seed for sampling items, for generation and for the bootstrap."""
    strengths: Annotated[ListOf[Annotated[float, Field(ge=STRENGTH_RANGE[0], le=STRENGTH_RANGE[1])]], Once] = setting(
        (1.0,), min_length=1, max_length=16
    )
    """Adapter strengths, separated by commas; several give the curve of bias against perplexity. 1: as trained."""
    data_dir: str = setting("", metavar="DIR", label="Folder of benchmark files")
    """Folder that holds one folder per benchmark, in its upstream format. Default: download from the Hub."""
    dataset: str = setting("", metavar="FILE|workspace|run")
    """For preference: the file that was trained on, workspace, or run (the adapter's own run). Its held-out pairs are
    scored."""
    samples: int | None = setting(None, range=(1, 4096), unit="completions", label="Completions per prompt")
    """Completions per prompt of real_toxicity_prompts. Default: 5."""
    max_new_tokens: int | None = setting(None, range=(1, 4096), unit="tokens", label="Tokens per completion")
    """Tokens per completion. Default: each benchmark's own."""
    toxicity_scorer: str = setting("", metavar="NAME")
    """profanity_check, or a classifier from the Hub as hub:OWNER/NAME. Default: profanity_check."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if len(self.strengths) > 1 and self.adapter == "none":
            raise ValueError("strengths apply to an adapter: got several with adapter none; name an adapter, or leave them out")
        if "preference" in self.benchmarks and not self.dataset:
            raise ValueError("preference needs pairs: give --dataset the file that was trained on, workspace or run")
        return self


# Export


ExportFormat = Literal["lora", "merged"]
ExportSource = Literal["auto", "hf", "gguf"]
ProofDepth = Literal["full", "quick", "none"]
DEFAULT_QUANTIZATION = "Q8_0"


def _is_merged(value: Any) -> bool:
    return bool(value == "merged")


def _is_full(value: Any) -> bool:
    return bool(value == "full")


class ExportConfig(Settings):
    """One export: an adapter, or a model with an adapter merged into it, as a GGUF file."""

    out: Annotated[Path, Field(strict=False)] = setting(..., label="Name", metavar="FILE")
    """File to write. FILE.json beside it is its record."""
    format: ExportFormat = setting(...)
    """lora: the adapter alone, to be loaded beside its base model; merged: one complete model with the adapter in it."""
    run: str = setting("", metavar="ID")
    """Finished run whose adapter is exported. Give this or --adapter."""
    adapter: str = setting("", metavar="ID|PATH|none")
    """Adapter: its id, a PEFT folder, or none for the model alone. Give this or --run."""
    model: str = setting("", label="Base model", metavar="ID|PATH", group="Advanced")
    """Base model. Default: the one that the adapter names."""
    quantization: Literal["", "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_1", "Q4_0", "keep"] = setting("")
    """Quantization of a merged file. keep: as in the base GGUF. Default: Q8_0."""
    proof: ProofDepth = setting("full", label="Verification")
    """Comparison with the original. full: tokens, probabilities and held-out pairs; quick: a fifth of the texts, no pairs;
    none: recorded as not verified."""
    source: ExportSource = setting("auto", group="Advanced", when={"format": _is_merged})
    """Source of a merged file: the Hugging Face folder (hf) or the base GGUF. auto: the first one present."""
    pairs: int = setting(64, range=(0, 10**9), label="Held-out pairs", unit="pairs", group="Advanced", when={"proof": _is_full})
    """Held-out pairs scored before and after the export, by the full verification. 0: none."""
    threads: int | None = setting(None, range=(1, 1024), label="CPU threads", group="Advanced")
    """CPU threads. Default: all cores."""

    @model_validator(mode="before")
    @classmethod
    def _name_quantization(cls, values: Any) -> Any:
        """A merged file always has a quantization."""
        if isinstance(values, dict) and values.get("format") == "merged" and not values.get("quantization"):
            return values | {"quantization": DEFAULT_QUANTIZATION}
        return values

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if bool(self.run) == bool(self.adapter):
            raise ValueError("An export needs either a run or an adapter: give --run, --adapter, or --adapter none with --model")
        if self.adapter == "none" and self.format == "lora":
            raise ValueError("format lora needs an adapter: got none; choose one, or export merged")
        if self.adapter == "none" and not self.model:
            raise ValueError("adapter none exports a model alone: name it with --model")
        if self.format == "lora" and self.quantization:
            raise ValueError(f"A LoRA GGUF is not quantized: got {self.quantization}; leave it out, or export merged")
        if self.quantization == "keep" and self.source == "hf":
            raise ValueError("quantization keep needs a base GGUF: got source hf; choose another quantization or source")
        return self


# Publishing


def repository_name(name: str) -> str:
    """Return the name if it can be one of a repository, OWNER/NAME, else raise ValueError."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as exc:
        raise ValueError(f"can't be the name of a repository: {exc}") from exc
    if name.count("/") != 1:
        raise ValueError(f"must be OWNER/NAME, where OWNER is your name on the Hub or an organization of yours: got {name!r}")
    return name


class PublishConfig(Settings):
    """One publication: where the adapter of a run goes on the Hugging Face Hub, and what goes with it."""

    to: Annotated[str, AfterValidator(repository_name)] = setting(..., label="Model repository", metavar="OWNER/NAME")
    """Repository on the Hub for the adapter and its model card. It is made if there is none."""
    dataset_to: Annotated[str, AfterValidator(lambda name: name and repository_name(name))] = setting(
        "", label="Dataset repository", metavar="OWNER/NAME"
    )
    """Repository for the judgments that the run was trained on, with a dataset card. Default: not published."""
    gguf: str = setting("", label="GGUF file", metavar="EXPORT")
    """Finished export of this run, to go with the adapter."""
    public: bool = setting(False)
    """Everybody may see the repositories. Default: private."""
    with_annotators: bool = setting(False, label="With nicknames and times")
    """Nicknames of annotators and the times of their judgments go into the dataset. Default: numbers for names, days for
    times."""
    update: bool = setting(False, label="Update what is there")
    """Replace files in a repository that has other content. Files of other names stay."""


# The app


def _sync_target(value: str) -> str:
    kind, _, name = value.partition(":")
    if value and (kind not in ("bucket", "dataset") or name.count("/") != 1):
        raise ValueError(f"must be bucket:OWNER/NAME or dataset:OWNER/NAME: got {value!r}; name one, e.g. dataset:me/labels")
    if value:
        repository_name(name)
    return value


SYNC_METAVAR = "bucket:OWNER/NAME|dataset:OWNER/NAME"
SyncTarget = Annotated[str, AfterValidator(_sync_target)]


class ServeConfig(Settings):
    """The options of app.py: what to serve, and where."""

    model: str = setting("auto", metavar="ID|PATH|auto")
    """Model to open: catalog id, Hub id, Hugging Face folder or .gguf file."""
    backend: Backend = setting("auto")
    """Engine that runs the model. auto: by the model's files and the hardware."""
    workspace: str = setting("", metavar="DIR")
    """Workspace folder. Default: $BIASDPO_WORKSPACE, else ./workspace."""
    data_dir: str = setting("", metavar="DIR")
    """Folder of benchmark files: the Measure tab scores them, and pairs that repeat their items are reported."""
    host: str = setting("", metavar="ADDRESS")
    """Address to serve on. Default: 127.0.0.1, on a Hugging Face Space 0.0.0.0."""
    port: int = setting(7860, range=(1, 65535))
    """Port to serve on."""
    allowed_hosts: ListOf[Name] = setting((), option="--allowed-host", metavar="NAME")
    """Another host name to answer to, such as a reverse proxy's or this machine's on the network. Repeatable."""
    trusted_proxies: ListOf[Name] = setting(("127.0.0.1",), option="--trusted-proxy", metavar="ADDRESS")
    """Address or network of a reverse proxy whose X-Forwarded-For names the visitor; other machines' is ignored. Repeatable."""
    auth: str = setting("", metavar="FILE")
    """Ask every visitor to sign in, with the accounts in this file; `python -m biasdpo users add NAME` adds one."""
    sync: SyncTarget = setting("", metavar=SYNC_METAVAR)
    """Copy all labels to this bucket or dataset repository on the Hub and read them back at the start, for a disk that does not
    last, as on a Space. Created, private, if missing; needs a token that may write there ($HF_TOKEN or `hf auth login`)."""
    public: bool = setting(False)
    """Let everybody compare and judge without an account, and nobody do more. Required, or --auth, for an address that other
    machines reach."""

    max_request_mb: int = setting(4, range=(1, 1024), unit="MiB")
    """Largest request that is no upload."""
    max_upload_mb: int = setting(200, range=(1, 65536), unit="MiB")
    """Largest uploaded file."""
    max_queue: int = setting(200, range=(1, 100_000), unit="requests")
    """Requests that may wait or be answered at a time, of all visitors."""
    max_queue_per_visitor: int = setting(20, range=(1, 100_000), unit="requests")
    """The same, of one address."""
    max_sessions: int = setting(2000, range=(10, 1_000_000), unit="pages")
    """Open pages whose state is kept; then the oldest is forgotten."""
    max_visits_per_minute: int = setting(120, range=(1, 1_000_000), unit="pages")
    """Pages that may be opened per minute from one address."""
    max_generation_seconds: int = setting(120, range=(1, 86400), unit="s")
    """Time after which a visitor's pair is stopped, once it is their turn."""
    max_verdicts_per_minute: int = setting(60, range=(1, 100_000), unit="verdicts")
    """Verdicts that one visitor may store per minute."""
    max_stored_mb_per_visitor: int = setting(5, range=(1, 1_000_000), unit="MiB")
    """Verdicts that one visitor may store per day."""
    max_stored_mb: int = setting(1000, range=(1, 1_000_000), unit="MiB")
    """Size of the file of judgments from which on only the owner may add to it."""
    max_uploads_mb_per_visitor: int = setting(400, range=(1, 1_000_000), unit="MiB")
    """Files that one address may upload per day to an app that others reach. Uploads are deleted after a day."""
    max_uploads_mb: int = setting(4000, range=(1, 1_000_000), unit="MiB")
    """The same, of all visitors."""
    max_connections: int = setting(800, range=(10, 1_000_000), unit="connections")
    """Open connections, of all visitors."""
    max_connections_per_visitor: int = setting(100, range=(10, 1_000_000), unit="connections")
    """The same, of one address that is no trusted proxy."""

    @model_validator(mode="after")
    def _check_proxies(self) -> Self:
        for proxy in self.trusted_proxies:
            try:
                ip_network(proxy, strict=False)
            except ValueError as exc:
                raise ValueError(f"--trusted-proxy is an IP address or a network: got {proxy!r}; for example 10.0.0.2") from exc
        return self

    @model_validator(mode="after")
    def _check_reach(self) -> Self:
        if self.auth and self.public:
            raise ValueError("--auth asks every visitor to sign in and --public asks nobody: leave one of them out")
        if not (self.auth or self.public or is_public_space() or _is_loopback(self.address)):
            raise ValueError(
                f"--host {self.address} lets other machines in, who could train and delete: add --auth FILE (accounts) or "
                "--public (everybody may compare and judge, nothing else)"
            )
        return self

    @property
    def address(self) -> str:
        """The address to serve on."""
        return self.host or ("0.0.0.0" if is_public_space() else "127.0.0.1")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


# Files and the command line


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a config file, unchecked."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError as exc:
        raise ConfigError(f"No config file {path}: see training/configs/ for the shipped ones") from exc
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"Can't read {path} as TOML: {exc}; correct it") from exc


def load_json(path: Path) -> TrainConfig:
    """A run's saved config.json."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise ConfigError(f"Can't read the run's config {path}: {exc}; restore it, or start a new run") from exc
    if not isinstance(values, dict):
        raise ConfigError(f"The run's config {path} is not a JSON object: restore it, or start a new run")
    return TrainConfig(**values)


def parse_settings(texts: Iterable[str]) -> dict[str, Any]:
    """The values of `key=value` texts. A value is read as TOML (0.1, ["a", "b"]), else taken as text."""
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set needs key=value: got {text!r}; write e.g. --set beta=0.2")
        try:
            values[name.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            values[name.strip()] = value.strip()
    return values


@dataclass(frozen=True)
class Preset:
    """A shipped training config. `id`: its file's name; `values`: what it sets, over the defaults."""

    id: str
    title: str
    model: str
    description: str
    values: dict[str, Any]


def presets() -> list[Preset]:
    """The configs in training/configs, by model, the quickest first.

    A file's first comment line is its title, the comment lines after it its description.
    """
    found = []
    for path in CONFIGS.glob("*.toml"):
        comment = []
        for line in path.read_text(encoding="utf-8").split("\n"):
            if not line.startswith("#"):
                break
            comment.append(line.removeprefix("#").strip())
        values = read_toml(path)
        found.append(Preset(path.stem, comment[0], values["model"], " ".join(comment[1:]), values))
    paces = ("quick", "standard", "thorough")
    return sorted(found, key=lambda one: (one.model != "smollm2", one.model, paces.index(one.id.rpartition("-")[2])))
