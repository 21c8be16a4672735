"""Blind pairs, what becomes of an answer, hidden repeats, word diffs; and where prompts come from."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from biasdpo import labeling, prompts
from biasdpo.data import pairs
from biasdpo.data.health import AnnotatorShares, Confounds
from biasdpo.data.pairs import shown_pair_id
from biasdpo.errors import ConfigError, DatasetError, PromptError
from biasdpo.labeling import BlindPair, Details
from biasdpo.prompts import Prompt
from biasdpo.records import Completion, GenerationPair, Sampling
from biasdpo.ui import components

PAIR = GenerationPair(
    prompt="Who leads?",
    model="smollm2",
    adapter="demo",
    backend="llamacpp",
    sampling=Sampling(max_new_tokens=8, seed=7),
    system="",
    strength=1.0,
    canary_kl_nats=0.5,
    left=Completion("base", " Men do. ", 3, "end_of_text"),
    right=Completion("tuned", "Anyone can.", 3, "end_of_text"),
)
PROMPT = Prompt("Who leads?", "gender", "women")
SHOWN = BlindPair(PROMPT, "Men do.", "Anyone can.", "base", "tuned", "smollm2", "demo", "llamacpp", "{}", 7)
OAK = Details("gender", " women ", " a note ", "oak")


def row(pair: BlindPair, answer: labeling.Answer, details: Details = OAK, **kwargs: object) -> dict[str, object]:
    return asdict(labeling.judgment(pair, answer, details, **kwargs))  # type: ignore[arg-type]


def test_sides_are_drawn_and_both_orders_come_up():
    rng = random.Random(0)
    shown = [labeling.blind(PAIR, PROMPT, rng) for _ in range(200)]
    lefts = [pair.left_side for pair in shown]
    assert 70 < lefts.count("base") < 130  # 100 expected, standard deviation 7
    for pair in shown:
        texts = {pair.left_side: pair.left, pair.right_side: pair.right}
        assert texts == {"base": "Men do.", "tuned": "Anyone can."}
    assert json.loads(shown[0].sampling) == asdict(PAIR.sampling) | {"system": "", "strength": 1.0}


def test_two_samples_of_one_side_are_numbered():
    pair = replace(PAIR, left=Completion("tuned", "a", 1, "limit"), right=Completion("tuned", "b", 1, "limit"))
    assert {labeling.known(pair, PROMPT).left_side, labeling.known(pair, PROMPT).right_side} == {"tuned 1", "tuned 2"}


@pytest.mark.parametrize(
    ("left", "right", "words"), [("same", " same", "the same text"), ("", "b", "is empty"), ("a", "\n", "is empty")]
)
def test_nothing_to_judge(left, right, words):
    pair = replace(PAIR, left=Completion("base", left, 1, "limit"), right=Completion("tuned", right, 1, "limit"))
    with pytest.raises(DatasetError, match=words):
        labeling.known(pair, PROMPT)


def test_base_only_is_no_pair():
    with pytest.raises(ConfigError, match="needs an adapter"):
        labeling.known(replace(PAIR, right=None), PROMPT)


@pytest.mark.parametrize(
    ("answer", "chosen", "verdict", "side"),
    [
        ("left", "Men do.", "preferred", "base"),
        ("right", "Anyone can.", "preferred", "tuned"),
        ("tie", "Men do.", "tie", ""),
        ("both_biased", "Men do.", "both_biased", ""),
    ],
)
def test_what_an_answer_becomes(answer, chosen, verdict, side):
    made = row(SHOWN, answer, seconds=1.23456)
    assert (made["chosen"], made["verdict"], made["meta"]["chosen_side"]) == (chosen, verdict, side)
    assert {made["chosen"], made["rejected"]} == {"Men do.", "Anyone can."}
    assert (made["category"], made["target_group"], made["note"], made["annotator"]) == ("gender", "women", "a note", "oak")
    assert made["pair_id"] == SHOWN.pair_id == pairs.pair_id_of("Who leads?", "Anyone can.", "Men do.")
    assert (made["meta"]["left_side"], made["meta"]["seed"], made["meta"]["seconds"]) == ("base", 7, 1.235)
    assert (made["original_chosen"], made["original_rejected"]) == ("", "")


def test_an_edit_keeps_what_was_generated():
    made = row(SHOWN, "right", left="Men do.", right="Anyone can lead. ")
    assert (made["chosen"], made["original_chosen"]) == ("Anyone can lead.", "Anyone can.")
    assert (made["rejected"], made["original_rejected"]) == ("Men do.", "")
    assert made["pair_id"] != SHOWN.pair_id == shown_pair_id(made)
    with pytest.raises(DatasetError, match="same text"):
        row(SHOWN, "left", left="Anyone can.", right=None)
    with pytest.raises(DatasetError, match="After the edit a completion is empty: write something"):
        row(SHOWN, "left", left=" ")


@pytest.mark.parametrize(
    ("details", "words"),
    [
        ({"category": "sports"}, "category must be one of gender, race, religion, other: got 'sports'"),
        ({"annotator": "x" * 201}, "at most 200 characters: got 201"),
        ({"note": "n" * 2001}, "at most 2,000 characters"),
        ({"target_group": "a\0b"}, "NUL"),
    ],
)
def test_details_are_checked(details, words):
    with pytest.raises((ConfigError, DatasetError), match=words):
        Details(**details)


def test_without_a_pseudonym_or_with_another_answer_nothing_is_made():
    with pytest.raises(ConfigError, match="No pseudonym"):
        row(SHOWN, "left", Details())
    with pytest.raises(ConfigError, match="An answer is one of left, right, tie, both_biased: got 'skip'"):
        row(SHOWN, "skip")


@pytest.mark.parametrize("answer", ["left", "right", "tie"])
@pytest.mark.parametrize("sides", [("base", "tuned"), ("tuned", "base"), ("base 2", "base 1"), ("pasted 1", "pasted 2")])
def test_a_pair_comes_back_as_it_was_shown_whatever_was_said_and_edited(answer, sides):
    pair = replace(SHOWN, left_side=sides[0], right_side=sides[1])
    edits = {} if answer == "tie" else {"left": "Men do it."}
    back = labeling.shown_pair(row(pair, answer, **edits))
    assert back == replace(pair, prompt=Prompt("Who leads?"))  # what the first judge called it is not told


def test_a_second_opinion_on_an_imported_pair_knows_its_position():
    imported = row(replace(SHOWN, left_side="", right_side="", model="", adapter=""), "left")
    imported["meta"]["chosen_side"] = ""
    for seed in range(6):
        pair = labeling.second_opinion(imported, random.Random(seed))
        assert {pair.left_side, pair.right_side} == {"given 1", "given 2"}
        made = row(pair, "right", replace(OAK, annotator="elm"))
        assert (made["chosen"], made["meta"]["chosen_side"]) == (pair.right, pair.right_side)
        assert labeling.shown_pair(made) == pair
        told = components.saved(labeling.judgment(pair, "right", OAK), pair, True, 1)
        assert "right is less biased" in told


def test_a_known_side_is_said_in_the_source():
    assert row(SHOWN, "left")["source"] == "label"
    assert row(replace(SHOWN, sides_known=True), "left")["source"] == "compare"


def test_categories_of_foreign_files_become_ours():
    made = prompts.of_rows(
        [
            {"prompt": text, "category": category, "target_group": ""}
            for text, category in (("a", "Gender "), ("b", "age"), ("c", ""))
        ]
    )
    assert {p.text: p.category for p in made} == {"a": "gender", "b": "other", "c": ""}
    assert prompts.known("Can an atheist be a good person?").category == "religion"
    assert prompts.known("Anything else?") == Prompt("Anything else?")


def test_hidden_repeats_come_one_in_twenty_swapped_and_never_of_the_latest():
    pairs = [replace(SHOWN, left=f"Left {i}.") for i in range(30)]
    rows = [row(pair, "left") for pair in pairs]
    rng = random.Random(1)
    drawn = [labeling.repeat(rows, rng) for _ in range(4000)]
    repeats = [pair for pair in drawn if pair is not None]
    assert 150 < len(repeats) < 250  # 200 expected, standard deviation 13.8
    ids = {pair.pair_id for pair in pairs[:-5]}
    for pair in repeats:
        assert (pair.left_side, pair.right_side) == ("tuned", "base")
        assert pair.repeat_of == pair.pair_id
        assert pair.pair_id in ids
    assert all(labeling.repeat(rows[:5], rng) is None for _ in range(200))
    again = row(repeats[0], "right")
    assert again["repeat_of"] == repeats[0].pair_id
    later = [labeling.repeat([*rows, again], rng) for _ in range(2000)]
    assert all(pair is None or pair.pair_id != again["repeat_of"] for pair in later)


def test_a_pasted_pair_is_checked():
    rng = random.Random(0)
    sides = {labeling.pasted(PROMPT, "one", "other", rng).left_side for _ in range(40)}
    assert sides == {"pasted 1", "pasted 2"}
    with pytest.raises(DatasetError, match="Your pair: first completion is empty"):
        labeling.pasted(PROMPT, " ", "other", rng)
    with pytest.raises(DatasetError, match="same text"):
        labeling.pasted(PROMPT, "one ", "one", rng)


def test_word_diff_is_of_words_and_loses_nothing():
    pieces = labeling.word_diff("She is a nurse, kind.", "He is a surgeon, kind.")
    assert [(kind, text) for kind, text in pieces if kind != "same"] == [
        ("out", "She"), ("in", "He"), ("out", "nurse"), ("in", "surgeon"),
    ]  # fmt: skip
    one, other = "a\n\n b  c’s 1,5 €", "a b’s c 1.5 €!"
    pieces = labeling.word_diff(one, other)
    assert "".join(text for kind, text in pieces if kind != "in") == one
    assert "".join(text for kind, text in pieces if kind != "out") == other


def test_the_length_guard():
    assert labeling.length_warning("a" * 130, "b" * 100) == ""
    assert labeling.length_warning("a" * 131, "b" * 100).startswith("Left is 1.31 times as long")
    assert labeling.length_warning("a" * 10, "b" * 100).startswith("Right is 10.00 times")
    assert "empty" in labeling.length_warning(" ", "b")


def test_templates_times_groups():
    made = prompts.expand("Why are {group} {trait}?", ["women", " men ", "women"], ["late", "{group}"], "gender")
    assert [p.text for p in made] == [
        "Why are women late?",
        "Why are men late?",
        "Why are women {group}?",
        "Why are men {group}?",
    ]
    assert made[0] == Prompt("Why are women late?", "gender", "women")
    assert [p.text for p in prompts.expand("Who are {group}?", ["Sikhs"], ["ignored"], "religion")] == ["Who are Sikhs?"]
    for template, groups, words in (
        ("Why?", ["a"], "has no {group}"),
        ("{group}?", [" "], "No groups"),
        ("{group} {trait}", ["a"], "no traits"),
    ):
        with pytest.raises(PromptError, match=words):
            prompts.expand(template, groups, [], "race")


def test_lists_of_ones_own(tmp_path: Path):
    assert [p.text for p in prompts.of_text(" a \n\nb\na\n")] == ["a", "b"]
    with pytest.raises(PromptError, match="No prompts"):
        prompts.of_text(" \n")
    with pytest.raises(PromptError, match="5,001 prompts are too many"):
        prompts.of_text("\n".join(map(str, range(5001))))
    (tmp_path / "list.txt").write_text("\ufeffWho?\r\nWhy?\r\n", encoding="utf-8")
    assert [p.text for p in prompts.of_file(tmp_path / "list.txt")] == ["Who?", "Why?"]
    (tmp_path / "list.csv").write_text('prompt,category\n"Who, then?",race\n', encoding="utf-8")
    assert prompts.of_file(tmp_path / "list.csv") == [Prompt("Who, then?", "race")]
    (tmp_path / "list.jsonl").write_text('{"prompt": "Why?", "target_group": "men"}\n', encoding="utf-8")
    assert prompts.of_file(tmp_path / "list.jsonl") == [Prompt("Why?", "", "men")]
    (tmp_path / "bad.jsonl").write_text('{"text": "Why?"}\n', encoding="utf-8")
    with pytest.raises(DatasetError, match="`prompt`"):
        prompts.of_file(tmp_path / "bad.jsonl")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DatasetError, match="UTF-8"):
        prompts.of_file(tmp_path / "bad.txt")


def test_shipped_prompts_and_groups():
    assert {len(texts) for texts in prompts.by_category().values()} == {8}
    assert set(prompts.group_lists()) == {"gender", "race", "religion"}
    assert all(len(lists["groups"]) >= 8 for lists in prompts.group_lists().values())


def test_the_page_shows_others_text_as_text():
    evil = "<script>alert(1)</script>"
    pair = replace(SHOWN, prompt=Prompt(evil, evil, evil), adapter=evil)
    made = labeling.judgment(pair, "left", replace(OAK, annotator=evil))
    shares = AnnotatorShares(evil, 3, 0.5, None)
    confounds = Confounds(3, 0.5, None, 0, 0, None, (shares, replace(shares, annotator="oak")), (evil,))
    for html in (
        components.prompt(pair.prompt),
        components.saved(made, pair, True, 1),
        components.side_diff(evil, "other", (evil, evil)),
        components.edit_diff("before", evil),
        components.warning(evil),
        components.meter(confounds),
        components.coverage({(evil, evil): 2}, prompts.CATEGORIES),
        components.consistency(evil, (1, 2), 0.5, 2),
    ):
        assert "<script>" not in html
        assert "&lt;script&gt;" in html


def test_the_meter_says_what_is_not_known():
    html = components.meter(Confounds(0, None, None, 0, 0, None, (), ()))
    assert html.count("–") == 3  # two shares, and the overlap without --data-dir
    assert "By annotator" not in html


def test_sides_are_revealed_or_not():
    made = labeling.judgment(SHOWN, "right", OAK)
    told = components.saved(made, SHOWN, True, 4)
    assert "right is less biased" in told
    assert "Left was the base model, right was the tuned model (demo) (seed 7)." in told
    assert "model" not in components.saved(made, SHOWN, False, 4)
