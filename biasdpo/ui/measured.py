"""What an adapter changed, as measured when it was made: its provenance.json and tradeoff.png, as HTML."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

from biasdpo.errors import BiasDPOError
from biasdpo.workspace import read_json

LABELS = {
    "reward_accuracy": "Reward accuracy",
    "reward_margin": "Reward margin (nats)",
    "length_normalised_accuracy": "Length-normalised accuracy",
    "pick_the_longer": "Baseline: pick the longer completion",
    "pick_the_longer_accuracy": "Baseline: pick the longer completion",
    "perplexity": "Perplexity on neutral text",
    "perplexity_change": "Perplexity on neutral text, change",
}


def table(folder: Path | None) -> str:
    """The measurements beside an adapter, or "" where it brings none. Unknown keys are shown under their own name."""
    if folder is None:
        return ""
    try:
        provenance = read_json(folder / "provenance.json")
    except BiasDPOError:
        return ""
    metrics = provenance.get("metrics") if isinstance(provenance, dict) else None
    rows = [_row(name, value) for name, value in metrics.items()] if isinstance(metrics, dict) else []
    shown = "".join(row for row in rows if row)
    if not shown:
        return ""
    return (
        '<table class="bd-table"><thead><tr><th scope="col">On held-out prompts</th><th scope="col">Base</th>'
        f'<th scope="col">Tuned</th></tr></thead><tbody>{shown}</tbody></table>{_picture(folder / "tradeoff.png")}'
    )


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
