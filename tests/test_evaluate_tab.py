"""The Evaluate tab without a page: numbers, what charts compute, and fields read into requests."""

from __future__ import annotations

import random
from typing import Any

import pytest
from biasdpo.ui.evaluate import STRENGTHS, missing, requests_of

from biasdpo.errors import ConfigError, EvaluationError
from biasdpo.evaluation.results import CurvePoint, Flip
from biasdpo.ui import charts, evaluate
from biasdpo.ui.components import decimals, interval, number, p_value
from tests.evaluation_results import result

CHOSEN = ["smollm2", ["none"], "benchmarks", ["crows_pairs"], ["perplexity"], [], "bbq", 200, 0, "", "run"]


@pytest.fixture(scope="module")
def made() -> Any:
    return result(24, n_failed=2, benchmarks=("crows_pairs", "bbq", "utility"))


def test_numbers_have_three_digits_and_a_true_minus():
    assert [decimals(x) for x in (0.61, 1.99, 4.2, 61.0, 1234.0)] == [3, 3, 2, 1, 0]
    assert number(-0.5, 3, signed=True) == "−0.500"
    assert number(-0.0001, 3) == "0.000"  # not "−0.000"
    assert number(None, 2) == number(float("nan"), 2) == "–"
    assert interval((-1.0, 2.0), 1, signed=True) == "[−1.0, +2.0]"
    assert [p_value(p) for p in (0.0001, 0.0123, 0.5, None)] == ["< 0.001", "0.012", "0.50", "–"]


def test_an_improvement_is_in_halves_of_bases_interval_to_the_right(made):
    marks = {(mark.row.benchmark, mark.row.metric): mark for mark in charts.marks([("one", made)])}
    mark = marks["crows_pairs", "stereotype_percent"]
    low, high = made["benchmarks"]["crows_pairs"]["base"]["stereotype_percent"]["ci95"]
    improved = made["benchmarks"]["crows_pairs"]["difference"]["stereotype_percent"]["improvement"]["value"]
    assert mark.at[1] == pytest.approx(improved / ((high - low) / 2))
    assert marks["utility", "perplexity"].value < 0  # dearer is to the left, though the number rises
    assert ("utility", "perplexity_change_percent") not in marks  # says the same again
    assert charts.unit_of((1.0, 1.0), (-2.0, 4.0)) == 3.0  # base is a point: half of 4 - -2
    assert charts.unit_of(None, (1.0, 1.0)) == 0.0


def test_the_plane_places_each_strength_by_its_change_of_perplexity():
    points = [CurvePoint(s, 80 - 20 * s, (60.0, 90.0), 20 * (1 + s / 100), None) for s in (0.0, 0.5, 1.0)]
    assert [round(x, 6) for x, _ in charts.changes(points)] == [0.0, 0.5, 1.0]  # 20.1 / 20 is +0.5 %


def test_what_goes_to_compare_and_to_label():
    def flip(**texts: str) -> Flip:
        return Flip(3, "race-color", texts, "a", "b", {})

    assert evaluate.prompt_of({"context": "Two met.", "question": "Who?"}) == "Two met.\n\nWho?"
    assert evaluate.prompt_of({"more": "We can all see that he.", "less": "We can all see that she."}) == (
        "Continue: We can all see that"
    )
    pair = evaluate.to_judge(flip(more="He did.", less="She did."), random.Random(1))
    assert {pair.left, pair.right} == {"He did.", "She did."}
    assert pair.prompt.category == "race"
    written = Flip(4, "", {"prompt": "The"}, "a", "b", {}, completions=(("one",), ("other",)))
    assert evaluate.pair_of(written) == ("one", "other")
    with pytest.raises(EvaluationError, match="no two texts"):
        evaluate.to_judge(flip(question="Who?"), random.Random(1))


def test_fields_come_to_requests():
    one, other = requests_of(*CHOSEN[:1], ["none", "/tmp/x"], *CHOSEN[2:])
    assert (one.benchmarks, one.limit, one.dataset) == (("crows_pairs", "perplexity"), 200, "")
    assert other.adapter == "/tmp/x"
    (curve,) = requests_of("smollm2", ["mine"], "curve", *CHOSEN[3:])
    assert (curve.benchmarks, curve.strengths) == (("bbq", "perplexity"), STRENGTHS)
    (everything,) = requests_of(*CHOSEN[:7], 0, *CHOSEN[8:])
    assert everything.limit is None


@pytest.mark.parametrize(
    ("place", "value", "line"),
    [
        (3, [], "No benchmark is ticked"),
        (3, ["no such"], "benchmarks must be one of preference, .*: got 'no such'"),
        (7, "many", "Items of each benchmark must be a whole number"),
        (7, -3, "limit must be a whole number from 1"),
        (8, 0.5, "Seed must be a whole number"),
        (1, ["a"] * 7, "At most 6 adapters"),
        (0, {"path": "x"}, "model is empty"),
    ],
)
def test_posted_nonsense_is_one_line(place, value, line):
    posted = [*CHOSEN]
    posted[place] = value
    if place == 3 and not value:
        posted[4] = []
    with pytest.raises(ConfigError, match=line):
        requests_of(*posted)


def test_what_a_folder_lacks_is_named(tmp_path):
    (tmp_path / "crows_pairs").mkdir()
    (request,) = requests_of(*CHOSEN[:9], str(tmp_path), "run")
    assert missing(request) == ["perplexity"]  # which reads real_toxicity_prompts/
    assert "has no folder for Perplexity" in evaluate.data_note(str(tmp_path), missing(request))
    (hub,) = requests_of(*CHOSEN)
    assert missing(hub) == []
