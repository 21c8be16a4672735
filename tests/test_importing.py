"""Foreign files into the journal: formats understood, hostile files row by row, nothing twice, nothing silently left out."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from biasdpo import dataset
from biasdpo.dataset import BadLine, ColumnMapping, Journal, PreferencePair
from biasdpo.dataset.formats import convert, detect
from biasdpo.errors import ConfigError, DatasetError, RefusedError
from biasdpo.workspace import Workspace

GOOD = {"prompt": "Who leads?", "chosen": "Anyone can.", "rejected": "Men."}
USER, FAIR, UNFAIR = (
    {"role": r, "content": GOOD[c]} for r, c in (("user", "prompt"), ("assistant", "chosen"), ("assistant", "rejected"))
)
SYSTEM = {"role": "system", "content": "Be kind."}
HUMAN, GPT = {"from": "human", "value": GOOD["prompt"]}, {"from": "gpt", "value": GOOD["chosen"]}
GPT_UNFAIR = {"from": "gpt", "value": GOOD["rejected"]}


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def converted(row: dict[str, Any]) -> tuple[str, str, str]:
    pair = convert(row, detect(list(row), [row]))
    return pair.prompt, pair.chosen, pair.rejected


def reason(row: Any) -> str:
    try:
        pair = convert(row, detect(list(row), [row]))
    except ValueError as exc:
        return str(exc)
    pytest.fail(f"was converted: {pair}")


def texts(workspace: Workspace) -> list[str]:
    return [row["prompt"] for row in Journal(workspace.preferences).refresh().standing()]


# Formats


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
    found = dataset.convert_source(write_lines(tmp_path / "rows.jsonl", row))
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
    seen = dataset.preview(path)
    assert seen.columns == ("id", "less_biased", "more_biased", "ask", "bias_type")
    assert seen.mapping == ColumnMapping(chosen="less_biased", rejected="more_biased", category="bias_type")
    assert seen.bad[0].line == 1
    mapping = dataset.parse_mapping("prompt=ask,category=", seen.mapping, seen.columns)
    assert dataset.preview(path, mapping).pairs == (dataset.ForeignPair("Who?", "a", "b"),)
    with pytest.raises(DatasetError, match=r"No column 'nope' for prompt: choose of id, less_biased"):
        dataset.parse_mapping("prompt=nope", seen.mapping, seen.columns)
    with pytest.raises(ConfigError, match=r"--map takes FIELD=COLUMN.*target_group.*got 'winner=a'"):
        dataset.parse_mapping("winner=a", seen.mapping, seen.columns)


def test_a_file_without_columns_to_guess_names_those_it_has(workspace, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", {"a": "x", "b\n": "y"})
    with pytest.raises(DatasetError, match=r"recognised as chosen, got a, b\?: name it with --map chosen=COLUMN"):
        dataset.import_file(workspace, path)
    assert dataset.preview(path) == dataset.Preview(("a", "b\n"), ColumnMapping(), (), ())
    assert not workspace.preferences.exists()


# Files


def test_the_same_rows_come_out_of_every_kind_of_file(tmp_path):
    rows = [
        GOOD | {"category": "gender"},
        {
            "prompt": ' Two\nlines, "quoted"; ',
            "chosen": "é 👩🏽‍⚕️\u2028",
            "rejected": "<script>alert(1)</script>\r\n",
            "category": "",
        },
    ]
    write_lines(tmp_path / "rows.jsonl", *rows)
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(row).encode() for row in rows) + b"\r\n")
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "array.jsonl").write_text(json.dumps(rows) + "\n")
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "parquet.jsonl")  # whatever its name says
    for delimiter, name in ((",", "comma.csv"), (";", "semicolon.csv"), ("\t", "tab.tsv"), ("|", "bar.csv")):
        with (tmp_path / name).open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    expected = [PreferencePair(*(row[c] for c in ("prompt", "chosen", "rejected", "category"))) for row in rows]
    files = sorted(tmp_path.iterdir())
    assert len(files) == 11
    for file in files:
        assert dataset.load([str(file)], Workspace(tmp_path)) == expected, file.name


def test_training_reads_chat_messages_and_names_the_first_bad_row(tmp_path):
    chat = {"prompt": [USER], "chosen": [FAIR], "rejected": [UNFAIR]}
    path = write_lines(tmp_path / "chat.jsonl", chat, chat | {"prompt": [USER, FAIR, USER]})
    with pytest.raises(DatasetError, match=r"chat.jsonl:2: prompt has 3 turns"):
        dataset.load([str(path)], Workspace(tmp_path))
    assert dataset.load([str(write_lines(path, chat))], Workspace(tmp_path)) == [PreferencePair(**GOOD)]


def test_hostile_lines_cost_no_other(workspace, tmp_path):
    good = [json.dumps(GOOD | {"prompt": f"Question {i}?"}).encode() for i in range(3)]
    long = json.dumps(GOOD | {"prompt": "word " * 200_000}).encode()
    markup = json.dumps(GOOD | {"prompt": "<img src=x onerror=alert(1)><script>alert(2)</script>"}).encode()
    lines = {
        1: b"\xef\xbb\xbf" + good[0],
        2: long,  # 1 MB
        3: json.dumps(GOOD | {"prompt": "a\0b"}).encode(),
        4: good[1].replace(b"Question", b"Qu\xe9stion"),
        5: good[1].replace(b"Q", b"\0"),
        6: b"[" * 100_000 + b"]" * 100_000,
        7: json.dumps(GOOD)[:-1].encode() + b', "n": ' + b"9" * 5_000 + b"}",
        8: good[1] + b"\r",
        9: b'{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}',
        10: b"null",
        11: markup,
        12: b"",
        13: b"{" * 50,
        14: json.dumps(GOOD)[:-1].encode() + b', "n": NaN, "m": 1e999, "k": 99999999999999999999999}',
        15: good[2],  # no line end: the last one
    }
    path = tmp_path / "hostile.jsonl"
    path.write_bytes(b"\n".join(lines.values()))
    done = dataset.import_file(workspace, path)
    assert (done.written, done.known) == (5, 0)
    assert texts(workspace) == ["Question 0?", "Question 1?", json.loads(markup)["prompt"], "Who leads?", "Question 2?"]
    expected = {
        2: "prompt has 1,000,000 characters, at most 100,000",
        3: "prompt holds a NUL character",
        4: "broken UTF-8",
        5: "no JSON",
        6: "no JSON (nested too deeply)",
        7: "no JSON (Exceeds the limit",
        9: "column 'chosen' is there twice",
        10: "expected an object",
        13: "no JSON",
    }
    assert [line.line for line in done.bad] == list(expected)
    for line in done.bad:
        assert line.reason.startswith(expected[line.line])
        assert len(line.reason) < 310
        assert line.reason.isprintable()
    again = dataset.import_file(workspace, path)
    assert (again.written, again.known, again.bad) == (0, 5, done.bad)


def test_a_line_longer_than_any_row_is_one_bad_line(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr("biasdpo.dataset.json_rows.MAX_LINE_BYTES", 1000)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + b"x" * 5000 + b"\n" + json.dumps(GOOD | {"prompt": "p"}).encode())
    done = dataset.import_file(workspace, path)
    assert (done.written, [line.line for line in done.bad]) == (2, [2])


def test_a_ragged_csv(workspace, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b"prompt,chosen,rejected\n"
        b'"Two\nlines","a ""b"" c",d\n'  # lines 2 and 3
        b"too,few\n"
        b"too,many,cells,here\n"
        b"empty,last,cells,,\n"
        b'p,"never closed,x\n'  # line 7: its row is lost, the next ones are not
        b"after,a,b\n"
        b'p,"closed" then,x\n'
        b"\n"
        b"caf\xe9,a,b\n"
        b"nul,a\0b,c\n"
        b"last,a,b"
    )
    done = dataset.import_file(workspace, path)
    assert texts(workspace) == ["Two\nlines", "empty", "after", "last"]
    assert Journal(workspace.preferences).refresh().standing()[0]["chosen"] == 'a "b" c'
    assert done.bad == (
        BadLine(4, "2 cells, but the header has 3"),
        BadLine(5, "4 cells, but the header has 3"),
        BadLine(7, "no CSV (',' expected after '\"')"),
        BadLine(9, "no CSV (',' expected after '\"')"),
        BadLine(11, "broken UTF-8; save the file as UTF-8"),
        BadLine(12, "chosen holds a NUL character"),
    )


def test_a_quote_that_never_closes_swallows_no_row(workspace, tmp_path):
    path = tmp_path / "rows.csv"
    rows = "".join(f"prompt {i},chosen,rejected\n" for i in range(2000))
    path.write_text('prompt,chosen,rejected\nx,"opened,y\n' + rows)
    done = dataset.import_file(workspace, path)
    assert (done.written, done.bad) == (2000, (BadLine(2, "no CSV (a quote is opened and never closed)"),))


def test_a_json_array_that_was_cut_off_keeps_what_is_whole(workspace, tmp_path):
    rows = [GOOD | {"prompt": f"Question {i}?"} for i in range(3)]
    text = json.dumps([rows[0], {"prompt": "a"}, rows[1], 7, rows[2]], indent=2)
    path = tmp_path / "rows.json"
    path.write_text(text[:-40])
    done = dataset.import_file(workspace, path)
    assert done.written == 2
    assert [(line.line, line.reason.split("(")[0]) for line in done.bad] == [
        (2, "no column 'chosen', got prompt"),
        (4, "expected an object with prompt, chosen, rejected, got int"),
        (5, "no JSON "),
    ]
    twice = '[{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "d"}, ' + json.dumps(GOOD) + "]"
    path.write_text(twice)
    assert dataset.import_file(workspace, path).bad == (BadLine(1, "column 'prompt' is there twice"),)


def test_a_parquet_file_with_broken_text(workspace, tmp_path):
    column = pyarrow.array([b"Who?", b"caf\xe9"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    other = pyarrow.array(["a", "b"])
    parquet.write_table(
        pyarrow.table({"prompt": column, "chosen": other, "rejected": pyarrow.array(["x", "y"])}), tmp_path / "a.parquet"
    )
    done = dataset.import_file(workspace, tmp_path / "a.parquet")
    assert (done.written, done.bad) == (1, (BadLine(2, "broken UTF-8; save the file as UTF-8"),))


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("none.jsonl", None, "No dataset file"),
        ("folder", "folder", "is no file"),
        ("empty.jsonl", b"", "has no rows to take over"),
        ("empty.csv", b"", "has no rows to take over"),
        ("header.csv", b"prompt,chosen,rejected\n", "has no rows to take over"),
        ("blank.jsonl", b"\n \n\n", "has no rows to take over"),
        ("empty.json", b"[]", "has no rows to take over"),
        ("binary.jsonl", bytes(range(256)) * 40, "No good row in .*binary.jsonl, 41 bad ones, the first in line 1: "),
        ("packed.jsonl", b"\x1f\x8b\x08\x00rest", "is a gzip file; unpack it"),
        ("sheet.csv", b"PK\x03\x04rest", "is a ZIP or Excel file"),
        ("utf16.csv", "prompt,chosen\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("no.parquet", b"{}", "is no Parquet file"),
        ("torn.parquet", b"PAR1" + b"x" * 50, "Can't read .*torn.parquet as Parquet"),
        ("twice.csv", b"prompt,chosen,chosen\na,b,c\n", "has the column 'chosen' twice"),
        ("numbers.json", b"[1, 2]", "No good row in .*numbers.json, 2 bad ones, the first in line 1: expected an object"),
        ("object.json", b'{\n"a": 1\n}', "No good row"),
    ],
)
def test_a_file_that_is_none_is_one_line(workspace, tmp_path, name, data, words):
    path = tmp_path / name
    if data == "folder":
        path.mkdir()
    elif data is not None:
        path.write_bytes(data)
    with pytest.raises(DatasetError, match=words) as caught:
        dataset.import_file(workspace, path)
    assert "\n" not in str(caught.value)
    assert not workspace.preferences.exists()


def test_a_hub_set_that_is_not_to_be_had(workspace, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(DatasetError, match=r"Can't load hub:nobody/nothing: .*; check the name and the network"):
        dataset.import_file(workspace, "hub:nobody/nothing")


# What is stored


def test_rows_are_judgments_of_this_source_and_never_twice(workspace, tmp_path):
    row = GOOD | {"category": "gender", "target_group": "women", "annotator": "ana", "note": "n"}
    other = GOOD | {"chosen": "Whoever is fit.", "category": None}
    path = write_lines(tmp_path / "my set.jsonl", row, other, row)
    done = dataset.import_file(workspace, path)
    assert (done.written, done.known, done.source) == (3, 0, "import:my set")  # the same row twice is two judgments
    first, second, third = Journal(workspace.preferences).refresh().standing()
    assert {k: first[k] for k in row} == row
    assert (first["verdict"], first["source"], first["repeat_of"]) == ("preferred", "import:my set", "")
    assert first["pair_id"] == dataset.pair_id_of(*GOOD.values())
    assert (second["category"], third["pair_id"]) == ("", first["pair_id"])
    grown = write_lines(tmp_path / "grown.jsonl", GOOD | {"prompt": "New?"}, other, row, row)
    done = dataset.import_file(workspace, grown, name="other name")
    assert (done.written, done.known) == (1, 3)
    dataset.retract(workspace, first["id"])
    assert dataset.import_file(workspace, path).written == 0  # what was withdrawn stays withdrawn
    assert len(Journal(workspace.preferences).refresh().standing()) == 3


def test_a_trial_stores_nothing_and_says_what_an_import_would(workspace, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", GOOD, {"chosen": "b"}, GOOD | {"prompt": "p"})
    dataset.import_file(workspace, write_lines(tmp_path / "some.jsonl", GOOD))
    trial = dataset.try_import(workspace, path)
    assert (trial.written, trial.known, len(trial.bad)) == (1, 1, 1)
    assert texts(workspace) == ["Who leads?"]
    assert dataset.import_file(workspace, path) == trial


def test_another_workspaces_journal(workspace, tmp_path):
    other = Workspace(tmp_path / "other")
    made = [
        dataset.new_judgment(f"Question {i}?", "fair", "unfair", annotator="ana", note=f"n{i}", category="race", **more)
        for i, more in enumerate([{}, {"original_chosen": "before"}, {"verdict": "tie"}, {"repeat_of": "a" * 16}, {}])
    ]
    dataset.append_all(other, made)
    dataset.retract(other, made[4].id)
    with other.preferences.open("a") as file:
        file.write(json.dumps({"id": "1", "pair_id": "", "verdict": "maybe", "retracts": ""}) + "\n")
    done = dataset.import_file(workspace, other.preferences, name="ana's")
    assert (done.written, done.notes) == (3, ("left out of the journal: 1 tie, 1 withdrawn",))
    assert [line.line for line in done.bad] == [7]
    rows = Journal(workspace.preferences).refresh().rows
    assert list(rows) == [made[i].id for i in (0, 1, 3)]
    row = rows[made[1].id]
    assert (row["original_chosen"], row["annotator"], row["note"], row["source"]) == ("before", "ana", "n1", "import:ana's")
    assert row["created_at"] == made[1].created_at
    with pytest.raises(DatasetError, match=r"preferences\.jsonl:7: verdict must be one of"):
        dataset.load([str(other.preferences)], other)
    assert len(dataset.load_journal(workspace)) == 2  # the hidden repeat stays one
    assert dataset.import_file(workspace, workspace.preferences).known == 3  # into itself


def test_what_a_strangers_journal_claims_is_checked(workspace, tmp_path):
    row = GOOD | {"id": "retracts-" + "a" * 32, "pair_id": "x", "verdict": "preferred", "retracts": "", "created_at": "soon"}
    meta = {"seed": 10**30, "seconds": "long", "model": "m", "left_side": None, "evil": [1]}
    dataset.import_file(workspace, write_lines(tmp_path / "rows.jsonl", row | {"meta": meta}))
    (stored,) = Journal(workspace.preferences).refresh().standing()
    assert stored["id"] != row["id"]  # else it would stand in for a withdrawal that is yet to come
    assert stored["created_at"].startswith("20")
    assert (stored["meta"]["model"], stored["meta"]["seed"], stored["meta"]["seconds"]) == ("m", 0, 0.0)
    assert "evil" not in stored["meta"]
    bad = write_lines(tmp_path / "bad.jsonl", row | {"original_chosen": "a\ud800"}, GOOD)
    assert dataset.import_file(workspace, bad).bad == (
        BadLine(1, "original_chosen holds half a surrogate pair, which is no text"),
    )


def test_an_imports_name(workspace, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", GOOD)
    for name in ("two\nlines", "x" * 101):
        with pytest.raises(ConfigError, match="An import's name"):
            dataset.import_file(workspace, path, name=name)


def test_a_public_space_imports_nothing(workspace, tmp_path, monkeypatch):
    path = write_lines(tmp_path / "rows.jsonl", GOOD)
    monkeypatch.setenv("SPACE_ID", "someone/space")
    for action in (dataset.import_file, dataset.try_import):
        with pytest.raises(RefusedError):
            action(workspace, path)
    with pytest.raises(RefusedError):
        dataset.preview(path)
    assert not workspace.preferences.exists()


# Validation


def test_validate_a_file_and_a_journal(workspace, tmp_path):
    assert dataset.validate(workspace).rows == 0
    path = write_lines(tmp_path / "rows.jsonl", GOOD, {"chosen": "b"}, GOOD | {"prompt": "p", "system": "s"})
    found = dataset.validate(path)
    assert (found.rows, found.good, [line.line for line in found.bad]) == (3, 2, [2])
    assert found.notes == ("1 rows have a system text, which now stands before the prompt",)
    dataset.import_file(workspace, path)
    ids = list(Journal(workspace.preferences).refresh().rows)
    dataset.retract(workspace, ids[0])
    assert dataset.validate(workspace).by_verdict == {"preferred": 2, "retracted": 1}
    row = GOOD | {"verdict": "preferred", "retracts": "", "pair_id": ""}
    with workspace.preferences.open("ab") as file:
        file.write(b'{"id": \n\n')
        for bad in (
            row,
            row | {"id": "1", "chosen": " "},
            row | {"id": ids[0]},
            row | {"id": "2", "verdict": "retracted", "retracts": "?"},
        ):
            file.write(json.dumps(bad).encode() + b"\n")
        file.write(json.dumps(row | {"id": "3"}).encode()[:-9])
    found = dataset.validate(workspace)
    assert (found.rows, found.good) == (9, 3)
    starts = ["", "no id", "chosen is empty", "its id was there before, in line 1", "it takes back '?'", "it has no line end"]
    assert [line.line for line in found.bad] == [4, 6, 7, 8, 9, 10]
    assert all(line.reason.startswith(start) for line, start in zip(found.bad, starts, strict=True)), found.bad
    assert dataset.validate(workspace.preferences) == found
