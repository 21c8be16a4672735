"""What an adapter changed, as measured when it was made: its provenance.json, evaluation.json and tradeoff.png, as HTML."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

from biasdpo.errors import BiasDPOError
from biasdpo.workspace import read_json

LABELS = {
    "pairs": "Held-out pairs",
    "reward_accuracy": "Reward accuracy",
    "reward_accuracy_of_picking_the_longer": "Baseline: pick the longer completion",
    "reward_margin_nats": "Reward margin (nats)",
    "length_normalised_accuracy": "Length-normalised accuracy",
    "perplexity": "Perplexity on neutral text",
}
_LEFT_OUT = ("logratio_margin_nats", "kl_base_to_tuned_nats_per_token")


def table(folder: Path | None) -> str:
    """The measurements beside an adapter, or "" where it brings none. Unknown keys are shown under their own name.

    provenance.json holds the training's own `metrics`; evaluation.json, where it is there, what `evaluate` printed.
    """
    if folder is None:
        return ""
    metrics = mapping(mapping(read_or_none(folder / "provenance.json")).get("metrics"))
    held_out = {name: value for name, value in mapping(metrics.get("held_out", metrics)).items() if name not in _LEFT_OUT}
    for name in [name.removesuffix("_base") for name in held_out if name.endswith("_base")]:
        held_out[name] = {"before": held_out.pop(f"{name}_base"), "after": held_out.pop(f"{name}_tuned", None)}
    utility = mapping(mapping(mapping(read_or_none(folder / "evaluation.json")).get("benchmarks")).get("utility"))
    before, after = (mapping(mapping(utility.get(side)).get("perplexity")).get("value") for side in ("base", "tuned"))
    if before is not None:
        held_out["perplexity"] = {"before": before, "after": after}
    shown = "".join(_row(name, value) for name, value in held_out.items())
    if not shown:
        return ""
    return (
        '<table class="bd-table"><thead><tr><th scope="col">On held-out prompts</th><th scope="col">Base</th>'
        f'<th scope="col">Tuned</th></tr></thead><tbody>{shown}</tbody></table>{_picture(folder / "tradeoff.png")}'
    )


def read_or_none(file: Path) -> Any:
    """A JSON file's content; None where it is missing or damaged, which a page shows as nothing."""
    try:
        return read_json(file)
    except BiasDPOError:
        return None


def mapping(value: Any) -> dict[str, Any]:
    """An object that a file should hold; empty where it holds something else."""
    return dict(value) if isinstance(value, dict) else {}


def _row(name: str, value: Any) -> str:
    before, after = (value.get("before"), value.get("after")) if isinstance(value, dict) else (None, value)
    if _number(before) == _number(after) == "":
        return ""
    label = escape(LABELS.get(name, name.replace("_", " ").capitalize()))
    return f'<tr><th scope="row">{label}</th><td>{_number(before)}</td><td>{_number(after)}</td></tr>'


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _picture(file: Path) -> str:
    if not file.is_file():
        return ""
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    words = "Trade-off between preference accuracy and perplexity"
    return f'<img class="bd-figure" alt="{words}" src="data:image/png;base64,{data}">'
