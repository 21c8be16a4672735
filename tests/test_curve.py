"""Several strengths in one evaluation: what is computed, what is kept, and the points of the curve, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from biasdpo import models
from biasdpo.benchmarks.crows_pairs import CrowsPairs, SentencePair
from biasdpo.benchmarks.preference import Preference
from biasdpo.benchmarks.utility import Utility
from biasdpo.data.pairs import PreferencePair
from biasdpo.engines import Engine
from biasdpo.evaluation import report, results, run
from biasdpo.records import Likelihood
from tests.lora_factory import write_lora


class Fake:
    """Each character costs 1 nat, and a tuned one less by half of the strength; of "less" sentences twice that."""

    name = "fake"
    device = "CPU, 2 threads"

    def __init__(self, template: Any) -> None:
        self.template = template
        self.computed: list[tuple[str, float]] = []

    def loglikelihood(self, requests, side, *, strength=1.0):
        self.computed += [(side, strength)] * len(requests)
        found = []
        for request in requests:
            text = getattr(request, "continuation", "") or request.text
            saved = 0.0 if side == "base" else 0.5 * strength * (2 if text.startswith("l") else 1)
            found.append(Likelihood(-len(text) + saved, len(text)))
        return found


@pytest.fixture
def engine(smollm2, tmp_path):
    adapter = models.AdapterSpec("mine", write_lora(tmp_path / "mine", layers=1), "smollm2")
    return Engine(smollm2, adapter, Fake(smollm2.template))


def scored(strengths: tuple[float, ...], engine: Engine, **options: Any) -> dict[str, Any]:
    return run.run(engine, [CrowsPairs([SentencePair("mm", "ll", "age")]), Utility(["neutral"])], strengths, **options)


def test_a_curve_computes_base_once_and_strength_0_never(engine, workspace):
    told: list[tuple[str, int, int]] = []
    result = scored((0.0, 0.5, 1.0, 1.5), engine, workspace=workspace, on_item=lambda *now: told.append(now))
    computed = engine.backend.computed
    assert [side for side, _ in computed].count("base") == 3  # two sentences, one text
    assert {strength for side, strength in computed if side == "tuned"} == {0.5, 1.0, 1.5}
    assert result["provenance"]["strength"] == 1.0
    assert result["provenance"]["strengths"] == [0.5, 1.0, 1.5]
    alone = run.run(engine, [CrowsPairs([SentencePair("mm", "ll", "age")]), Utility(["neutral"])], workspace=workspace)
    assert result["benchmarks"] == alone["benchmarks"]
    assert all("items" not in found for point in result["curve"] for found in point["benchmarks"].values())
    assert told[:2] == [("crows_pairs", 1, 3), ("utility", 1, 3)]
    assert told[-1] == ("utility", 3, 3)
    # |log p(mm) - log p(ll)| is 0 in base, then half of the strength; perplexity exp((7 - strength / 2) / 7).
    points = results.curve_points(result, "crows_pairs", "mean_abs_difference_nats")
    assert [(point.strength, point.value) for point in points] == [
        (0.0, 0.0), (0.5, pytest.approx(0.25)), (1.0, pytest.approx(0.5)), (1.5, pytest.approx(0.75))
    ]  # fmt: skip
    assert points[0].perplexity == pytest.approx(2.71828, abs=1e-4)  # e^(7/7)
    assert points[2].perplexity == pytest.approx(2.53094, abs=1e-4)  # e^(6.5/7)
    assert results.curve_points(result, "bbq", "accuracy_ambiguous") == []
    assert results.curve_metrics(result) == [("crows_pairs", "stereotype_percent"), ("crows_pairs", "mean_abs_difference_nats")]
    assert "| utility | perplexity | 2.718 [2.718, 2.718] |" in report.markdown(result)


def test_a_cancelled_curve_keeps_the_strengths_that_are_whole(engine):
    told: list[tuple[str, int, int]] = []

    def stop() -> bool:
        return ("utility", 2, 3) in told  # after the second strength

    result = scored((0.5, 1.0, 1.5), engine, on_item=lambda *now: told.append(now), should_stop=stop)
    assert result["provenance"]["interrupted"] is True
    assert result["benchmarks"]["crows_pairs"]["not_comparable"] == ""
    assert 1.0 in [point["strength"] for point in result["curve"]]  # the main one comes first
    assert 1.5 not in [point["strength"] for point in result["curve"]]


def test_what_was_scored_is_kept_where_the_next_benchmark_is_stopped_at_once(engine):
    """The stop falls between the question before a benchmark and the first one within it."""
    asked: list[bool] = []

    def stop() -> bool:
        asked.append(len(asked) >= 3)  # before and within the first; before the second
        return asked[-1]

    result = scored((1.0,), engine, should_stop=stop)
    assert list(result["benchmarks"]) == ["crows_pairs"]
    assert result["benchmarks"]["crows_pairs"]["n"] == 1
    assert result["provenance"]["interrupted"] is True
    # A stop after the last item takes nothing away.
    told: list[str] = []
    whole = scored((1.0,), engine, on_item=lambda name, *_: told.append(name), should_stop=lambda: "utility" in told)
    assert (len(whole["benchmarks"]), whole["provenance"]["interrupted"]) == (2, False)


def test_one_strength_is_no_curve(engine):
    result = scored((0.5,), engine)
    assert "curve" not in result
    assert [point.strength for point in results.curve_points(result, "crows_pairs", "stereotype_percent")] == [0.0, 0.5]
    assert run.strength_order((0.0,)) == [0.0]
    assert run.strength_order((0.25, 0.0, 0.5)) == [0.5, 0.25]
    assert run.strength_order((1.5, 1.0, 0.5)) == [1.0, 0.5, 1.5]


def test_preference_without_a_benchmark_of_utility_has_points_without_a_price(engine):
    benchmark = Preference([PreferencePair("p", "chosen", "rejected")])
    result = run.run(engine, [benchmark], (0.5, 1.0))
    points = results.curve_points(result, "preference", "length_normalised_accuracy")
    assert [(point.strength, point.perplexity, point.perplexity_ci) for point in points] == [
        (0.0, None, None), (0.5, None, None), (1.0, None, None)
    ]  # fmt: skip
