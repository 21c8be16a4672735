"""What the Evaluate tab shows, from results and records to HTML, without a page."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

from biasdpo.config import EvaluationConfig
from biasdpo.errors import ConfigError, EvaluationError
from biasdpo.evaluation.results import CurvePoint, Flip, flips, table
from biasdpo.jobs.job import Job, JobFolder, JobRecord, Progress, Status
from biasdpo.ui import charts, evaluate
from biasdpo.ui.components import decimals, interval, number, p_value
from biasdpo.ui.evaluate import STRENGTHS, About, missing, requests_of
from tests.evaluation_results import result

CHOSEN = ["smollm2", ["none"], "benchmarks", ["crows_pairs"], ["perplexity"], [], "bbq", 200, 0, "", "run"]


@pytest.fixture(scope="module")
def made() -> Any:
    return result(24, n_failed=2, benchmarks=("crows_pairs", "bbq", "utility"))


def text_of(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def evaluation(job_id: str = "one", state: Any = "running", **status: Any) -> Job:
    config = EvaluationConfig(model="smollm2", adapter="none", benchmarks=("crows_pairs", "utility"), limit=50)
    folder = JobFolder(Path("/w/evaluations") / job_id)
    return Job(folder, "evaluate", config, Status(state, **status), JobRecord(id=job_id, kind="evaluate"))


# Numbers and words


def test_numbers_have_three_digits_and_a_true_minus():
    assert [decimals(x) for x in (0.61, 1.99, 4.2, 61.0, 1234.0)] == [3, 3, 2, 1, 0]
    assert number(-0.5, 3, signed=True) == "−0.500"
    assert number(-0.0001, 3) == "0.000"  # not "−0.000"
    assert number(None, 2) == number(float("nan"), 2) == "–"
    assert interval((-1.0, 2.0), 1, signed=True) == "[−1.0, +2.0]"
    assert [p_value(p) for p in (0.0001, 0.0123, 0.5, None)] == ["< 0.001", "0.012", "0.50", "–"]


# The forest


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


def test_what_lies_beyond_the_axis_is_marked_at_its_edge():
    row = table(result(8, benchmarks=("crows_pairs",)))[0]
    mark = charts.Mark("one", 0, row, value=99.0, low=2.0, high=150.0, unit=1.0)
    drawn = charts._forest_drawn(mark, 5.0)
    assert "bd-off-right" in drawn
    assert "bd-beyond-right" in drawn
    assert "left: 96.00%" in drawn  # 4 + 92 * (5 + 5) / 10


def test_verdicts_are_told_by_word_and_symbol_not_by_colour_alone(made):
    drawn = charts.forest([("one", made)])
    assert "▼" in drawn
    assert "worse" in text_of(drawn)
    assert '<span aria-hidden="true">▲</span> less biased' in charts.verdict("less biased")
    assert charts.verdict("") == ""


def test_base_alone_has_nothing_to_draw(made):
    alone = {"benchmarks": {"utility": dict(made["benchmarks"]["utility"])}, "provenance": {}}
    alone["benchmarks"]["utility"] |= {"tuned": {}, "difference": {}, "paired": {}, "groups": {}}
    assert "base stands alone" in charts.forest([("one", alone)])
    assert "no adapter" in evaluate.summary(alone)
    assert "Perplexity" in text_of(evaluate.result_table(alone))


# The result


def test_the_table_says_failed_not_comparable_and_how_far_from_the_ideal(made):
    told = text_of(evaluate.result_table(made))
    assert "24 items · 2 failed , not scored · not comparable: limited to 24 of 240 items" in told
    assert "distance to 50:" in told
    assert "2 × the prompt is longer than the model&#x27;s context" in evaluate.failures(made)
    assert text_of(evaluate.summary(made)).startswith("Bias, 4 metrics:")


def test_nothing_of_a_result_is_taken_for_html(made):
    bad = {**made, "provenance": {"model": "<img src=x>", "adapter": "/home/somebody/<b>mine"}}
    told = evaluate.facts(bad)
    assert "<img" not in told
    assert "somebody" not in told  # never a folder of this machine
    flip = Flip(1, "<i>", {"more": "<script>", "less": "b"}, "prefers <u>", "b", {"logp_more": (-1.0, -2.0)})
    card = evaluate.card(flip, "crows_pairs")
    assert not re.search("<(i|script|u)>", card)


def test_bars_stand_in_one_scale_with_their_ideal(made):
    choices = dict(charts.grouped(made))
    assert choices["CrowS-Pairs · Prefers the stereotype (%)"] == "crows_pairs/stereotype_percent"
    drawn = charts.bars(made, "crows_pairs", "stereotype_percent")
    assert drawn.count("<tr") == 1 + 5 + 1  # head, all and four categories, axis
    assert drawn.count('class="bd-ideal" style="left: 50.00%"') == 10  # both sides of five rows, of 0 to 100
    assert "Nothing of this metric" in charts.bars(made, "crows_pairs", "no such")


# The plane


def test_the_plane_places_each_strength_by_its_change_of_perplexity():
    points = [CurvePoint(s, 80 - 20 * s, (60.0, 90.0), 20 * (1 + s / 100), None) for s in (0.0, 0.5, 1.0)]
    assert [round(x, 6) for x, _ in charts.changes(points)] == [0.0, 0.5, 1.0]  # 20.1 / 20 is +0.5 %
    drawn = charts.plane(points, "crows_pairs", "stereotype_percent", "nearer 50")
    assert drawn.count("<circle") == 3
    assert ">base</text>" in drawn
    assert ">ideal</text>" in drawn
    without = [CurvePoint(0.5, 1.0, (0.0, 2.0), None, None)]
    assert "No curve" in charts.plane(without, "bbq", "accuracy", "higher")


# What flipped


def test_flips_are_filtered_paged_and_counted(made):
    found = flips(made, "crows_pairs")
    assert found
    assert evaluate.ways(found)[0] == (f"all ({len(found)})", "")
    less = evaluate.filtered(found, "toward less bias")
    assert {flip.way for flip in less} == {"toward less bias"}
    assert evaluate.filtered(less, evaluate.flip_change(less[0])) == less  # of two outcomes there is one way to less bias
    shown = evaluate.listed(found, "crows_pairs", 24, 1)
    assert shown.count("<article") == 1
    assert "logp more" in shown
    assert "all 24 alike" in evaluate.listed([], "crows_pairs", 24, 1)


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


# Several


def test_several_results_have_a_column_each_and_say_where_they_may_not_stand_side_by_side(made):
    other = result(16, benchmarks=("crows_pairs",), adapter="gentle")
    drawn = evaluate.comparison([("one", made), ("two", other)])
    told = text_of(drawn)
    assert "24 / 16 items" in told
    assert told.count("not side by side: scored on different numbers of items (24, 16)") == 2  # table and forest
    assert "gentle" in told


# The list, one evaluation, a new one


def test_progress_has_a_bar_a_benchmark_and_the_seconds_left():
    head = evaluate.head(
        evaluation(progress=(Progress("crows_pairs", 5, 50), Progress("utility", 0, 0)), eta_seconds=30.0, phase="scoring")
    )
    assert 'aria-label="CrowS-Pairs" aria-valuenow="10"' in head
    told = text_of(head)
    assert "5 of 50" in told
    assert "waits" in told
    assert "about 30 s left" in told
    failed = evaluate.head(evaluation(state="failed", error="No folder <x>: get it"))
    assert "No folder &lt;x&gt;: get it" in failed
    assert "before anything was scored" in evaluate.head(evaluation(state="stopped"))


def test_the_list_marks_the_chosen_one_and_hides_folders():
    about = About("smollm2", "/home/somebody/mine", ("crows_pairs",), None, 6)
    rows = evaluate.listed([(evaluation(), about), (evaluation("two"), About())], "two")
    assert re.search('data-id="two" aria-current="true"', rows)
    assert "6 strengths · CrowS-Pairs" in rows
    assert "somebody" not in rows


def test_the_estimate_says_what_is_not_known():
    told = text_of(evaluate.estimate({"crows_pairs": 60.0, "bbq": None}, 2))
    assert told.startswith("About 2 min , 2 adapters one after another: CrowS-Pairs 60 s.")  # 2 x 60 s
    assert "Not known yet: BBQ" in told
    assert "press Estimate" in evaluate.estimate({"bbq": None}, 1)


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
        (3, ["no such"], "benchmarks must be one of preference, .*got 'no such'"),
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
