"""The model card of a trained adapter: README.md in the Hub's format, with a plot of the training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from biasdpo.models import ModelSpec
from biasdpo.workspace import ASSETS

CARD, CURVES = "README.md", "curves.png"

_TEMPLATE = ASSETS / "model_card.md.jinja"
_HUB = "hub:"
LICENSES = {"Apache-2.0": "apache-2.0", "MIT": "mit"}

# Okabe and Ito's colors, distinguishable with any color vision
_TRAIN, _HELD_OUT, _BASELINE = "#0072B2", "#D55E00", "#777777"
_PANELS = (
    ("loss", "Loss", "eval_loss"),
    ("rewards/accuracies", "Reward accuracy", "eval_rewards/accuracies"),
    ("rewards/margins", "Reward margin (nats)", "eval_rewards/margins"),
)


def write_card(folder: Path, spec: ModelSpec, provenance: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> None:
    """Write README.md and curves.png into an adapter's folder. `metrics`: the lines of metrics.jsonl."""
    baseline, kept_step = provenance.get("held_out_longer_baseline"), provenance["kept"]["step"]
    plot_training_curves(metrics, folder / CURVES, longer_baseline=baseline, kept_step=kept_step)
    (folder / CARD).write_text(build_card(spec, provenance), encoding="utf-8")


def build_card(spec: ModelSpec, provenance: Mapping[str, Any]) -> str:
    """The card's text. Names no folder of this machine."""
    import jinja2
    from huggingface_hub import EvalResult, ModelCardData

    sources: list[str] = provenance["dataset_files"]
    hub_datasets = [name.removeprefix(_HUB) for name in sources if name.startswith(_HUB)]
    held_out = provenance["metrics"].get("held_out")
    measured = {
        "Reward accuracy": held_out["reward_accuracy"],
        "Length-normalized accuracy": held_out["length_normalised_accuracy_tuned"],
    } if held_out else {}  # fmt: skip
    card_data = ModelCardData(
        base_model=spec.hub_id or None,
        base_model_relation="adapter" if spec.hub_id else None,
        license=LICENSES.get(spec.license, "other"),
        library_name="peft",
        pipeline_tag="text-generation",
        datasets=hub_datasets or None,
        tags=["biasdpo", "dpo", "lora", "trl", "bias"],
        model_name=provenance["run_id"],
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=hub_datasets[0] if len(sources) == 1 and hub_datasets else "preference-pairs",
                dataset_name="Held-out preference pairs",
                metric_type="accuracy",
                metric_name=name,
                metric_value=round(value, 4),
            )
            for name, value in measured.items()
        ] or None,
    )  # fmt: skip
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined, autoescape=False
    )
    environment.filters["plain"] = plain
    weights = provenance["config"].get("dataset_weights") or [1] * len(sources)
    body = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        provenance,
        spec=spec,
        held_out=held_out,
        datasets=list(zip(sources, weights, strict=True)),
        config=provenance["config"] | {"model": spec.hub_id or spec.title},
        confounds=provenance.get("confounds"),  # absent in runs of the first version
    )
    return f"---\n{card_data.to_yaml()}\n---\n\n{body}"


def plain(value: object) -> str:
    """Someone's words as plain Markdown text: no markup, no line break, no end of a table cell."""
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    escaped = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return escaped.replace("|", "\\|").replace("`", "'")


def plot_training_curves(
    metrics: Sequence[Mapping[str, Any]], path: Path, *, longer_baseline: float | None, kept_step: int
) -> None:
    """Plot loss, reward accuracy and reward margin by step, for training batches and held-out pairs, as a PNG file.

    With matplotlib: plotly, which draws the page's charts, needs a Chromium to write a PNG.

    metrics          the lines of metrics.jsonl
    longer_baseline  accuracy of picking the longer completion on the held-out pairs; None draws no line
    kept_step        the step of the adapter
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (key, title, eval_key) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for name, color, style, label in ((key, _TRAIN, "-", "training batches"), (eval_key, _HELD_OUT, "o-", "held-out pairs")):
            points = [(row["step"], row[name]) for row in metrics if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=color, label=label, linewidth=1.4, markersize=4)
        if key == "rewards/accuracies":
            axes.set_ylim(-0.03, 1.03)
            if longer_baseline is not None:
                axes.axhline(longer_baseline, color=_BASELINE, linestyle="--", label="picking the longer (held out)")
        axes.axvline(kept_step, color=_BASELINE, linestyle=":", label="kept")
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    handles, labels = figure.axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, format="png", metadata={"Software": None})
