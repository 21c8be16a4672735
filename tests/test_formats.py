"""Formats of foreign rows: those that are understood, how their columns are guessed, and why a row can be no pair."""

from __future__ import annotations

import json
import re

import pytest

from biasdpo.data import importing
from biasdpo.data.importing import ColumnMapping
from biasdpo.errors import ConfigError, DatasetError
from tests.foreign_rows import FAIR, GOOD, GPT, GPT_UNFAIR, HUMAN, SYSTEM, UNFAIR, USER, converted, reason, write_lines


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {"Prompt": "Who leads?", "Chosen ": "Anyone can.", "REJECTED": "Men."},
        {"question": "Who leads?", "chosen": "Anyone can.", "rejected": "Men.", "score": 3},
        {"prompt": [USER], "chosen": [FAIR], "rejected": [UNFAIR]},  # TRL, conversational
        {"chosen": [USER, FAIR], "rejected": [USER, UNFAIR]},  # TRL, its prompt implicit
        {"prompt": "Who leads?", "chosen": [USER, FAIR], "rejected": [USER, UNFAIR], "messages": [USER, FAIR]},  # UltraFeedback
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "Who leads?"}]}],
            "chosen": [FAIR],
            "rejected": [UNFAIR],
        },
        {"instruction": "Who leads?", "input": "", "chosen": "Anyone can.", "rejected": "Men.", "system": "", "history": []},
        {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT_UNFAIR},  # LLaMA-Factory, sharegpt
        {"messages": [USER], "chosen": FAIR, "rejected": UNFAIR, "tools": "", "images": []},
        {"prompt": json.dumps([USER]), "chosen": json.dumps([FAIR]), "rejected": json.dumps([UNFAIR])},  # as a CSV holds them
    ],
)
def test_formats_that_are_understood(row):
    assert converted(row) == ("Who leads?", "Anyone can.", "Men.")


def test_alpacas_two_halves_are_joined_as_llama_factory_joins_them():
    row = {"instruction": "Answer.", "input": "Who leads?", "chosen": "Anyone.", "rejected": "Men."}
    assert converted(row)[0] == "Answer.\nWho leads?"
    assert converted({**row, "prompt": "p"})[0] == "p"  # beside a prompt, `input` is some other column


@pytest.mark.parametrize(
    "row",
    [
        {**GOOD, "system": "Be kind."},
        {"prompt": [SYSTEM, USER], "chosen": [FAIR], "rejected": [UNFAIR]},
        {"chosen": [SYSTEM, USER, FAIR], "rejected": [SYSTEM, USER, UNFAIR]},
        {"conversations": [{"from": "system", "value": "Be kind."}, HUMAN], "chosen": GPT, "rejected": GPT_UNFAIR},
    ],
)
def test_a_system_text_stands_before_the_prompt_and_is_told(row, tmp_path):
    assert converted(row) == ("Be kind.\n\nWho leads?", "Anyone can.", "Men.")
    found = importing.convert_source(write_lines(tmp_path / "rows.jsonl", row))
    assert found.notes == ("1 rows have a system text, which now stands before the prompt",)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": [USER, FAIR, USER], "chosen": [FAIR], "rejected": [UNFAIR]}, "prompt has 3 turns before the completion"),
        ({"chosen": [USER, FAIR, USER, FAIR], "rejected": [USER, FAIR, USER, UNFAIR]}, "chosen has 3 turns"),
        ({"conversations": [HUMAN, GPT, HUMAN], "chosen": GPT, "rejected": GPT_UNFAIR}, "conversations has 3 turns"),
        ({"instruction": "p", "chosen": "a", "rejected": "b", "history": [["q", "a"]]}, "history holds earlier turns"),
        ({"chosen": [USER, FAIR], "rejected": [SYSTEM, USER, UNFAIR]}, "begin with different turns"),
        (
            {"prompt": "Other?", "chosen": [USER, FAIR], "rejected": [USER, UNFAIR]},
            "prompt is not the turn that chosen begins with",
        ),
        ({"prompt": [USER], "chosen": [FAIR, USER], "rejected": [UNFAIR]}, "chosen ends with a turn of the user"),
        ({"prompt": [FAIR], "chosen": [FAIR], "rejected": [UNFAIR]}, "prompt ends with a turn of the assistant"),
        ({"prompt": [{"role": "tool", "content": "x"}], "chosen": [FAIR], "rejected": [UNFAIR]}, "role 'tool'"),
        ({"prompt": [USER], "chosen": [FAIR | {"tool_calls": [1]}], "rejected": [UNFAIR]}, "tool calls"),
        ({"prompt": [USER], "chosen": [FAIR | {"content": None}], "rejected": [UNFAIR]}, "must be a string, got NoneType"),
        ({"prompt": [USER], "chosen": [FAIR | {"content": [{"type": "image"}]}], "rejected": [UNFAIR]}, "parts that are no text"),
        (GOOD | {"images": ["a.png"]}, "the row has images"),
        (GOOD | {"tools": "[{}]"}, "the row has tools"),
        (GOOD | {"chosen": "[{'role': 'assistant', 'content': 'x'}]"}, "printed form of chat messages"),
        ({"chosen": "a", "rejected": "b", "text": "p"}, "no column is the prompt.*chosen, rejected, text"),
        (GOOD | {"chosen": 3}, "chosen must be a string, got int"),
        (GOOD | {"rejected": " \n"}, "rejected is empty"),
        (GOOD | {"prompt": " ", "system": "Be kind."}, "prompt is empty"),
        (GOOD | {"rejected": "Anyone can. "}, "the same text"),
        (GOOD | {"category": {"a": 1}}, "category must be a string, got dict"),
        (GOOD | {"category": "x" * 201}, "category has 201 characters, at most 200"),
        (GOOD | {"prompt": "a\0b"}, "prompt holds a NUL"),
        (GOOD | {"prompt": "a\ud800b"}, "surrogate"),
        (GOOD | {"category": "a\ud800b"}, "category holds half a surrogate pair"),
        (GOOD | {"system": 1}, "system must be a string"),
        (["a"], "expected an object"),
    ],
)
def test_a_row_that_can_be_no_pair_says_why(row, words):
    found = reason(row)
    assert re.search(words, found), found
    assert "\n" not in found


def test_mapping_is_guessed_shown_and_overridden(tmp_path):
    path = write_lines(
        tmp_path / "rows.jsonl", {"id": 1, "less_biased": "a", "more_biased": "b", "ask": "Who?", "bias_type": "race"}
    )
    seen = importing.preview(path)
    assert seen.columns == ("id", "less_biased", "more_biased", "ask", "bias_type")
    assert seen.mapping == ColumnMapping(chosen="less_biased", rejected="more_biased", category="bias_type")
    assert seen.bad[0].line == 1
    mapping = importing.parse_mapping("prompt=ask,category=", seen.mapping, seen.columns)
    assert importing.preview(path, mapping).pairs == (importing.ForeignPair("Who?", "a", "b"),)
    with pytest.raises(DatasetError, match=r"No column 'nope' for prompt: choose of id, less_biased"):
        importing.parse_mapping("prompt=nope", seen.mapping, seen.columns)
    with pytest.raises(ConfigError, match=r"--map takes FIELD=COLUMN.*target_group.*got 'winner=a'"):
        importing.parse_mapping("winner=a", seen.mapping, seen.columns)


def test_a_file_without_columns_to_guess_names_those_it_has(workspace, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", {"a": "x", "b\n": "y"})
    with pytest.raises(DatasetError, match=r"recognised as chosen, got a, b\?: name it with --map chosen=COLUMN"):
        importing.import_file(workspace, path)
    assert importing.preview(path) == importing.Preview(("a", "b\n"), ColumnMapping(), (), ())
    assert not workspace.preferences.exists()
