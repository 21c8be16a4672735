"""Figures, as PNG files. matplotlib is loaded when one is drawn, and never through pyplot, which keeps global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, told apart whatever one's colour vision.
TRAIN, HELD_OUT, BASELINE = "#0072B2", "#D55E00", "#777777"

_PANELS = (
    ("loss", "Loss", "eval_loss"),
    ("rewards/accuracies", "Reward accuracy", "eval_rewards/accuracies"),
    ("rewards/margins", "Reward margin (nats)", "eval_rewards/margins"),
)


def training_curves(metrics: Sequence[Mapping[str, Any]], path: Path, *, longer_baseline: float | None, kept_step: int) -> None:
    """Loss, reward accuracy and reward margin by step, of the training batches and the held-out pairs.

    metrics          the lines of metrics.jsonl
    longer_baseline  accuracy of picking the longer completion of the held-out pairs; None draws no line
    kept_step        the step whose adapter was kept
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (key, title, eval_key) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for name, colour, style, label in ((key, TRAIN, "-", "training batches"), (eval_key, HELD_OUT, "o-", "held-out pairs")):
            points = [(row["step"], row[name]) for row in metrics if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=colour, label=label, linewidth=1.4, markersize=4)
        if key == "rewards/accuracies":
            axes.set_ylim(-0.03, 1.03)
            if longer_baseline is not None:
                axes.axhline(longer_baseline, color=BASELINE, linestyle="--", label="picking the longer (held out)")
        axes.axvline(kept_step, color=BASELINE, linestyle=":", label="kept")
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    axes_with_all = figure.axes[1]
    handles, labels = axes_with_all.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, format="png", metadata={"Software": None})
