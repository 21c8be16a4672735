"""The settings of a run as fields of the page: which there are, in which group, when they have an effect, how they are written.

Their explanations and bounds have one home, `run_config`: here is only how they look.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import gradio as gr

from biasdpo import run_config
from biasdpo.errors import ConfigError
from biasdpo.run_config import RunConfig

Kind = Literal["integer", "number", "choice", "choices", "names", "numbers", "lines"]
Values = Mapping[str, Any]

DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(RunConfig)}


def _always(_values: Values) -> bool:
    return True


@dataclass(frozen=True)
class Setting:
    """One field. `matters`: whether it has an effect beside these other values; where it has none it is hidden, and its default
    is used."""

    name: str
    title: str
    kind: Kind
    choices: tuple[str, ...] = ()
    matters: Callable[[Values], bool] = _always

    @property
    def depends(self) -> bool:
        """Whether its effect hangs on others (those of DECIDING)."""
        return self.matters is not _always

    @property
    def elem_id(self) -> str:
        return f"train-{self.name.replace('_', '-')}"


def _evaluates(values: Values) -> bool:
    return _number_or_zero(values["held_out_share"]) > 0 and _number_or_zero(values["eval_every"]) > 0


def _number_or_zero(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0


GROUPS: dict[str, tuple[Setting, ...]] = {
    "Essentials": (
        Setting("learning_rate", "Learning rate", "number"),
        Setting("beta", "Beta", "number"),
        Setting("epochs", "Epochs", "number", matters=lambda v: _number_or_zero(v["max_steps"]) == 0),
        Setting("max_steps", "Steps (0: by epochs)", "integer"),
        Setting("batch_size", "Batch size", "integer"),
        Setting("gradient_accumulation", "Batches a step", "integer"),
        Setting("max_length", "Max length", "integer"),
        Setting("end_of_text", "End of text", "choice", run_config.ENDS),
        Setting("held_out_share", "Held-out share", "number"),
        Setting("seed", "Seed", "integer"),
    ),
    "Loss": (
        Setting("loss_type", "Loss types", "choices", run_config.LOSS_TYPES),
        Setting("loss_weights", "Loss weights", "numbers", matters=lambda v: len(v["loss_type"] or ()) > 1),
        Setting("label_smoothing", "Label smoothing", "number", matters=lambda v: "robust" in (v["loss_type"] or ())),
        Setting("text_kl_weight", "Text KL weight", "number"),
        Setting("counterfactual_weight", "Counterfactual weight", "number"),
        Setting("question_weight", "Question weight", "number"),
        Setting("ending_weight", "Ending weight", "number"),
    ),
    "Optimizer": (
        Setting("schedule", "Schedule", "choice", run_config.SCHEDULES),
        Setting("warmup_share", "Warm-up share", "number", matters=lambda v: v["schedule"] != "constant"),
        Setting("max_grad_norm", "Gradient norm", "number"),
    ),
    "LoRA": (
        Setting("rank", "Rank", "integer"),
        Setting("alpha", "Alpha", "integer"),
        Setting("target_modules", "Target modules", "names"),
        Setting("strength", "Strength baked in", "number"),
        Setting("adapter_dtype", "Saved as", "choice", run_config.ADAPTER_DTYPES),
    ),
    "Evaluation and probes": (
        Setting("eval_every", "Evaluate every", "integer", matters=lambda v: _number_or_zero(v["held_out_share"]) > 0),
        Setting("early_stopping", "Early stopping", "integer", matters=_evaluates),
        Setting("keep", "Adapter kept", "choice", run_config.KEEPS, matters=_evaluates),
        Setting("probe_every", "Probe every", "integer"),
        Setting("probe_prompts", "Probe prompts, one a line", "lines", matters=lambda v: _number_or_zero(v["probe_every"]) > 0),
        Setting("logging_steps", "Log every", "integer"),
        Setting("save_steps", "Checkpoint every", "integer"),
    ),
    "Machine": (
        Setting("precision", "Precision", "choice", run_config.PRECISIONS),
        Setting("threads", "CPU threads", "integer"),
        Setting("num_processes", "Processes", "integer"),
        Setting("accelerate", "Accelerate config", "choice", run_config.ACCELERATE_CONFIGS),
    ),
}
SETTINGS: tuple[Setting, ...] = tuple(setting for group in GROUPS.values() for setting in group)

# What others' effect hangs on: a change of these shows and hides fields.
DECIDING = ("max_steps", "loss_type", "schedule", "held_out_share", "eval_every", "probe_every")


def build_field(setting: Setting, explanation: str) -> gr.components.Component:
    """The field, at its default. Text and number boxes show a validator's line themselves, so bounds need no slider."""
    shown: dict[str, Any] = {
        "label": setting.title,
        "info": explanation,
        "elem_id": setting.elem_id,
        "min_width": 190,
        "value": to_field(setting, DEFAULTS[setting.name]),
        "visible": setting.matters(DEFAULTS),
    }
    if setting.kind == "integer":
        return gr.Number(**shown)
    if setting.kind == "choice":
        return gr.Dropdown(list(setting.choices), **shown)
    if setting.kind == "choices":
        return gr.Dropdown(list(setting.choices), multiselect=True, **shown)
    lines = 3 if setting.kind == "lines" else 1
    return gr.Textbox(lines=lines, max_lines=max(lines, 1), **shown)


def to_field(setting: Setting, value: Any) -> Any:
    """A config's value as the field shows it."""
    if setting.kind == "choices":
        return list(value)
    if setting.kind == "lines":
        return "\n".join(value)
    if setting.kind == "names":
        return ", ".join(value)
    if setting.kind == "numbers":
        return ", ".join(_written(number) for number in value)
    if setting.kind == "number":
        return _written(value)
    return value


def _written(number: float) -> str:
    """As people write it: 0.1, and 0.0001 as 1e-4."""
    if 0 < abs(number) < 1e-3:
        digits, _, power = f"{number:e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{number:g}"


def from_field(setting: Setting, value: Any) -> Any:
    """A field's value as the config takes it. What can't be read at all is a ConfigError; bounds are `run_config`'s."""
    if setting.kind == "integer":
        if isinstance(value, float) and value.is_integer():
            return int(value)
        return value
    if setting.kind == "number":
        return _number(setting, value)
    if setting.kind == "choices":
        return tuple(value or ())
    if setting.kind in ("names", "numbers", "lines"):
        if not isinstance(value, str | None):
            raise ConfigError(f"{setting.name} must be text: got {value!r}")
        separator = "\n" if setting.kind == "lines" else ","
        parts = tuple(part.strip() for part in (value or "").split(separator) if part.strip())
        return tuple(_number(setting, part) for part in parts) if setting.kind == "numbers" else parts
    return value


def _number(setting: Setting, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return float(value.strip().replace("−", "-"))
    except ValueError:
        raise ConfigError(f"{setting.name} must be a number: got {value[:40]!r}; write one such as 0.1 or 5e-5") from None


def problem(setting: Setting, value: Any) -> str:
    """What is wrong with a field's value by itself, in one line; "" where nothing is."""
    try:
        run_config.check_setting(setting.name, from_field(setting, value))
    except ConfigError as exc:
        return str(exc)
    return ""


def field_values(given: Sequence[Any]) -> dict[str, Any]:
    """The fields' values by name, in the order of SETTINGS."""
    return dict(zip((setting.name for setting in SETTINGS), given, strict=True))


def problems(given: Sequence[Any]) -> list[str]:
    """One line (or "") a field; a field without effect has no problem."""
    values = field_values(given)
    return [problem(s, values[s.name]) if s.matters(values) else "" for s in SETTINGS]


def to_values(given: Sequence[Any]) -> dict[str, Any]:
    """The config's values; those without effect at their defaults. ConfigError for the first that can't be read."""
    values = field_values(given)
    return {s.name: from_field(s, values[s.name]) if s.matters(values) else DEFAULTS[s.name] for s in SETTINGS}


def effects(values: Values) -> dict[str, bool]:
    """By name: whether each field has an effect, where these are the values of DECIDING."""
    return {setting.name: setting.matters(values) for setting in SETTINGS}


def from_config(config: RunConfig) -> list[Any]:
    """What the fields show of a config, in the order of SETTINGS."""
    return [to_field(setting, getattr(config, setting.name)) for setting in SETTINGS]
