"""What the Train tab says and draws of runs, without a browser: the outcome by worked numbers, curves, probes, tables."""

from __future__ import annotations

import math
import os
import zipfile
from dataclasses import replace

import psutil
import pytest

from biasdpo.jobs import store
from biasdpo.jobs.job import Job
from biasdpo.jobs.outcome import accuracy_text, held_out_metrics, outcome, pack_run, pairs_needed, run_table
from biasdpo.ui import charts, jobs, train
from biasdpo.ui.charts import moving_mean, points, thinned, training_chart
from biasdpo.ui.components import escape
from biasdpo.workspace import Workspace, read_json, write_json
from tests.run_folders import metrics, probe, write_run


def find(workspace: Workspace, run_id: str) -> Job:
    return store.find_job(run_id, workspace, "train")


# The outcome. Wilson's interval of 21 of 26, z = 1.96: share 0.8077, center (0.8077 + z²/52)/(1 + z²/26) = 0.7681, half width
# z/(1 + z²/26) * sqrt(0.8077 * 0.1923/26 + z²/2704) = 0.1468.


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        (
            {"reward_accuracy": 21 / 26, "pairs": 26, "kl_base_to_tuned_nats_per_token": 0.005},
            "Reward accuracy 0.81 [0.62, 0.91] on 26 held-out pairs; the adapter hardly changes the model: KL 0.005 nats per "
            "token.",
        ),
        (  # 14 of 26: 0.5 is inside
            {"reward_accuracy": 14 / 26, "pairs": 26, "kl_base_to_tuned_nats_per_token": 0.1},
            "Reward accuracy 0.54 [0.35, 0.71] on 26 held-out pairs, which chance can explain; the adapter slightly changes the "
            "model: KL 0.1 nats per token.",
        ),
        (  # the shipped adapter: 92 of 96
            {
                "reward_accuracy": 92 / 96,
                "pairs": 96,
                "reward_accuracy_of_picking_the_longer": 0.90625,
                "kl_base_to_tuned_nats_per_token": 0.507,
            },
            "Reward accuracy 0.96 [0.90, 0.98] on 96 held-out pairs, not clearly better than always choosing the longer "
            "completion (0.91); the adapter clearly changes the model: KL 0.51 nats per token.",
        ),
        ({"reward_accuracy": 0.0, "pairs": 8}, "Reward accuracy 0.00 [0.00, 0.32] on 8 held-out pairs, worse than chance."),
        (
            {"reward_accuracy": 1.0, "pairs": 1, "reward_margin_nats": 1.234},
            "Reward accuracy 1.00 [0.21, 1.00] on 1 held-out pair, which chance can explain; mean reward margin 1.2 nats.",
        ),
        ({}, "No pairs were held out, so the result was not measured: set a held-out share of 0.1 or more in the next run."),
    ],
)
def test_a_run_in_one_sentence(numbers, sentence):
    assert outcome(numbers) == sentence


def test_how_many_pairs_are_needed():
    assert [accuracy_text(1.0, n)[5:10] for n in (3, 4)] == ["[0.44", "[0.51"]  # four right of four exclude chance
    assert (pairs_needed(0.1), pairs_needed(0.25), pairs_needed(0)) == (40, 16, 1)


def test_measurements_of_any_adapter_are_read_whatever_they_hold(workspace):
    folder = write_run(workspace.root, "odd")
    assert held_out_metrics(find(workspace, "odd"))["reward_accuracy"] == 0.885
    file = folder.adapter / "provenance.json"
    for held_out in ({"reward_accuracy": "<b>", "pairs": {"deep": 1}}, None, []):
        write_json(file, read_json(file) | {"metrics": {"held_out": held_out}})
        assert outcome(held_out_metrics(find(workspace, "odd"))).startswith("No pairs were held out")
    file.write_text("{")
    assert train.row_of(find(workspace, "odd"))[:3] == ["odd", "Finished", ""]


def test_a_damaged_folder_shows_what_it_has(workspace):
    folder = write_run(workspace.root, "truncated", "stopped", steps=3)
    folder.config.write_text("{")
    folder.record.write_text("")
    job = find(workspace, "truncated")
    assert train.row_of(job)[:4] == ["truncated", "Stopped", "", ""]
    assert run_table([job])["data"]
    assert not job.has_adapter


# Tables, zip


def test_a_table_of_several_runs_has_what_differs(workspace):
    for run_id, beta in (("a", 0.1), ("b", 0.3)):
        write_run(workspace.root, run_id, beta=beta)
    jobs = [find(workspace, run_id) for run_id in "ab"]
    table = run_table(jobs)
    assert table["headers"] == ["", "a", "b"]
    assert ["Beta", "0.1", "0.3"] in table["data"]
    assert ["Reward accuracy (held-out)", "0.89 [0.71, 0.96]", "0.89 [0.71, 0.96]"] in table["data"]
    assert "Rank" not in {row[0] for row in table["data"]}
    assert {"Rank", "Hash of the data"} <= {row[0] for row in run_table(jobs[:1])["data"]}


def test_a_packed_run_is_a_peft_folder_with_its_numbers(workspace):
    write_run(workspace.root, "first")
    names = zipfile.ZipFile(pack_run(find(workspace, "first"))).namelist()
    files = (
        "adapter_model.safetensors",
        "adapter_config.json",
        "provenance.json",
        "metrics.jsonl",
        "probes.jsonl",
        "config.json",
    )
    assert {f"first/{name}" for name in files} <= set(names)


# Probes


def test_the_probe_that_is_shown_follows_the_latest_until_one_looks_back():
    rows = [row for step in (0, 20, 40) for row in probe(step)]
    assert train.find_probe(rows, "a", None) == ([0, 20, 40], 40, None)
    back = train.find_probe(rows, "a", None, -1)
    assert back == ([0, 20, 40], 20, ("a", 20))
    assert train.find_probe([*rows, *probe(60)], "a", back[2])[1] == 20  # it stays there as others follow
    assert train.find_probe(rows, "a", ("a", 0), -1)[1:] == (0, ("a", 0))
    assert train.find_probe(rows, "a", ("a", 20), 1)[1:] == (40, None)  # the latest, whatever follows
    assert train.find_probe(rows, "b", ("a", 20))[1] == 40  # of another run
    assert train.find_probe(rows, "a", ("a", 30))[1] == 40  # gone after a resume
    assert train.find_probe([], "a", None) == ([], None, None)


def test_words_that_only_one_side_has_are_marked():
    base, tuned = "Men lead best at work.", "All people lead well at work."
    left, right = train.diff_sides(base, tuned)
    assert ("".join(text for text, _ in left), "".join(text for text, _ in right)) == (base, tuned)
    assert [text for text, label in right if label == "new" and text.strip()] == ["All people", "well"]
    assert train.diff_sides("Men lead best.", tuned) == ([("Men lead best.", None)], [(tuned, None)])  # nearly all would be
    assert train.diff_sides("a" * 5000, "b") == ([("a" * 5000, None)], [("b", None)])


# The head


def test_a_run_shows_what_it_does_before_its_first_step(workspace):
    me = {"pid": os.getpid(), "pid_created": psutil.Process().create_time()}
    status = me | {"phase": "computing reference log-probabilities (30 of 120 pairs)", "share": 0.25}
    write_run(workspace.root, "new", "running", steps=0, total=0, status=status)
    job = find(workspace, "new")
    assert escape("computing reference log-probabilities (30 of 120 pairs)") in jobs.head(job)
    assert 'value="0.250"' in jobs.head(job)
    assert jobs.state_word(job) == "Running"  # 25% of the run it isn't
    job.folder.write_status(replace(job.status, phase="loading the model", share=0.0, step=20, total_steps=80))
    resumed = jobs.head(find(workspace, "new"))
    assert "step 20 of 80 · loading the model" in resumed
    assert 'value="0.250"' in resumed


# Curves


def test_points_are_the_finite_numbers_of_a_key():
    rows = [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": math.nan},
        {"step": 3, "eval_loss": 0.4},
        {"step": 4, "loss": 1},
        {"loss": 2},
    ]
    assert points(rows, "loss") == [(1.0, 0.5), (4.0, 1.0)]
    assert points(rows, "eval_loss") == [(3.0, 0.4)]


def test_moving_mean_of_the_last_five():
    curve = [(float(i), float(i)) for i in range(1, 8)]
    assert [y for _, y in moving_mean(curve)] == [1, 1.5, 2, 2.5, 3, 4, 5]  # (1+…+5)/5 = 3, (2+…+6)/5 = 4, (3+…+7)/5 = 5


def test_a_long_curve_is_thinned_to_means_and_keeps_its_ends():
    curve = [(float(i), float(i % 2)) for i in range(10_001)]
    thin = thinned(curve, 102)
    assert len(thin) == 102
    assert (thin[0], thin[-1]) == (curve[0], curve[-1])
    assert all(0.45 < y < 0.55 for _, y in thin[1:-1])  # of about a hundred 0s and 1s in turn
    assert thinned(curve[:50]) == curve[:50]


@pytest.mark.parametrize("color", [charts.BASE, *charts.SERIES])
@pytest.mark.parametrize("background", ["#ffffff", "#1e293b"])  # of the page's blocks, light and dark
def test_curves_have_contrast_on_light_and_dark(color, background):
    def luminance(color: str) -> float:  # WCAG 2
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted(map(luminance, (color, background)))
    assert (light + 0.05) / (dark + 0.05) >= 3


def test_a_runs_charts_have_training_held_out_interval_and_baseline():
    rows = metrics(40, 40, 1e-4)
    accuracy = training_chart("accuracy", {"a": rows}, pairs=26, longer=0.615)
    _, mean, held_out = accuracy.data
    assert (mean.name, held_out.name) == ("training", "held-out")
    assert list(held_out.x) == [10, 20, 30, 40]
    assert held_out.y[3] - held_out.error_y.arrayminus[3] == pytest.approx(0.70, abs=0.01)  # Wilson, 0.88 of 26: 0.70 to 0.96
    assert held_out.y[3] + held_out.error_y.array[3] == pytest.approx(0.96, abs=0.01)
    line = accuracy.layout.shapes[0]
    assert (line.y0, line.showlegend, line.name) == (0.615, True, "always choosing the longer completion")
    assert (accuracy.layout.xaxis.title.text, accuracy.layout.yaxis.title.text) == ("Step", "Share of pairs")
    assert [curve.name for curve in training_chart("loss", {"a": rows[:3]}).data] == ["training"]  # three points have no mean
    assert training_chart("kl", {"a": rows}) is None
    both = training_chart("margin", {"a": rows, "b": rows})
    assert [curve.name for curve in both.data] == ["a, training", "a, held-out", "b, training", "b, held-out"]
    terms = [{"step": 1, "text_kl": 0.1, "counterfactual_kl": 0.2}]
    assert [curve.name for curve in training_chart("kl", {"a": terms}).data] == [
        "plain text, training",
        "counterfactual, training",
    ]
