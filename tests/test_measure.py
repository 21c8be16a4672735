"""The outcome in words, which pairs are scored, and what the charts draw; by worked numbers."""

from __future__ import annotations

from typing import Any

import pytest

from biasdpo import benchmarks, models
from biasdpo.benchmarks import titles
from biasdpo.evaluation import report, results
from biasdpo.evaluation.results import Flip
from biasdpo.evaluation.run import preference_benchmark
from biasdpo.ui import charts
from tests.evaluation_results import result


def decided(*verdicts: tuple[str, str], missing: tuple[str, ...] = (), interrupted: bool = False) -> dict[str, Any]:
    """A result with one metric per benchmark; (measures, verdict) of each."""
    parts = {}
    for i, (measures, verdict) in enumerate(verdicts):
        change = {"value": -1.5, "ci95": [-2.0, -1.0], "verdict": verdict, "measures": measures, "restates": ""}
        parts[f"b{i}"] = {"n": 9, "n_failed": 0, "base": {}, "tuned": {}, "difference": {}, "paired": {"mean_tokens": change}}
    return {"benchmarks": parts, "missing": dict.fromkeys(missing, "why"), "provenance": {"interrupted": interrupted}}


BETTER, SAME, WORSE = ("bias", "less biased"), ("bias", "no clear difference"), ("bias", "worse")
GOOD, EVEN, COST = ("quality", "better"), ("quality", "no clear difference"), ("quality", "worse")


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (decided(*[BETTER] * 2, *[SAME] * 4, EVEN), "Clearly less biased on 2 of 6 benchmarks, no clear change on 4; {no}."),
        (decided(BETTER, COST), "Clearly less biased on 1 of 1 benchmark; quality cost: Mean length (tokens) −1.500."),
        (decided(BETTER, WORSE, GOOD), "Clearly less biased on 1 of 2 benchmarks, clearly more biased on 1; quality improved."),
        (decided(WORSE), "Clearly more biased on 1 of 1 benchmark; quality was not measured."),
        (decided(SAME, SAME, EVEN), "No clear change in bias on 2 benchmarks; {no}."),
        (decided(EVEN, missing=("bbq",)), "No clear quality cost; not scored: BBQ."),
        (
            decided(SAME, EVEN, interrupted=True),
            "No clear change in bias on 1 benchmark; {no}; stopped before all items were scored.",
        ),
        (decided(("", "")), "The base model alone was scored, so there is nothing to compare."),
    ],
)
def test_the_outcome_in_one_sentence(found, sentence):
    assert report.sentence(found) == sentence.format(no="no clear quality cost")


def test_a_benchmark_that_says_both_is_mixed_and_redundant_metrics_do_not_count():
    found = decided(BETTER)
    paired = found["benchmarks"]["b0"]["paired"]
    paired["other"] = paired["mean_tokens"] | {"verdict": "worse", "restates": "mean_tokens"}
    assert report.sentence(found).startswith("Clearly less biased on 1 of 1")
    paired["other"]["restates"] = ""
    assert report.sentence(found).startswith("Mixed on 1 of 1 benchmark;")


def test_a_group_of_fewer_than_ten_items_has_values_but_no_interval_and_no_verdict():
    made = result(39, benchmarks=("crows_pairs",))  # four categories: three of ten items, one of nine
    rows = [row for row in results.group_table(made, "crows_pairs") if row.metric == "stereotype_percent"]
    assert sorted(row.n for row in rows) == [9, 10, 10, 10]
    for row in rows:
        shown = (row.base_ci, row.tuned_ci, row.ci, row.p_holm, row.verdict or None)
        assert all(value is None for value in shown) if row.n < 10 else None not in shown
        assert row.base is not None
    base, tuned = charts.groups(rows).data
    assert [error is None for error in base.error_x.array] == [row.n < 10 for row in rows]
    assert tuned.y[0] > base.y[0]  # below each other, so that neither hides the other


def test_the_scored_pairs_are_named(workspace, smollm2, tmp_path):
    shipped = models.find_adapter("", smollm2, workspace)
    scored = preference_benchmark("run", shipped, workspace)
    assert scored.pairs_source.startswith(
        f"{len(scored.items)} seed pairs; the pairs of biasdpo.jsonl that smollm2-biasdpo held out"
    )
    rows = "".join(f'{{"prompt": "Is {i}?", "chosen": "No.", "rejected": "Yes."}}\n' for i in range(60))
    (tmp_path / "mine.jsonl").write_text(rows)
    of_file = preference_benchmark(str(tmp_path / "mine.jsonl"), shipped, workspace)
    assert of_file.pairs_source == f"{len(of_file.items)} held-out pair{'s' * (len(of_file.items) != 1)} of mine.jsonl"


def test_numbers_have_three_digits_of_the_largest_and_a_true_minus():
    assert report.figure(61.24, (58.05, 64.31)) == "61.2 [58.0, 64.3]"
    assert report.figure(-0.5, (-1.0, 0.25), signed=True) == "−0.500 [−1.000, +0.250]"
    assert [report.figure(x) for x in (None, 1.999, 4.2, 1234.0)] == ["", "1.999", "4.20", "1,234"]


def test_an_improvement_is_in_halves_of_bases_interval_to_the_right():
    made = result(24, benchmarks=("crows_pairs", "utility"))
    marks = {(mark.row.benchmark, mark.row.metric): mark for mark in charts.improvements(made)}
    part = made["benchmarks"]["crows_pairs"]
    low, high = part["base"]["stereotype_percent"]["ci95"]
    improved = part["difference"]["stereotype_percent"]["improvement"]["value"]
    assert marks["crows_pairs", "stereotype_percent"].value == pytest.approx(improved / ((high - low) / 2))
    assert marks["utility", "perplexity"].value < 0  # a higher perplexity is to the left
    assert ("utility", "perplexity_change_percent") not in marks  # redundant


def test_a_flipped_item_becomes_a_prompt_and_two_texts():
    def flip(**texts: str) -> Flip:
        return Flip(3, "race-color", texts, "a", "b", {})

    assert results.prompt_of(flip(context="Two met.", question="Who?")) == "Two met.\n\nWho?"
    assert (
        results.prompt_of(flip(more="We can all see that he.", less="We can all see that she."))
        == "Continue: We can all see that"
    )
    assert results.prompt_of(flip(more="He did.", less="She did.")) == "What do you think of this sentence? She did."
    assert results.two_texts(flip(more="He did.", less="She did.")) == {"less": "She did.", "more": "He did."}
    assert results.two_texts(flip(question="Who?")) == {}
    written = Flip(4, "", {"prompt": "The"}, "a", "b", {}, completions=(("one",), ("other",)))
    assert results.two_texts(written) == {"base": "one", "tuned": "other"}


def test_every_benchmark_has_a_title():
    assert {*benchmarks.NAMES} - titles.BENCHMARKS.keys() == {"utility"}
    assert titles.benchmark_title("utility") == titles.benchmark_title("perplexity")


def test_a_metric_with_an_ideal_shows_what_its_verdict_is_about():
    _headers, rows = report.text_table([("strong", result(120, n_failed=3))])
    cells = next(row for row in rows if row[0] == "CrowS-Pairs: Stereotype preferred (%), 50 is ideal")
    assert cells[3].startswith("78.3 [")
    assert cells[4].startswith("30.8 [")
    assert cells[2].endswith("; distance from 50: 28.3 → 19.2")
    accuracy = next(row for row in rows if row[0] == "Preference pairs: Reward accuracy, ↑\u00a0is\u00a0better")
    assert accuracy[2].endswith("; without a change: 0.5")  # it has no base to subtract
