"""What a side decided, in words, by benchmark; and the items that flipped. All numbers are given."""

from __future__ import annotations

from typing import Any

import pytest

from biasdpo.benchmarks import bbq, crows_pairs, preference, stereoset, truthfulqa, winobias
from biasdpo.data.pairs import PreferencePair
from biasdpo.evaluation import results
from biasdpo.evaluation.results import Flip, direction_of
from biasdpo.records import Likelihood


def likelihoods(*logps: float) -> list[Likelihood]:
    return [Likelihood(logp, 4) for logp in logps]


def question(biased: int | None, right: int | None) -> bbq.BBQ:
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
    (question(biased=0, right=None), UNKNOWN, "right: unknown"),
    (question(biased=0, right=None), FIRST, "wrong: the biased answer"),
    (question(biased=0, right=None), SECOND, "wrong: the unbiased answer"),
    (question(biased=0, right=0), UNKNOWN, "wrong: unknown"),
    (question(biased=0, right=0), FIRST, "right: the biased answer"),
    (question(biased=0, right=0), SECOND, "wrong: the unbiased answer"),
    (question(biased=1, right=0), FIRST, "right: the unbiased answer"),
    (question(biased=None, right=None), SECOND, "wrong: names The young"),  # both groups are stereotyped, or neither
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
