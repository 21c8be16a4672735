"""What better preferences cost in fluency: adapters at several strengths, scored and plotted.

    python -m tests.perf.tradeoff --model smollm2 --dataset FILE --data-dir DIR --out FOLDER LABEL=ADAPTER[@0.25,0.5,1] ...

Each point is one `evaluate` of the benchmarks preference (held-out pairs of FILE) and utility (DIR/real_toxicity_prompts).
Writes FOLDER/tradeoff.json (the points) and FOLDER/tradeoff.png (the picture); prints the points. Points that are in
tradeoff.json already, of the same adapter weights, are not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from biasdpo import models
from biasdpo.benchmarks.preference import Preference
from biasdpo.benchmarks.utility import Utility, load_texts
from biasdpo.data import pairs, splits
from biasdpo.engines import EngineKey, open_engine
from biasdpo.evaluation import run
from biasdpo.migrations import open_workspace
from biasdpo.workspace import read_json, write_json

STRENGTHS = (0.25, 0.5, 0.75, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Score adapters at several strengths and plot accuracy against perplexity.")
    parser.add_argument("adapters", nargs="+", metavar="LABEL=ADAPTER[@S,S]")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dataset", required=True, type=Path, metavar="FILE")
    parser.add_argument("--data-dir", required=True, type=Path, metavar="DIR")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--workspace")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "tradeoff.json"
    points: list[dict[str, Any]] = read_json(file) if file.is_file() else []
    held_out = splits.split(pairs.derive(splits.load_file(args.dataset)).pairs, 0.1).held_out
    benchmarks = [Preference(held_out), Utility(load_texts(args.data_dir))]
    for argument in args.adapters:
        label, _, name = argument.partition("=")
        name, _, listed = name.partition("@")
        engine = open_engine(EngineKey(args.model, name), open_workspace(args.workspace))
        try:
            assert engine.adapter is not None
            weights = models.adapter_sha256(engine.adapter)
            for strength in [float(s) for s in listed.split(",")] if listed else STRENGTHS:
                key = {"label": label, "adapter_sha256": weights, "strength": strength}
                if any(key.items() <= point.items() for point in points):
                    continue
                result = run.run(engine, benchmarks, [strength])
                points = [*points, {**key, **summary(result["benchmarks"])}]
                write_json(file, points)
        finally:
            engine.backend.close()
    json.dump(points, sys.stdout)
    print()
    plot(points, args.out / "tradeoff.png")


def summary(results: dict[str, Any]) -> dict[str, float]:
    """The numbers of one point, rounded."""
    preference, utility = results["preference"], results["utility"]

    def value(section: Any, metric: str) -> float:
        return round(float(section[metric]["value"]), 4)

    base, tuned = value(utility["base"], "perplexity"), value(utility["tuned"], "perplexity")
    return {
        "length_normalised_accuracy_base": value(preference["base"], "length_normalised_accuracy"),
        "length_normalised_accuracy": value(preference["tuned"], "length_normalised_accuracy"),
        "reward_accuracy": value(preference["paired"], "reward_accuracy"),
        "logratio_margin_nats": value(preference["paired"], "logratio_margin_nats"),
        "perplexity_base": base,
        "perplexity": tuned,
        "perplexity_change_percent": round(100 * (tuned / base - 1), 2),
    }


def plot(points: list[dict[str, Any]], file: Path) -> None:
    """Perplexity's change to the right, length-normalised accuracy upwards: the upper left corner is better."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), dpi=110, layout="constrained")
    base = points[0]["length_normalised_accuracy_base"]
    axes.plot([0], [base], "ks", markersize=7, zorder=5)
    axes.annotate("base", (0, base), (7, -3), textcoords="offset points")
    for label, marker in zip(dict.fromkeys(point["label"] for point in points), "oD^vP*", strict=False):
        curve = sorted((p for p in points if p["label"] == label), key=lambda p: float(p["strength"]))
        xs = [0.0, *(p["perplexity_change_percent"] for p in curve)]
        ys = [curve[0]["length_normalised_accuracy_base"], *(p["length_normalised_accuracy"] for p in curve)]
        (line,) = axes.plot(xs, ys, "-", label=label, alpha=0.8)
        axes.plot(xs[1:], ys[1:], marker, color=line.get_color())
        for point, x, y in zip(curve, xs[1:], ys[1:], strict=True):
            axes.annotate(f"{point['strength']:g}", (x, y), (5, -11), textcoords="offset points", fontsize=8)
    axes.set_xlabel("perplexity of neutral text, change from base (%) - left is better")
    axes.set_ylabel("length-normalised accuracy\non held-out pairs - up is better")
    axes.set_title("Preference against fluency (numbers: adapter strength)", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(file)


if __name__ == "__main__":
    main()
