"""What the fields of a new evaluation come to: its requests, checked, from values that anybody may have posted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from biasdpo import models
from biasdpo.errors import BiasDPOError, ConfigError
from biasdpo.evaluations import EvaluationRequest
from biasdpo.models import ModelSpec
from biasdpo.ui.own_models import pasted

STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)  # of a curve; base is its strength 0
MOST_ADAPTERS = 6  # in one go, as many as the page has colours

# The folder of benchmark files that one is read from, where it is not of its own name; "": none.
_FOLDERS = {"utility_generation": "", "preference": "", "perplexity": "real_toxicity_prompts"}


def requests_of(
    model: Any,
    adapters: Any,
    kind: Any,
    likelihood: Any,
    price: Any,
    generation: Any,
    curve_of: Any,
    limit: Any,
    seed: Any,
    folder: Any,
    pairs: Any,
) -> list[EvaluationRequest]:
    """One evaluation for each adapter. Raises ConfigError for what can't be one."""
    named = [pasted(name) for name in texts(adapters)] or ["none"]
    if len(named) > MOST_ADAPTERS:
        raise ConfigError(f"At most {MOST_ADAPTERS} adapters in one go: got {len(named)}; take some out")
    is_curve = kind == "curve"
    names = [text(curve_of), "perplexity"] if is_curve else [*texts(likelihood), *texts(price), *texts(generation)]
    if not names:
        raise ConfigError("No benchmark is ticked: tick one")
    return [
        EvaluationRequest(
            model=text(model),
            adapter=name,
            benchmarks=tuple(names),
            limit=_whole(limit, "Items of each benchmark") or None,
            seed=_whole(seed, "Seed"),
            strengths=STRENGTHS if is_curve else (1.0,),
            data_dir=text(folder),
            dataset=text(pairs) if "preference" in names else "",
        ).check()
        for name in named
    ]


def missing(request: EvaluationRequest) -> list[str]:
    """The benchmarks of a request that its folder of benchmark files lacks; of the Hub nobody knows before it is asked."""
    if not request.data_dir:
        return []
    folder = Path(request.data_dir).expanduser()
    return [name for name in request.benchmarks if (own := _FOLDERS.get(name, name)) and not (folder / own).is_dir()]


def spec_of(model: str) -> ModelSpec | None:
    """What is known of a model; None of one that is not there, which has its own line."""
    try:
        return models.with_files(models.catalog()[model]) if model in models.catalog() else models.find(model)
    except BiasDPOError:
        return None


def text(value: Any) -> str:
    """A posted text; "" for what is none."""
    return pasted(value) if isinstance(value, str) else ""


def texts(value: Any) -> list[str]:
    """The texts of a posted list."""
    return [name for name in value if isinstance(name, str) and name] if isinstance(value, list | tuple) else []


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ConfigError(f"{name} must be a whole number: got {value!r}; write one such as 0")
    return int(value)
