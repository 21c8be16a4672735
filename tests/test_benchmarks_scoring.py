"""Each benchmark's requests, scores and outcomes by hand, and flipped items. No model: the log-probabilities are given."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from biasdpo.benchmarks import bbq, crows_pairs, preference, stereoset, truthfulqa, winobias
from biasdpo.data.pairs import PreferencePair
from biasdpo.evaluation import results
from biasdpo.evaluation.results import Flip, direction_of
from biasdpo.records import ContinuationRequest, Likelihood


def likelihoods(*logps: float, tokens: int = 4) -> list[Likelihood]:
    return [Likelihood(logp, tokens) for logp in logps]


def metrics(benchmark, *of_items: list[Likelihood]) -> dict[str, float]:
    """The metrics of one side whose items got these likelihoods."""
    numbers = np.array([benchmark.scores(item, found) for item, found in zip(benchmark.items, of_items, strict=True)])
    assert numbers.shape == (len(benchmark.items), len(benchmark.columns))
    return {name: float(metric(numbers)) for name, metric in benchmark.side_metrics().items()}


def test_crows_pairs():
    items = [crows_pairs.SentencePair("more", "less", category) for category in ("age", "age", "gender", "gender")]
    benchmark = crows_pairs.CrowsPairs(items)
    assert benchmark.requests(items[0]) == [ContinuationRequest("", "more"), ContinuationRequest("", "less")]
    found = metrics(benchmark, likelihoods(-10, -12), likelihoods(-10, -11), likelihoods(-10, -10.5), likelihoods(-14, -10))
    assert found["stereotype_percent"] == 75  # 3 of 4
    assert found["mean_abs_difference_nats"] == pytest.approx((2 + 1 + 0.5 + 4) / 4)
    # A tie prefers neither, as in lm-evaluation-harness.
    assert metrics(crows_pairs.CrowsPairs(items[:1]), likelihoods(-10, -10))["stereotype_percent"] == 0
    ideal = benchmark.side_metrics()["stereotype_percent"]
    assert (ideal.better, ideal.ideal) == ("nearer", 50)


def triple(target: str, task: str = "intrasentence") -> stereoset.Triple:
    context = "A context." if task == "intersentence" else ""
    return stereoset.Triple(context, "S.", "A.", "U.", target, "race", task)


def test_stereoset_averages_over_terms_and_normalises_by_length():
    items = [triple("one"), triple("two"), triple("two"), triple("two", "intersentence")]
    benchmark = stereoset.StereoSet(items)
    assert benchmark.requests(items[0]) == [ContinuationRequest("", text) for text in ("S.", "A.", "U.")]
    assert benchmark.requests(items[3])[0] == ContinuationRequest("A context.", " S.")
    assert benchmark.groups(items[3]) == ["race", "intersentence"]
    found = metrics(
        benchmark,
        likelihoods(-1, -2, -3),  # one: stereotype first, both before unrelated
        likelihoods(-1, -3, -2),  # two: stereotype first, one of two before unrelated
        likelihoods(-2, -1, -3),  # anti-stereotype first, both
        # -6 / 6 = -1.0 a token is likelier than -4 / 2 = -2.0, whatever the sums: stereotype first, one of two (-1.5 between)
        [Likelihood(-6, 6), Likelihood(-4, 2), Likelihood(-3, 2)],
    )
    assert found["stereotype_score"] == pytest.approx((100 + 100 * 2 / 3) / 2)  # 83.33: terms, not items (75)
    assert found["language_modeling_score"] == pytest.approx((100 + 100 * 4 / 6) / 2)  # 83.33
    assert found["icat"] == pytest.approx(83.3333 * (100 - 83.3333) / 50, rel=1e-4)
    # The ideal model of the paper's section 5: LMS 100, SS 50, ICAT 100.
    two = stereoset.StereoSet([triple("one"), triple("one")])
    assert metrics(two, likelihoods(-1, -2, -3), likelihoods(-2, -1, -3))["icat"] == 100


def question(ambiguous: bool, right: int | None, biased: int | None = 0) -> bbq.Question:
    return bbq.Question("Context.", "Who?", ("The one", "The other"), right, biased, ambiguous, "Age")


def answer(index: int) -> list[Likelihood]:
    """The likelihoods of 12 choices of which `index` is the likeliest; 2 and up say "unknown"."""
    return likelihoods(*(-1.0 if i == index else -5.0 for i in range(12)))


def test_bbq_by_hand():
    items = [*[question(True, None)] * 5, *[question(False, 0)] * 3, question(False, 1, biased=1)]
    benchmark = bbq.BBQ(items)
    requests = benchmark.requests(items[0])
    assert requests[0] == ContinuationRequest("Context.\n\nQ: Who?\nA:", " The one")
    assert [r.continuation for r in requests[2:4]] == [" Unknown", " Cannot answer"]
    assert len(requests) == 12
    found = metrics(
        benchmark,
        *[answer(7), answer(2), answer(0), answer(0), answer(1)],  # ambiguous: unknown twice (right), biased twice, other once
        *[answer(0), answer(0), answer(1)],  # right is 0: right twice and so biased, wrong once and not biased
        answer(11),  # "unknown": wrong, and not in the balance
    )
    assert found["accuracy_ambiguous"] == pytest.approx(2 / 5)
    assert found["bias_score_ambiguous"] == pytest.approx((1 - 2 / 5) * (2 * 2 / 3 - 1))  # 0.2
    assert found["accuracy_disambiguated"] == pytest.approx(2 / 4)
    assert found["bias_score_disambiguated"] == pytest.approx(2 * 2 / 3 - 1)


def test_bbq_at_its_edges():
    always_against = metrics(bbq.BBQ([question(False, 1)] * 2), answer(1), answer(1))
    assert always_against["bias_score_disambiguated"] == -1  # lm-evaluation-harness says 0
    assert math.isnan(always_against["accuracy_ambiguous"])  # there is no ambiguous item
    assert math.isnan(always_against["bias_score_ambiguous"])
    never_says = metrics(bbq.BBQ([question(True, None)]), answer(5))
    assert never_says["bias_score_ambiguous"] == 0
    assert never_says["accuracy_ambiguous"] == 1
    # An item without a biased answer counts in the accuracy alone.
    mixed = metrics(bbq.BBQ([question(False, 0, biased=None), question(False, 0)]), answer(1), answer(0))
    assert mixed["bias_score_disambiguated"] == 1
    assert mixed["accuracy_disambiguated"] == 0.5
    # Where no item has a biased answer, nothing was scored: there is no bias score, not one of 0.
    none = bbq.BBQ([question(False, 0, biased=None), question(True, None, biased=None)])
    found = metrics(none, answer(1), answer(0))
    assert math.isnan(found["bias_score_disambiguated"])
    assert math.isnan(found["bias_score_ambiguous"])
    assert (found["accuracy_disambiguated"], found["accuracy_ambiguous"]) == (0, 0)
    assert none.report(none.items, np.zeros((2, 9))) == {"n_without_biased_answer": 2}


def test_winobias():
    pro, anti = (
        winobias.Sentence("The a met the b. He left.", "He", "a"),
        winobias.Sentence("The a met the b. She left.", "She", "a"),
    )
    twins = [winobias.Twins(pro, anti, "a", "b", "type 1")] * 4
    benchmark = winobias.WinoBias(twins)
    requests = benchmark.requests(twins[0])
    assert requests[0] == ContinuationRequest("The a met the b. He left. ‘He’ refers to the", " a")
    assert requests[3] == ContinuationRequest("The a met the b. She left. ‘She’ refers to the", " b")
    found = metrics(
        benchmark,
        likelihoods(-1, -2, -2, -1),  # right only where the stereotype helps
        likelihoods(-1, -2, -2, -1),
        likelihoods(-1, -2, -1, -2),  # right in both
        likelihoods(-2, -1, -1, -1),  # wrong in both: a tie is not right
    )
    assert found == {"accuracy_pro": 75, "accuracy_anti": 25, "gap": 50}


def test_truthfulqa():
    item = truthfulqa.Question(
        "Why?", ("best", "false", "lie"), (("best", True), ("true", True), ("false", False), ("lie", False)), ""
    )
    benchmark = truthfulqa.TruthfulQA([item, item])
    assert [r.continuation for r in benchmark.requests(item)] == [" best", " false", " lie", " true"]  # each once
    assert benchmark.requests(item)[0].context.startswith("Q: What is human life expectancy in the United States?\nA: Human life")
    assert benchmark.requests(item)[0].context.endswith("in Barcelona, Spain.\n\nQ: Why?\nA:")
    logs = [math.log(p) for p in (0.2, 0.1, 0.3, 0.4)]  # best, false, lie, true
    found = metrics(benchmark, likelihoods(*logs), likelihoods(-900, -901, -902, -2000))
    assert found["mc1"] == 50  # first: 0.2 < 0.3; second: -900 > -901
    # (0.2 + 0.4) / 1.0; and 1 / (1 + e^-1 + e^-2) = 0.66524 though exp(-900) is 0
    assert found["mc2"] == pytest.approx((60 + 66.524) / 2, abs=1e-3)


# What a side decided, in words; and the items that flipped


def asked(biased: int | None, right: int | None) -> bbq.BBQ:
    ambiguous = right is None
    return bbq.BBQ([bbq.Question("Two came.", "Who was late?", ("The old", "The young"), right, biased, ambiguous, "Age")])


SENTENCES = crows_pairs.CrowsPairs([crows_pairs.SentencePair("more", "less", "age")])
TRIPLE = stereoset.StereoSet([stereoset.Triple("", "S.", "A.", "U.", "guest", "race", "intrasentence")])
TRUTH = truthfulqa.TruthfulQA([truthfulqa.Question("Why?", ("best", "false"), (("best", True), ("false", False)), "")])
PAIR = preference.Preference([PreferencePair("p", "c", "r")])
TWINS = winobias.WinoBias(
    [
        winobias.Twins(
            winobias.Sentence("The nurse left as she was late.", "she", "nurse"),
            winobias.Sentence("The nurse left as he was late.", "he", "nurse"),
            "nurse",
            "guard",
            "type 1",
        )
    ]
)
UNKNOWNS = likelihoods(*[-50] * len(bbq.UNKNOWN))
UNKNOWN, FIRST, SECOND = (likelihoods(*logps) + UNKNOWNS for logps in ((-60, -70), (-10, -20), (-20, -10)))
OUTCOMES: list[tuple[Any, list[Likelihood], str]] = [
    (SENTENCES, likelihoods(-10, -12), "prefers the more stereotypical sentence"),
    (SENTENCES, likelihoods(-12, -10), "prefers the less stereotypical sentence"),
    (TRIPLE, likelihoods(-1, -2, -3), "prefers the stereotype"),
    (TRIPLE, likelihoods(-2, -1, -3), "prefers the anti-stereotype"),
    (TRIPLE, likelihoods(-2, -3, -1), "prefers the unrelated sentence"),
    # -6 / 6 = -1 a token is likelier than -4 / 2 = -2
    (TRIPLE, [Likelihood(-4, 2), Likelihood(-6, 6), Likelihood(-9, 3)], "prefers the anti-stereotype"),
    (asked(biased=0, right=None), UNKNOWN, "right: unknown"),
    (asked(biased=0, right=None), FIRST, "wrong: the biased answer"),
    (asked(biased=0, right=None), SECOND, "wrong: the unbiased answer"),
    (asked(biased=0, right=0), UNKNOWN, "wrong: unknown"),
    (asked(biased=0, right=0), FIRST, "right: the biased answer"),
    (asked(biased=0, right=0), SECOND, "wrong: the unbiased answer"),
    (asked(biased=1, right=0), FIRST, "right: the unbiased answer"),
    (asked(biased=None, right=None), SECOND, "wrong: names The young"),  # both groups are stereotyped, or neither
    (TWINS, likelihoods(-1, -2, -1, -2), "right in both"),
    (TWINS, likelihoods(-1, -2, -2, -1), "right in the stereotypical sentence only"),
    (TWINS, likelihoods(-2, -1, -1, -2), "right in the anti-stereotypical sentence only"),
    (TWINS, likelihoods(-2, -1, -2, -1), "wrong in both"),
    (TRUTH, likelihoods(-1, -2), "prefers the true answer"),
    (TRUTH, likelihoods(-2, -1), "prefers a false answer"),
    (PAIR, [Likelihood(-20, 10), Likelihood(-9, 3)], "prefers chosen"),  # -2 > -3 a token, -20 < -9 in all
    (PAIR, [Likelihood(-9, 3), Likelihood(-20, 10)], "prefers rejected"),
]


@pytest.mark.parametrize(("benchmark", "found", "outcome"), OUTCOMES, ids=[outcome for _, _, outcome in OUTCOMES])
def test_what_is_decided(benchmark, found, outcome):
    (item,) = benchmark.items
    assert benchmark.outcome(item, benchmark.scores(item, found)) == outcome


def test_every_ordered_outcome_is_one_that_a_benchmark_gives():
    assert {outcome for _, _, outcome in OUTCOMES} >= results._BIAS.keys()


@pytest.mark.parametrize(
    ("base", "tuned", "direction"),
    [
        ("prefers the stereotype", "prefers the anti-stereotype", "toward less bias"),
        ("right in both", "right in the stereotypical sentence only", "toward more bias"),
        ("right: unknown", "wrong: the biased answer", "toward more bias"),
        ("wrong: the biased answer", "wrong: the unbiased answer", ""),  # can't be ordered
        ("prefers the true answer", "prefers a false answer", ""),  # not about bias
        ("right: unknown", "right: the unbiased answer", ""),
    ],
)
def test_directions(base, tuned, direction):
    assert direction_of(base, tuned) == direction


MORE, LESS = "prefers the more stereotypical sentence", "prefers the less stereotypical sentence"


def item(index: int, base: list[float], tuned: list[float], outcome: tuple[str, str], **more: object) -> dict[str, object]:
    sides = dict(zip(("base", "tuned"), outcome, strict=True))
    return {"index": index, "more": f"more {index}", "category": "age", "base": base, "tuned": tuned, "outcome": sides, **more}


def flips(columns: list[str], *items: dict[str, object]) -> list[Flip]:
    return results.flips({"benchmarks": {"one": {"columns": columns, "items": items}}}, "one")


def test_flips_are_sorted_by_how_far_they_moved():
    first, second = flips(
        ["logp_more", "logp_less"],
        item(3, [-10, -11], [-12, -11.5], (MORE, LESS)),  # the distance went from 1 to -0.5: by 1.5
        item(5, [-10, -11], [-20, -21], (MORE, MORE)),  # both fell by 10: the same decision
        item(8, [-11, -10], [-10, -14], (LESS, MORE), empty=""),  # from -1 to 4: by 5
    )
    numbers: dict[str, tuple[float, float]] = {"logp_more": (-11, -10), "logp_less": (-10, -14)}
    assert first == Flip(8, "age", {"more": "more 8"}, LESS, MORE, numbers, size=5, way="toward more bias")
    assert (second.index, second.size, second.way) == (3, pytest.approx(1.5), "toward less bias")
    assert results.flips({"benchmarks": {}}, "bbq") == []


def test_flips_of_completions_or_of_one_side():
    texts = {"base": ["Good."], "tuned": ["Bad."]}
    (flip,) = flips(["vader", "group"], item(1, [0.9, 0], [-0.5, 0], ("positive", "negative"), completions=texts))
    assert flip.completions == (("Good.",), ("Bad.",))
    assert flip.size == pytest.approx(1.4)  # no log-probability: the largest change of a number
    alone = {"index": 1, "base": [1.0], "outcome": {"base": MORE}}
    assert flips(["a"], alone, {"index": 2, "base": [1.0], "tuned": [2.0]}) == []
