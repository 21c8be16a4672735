"""The score of a blind reading, by hand; and the shipped one is scored as it says."""

from __future__ import annotations

import json

import pytest

from biasdpo.workspace import ASSETS
from scripts import reading

WRITTEN = {side: {"tokens": tokens, "finish_reason": "limit"} for side, tokens in (("base", 8), ("tuned", 4))}
KEY = {
    "one": {"set": "loaded", "a": "base", "b": "tuned", **WRITTEN},
    "two": {"set": "loaded", "a": "tuned", "b": "base", **WRITTEN},
    "three": {"set": "loaded", "a": "tuned", "b": "base", **WRITTEN},
}
VERDICTS = [
    {"id": "one", "preferred": "b", "a": ["prejudice", "broken"], "b": ["rejects"]},
    {"id": "two", "preferred": "b", "a": ["evasive"], "b": []},
    {"id": "three", "preferred": "tie", "a": [], "b": ["prejudice"]},
]


def test_shares_are_of_sides_and_not_of_places():
    found = reading.shares(reading.check(VERDICTS, KEY, "x"), KEY, "loaded")
    assert {name: found[name] for name in ("n", "tuned", "base", "tie")} == {"n": 3, "tuned": 1, "base": 1, "tie": 1}
    assert found["base_labels"] == pytest.approx({"prejudice": 2 / 3, "rejects": 0.0, "evasive": 0.0, "broken": 1 / 3})
    assert found["tuned_labels"] == pytest.approx({"prejudice": 0.0, "rejects": 1 / 3, "evasive": 1 / 3, "broken": 0.0})
    assert (found["base_tokens"], found["tuned_tokens"], found["tuned_ended"]) == (8, 4, 0)


def test_kappa_by_hand():
    assert reading.kappa(["a", "a", "b", "b"], ["a", "b", "b", "b"]) == pytest.approx((0.75 - 0.5) / 0.5)
    assert reading.kappa(["a", "b"], ["b", "a"]) == -1.0
    assert reading.kappa(["a", "a"], ["a", "a"]) == 1.0
    both = reading.agreement(
        *({row["id"]: row for row in rows} for rows in (VERDICTS, VERDICTS[:1] + VERDICTS[2:] + VERDICTS[1:2]))
    )
    assert set(both.values()) == {1.0}


@pytest.mark.parametrize("wrong", [{"preferred": "c"}, {"a": ["rude"]}, {"id": "four"}])
def test_a_verdict_that_is_unknown_or_missing_is_named(wrong):
    with pytest.raises(ValueError, match="my-file"):
        reading.check([VERDICTS[0] | wrong, *VERDICTS[1:]], KEY, "my-file")


def test_the_shipped_reading_is_of_the_shipped_prompts_and_scored_from_its_verdicts():
    folder = ASSETS / "adapters" / "smollm2-biasdpo" / "reading"
    key = json.loads((folder / "key.json").read_text(encoding="utf-8"))["items"]
    assert {row["id"]: row["set"] for row in reading.read_lines(reading.PROMPTS)} == {
        name: one["set"] for name, one in key.items()
    }
    assert reading.score(folder) == json.loads((folder / "results.json").read_text(encoding="utf-8"))
