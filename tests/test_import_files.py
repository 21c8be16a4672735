"""Foreign files of every kind, hostile ones too: bad rows are named and cost no other."""

from __future__ import annotations

import csv
import json

import pyarrow
import pytest
from pyarrow import parquet

from biasdpo.data import importing, splits
from biasdpo.data.journal import BadLine, Journal
from biasdpo.data.pairs import PreferencePair
from biasdpo.errors import DatasetError
from biasdpo.workspace import Workspace
from tests.foreign_rows import FAIR, GOOD, UNFAIR, USER, texts, write_lines


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
        assert splits.load([str(file)], Workspace(tmp_path)) == expected, file.name


def test_training_reads_chat_messages_and_names_the_first_bad_row(tmp_path):
    chat = {"prompt": [USER], "chosen": [FAIR], "rejected": [UNFAIR]}
    path = write_lines(tmp_path / "chat.jsonl", chat, chat | {"prompt": [USER, FAIR, USER]})
    with pytest.raises(DatasetError, match=r"chat.jsonl:2: prompt has 3 turns"):
        splits.load([str(path)], Workspace(tmp_path))
    assert splits.load([str(write_lines(path, chat))], Workspace(tmp_path)) == [PreferencePair(**GOOD)]


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
    done = importing.import_file(workspace, path)
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
    again = importing.import_file(workspace, path)
    assert (again.written, again.known, again.bad) == (0, 5, done.bad)


def test_a_line_longer_than_any_row_is_one_bad_line(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr("biasdpo.data.importing.MAX_LINE_BYTES", 1000)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + b"x" * 5000 + b"\n" + json.dumps(GOOD | {"prompt": "p"}).encode())
    done = importing.import_file(workspace, path)
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
    done = importing.import_file(workspace, path)
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
    done = importing.import_file(workspace, path)
    assert (done.written, done.bad) == (2000, (BadLine(2, "no CSV (a quote is opened and never closed)"),))


def test_a_json_array_that_was_cut_off_keeps_what_is_whole(workspace, tmp_path):
    rows = [GOOD | {"prompt": f"Question {i}?"} for i in range(3)]
    text = json.dumps([rows[0], {"prompt": "a"}, rows[1], 7, rows[2]], indent=2)
    path = tmp_path / "rows.json"
    path.write_text(text[:-40])
    done = importing.import_file(workspace, path)
    assert done.written == 2
    assert [(line.line, line.reason.split("(")[0]) for line in done.bad] == [
        (2, "no column 'chosen', got prompt"),
        (4, "expected an object with prompt, chosen, rejected, got int"),
        (5, "no JSON "),
    ]
    twice = '[{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "d"}, ' + json.dumps(GOOD) + "]"
    path.write_text(twice)
    assert importing.import_file(workspace, path).bad == (BadLine(1, "column 'prompt' is there twice"),)


def test_a_parquet_file_with_broken_text(workspace, tmp_path):
    column = pyarrow.array([b"Who?", b"caf\xe9"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    other = pyarrow.array(["a", "b"])
    parquet.write_table(
        pyarrow.table({"prompt": column, "chosen": other, "rejected": pyarrow.array(["x", "y"])}), tmp_path / "a.parquet"
    )
    done = importing.import_file(workspace, tmp_path / "a.parquet")
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
        importing.import_file(workspace, path)
    assert "\n" not in str(caught.value)
    assert not workspace.preferences.exists()


def test_a_hub_set_that_is_not_to_be_had(workspace, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(DatasetError, match=r"Can't load hub:nobody/nothing: .*; check the name and the network"):
        importing.import_file(workspace, "hub:nobody/nothing")
