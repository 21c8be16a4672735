"""What training learned: margins by hand, groups, order, the command."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest

from biasdpo import learned
from biasdpo.backends.base import Cancellation
from biasdpo.data import splits
from biasdpo.data.pairs import PreferencePair
from biasdpo.models import find_adapter
from biasdpo.records import Likelihood
from tests.commands import run


class Scores:
    """A backend whose log-probabilities are given: base -1 a character; tuned adds `gain` to texts that have the word "all"."""

    def __init__(self, gain: float) -> None:
        self.gain = gain

    def loglikelihood(self, requests, side, *, strength=1.0):
        added = strength * self.gain if side == "tuned" else 0.0
        return [
            Likelihood(-len(one.continuation) + added * ("all" in one.continuation), len(one.continuation)) for one in requests
        ]


PAIRS = [
    PreferencePair("Who?", "We all.", "They.", "gender"),
    PreferencePair("Why?", "They.", "We all.", "race"),
    PreferencePair("How?", "They.", "Them.", "race"),
]


def scored(gain: float, **options) -> list[learned.LearnedPair]:
    found = learned.score_pairs(Scores(gain), PAIRS, **options)  # type: ignore[arg-type]
    return learned.placed(found, ["a.jsonl", "a.jsonl", "b.jsonl"], {PAIRS[0].pair_id})


def test_margins_by_hand():
    assert [one.margin for one in scored(3.0)] == [3.0, -3.0, 0.0]
    assert [one.margin for one in scored(3.0, strength=0.5)] == [1.5, -1.5, 0.0]
    assert [one.right for one in scored(3.0)] == [1.0, 0.0, 0.5]
    assert [one.part for one in scored(3.0)] == ["trained on", "not trained on", "not trained on"]
    assert [one.pair.prompt for one in learned.hardest(scored(3.0))] == ["Why?", "How?", "Who?"]


def test_a_pair_that_only_the_longer_completion_carries():
    pair = PreferencePair("Q", "long", "short")
    assert learned.LearnedPair(pair, 4.0, 3.0, 40, 10).by_length_only
    assert not learned.LearnedPair(pair, 4.0, 3.0, 10, 10).by_length_only
    assert not learned.LearnedPair(pair, 3.0, 4.0, 10, 40).by_length_only  # it is wrong


def test_the_summary_by_group():
    summary = learned.summarize(scored(3.0))
    assert (summary["n"], summary["accuracy"], summary["margin_nats"]) == (3, {"value": 0.5}, 0.0)  # too few for an interval
    assert {name: part["accuracy"]["value"] for name, part in summary["by_category"].items()} == {"gender": 1.0, "race": 0.25}
    assert {name: part["n"] for name, part in summary["by_source"].items()} == {"a.jsonl": 2, "b.jsonl": 1}
    assert np.sum([part["histogram"] for part in summary["by_source"].values()]) == 3
    assert len(summary["edges"]) == len(summary["by_part"]["trained on"]["histogram"]) + 1
    many = learned.summarize(scored(3.0) * 4)
    low, high = many["accuracy"]["ci95"]
    assert low < many["accuracy"]["value"] == 0.5 < high
    assert learned.summarize([]) == {"n": 0}


def test_what_was_scored_before_a_cancelation_stays():
    stopped = Cancellation()
    steps = learned.score_pairs(Scores(1.0), PAIRS * 8, cancellation=stopped)  # type: ignore[arg-type]
    first = list(islice(steps, 2))
    stopped.set()
    assert len(first + list(steps)) == 16  # those of one call


@pytest.mark.slow
def test_the_command(tmp_path, smollm2, session_workspace):
    rows = splits.load_file(splits.SEED_PAIRS)[:12]
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps({**vars(pair)}) + "\n" for pair in rows))
    options = ("--dataset", file, "--workspace", session_workspace.root)
    result = json.loads(run("learned", "smollm2-biasdpo", *options, "--json").stdout)
    assert (result["summary"]["n"], len(result["pairs"])) == (12, 12)
    margins = [pair["margin_nats"] for pair in result["pairs"]]
    assert margins == sorted(margins)
    assert np.ptp(margins) > 0.1
    assert {pair["part"] for pair in result["pairs"]} == {"not trained on"}
    assert {pair["source"] for pair in result["pairs"]} == {"some.jsonl"}
    done = run("learned", "smollm2-biasdpo", *options, "--limit", 1)
    assert (done.returncode, done.stdout.count("rejected")) == (0, 1)
    assert "of 12 pairs right" in done.stdout
    known = find_adapter("smollm2-biasdpo", smollm2, session_workspace)
    assert known is not None
    assert splits.own_sources(known, session_workspace) == [splits.SEED_PAIRS]


def test_without_an_adapter_it_is_one_line(tmp_path):
    assert "name a run or an adapter's folder" in run("learned", "none", "--workspace", tmp_path).error
    assert "nothing-like-that" in run("learned", "nothing-like-that", "--workspace", tmp_path).error
