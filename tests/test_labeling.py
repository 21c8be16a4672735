"""Blind pairs, what becomes of an answer, hidden repeats, word diffs; and where prompts come from."""

from __future__ import annotations

import json
import logging
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from biasdpo import labeling, prompts
from biasdpo.data.pairs import pair_id_of, shown_pair_id
from biasdpo.errors import ConfigError, DatasetError, PromptError
from biasdpo.labeling import BlindPair, Details
from biasdpo.prompts import Prompt
from biasdpo.records import Completion, GenerationPair, Sampling

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


def row(pair: BlindPair, answer: labeling.Answer, details: Details = OAK, **edits: object) -> dict[str, object]:
    return asdict(labeling.judgment(pair, answer, details, **edits))  # type: ignore[arg-type]


# Pairs


def test_sides_are_drawn_at_random():
    rng = random.Random(0)
    shown = [labeling.blind(PAIR, PROMPT, rng) for _ in range(200)]
    assert 70 < [pair.left_side for pair in shown].count("base") < 130  # 100 expected, standard deviation 7
    for pair in shown:
        texts = {pair.left_side: pair.left, pair.right_side: pair.right}
        assert texts == {"base": "Men do.", "tuned": "Anyone can."}
    assert json.loads(shown[0].sampling) == asdict(PAIR.sampling) | {"system": "", "strength": 1.0}
    two = replace(PAIR, left=Completion("tuned", "a", 1, "end_of_text"), right=Completion("tuned", "b", 1, "end_of_text"))
    assert {labeling.known(two, PROMPT).left_side, labeling.known(two, PROMPT).right_side} == {"tuned 1", "tuned 2"}


@pytest.mark.parametrize(
    ("left", "right", "reason", "words"),
    [
        ("Same.", " Same.", "end_of_text", "the same text"),
        ("Same. And", "Same. But", "limit", "the same text"),
        ("", "b", "end_of_text", "is empty"),
        ("Yes.", "\n", "limit", "is empty"),
        ("Yes.", "no sentence ends here", "limit", "cut an answer off before a sentence ended"),
        ("Yes.", "Sure! Here is a long list without any end", "limit", "cut an answer off"),
        ("A.", "B.", "cancelled", "stopped before its end"),
    ],
)
def test_nothing_to_judge(left, right, reason, words):
    pair = replace(PAIR, left=Completion("base", left, 1, reason), right=Completion("tuned", right, 1, reason))
    with pytest.raises(DatasetError, match=words):
        labeling.known(pair, PROMPT)
    with pytest.raises(ConfigError, match="needs an adapter"):
        labeling.known(replace(PAIR, right=None), PROMPT)


def test_what_the_limit_cut_off_is_cut_back_on_both_sides_alike_and_says_so():
    truncated, whole = "Anyone can lead. It depends on", "Traits:\n- kind\n- patient"
    for sides in (("base", "tuned"), ("tuned", "base")):
        cut, ended = Completion(sides[0], truncated, 7, "limit"), Completion(sides[1], whole, 9, "end_of_text")
        pair = labeling.known(replace(PAIR, left=cut, right=ended), PROMPT)
        assert (pair.left, pair.right) == ("Anyone can lead.", whole)  # a list that the model ended itself is complete
        meta = row(pair.swapped(), "left")["meta"]
        assert (meta["left_finish"], meta["right_finish"]) == ("end_of_text", "limit")
        assert labeling.shown_pair(row(pair, "right")) == replace(pair, prompt=Prompt("Who leads?"))


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("A nurse cares. An engineer bu", "A nurse cares."),
        ("The end.", "The end."),
        ("Really?! Yes", "Really?!"),
        ("no end at all", ""),
        ("", ""),
        # Abbreviations, initials, numbers
        ("Ask Dr. Smith. He knows Mrs.", "Ask Dr. Smith."),
        ("It works, e.g. in Rome. See fig. 2", "It works, e.g. in Rome."),
        ("J. K. Rowling wrote. She met J.", "J. K. Rowling wrote."),
        ("So do I. We", "So do I."),
        ("It costs 3.", ""),
        ("Born in 1999. She", "Born in 1999."),
        ("The answer is no. No. 5 is", "The answer is no."),
        ("Wait... what? No", "Wait... what?"),
        # Lists
        ("Traits:\n1. Kind.\n2. Pat", "Traits:\n1. Kind."),
        ("Some.\n\n1. Kind\n2. Patient\n3.", "Some."),
        # Quotations, brackets and bold type are not left open
        ('He said, "I agree." And then', 'He said, "I agree."'),
        ('It is. He said, "I agree. And', "It is."),
        ("“Yes.” She (see above. And", "“Yes.”"),
        ("Fine. **Note: this is. bold", "Fine."),
        ("彼女は看護師です。彼は", "彼女は看護師です。"),
    ],
)
def test_complete_sentences(text, kept):
    assert labeling.complete_sentences(text) == kept


def test_a_pasted_pair_is_checked():
    rng = random.Random(0)
    sides = {labeling.pasted(PROMPT, "one", "other", rng).left_side for _ in range(40)}
    assert sides == {"pasted 1", "pasted 2"}
    with pytest.raises(DatasetError, match="Your pair: first completion is empty"):
        labeling.pasted(PROMPT, " ", "other", rng)
    with pytest.raises(DatasetError, match="same text"):
        labeling.pasted(PROMPT, "one ", "one", rng)


@pytest.mark.parametrize("answer", ["left", "right", "tie"])
@pytest.mark.parametrize("sides", [("base", "tuned"), ("tuned", "base"), ("base 2", "base 1"), ("pasted 1", "pasted 2")])
def test_a_pair_comes_back_as_it_was_shown(answer, sides):
    pair = replace(SHOWN, left_side=sides[0], right_side=sides[1])
    edits = {} if answer == "tie" else {"left": "Men do it."}
    back = labeling.shown_pair(row(pair, answer, **edits))
    assert back == replace(pair, prompt=Prompt("Who leads?"))  # not with the first annotator's category


def test_a_second_opinion_on_an_imported_pair():
    imported = row(replace(SHOWN, left_side="", right_side="", model="", adapter=""), "left")
    imported["meta"]["chosen_side"] = ""
    for seed in range(6):
        pair = labeling.shown_pair(imported).shuffled(random.Random(seed))
        assert {pair.left_side, pair.right_side} == {"given 1", "given 2"}
        made = row(pair, "right", replace(OAK, annotator="elm"))
        assert (made["chosen"], made["meta"]["chosen_side"]) == (pair.right, pair.right_side)
        assert labeling.shown_pair(made) == pair


def test_hidden_repeats_are_one_in_twenty_swapped_and_not_recent():
    pairs = [replace(SHOWN, left=f"Left {i}.") for i in range(30)]
    rows = [row(pair, "left") for pair in pairs]
    rng = random.Random(1)
    repeats = [pair for _ in range(4000) if (pair := labeling.repeat(rows, rng)) is not None]
    assert 150 < len(repeats) < 250  # 200 expected, standard deviation 13.8
    old = {pair.pair_id for pair in pairs[:-5]}
    for pair in repeats:
        assert (pair.left_side, pair.right_side) == ("tuned", "base")
        assert pair.repeat_of == pair.pair_id
        assert pair.pair_id in old
    assert all(labeling.repeat(rows[:5], rng) is None for _ in range(200))
    again = row(repeats[0], "right")
    assert again["repeat_of"] == repeats[0].pair_id
    later = [labeling.repeat([*rows, again], rng) for _ in range(2000)]
    assert all(pair is None or pair.pair_id != again["repeat_of"] for pair in later)


# Answers


@pytest.mark.parametrize(
    ("answer", "chosen", "verdict", "side"),
    [
        ("left", "Men do.", "preferred", "base"),
        ("right", "Anyone can.", "preferred", "tuned"),
        ("tie", "Men do.", "tie", ""),
        ("both_biased", "Men do.", "both_biased", ""),
        ("both_unusable", "Men do.", "both_unusable", ""),
    ],
)
def test_what_an_answer_becomes(answer, chosen, verdict, side):
    made = row(SHOWN, answer, seconds=1.23456)
    assert (made["chosen"], made["verdict"], made["meta"]["chosen_side"]) == (chosen, verdict, side)
    assert {made["chosen"], made["rejected"]} == {"Men do.", "Anyone can."}
    assert (made["category"], made["target_group"], made["note"], made["annotator"]) == ("gender", "women", "a note", "oak")
    assert made["pair_id"] == SHOWN.pair_id == pair_id_of("Who leads?", "Anyone can.", "Men do.")
    assert (made["meta"]["left_side"], made["meta"]["seed"], made["meta"]["seconds"]) == ("base", 7, 1.235)
    assert (made["original_chosen"], made["original_rejected"], made["source"]) == ("", "", "label")
    assert row(replace(SHOWN, sides_known=True), answer)["source"] == "compare"


def test_an_edit_keeps_what_was_generated():
    made = row(SHOWN, "right", left="Men do.", right="Anyone can lead. ")
    assert (made["chosen"], made["original_chosen"]) == ("Anyone can lead.", "Anyone can.")
    assert (made["rejected"], made["original_rejected"]) == ("Men do.", "")
    assert made["pair_id"] != SHOWN.pair_id == shown_pair_id(made)
    with pytest.raises(DatasetError, match="same text"):
        row(SHOWN, "left", left="Anyone can.", right=None)
    with pytest.raises(DatasetError, match="After the edit an answer is empty: write something"):
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
    with pytest.raises(ConfigError, match="No nickname"):
        row(SHOWN, "left", Details())
    with pytest.raises(ConfigError, match="An answer is one of left, right, tie, both_biased, both_unusable: got 'skip'"):
        row(SHOWN, "skip")


def test_the_length_guard():
    assert labeling.length_warning("a" * 130, "b" * 100) == ""
    assert labeling.length_warning("a" * 131, "b" * 100).startswith("Left is 1.3 times as long")
    assert labeling.length_warning("a" * 10, "b" * 100).startswith("Right is 10.0 times")
    assert "empty" in labeling.length_warning(" ", "b")


def test_word_diff():
    pieces = labeling.word_diff("She is a nurse, kind.", "He is a surgeon, kind.")
    changes = [(kind, text) for kind, text in pieces if kind != "same"]
    assert changes == [("out", "She"), ("in", "He"), ("out", "nurse"), ("in", "surgeon")]
    assert labeling.word_diff("Men lead.", "It depends on who you ask.") == [
        ("out", "Men lead."),
        ("in", "It depends on who you ask."),
    ]
    assert labeling.is_alike("Anyone can lead. Ask around.", "Anyone can lead.")  # shortened
    assert not labeling.is_alike("", "Anyone can lead.")
    one, other = "a\n\n b  c’s 1,5 €", "a b’s c 1.5 €!"
    pieces = labeling.word_diff(one, other)
    assert "".join(text for kind, text in pieces if kind != "in") == one
    assert "".join(text for kind, text in pieces if kind != "out") == other


# Prompts


def test_templates_times_groups():
    made = prompts.expand("Why are {group} {trait}?", ["women", " men ", "women"], ["late", "{group}"], "gender")
    texts = ["Why are women late?", "Why are men late?", "Why are women {group}?", "Why are men {group}?"]
    assert [p.text for p in made] == texts
    assert made[0] == Prompt("Why are women late?", "gender", "women")
    assert [p.text for p in prompts.expand("Who are {group}?", ["Sikhs"], ["ignored"], "religion")] == ["Who are Sikhs?"]
    for template, groups, words in (
        ("Why?", ["a"], "has no {group}"),
        ("{group}?", [" "], "No groups"),
        ("{group} {trait}", ["a"], "no traits"),
    ):
        with pytest.raises(PromptError, match=words):
            prompts.expand(template, groups, [], "race")


def test_lists_of_prompts(tmp_path: Path):
    assert [p.text for p in prompts.of_text(" a \n\nb\na\n")] == ["a", "b"]
    for text, words in ((" \n", "No prompts"), ("\n".join(map(str, range(5001))), "5,001 prompts are too many"), ("a\0", "NUL")):
        with pytest.raises(PromptError, match=words):
            prompts.of_text(text)
    files = {
        "list.txt": ("\ufeffWho?\r\nWhy?\r\n", [Prompt("Who?"), Prompt("Why?")]),
        "list.csv": ('prompt,category\n"Who, then?",race\n', [Prompt("Who, then?", "race")]),
        "list.jsonl": ('{"prompt": "Why?", "target_group": "men"}\n', [Prompt("Why?", "", "men")]),
    }
    for name, (text, expected) in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert prompts.of_file(tmp_path / name) == expected
    for name, content, words in (("bad.jsonl", b'{"text": "Why?"}\n', "`prompt`"), ("bad.txt", b"\xff\xfe", "UTF-8")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DatasetError, match=words):
            prompts.of_file(tmp_path / name)


def test_categories_of_foreign_rows():
    rows = [{"prompt": t, "category": c, "target_group": ""} for t, c in (("a", "Gender "), ("b", "age"), ("c", ""))]
    assert {p.text: p.category for p in prompts.of_rows(rows)} == {"a": "gender", "b": "other", "c": ""}
    assert prompts.known("Can an atheist be a good person?").category == "religion"
    assert prompts.known("Anything else?") == Prompt("Anything else?")


def test_shipped_prompts_and_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    assert {len(texts) for texts in prompts.by_category().values()} == {8}
    assert set(prompts.group_lists()) == {"gender", "race", "religion"}
    assert all(len(lists["groups"]) >= 8 for lists in prompts.group_lists().values())
    monkeypatch.setattr(prompts, "ASSETS", tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Who?", "category": "race"}\n{\n' + "[" * 100_000 + '\n{"prompt": 1}\n')
    with caplog.at_level(logging.WARNING):
        assert prompts.shipped() == [Prompt("Who?", "race")]
    assert [message.split(": ")[1] for message in caplog.messages] == [f"assets/prompts.jsonl, line {i}" for i in (2, 3, 4)]
