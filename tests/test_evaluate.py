"""Evaluation: the arithmetic of benchmarks and intervals by hand, the command on the embedded model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from biasdpo import dataset, stats
from biasdpo.benchmarks.preference import Preference
from biasdpo.benchmarks.utility import Utility, load_texts
from biasdpo.dataset import PreferencePair, is_held_out
from biasdpo.errors import DatasetError
from biasdpo.records import Likelihood
from tests.lora_factory import write_lora

ROOT = Path(__file__).resolve().parent.parent
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
    base_items, both = np.array([base]), np.concatenate([np.array([base]), np.array([tuned])], axis=-1)
    assert benchmark.side_metrics()["length_normalised_accuracy"](base_items) == pytest.approx(0.5)
    assert benchmark.paired_metrics()["reward_accuracy"](both) == pytest.approx(0.5)
    assert benchmark.paired_metrics()["logratio_margin_nats"](both) == pytest.approx(1.5)  # (5 - 2) / 2
    assert benchmark.report(PAIRS, base_items[0]) == {"pick_the_longer_baseline": 0.5}
    assert [r.continuation for r in benchmark.requests(PAIRS[0])] == ["a longer chosen", "short"]
    assert all(r.end_of_text for r in benchmark.requests(PAIRS[0]))


def test_perplexity_is_per_token_not_per_text():
    benchmark = Utility(["x", "y"])
    base = np.array([[[-2.0, 1.0], [-6.0, 3.0]]])
    assert benchmark.side_metrics()["perplexity"](base) == pytest.approx(math.exp(8 / 4))
    both = np.concatenate([base, [[[-2.0, 1.0], [-6.4, 3.0]]]], axis=-1)
    assert benchmark.paired_metrics()["perplexity_change_percent"](both) == pytest.approx(100 * (math.exp(0.1) - 1))


def test_the_interval_of_a_mean_is_the_textbook_one():
    items = np.random.default_rng(1).normal(3.0, 2.0, size=(400, 1))
    interval, resampled = stats.bootstrap(items, stats.mean_of)
    half_width = 1.96 * items.std() / math.sqrt(400)
    assert interval.value == pytest.approx(items.mean())
    assert interval.high - interval.value == pytest.approx(half_width, rel=0.12)
    assert interval.value - interval.low == pytest.approx(half_width, rel=0.12)
    assert stats.bootstrap(items, stats.mean_of)[0] == interval  # the same seed, the same interval
    assert stats.two_sided_p(resampled) == 1 / stats.RESAMPLES  # far from zero: the smallest p that it can give
    assert stats.two_sided_p(resampled - resampled.mean()) > 0.5


def test_missing_and_foreign_text_files(tmp_path):
    with pytest.raises(DatasetError, match=r"No file .*nontoxic\.jsonl"):
        load_texts(tmp_path)
    file = tmp_path / "real_toxicity_prompts" / "nontoxic.jsonl"
    file.parent.mkdir()
    file.write_text('{"prompt": {"text": "fine"}}\n{"prompt": "a string"}\n')
    with pytest.raises(DatasetError, match="line 2"):
        load_texts(tmp_path)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "biasdpo", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


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
    common = ["evaluate", "--model", "smollm2", "--adapter", str(adapter), "--workspace", str(tmp_path / "w"), "--out", str(out)]
    result = run(*common, "--benchmark", "preference,utility", "--dataset", str(data), "--data-dir", str(tmp_path), "--json")
    assert result.returncode == 0, result.stderr
    printed, written = json.loads(result.stdout), json.loads(out.read_text())
    assert printed["benchmarks"]["preference"]["n"] == 4
    assert printed["benchmarks"]["utility"]["n"] == 1
    assert printed["benchmarks"]["utility"]["n_failed"] == 1  # one token: nothing to predict
    assert len(written["benchmarks"]["preference"]["items"]) == 4
    change = written["benchmarks"]["utility"]["difference"]["perplexity"]
    base, tuned = (written["benchmarks"]["utility"][side]["perplexity"]["value"] for side in ("base", "tuned"))
    assert change["value"] == pytest.approx(tuned - base)
    assert change["value"] != 0.0
    # What a run held out is scored: with a share of half, more of the same file than with a tenth.
    (adapter / "provenance.json").write_text(json.dumps({"model": "smollm2", "config": {"held_out_share": 0.5}}))
    asked = [f"Question {i}?" for i in range(12)]
    data.write_text("".join(json.dumps(rows[0] | {"prompt": p}) + "\n" for p in asked))
    half = run(*common, "--benchmark", "preference", "--dataset", str(data), "--json")
    expected = len(dataset.split([PreferencePair(p, "a", "b") for p in asked], 0.5).held_out)
    assert json.loads(half.stdout)["benchmarks"]["preference"]["n"] == expected > 0
    assert expected != len(dataset.split([PreferencePair(p, "a", "b") for p in asked], 0.1).held_out)
    for arguments, message in (
        (["--benchmark", "bbqq"], "Unknown benchmark 'bbqq'"),
        (["--benchmark", "preference"], "--dataset"),
        (["--benchmark", "utility", "--limit", "0"], "--limit"),
        (["--benchmark", "utility", "--data-dir", str(tmp_path / "none")], "No file"),
    ):
        bad = run(*common, *arguments)
        assert bad.returncode == 2
        assert message in bad.stderr
        assert bad.stderr.count("\n") == 1
