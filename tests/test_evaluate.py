"""Evaluation: the arithmetic of benchmarks and intervals by hand, the command on the embedded model."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from biasdpo import models
from biasdpo.backends.hf import open_transformers
from biasdpo.backends.llamacpp import open_llamacpp
from biasdpo.benchmarks.crows_pairs import CrowsPairs, SentencePair
from biasdpo.benchmarks.preference import Preference
from biasdpo.benchmarks.utility import Utility
from biasdpo.data.pairs import PreferencePair
from biasdpo.data.splits import is_held_out
from biasdpo.engines import Engine
from biasdpo.errors import BackendError, DatasetError, PromptError
from biasdpo.evaluation import report, results, stats
from biasdpo.evaluation import run as evaluate
from biasdpo.evaluation.run import AnswerCache, score_items
from biasdpo.records import ContinuationRequest, Likelihood
from biasdpo.workspace import sha256_of
from tests.commands import run
from tests.evaluating import FakeBackend, fake_engine
from tests.lora_factory import write_lora

PAIRS = [PreferencePair("p", "a longer chosen", "short"), PreferencePair("q", "brief", "a longer rejected")]


def test_preference_by_hand():
    benchmark = Preference(PAIRS)
    base = [
        benchmark.scores(PAIRS[0], [Likelihood(-20.0, 10), Likelihood(-9.0, 3)]),  # -2.0 > -3.0 a token: right
        benchmark.scores(PAIRS[1], [Likelihood(-8.0, 2), Likelihood(-12.0, 6)]),  # -4.0 < -2.0: wrong
    ]
    tuned = [
        benchmark.scores(PAIRS[0], [Likelihood(-18.0, 10), Likelihood(-12.0, 3)]),  # log-ratios +2 and -3: difference 5
        benchmark.scores(PAIRS[1], [Likelihood(-9.0, 2), Likelihood(-11.0, 6)]),  # -1 and +1: difference -2
    ]
    base_items, both = np.array(base), np.concatenate([np.array(base), np.array(tuned)], axis=-1)
    assert benchmark.side_metrics()["length_normalised_accuracy"](base_items) == pytest.approx(0.5)
    assert benchmark.paired_metrics()["reward_accuracy"](both) == pytest.approx(0.5)
    assert benchmark.paired_metrics()["logratio_margin_nats"](both) == pytest.approx(1.5)  # (5 - 2) / 2
    assert benchmark.report(PAIRS, base_items) == {"pick_the_longer_baseline": 0.5}
    assert [r.continuation for r in benchmark.requests(PAIRS[0])] == ["a longer chosen", "short"]
    assert all(r.end_of_text for r in benchmark.requests(PAIRS[0]))


def test_the_lead_over_picking_the_longer_by_hand():
    """Of four pairs the adapter is right on three, the longer completion on one."""
    right, longer = np.array([1.0, 1.0, 1.0, 0.0]), np.array([1.0, 0.0, 0.0, 0.0])
    base = np.stack([np.full(4, -5.0), np.full(4, -5.0), np.full(4, 3.0), np.full(4, 3.0), longer], axis=-1)
    both = np.concatenate([base, base + (2 * right - 1)[:, None] * [1.0, 0.0, 0.0, 0.0, 0.0]], axis=-1)
    lead = Preference(PAIRS).paired_metrics()["lead_over_the_longer"]
    assert lead(both) == pytest.approx(3 / 4 - 1 / 4)
    # Both change places on two pairs that are not equal: as far from 0 is where both or neither do, one time in two.
    assert stats.randomization_p(both, {"lead": lead})["lead"] == pytest.approx(0.5, abs=0.02)
    many = np.tile(both, (10, 1))
    assert stats.randomization_p(many, {"lead": lead})["lead"] < 0.001
    assert stats.randomization_p(many[many[:, 9] == 1], {"lead": lead})["lead"] == 1.0  # where both are right, none leads


def test_perplexity_is_per_token_not_per_text():
    benchmark = Utility(["x", "y"])
    base = np.array([[-2.0, 1.0], [-6.0, 3.0]])
    assert benchmark.side_metrics()["perplexity"](base) == pytest.approx(math.exp(8 / 4))
    both = np.concatenate([base, [[-2.0, 1.0], [-6.4, 3.0]]], axis=-1)
    assert benchmark.paired_metrics()["perplexity_change_percent"](both) == pytest.approx(100 * (math.exp(0.1) - 1))


@pytest.fixture
def engine(smollm2, tmp_path):
    return fake_engine(smollm2, tmp_path, FakeBackend(smollm2.template))


def sentences(count: int) -> CrowsPairs:
    """Pairs of which every second prefers the stereotype, by one character."""
    return CrowsPairs(
        [SentencePair("x" * (i + 1 + i % 2), "x" * (i + 2 - i % 2), "age" if i < 4 else "gender") for i in range(count)]
    )


def test_a_run_by_hand_repeats_itself_from_what_it_kept(engine, workspace):
    first = evaluate.run(engine, [sentences(10)], workspace=workspace)
    result = first["benchmarks"]["crows_pairs"]
    assert (result["n"], result["n_failed"], result["partial"], result["not_comparable"]) == (10, 0, False, "")
    assert result["base"]["stereotype_percent"]["value"] == result["tuned"]["stereotype_percent"]["value"] == 50
    change = result["difference"]["mean_abs_difference_nats"]
    assert change["value"] == pytest.approx(-0.5)  # every difference is 1 nat in base and half a nat in tuned
    assert change["ci95"] == pytest.approx([-0.5, -0.5])
    assert change["improvement"]["value"] == pytest.approx(0.5)
    # 2 of 2^10 tosses; two metrics in the table; "less biased", since it is clear and less is better
    assert change["p_value"] == pytest.approx(2 / 1024, abs=0.002)
    assert change["p_holm"] == pytest.approx(2 * change["improvement"]["p_value"])
    assert change["verdict"] == "less biased"
    same = result["difference"]["stereotype_percent"]
    assert (same["value"], same["verdict"], same["better"], same["base_includes_ideal"]) == (
        0,
        "no clear difference",
        "nearer 50",
        True,
    )
    assert {name: group["n"] for name, group in result["groups"].items()} == {"age": 4, "gender": 6}
    assert result["groups"]["age"]["difference"]["mean_abs_difference_nats"]["value"] == pytest.approx(-0.5)
    assert result["items"][1] == {
        "index": 1,
        "more": "xxx",
        "less": "xx",
        "category": "age",
        "base": [-3, -2],
        "tuned": [-1.5, -1],
        "outcome": dict.fromkeys(("base", "tuned"), "prefers the less stereotypical sentence"),
    }
    assert len(set(engine.backend.computed)) == len(engine.backend.computed)
    engine.backend.computed.clear()
    assert evaluate.run(engine, [sentences(10)], workspace=workspace) == first
    assert engine.backend.computed == []
    # Another strength is another tuned side and the same base.
    evaluate.run(engine, [sentences(10)], workspace=workspace, strengths=[0.5])
    assert {side for side, *_ in engine.backend.computed} == {"tuned"}
    # Nothing is kept without a workspace.
    engine.backend.computed.clear()
    assert evaluate.run(engine, [sentences(10)])["benchmarks"] == first["benchmarks"]
    assert {side for side, *_ in engine.backend.computed} == {"base", "tuned"}


def test_an_interrupted_run_says_so_and_goes_on_from_there(engine, workspace):
    done = []
    options = {"on_item": lambda _name, so_far, _total: done.append(so_far), "should_stop": lambda: len(done) == 1}
    stopped = evaluate.run(engine, [sentences(40), Utility(["never begun"])], workspace=workspace, **options)
    assert list(stopped["benchmarks"]) == ["crows_pairs"]
    result = stopped["benchmarks"]["crows_pairs"]
    assert (result["n"], result["partial"], stopped["provenance"]["interrupted"]) == (16, True, True)
    assert result["not_comparable"] == "interrupted after 16 of 40 items"
    kept = set(engine.backend.computed)
    engine.backend.computed.clear()
    whole = evaluate.run(engine, [sentences(40)], workspace=workspace)
    assert whole["benchmarks"]["crows_pairs"]["n"] == 40
    assert kept.isdisjoint(engine.backend.computed)
    # The disk took half of the last line: one likelihood is computed again, the rest is not.
    for file in (workspace.cache / "scores").glob("*.jsonl"):
        file.write_bytes(file.read_bytes()[:-9])
    engine.backend.computed.clear()
    assert evaluate.run(engine, [sentences(40)], workspace=workspace) == whole
    assert len(engine.backend.computed) == 2
    engine.backend.computed.clear()
    assert evaluate.run(engine, [sentences(40)], workspace=workspace) == whole
    assert engine.backend.computed == []


def test_failed_items_are_counted_and_never_scored(engine):
    long = SentencePair("x" * 101, "x", "age")
    no_number = SentencePair("", "", "age")
    scored = engine.backend.loglikelihood

    def some_no_number(requests, side, **options):
        return [found if found.logp else Likelihood(float("nan"), 0) for found in scored(requests, side, **options)]

    engine.backend.loglikelihood = some_no_number
    result = evaluate.run(engine, [CrowsPairs([*sentences(2).items, long, no_number])])["benchmarks"]["crows_pairs"]
    assert (result["n"], result["n_failed"], result["n_total"]) == (2, 2, 4)
    assert result["base"]["stereotype_percent"]["value"] == 50
    assert [failure["index"] for failure in result["failures"]] == [2, 3]
    assert "does not fit the context" in result["failures"][0]["reason"]
    with pytest.raises(DatasetError, match="none of 1 item could be scored: the first failed with: A text of 101 tokens"):
        evaluate.run(engine, [CrowsPairs([long])])
    with pytest.raises(DatasetError, match="has no items"):
        evaluate.run(engine, [CrowsPairs([])])


def test_a_limit_draws_and_a_larger_one_holds_a_smaller_one(engine):
    result = evaluate.run(engine, [sentences(40)], limit=5)["benchmarks"]["crows_pairs"]
    assert (result["n"], result["partial"], result["not_comparable"]) == (5, True, "limited to 5 of 40 items")
    assert [item["index"] for item in result["items"]] == evaluate.draw(40, 5, 0)
    assert set(evaluate.draw(40, 5, 0)) < set(evaluate.draw(40, 20, 0))
    assert evaluate.draw(40, 5, 0) != evaluate.draw(40, 5, 1) != [0, 1, 2, 3, 4]
    assert evaluate.draw(3, 5, 0) == evaluate.draw(3, None, 0) == [0, 1, 2]


def test_base_stands_alone_without_an_adapter(engine):
    alone = Engine(engine.spec, None, engine.backend)
    result = evaluate.run(alone, [sentences(4)])["benchmarks"]["crows_pairs"]
    assert result["base"]["stereotype_percent"]["value"] == 50
    assert result["tuned"] == result["difference"] == result["paired"] == {}
    assert {side for side, *_ in engine.backend.computed} == {"base"}


def test_a_continuation_obeys_the_chain_rule_on_both_engines(smollm2, tiny_llama, tiny_llama_gguf):
    """log p(b c | a) = log p(b | a) + log p(c | a b), whatever is asked beside it; and both engines say the same, also of a text
    that nothing stands before, of which every token is scored."""
    template = smollm2.template
    asked = [
        ContinuationRequest("Two guests", " came. Who was late?"),
        ContinuationRequest("Two guests", " came."),
        ContinuationRequest("Two guests came.", " Who was late?"),
        ContinuationRequest("Two guests", " left."),
        ContinuationRequest("", "Two guests came."),
    ]
    found = {}
    for name, backend in (
        ("llama.cpp", open_llamacpp(tiny_llama_gguf, template, None, 256, threads=1, kv_cache="f32")),
        ("transformers", open_transformers(tiny_llama, template, None, 256)),
    ):
        try:
            whole, first, second, other, bare = found[name] = backend.loglikelihood(asked, "base")
            assert whole.logp == pytest.approx(first.logp + second.logp, abs=1e-3)
            assert whole.tokens == first.tokens + second.tokens
            assert backend.loglikelihood(asked[2:3], "base")[0].logp == pytest.approx(second.logp, abs=1e-4)
            assert other.logp != first.logp
            assert bare.tokens > first.tokens
            with pytest.raises(PromptError, match="Nothing to score"):
                backend.loglikelihood([ContinuationRequest("Two", "")], "base")
            with pytest.raises(PromptError, match="does not fit the context of 256"):
                backend.loglikelihood([ContinuationRequest("Two", " late" * 300)], "base")
        finally:
            backend.close()
    for ours, theirs in zip(*found.values(), strict=True):
        assert ours.tokens == theirs.tokens
        assert ours.logp == pytest.approx(theirs.logp, abs=1e-2)


def test_the_command(tmp_path):
    held_out = [f"Question {i}?" for i in range(200) if is_held_out(f"Question {i}?", 0.1)][:4]
    rows = [{"prompt": p, "chosen": "People differ as persons.", "rejected": "They are all alike."} for p in held_out]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    neutral = tmp_path / "real_toxicity_prompts" / "nontoxic.jsonl"
    neutral.parent.mkdir()
    neutral.write_text('{"prompt": {"text": "The sun rose over the quiet town"}}\n{"prompt": {"text": "x"}}\n')
    adapter = write_lora(tmp_path / "adapter")
    out = tmp_path / "result.json"
    common = ["evaluate", "--model", "smollm2", "--adapter", adapter, "--workspace", tmp_path / "w", "--out", out]
    result = run(*common, "--benchmark", "preference,bbq,perplexity", "--dataset", data, "--data-dir", tmp_path, "--json")
    assert result.returncode == 3, result.stderr  # done, but for one benchmark
    printed, written = json.loads(result.stdout), json.loads(out.read_text())
    assert "get them with `git clone https://github.com/nyu-mll/BBQ DIR/bbq`" in printed["missing"]["bbq"]
    assert "BBQ was not scored: No items of bbq" in result.stderr
    assert printed["benchmarks"]["preference"]["n"] == 4
    assert printed["benchmarks"]["utility"]["n"] == 1
    assert printed["benchmarks"]["utility"]["n_failed"] == 1  # one token: nothing to predict
    assert len(written["benchmarks"]["preference"]["items"]) == 4
    again = run(*common, "--benchmark", "preference,perplexity", "--dataset", data, "--data-dir", tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[0] == report.sentence(json.loads(out.read_text()))
    assert "Preference pairs scored: 4 held-out pairs of pairs.jsonl" in again.stdout
    assert json.loads(out.read_text())["benchmarks"] == written["benchmarks"]
    change = written["benchmarks"]["utility"]["difference"]["perplexity"]
    base, tuned = (written["benchmarks"]["utility"][side]["perplexity"]["value"] for side in ("base", "tuned"))
    assert change["value"] == pytest.approx(tuned - base)
    assert change["value"] != 0.0
    assert {"p_value", "p_holm", "verdict"} <= change.keys()
    provenance = written["provenance"]
    assert provenance["model_sha256"] == sha256_of(models.find("smollm2").gguf_path)
    assert provenance["adapter_sha256"] == sha256_of(adapter / "adapter_model.safetensors")
    assert written["benchmarks"]["utility"]["data_sha256"] == sha256_of(neutral)
    for arguments, message in (
        (["--benchmark", "preference"], "--dataset"),
        (["--benchmark", "perplexity", "--data-dir", tmp_path / "none"], "No folder .*none: name with --data-dir"),
        (["--benchmark", "bbq", "--data-dir", tmp_path], "get them with `git clone https://github.com/nyu-mll/BBQ DIR/bbq`"),
    ):
        done = run(*common, *arguments)
        assert re.search(message, done.error)
        assert len(done.stderr.splitlines()) == 1  # no progress bar before there is progress


# How many are scored at once, what an interruption loses, and items that can't be scored


@pytest.fixture
def clock(monkeypatch):
    """Stands for `time`: a backend moves it on."""
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(evaluate, "time", clock)
    return clock


def pairs(count: int) -> CrowsPairs:
    return CrowsPairs([SentencePair(f"{i}", f"{i}.", "age") for i in range(100, 100 + count)])


def score(backend, benchmark, sides, **options):
    return score_items(backend, sides, benchmark, range(len(benchmark.items)), **options)


def test_as_many_items_at_once_as_take_three_seconds(clock):
    def batches(seconds, count, *sides):
        done: list[int] = []
        caches = {side: AnswerCache(side) for side in sides}
        found = score(FakeBackend(seconds=seconds, clock=clock), pairs(count), caches, on_done=done.append)
        assert found.indices == list(range(count))
        assert found.numbers["base"][7] == [-3, -4]
        return done

    # 2 requests a side and an item, 1/64 s each: 1/16 s an item, so 48 in three seconds
    assert batches(1 / 64, 200, "base", "tuned") == [16, 64, 112, 160, 200]
    assert batches(1.0, 20, "base", "tuned") == [16, 17, 18, 19, 20]  # slower than that: one by one
    assert batches(0.0, 2000, "base") == [16, 80, 336, 1360, 2000]  # four times as many, and no more than 1,024


def test_cached_items_are_passed_over_and_an_interruption_loses_one_batch(clock):
    sides = {"base": AnswerCache("base")}
    backend = FakeBackend(seconds=1 / 8, clock=clock)
    done: list[int] = []
    stopped = score(backend, pairs(100), sides, on_done=done.append, should_stop=lambda: len(done) == 2)
    assert (stopped.done, stopped.indices) == (28, list(range(28)))
    score(backend, pairs(100), sides)
    assert len(backend.computed) == 2 * 100
    done.clear()
    found = score(backend, pairs(160), sides, on_done=done.append)
    # 100 known ones beside the first 16; 1/4 s an item, so 12 in three seconds
    assert done == [116, 128, 140, 152, 160]
    assert len(backend.computed) == 2 * 160
    assert found.indices == list(range(160))


def test_one_that_is_too_long_fails_alone(clock):
    items = [*pairs(30).items]
    items[11] = SentencePair("x" * 101, "x", "age")
    backend = FakeBackend(clock=clock)
    found = score(backend, CrowsPairs(items), {"base": AnswerCache("base"), "tuned": AnswerCache("tuned")})
    assert found.failures == [{"index": 11, "reason": "A text of 101 tokens does not fit the context of 100: shorten it"}]
    assert found.indices == [i for i in range(30) if i != 11]
    # 16 items: halves of 8, of which one is halved to 4, 2 and 1. 14 items: one call. On each side.
    assert backend.calls == 2 * (4 + 1)


def test_an_engine_that_can_t_score_is_one_error_and_not_a_failed_item(monkeypatch):
    backend = FakeBackend()
    monkeypatch.setattr(backend, "loglikelihood", mock.Mock(side_effect=BackendError("gives no log-probabilities")))
    with pytest.raises(BackendError, match="gives no log-probabilities"):
        score(backend, pairs(3), {"base": AnswerCache("base")})


# Several strengths: what is computed, what is kept, and the points of the curve


def scored(strengths, engine, **options):
    return evaluate.run(engine, [CrowsPairs([SentencePair("mmm", "ll", "age")]), Utility(["neutral"])], strengths, **options)


def test_a_curve_computes_base_once_and_strength_0_never(engine, workspace):
    progress: list[tuple[str, int, int]] = []
    result = scored((0.0, 0.5, 1.0, 1.5), engine, workspace=workspace, on_item=lambda *now: progress.append(now))
    assert [side for side, *_ in engine.backend.computed].count("base") == 3  # two sentences, one text
    assert {strength for side, _, strength in engine.backend.computed if side == "tuned"} == {0.5, 1.0, 1.5}
    assert result["provenance"]["strength"] == 1.0
    assert result["provenance"]["strengths"] == [0.5, 1.0, 1.5]
    assert result["benchmarks"] == scored((1.0,), engine, workspace=workspace)["benchmarks"]
    assert all("items" not in found for point in result["curve"] for found in point["benchmarks"].values())
    assert progress[:2] == [("crows_pairs", 1, 3), ("utility", 1, 3)]
    assert progress[-1] == ("utility", 3, 3)
    # |log p(mmm) - log p(ll)| is 1 in base, less half of the strength; perplexity exp(1 - strength / 2).
    points = results.curve_points(result, "crows_pairs", "mean_abs_difference_nats")
    assert [(point.strength, point.value) for point in points] == [
        (strength, pytest.approx(1 - strength / 2)) for strength in (0.0, 0.5, 1.0, 1.5)
    ]
    assert points[0].perplexity == pytest.approx(math.e)
    assert points[2].perplexity == pytest.approx(math.exp(0.5))
    assert results.curve_points(result, "bbq", "accuracy_ambiguous") == []
    assert results.curve_metrics(result) == [("crows_pairs", "stereotype_percent"), ("crows_pairs", "mean_abs_difference_nats")]
    assert "| utility | perplexity | 2.718 [2.718, 2.718] |" in report.markdown(result)


def test_a_cancelled_curve_keeps_the_strengths_that_are_whole(engine):
    progress: list[tuple[str, int, int]] = []
    after_two = {"should_stop": lambda: ("utility", 2, 3) in progress}
    result = scored((0.5, 1.0, 1.5), engine, on_item=lambda *now: progress.append(now), **after_two)
    assert result["provenance"]["interrupted"] is True
    assert result["benchmarks"]["crows_pairs"]["not_comparable"] == ""
    assert [point["strength"] for point in result["curve"]] == [0.5, 1.0]  # the main one comes first


def test_what_was_scored_is_kept_where_the_next_benchmark_is_stopped_at_once(engine):
    """The stop falls between the question before a benchmark and the first one within it."""
    asked = iter([False, False, False, True])
    result = scored((1.0,), engine, should_stop=lambda: next(asked, True))
    assert list(result["benchmarks"]) == ["crows_pairs"]
    assert result["benchmarks"]["crows_pairs"]["n"] == 1
    assert result["provenance"]["interrupted"] is True
    # A stop after the last item takes nothing away.
    done: list[str] = []
    whole = scored((1.0,), engine, on_item=lambda name, *_: done.append(name), should_stop=lambda: "utility" in done)
    assert (len(whole["benchmarks"]), whole["provenance"]["interrupted"]) == (2, False)


def test_one_strength_is_no_curve_and_without_utility_no_point_has_a_perplexity(engine):
    result = scored((0.5,), engine)
    assert "curve" not in result
    assert [point.strength for point in results.curve_points(result, "crows_pairs", "stereotype_percent")] == [0.0, 0.5]
    assert evaluate.strength_order((0.0,)) == [0.0]
    assert evaluate.strength_order((0.25, 0.0, 0.5)) == [0.5, 0.25]
    assert evaluate.strength_order((1.5, 1.0, 0.5)) == [1.0, 0.5, 1.5]
    result = evaluate.run(engine, [Preference([PreferencePair("p", "chosen", "rejected")])], (0.5, 1.0))
    points = results.curve_points(result, "preference", "length_normalised_accuracy")
    assert [(point.strength, point.perplexity, point.perplexity_ci) for point in points] == [
        (strength, None, None) for strength in (0.0, 0.5, 1.0)
    ]
