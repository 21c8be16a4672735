"""Each benchmark's requests and scores on two or three items, by hand. No model: the log-probabilities are given."""

from __future__ import annotations

import math

import numpy as np
import pytest

from biasdpo.benchmarks import bbq, crows_pairs, stereoset, truthfulqa, winobias
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
