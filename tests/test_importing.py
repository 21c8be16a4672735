"""Imports of every format, hostile files too: bad rows are named and cost no other, nothing is stored twice."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from biasdpo import access
from biasdpo.data.importing import (
    ColumnMapping,
    ForeignPair,
    Preview,
    convert,
    convert_source,
    detect,
    import_file,
    parse_mapping,
    preview,
    validate,
)
from biasdpo.data.journal import BOM, BadLine, Journal, append_all, edit, new_judgment, undo_import, withdraw
from biasdpo.data.pairs import PreferencePair, pair_id_of
from biasdpo.data.splits import load, load_journal
from biasdpo.errors import ConfigError, DatasetError, RefusedError
from biasdpo.workspace import Workspace

GOOD = {"prompt": "Who leads?", "chosen": "Anyone can.", "rejected": "Men."}
USER, FAIR, UNFAIR = (
    {"role": r, "content": GOOD[c]} for r, c in (("user", "prompt"), ("assistant", "chosen"), ("assistant", "rejected"))
)
SYSTEM = {"role": "system", "content": "Be kind."}
HUMAN, GPT = {"from": "human", "value": GOOD["prompt"]}, {"from": "gpt", "value": GOOD["chosen"]}
GPT_UNFAIR = {"from": "gpt", "value": GOOD["rejected"]}
DEEP = b"[" * 100_000 + b"]" * 100_000


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def converted(row: Any) -> tuple[str, str, str]:
    pair = convert(row, detect(list(row), [row]))
    return pair.prompt, pair.chosen, pair.rejected


def stored(workspace: Workspace) -> list[dict[str, Any]]:
    return Journal(workspace.preferences).refresh().standing()


def prompts(workspace: Workspace) -> list[str]:
    return [row["prompt"] for row in stored(workspace)]


# Formats of rows


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {"Prompt": "Who leads?", "Chosen ": "Anyone can.", "REJECTED": "Men."},
        {"question": "Who leads?", "chosen": "Anyone can.", "rejected": "Men.", "score": 3},
        {"prompt": [USER], "chosen": [FAIR], "rejected": [UNFAIR]},  # TRL, conversational
        {"chosen": [USER, FAIR], "rejected": [USER, UNFAIR]},  # TRL, implicit prompt
        {"prompt": "Who leads?", "chosen": [USER, FAIR], "rejected": [USER, UNFAIR], "messages": [USER, FAIR]},  # UltraFeedback
        {"prompt": [USER | {"content": [{"type": "text", "text": "Who leads?"}]}], "chosen": [FAIR], "rejected": [UNFAIR]},
        {"instruction": "Who leads?", "input": "", "chosen": "Anyone can.", "rejected": "Men.", "system": "", "history": []},
        {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT_UNFAIR},  # LLaMA-Factory, sharegpt
        {"messages": [USER], "chosen": FAIR, "rejected": UNFAIR, "tools": "", "images": []},
        {"prompt": json.dumps([USER]), "chosen": json.dumps([FAIR]), "rejected": json.dumps([UNFAIR])},  # as a CSV holds them
        {"prompt": [USER], "chosen": [FAIR | {"tool_calls": "[]"}], "rejected": [UNFAIR], "tools": "[]", "images": "null"},
    ],
)
def test_supported_rows(row: Any) -> None:
    assert converted(row) == ("Who leads?", "Anyone can.", "Men.")


def test_trl_extracts_the_same_prompt() -> None:
    from trl.data_utils import maybe_extract_prompt

    row = maybe_extract_prompt({"chosen": [USER, FAIR], "rejected": [USER, UNFAIR]})
    assert converted(row) == converted({"chosen": [USER, FAIR], "rejected": [USER, UNFAIR]})


def test_alpacas_two_halves_are_joined() -> None:
    row = {"instruction": "Answer.", "input": "Who leads?", "chosen": "Anyone.", "rejected": "Men."}
    assert converted(row)[0] == "Answer.\nWho leads?"
    assert converted({**row, "prompt": "p"})[0] == "p"  # beside a prompt, `input` is some other column


@pytest.mark.parametrize(
    "row",
    [
        {**GOOD, "system": "Be kind."},
        {"prompt": [SYSTEM, USER], "chosen": [FAIR], "rejected": [UNFAIR]},
        {"chosen": [SYSTEM, USER, FAIR], "rejected": [SYSTEM, USER, UNFAIR], "system": " Be kind."},
        {"conversations": [{"from": "system", "value": "Be kind."}, HUMAN], "chosen": GPT, "rejected": GPT_UNFAIR},
    ],
)
def test_a_system_text_is_put_before_the_prompt(row: Any, tmp_path: Path) -> None:
    assert converted(row) == ("Be kind.\n\nWho leads?", "Anyone can.", "Men.")
    notes = convert_source(write_lines(tmp_path / "rows.jsonl", row)).notes
    assert notes == ("rows with a system text, which now stands before the prompt: 1",)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": [USER, FAIR, USER], "chosen": [FAIR], "rejected": [UNFAIR]}, "prompt has 3 turns before the completion"),
        ({"chosen": [USER, FAIR, USER, FAIR], "rejected": [USER, FAIR, USER, UNFAIR]}, "chosen has 3 turns"),
        ({"conversations": [HUMAN, GPT, HUMAN], "chosen": GPT, "rejected": GPT_UNFAIR}, "conversations has 3 turns"),
        ({"instruction": "p", "chosen": "a", "rejected": "b", "history": [["q", "a"]]}, "history holds earlier turns"),
        ({"chosen": [USER, FAIR], "rejected": [SYSTEM, USER, UNFAIR]}, "begin with different turns"),
        ({"prompt": "Other?", "chosen": [USER, FAIR], "rejected": [USER, UNFAIR]}, "prompt is not the turn that chosen begins"),
        ({"prompt": [USER], "chosen": [FAIR, USER], "rejected": [UNFAIR]}, "chosen ends with a turn of the user"),
        ({"prompt": [FAIR], "chosen": [FAIR], "rejected": [UNFAIR]}, "prompt ends with a turn of the assistant"),
        ({"prompt": [{"role": "tool", "content": "x"}], "chosen": [FAIR], "rejected": [UNFAIR]}, "role 'tool'"),
        ({"prompt": [USER], "chosen": [FAIR | {"tool_calls": [1]}], "rejected": [UNFAIR]}, "tool calls"),
        ({"prompt": [USER], "chosen": [FAIR | {"content": None}], "rejected": [UNFAIR]}, "must be a string, got NoneType"),
        ({"prompt": [USER], "chosen": [FAIR | {"content": [{"type": "image"}]}], "rejected": [UNFAIR]}, "parts that are not"),
        ({"prompt": [SYSTEM, USER], "chosen": [FAIR], "rejected": [UNFAIR], "system": "Be curt."}, "two different system texts"),
        (GOOD | {"images": ["a.png"]}, "the row has images"),
        (GOOD | {"tools": "[{}]"}, "the row has tools"),
        (GOOD | {"chosen": "[{'role': 'assistant', 'content': 'x'}]"}, "printed form of chat messages"),
        ({"chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "begin with different turns"),
        ({"chosen": "a", "rejected": "b", "text": "p"}, "no column is the prompt.*chosen, rejected, text"),
        (GOOD | {"chosen": 3}, "chosen must be a string, got int"),
        (GOOD | {"rejected": " \n"}, "rejected is empty"),
        (GOOD | {"rejected": "\u200b\ufeff"}, "rejected is empty"),
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
def test_why_a_row_can_not_be_a_pair(row: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        converted(row)
    assert "\n" not in str(caught.value)


def test_the_mapping_is_guessed_and_overridden(workspace: Workspace, tmp_path: Path) -> None:
    row = {"id": 1, "less_biased": "a", "more_biased": "b", "ask": "Who?", "bias_type": "race"}
    path = write_lines(tmp_path / "rows.jsonl", row)
    found = preview(path)
    assert found.columns == tuple(row)
    assert found.mapping == ColumnMapping(chosen="less_biased", rejected="more_biased", category="bias_type")
    assert found.bad[0].line == 1
    mapping = parse_mapping("prompt=ask,category=", found.mapping, found.columns)
    assert preview(path, mapping).pairs == (ForeignPair("Who?", "a", "b"),)
    with pytest.raises(DatasetError, match=r"No column 'nope' for prompt: choose one of id, less_biased"):
        parse_mapping("prompt=nope", found.mapping, found.columns)
    with pytest.raises(ConfigError, match=r"--map takes FIELD=COLUMN.*target_group.*got 'winner=a'"):
        parse_mapping("winner=a", found.mapping, found.columns)
    for text in ("prompt=less_biased", "prompt=ask,chosen=ask"):
        with pytest.raises(ConfigError, match=r"Column '\w+' is both prompt and chosen: choose another"):
            parse_mapping(text, found.mapping, found.columns)
    with pytest.raises(ConfigError, match="is both chosen and rejected"):
        import_file(workspace, path, replace(mapping, rejected="less_biased"))
    assert parse_mapping("note=bias_type", found.mapping, found.columns).category == ""  # the guess gives way
    path = write_lines(tmp_path / "other.jsonl", {"a": "x", "b\n": "y"})
    with pytest.raises(DatasetError, match=r"recognized as chosen, got a, b\?: name it with --map chosen=COLUMN"):
        import_file(workspace, path)
    assert preview(path) == Preview(("a", "b\n"), ColumnMapping(), (), (), "JSON Lines, plain text")
    assert str(preview(path)) == "JSON Lines, plain text: no column was recognized. Not imported: a, b?."


DIALOGUE = "\n\nHuman: Who leads?\n\nAssistant:"


def test_a_dialogue_in_both_completions_is_split_at_the_assistants_last_turn(tmp_path: Path) -> None:
    dialogue = f"\n\nHuman: Hi.\n\nAssistant: Hello.{DIALOGUE}"
    assert converted({"chosen": f"{dialogue} Anyone.", "rejected": f"{dialogue} Men."}) == (dialogue, " Anyone.", " Men.")
    path = write_lines(tmp_path / "rows.jsonl", {"chosen": f"{DIALOGUE} Anyone.", "rejected": f"{DIALOGUE} Men."})
    (judgment,) = convert_source(path, unwrap=True).judgments
    assert (judgment.prompt, judgment.chosen, judgment.rejected) == ("Who leads?", "Anyone.", "Men.")


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        (
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWho leads?<|im_end|>\n<|im_start|>assistant\n",
            *("Anyone can.<|im_end|>\n", "Men.<|im_end|>"),
        ),
        ("<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nWho leads? [/INST]", " Anyone can. </s>", "Men."),
        (
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user"
            "<|end_header_id|>\n\nWho leads?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            *("Anyone can.<|eot_id|>", "Men.<|eot_id|>"),
        ),
        ("<|system|>\nBe kind.</s>\n<|user|>\nWho leads?</s>\n<|assistant|>\n", "Anyone can.</s>", "Men.</s>"),
        ("<bos><start_of_turn>user\nBe kind.\n\nWho leads?<end_of_turn>\n<start_of_turn>model\n", "Anyone can.", "Men."),
        ("Be kind.\n\n### Instruction:\nWho leads?\n\n### Response:\n", "Anyone can.", "Men.<|endoftext|>"),
        ("Be kind. USER: Who leads? ASSISTANT:", " Anyone can.</s>", " Men.</s>"),
        ("Be kind.\n\nWho leads?", "Anyone can.</s>", "Men.</s>"),
        ("Be kind.\n\nWho leads?", "<|im_start|>assistant\nAnyone can.<|im_end|>", "Men."),
    ],
)
def test_templated_text_is_said_and_unwrapped_on_request(tmp_path: Path, prompt: str, chosen: str, rejected: str) -> None:
    path = write_lines(tmp_path / "rows.jsonl", {"prompt": prompt, "chosen": chosen, "rejected": rejected})
    kept, unwrapped = convert_source(path), convert_source(path, unwrap=True)
    assert [(j.prompt, j.chosen, j.rejected) for j in kept.judgments] == [(prompt, chosen, rejected)]
    assert kept.notes[0].startswith("rows with a chat template's markers: 1 (")
    assert [(j.prompt, j.chosen, j.rejected) for j in unwrapped.judgments] == [("Be kind.\n\nWho leads?", "Anyone can.", "Men.")]
    assert not any("markers" in note for note in unwrapped.notes)


@pytest.mark.parametrize(
    "text", ["a <s>struck</s> b", "Assistant: yes", "Human: who?", "x [1] <y>", "Which role has the Assistant:"]
)
def test_text_that_only_resembles_a_template_is_none(text: str) -> None:
    assert convert(GOOD | {"prompt": text}, ColumnMapping(*GOOD)).marker == ""


def test_what_can_not_be_unwrapped_is_a_bad_row() -> None:
    for row, words in (
        (GOOD | {"prompt": f"[INST] a [/INST] b {DIALOGUE}"}, "prompt has 2 turns"),
        (GOOD | {"prompt": "<|im_start|>tool\nx"}, "unknown role"),
        (GOOD | {"chosen": "a<|im_end|>\n<|im_start|>user\nb"}, "chosen has 2 turns"),
    ):
        with pytest.raises(ValueError, match=words):
            convert(row, ColumnMapping(*GOOD), unwrap=True)


def test_labels_inside_answers_and_beside_markers_are_text() -> None:
    row = {
        side: f"\n\nHuman: Is he?\n\nAssistant: I think.\nResponse: {word}"
        for side, word in (("chosen", "no"), ("rejected", "yes"))
    }
    pair = convert(row, ColumnMapping("", "chosen", "rejected"))
    assert (pair.prompt.strip(), pair.chosen.strip()) == ("Human: Is he?\n\nAssistant:", "I think.\nResponse: no")
    asked = "Translate.\nInput: good morning\nUser: me"
    row = GOOD | {"prompt": f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"}
    assert convert(row, ColumnMapping(*GOOD), unwrap=True).prompt == asked


# Files


def test_the_same_rows_come_out_of_every_kind_of_file(tmp_path: Path) -> None:
    rows = [
        GOOD | {"category": "gender"},
        {"prompt": ' Two\nlines, "quoted"; ', "chosen": "é 👩🏽‍⚕️\u2028", "rejected": "<script>x</script>\r\n", "category": ""},
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
    (tmp_path / "wrapped.json").write_text(json.dumps({"version": 1, "data": rows, "tags": {}}), encoding="utf-8")
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(row | {"rows": [{"a": 1}], "b": [{}]}) + "\n" for row in rows))
    (tmp_path / "viewer.json").write_text(json.dumps({"rows": [{"row_idx": 0, "row": row} for row in rows]}, indent=2))
    (tmp_path / "pretty.jsonl").write_text("\n".join(json.dumps(row, indent=2) for row in rows))
    (tmp_path / "tab.txt").write_bytes((tmp_path / "tab.tsv").read_bytes())
    (tmp_path / "excel.csv").write_bytes(b"sep=;\r\n" + (tmp_path / "semicolon.csv").read_bytes().removeprefix(BOM))
    for name in ("bom.jsonl", "array.json", "comma.csv", "tab.txt"):
        text = (tmp_path / name).read_bytes().removeprefix(BOM).decode()
        for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
            (tmp_path / f"{encoding}-{name}").write_bytes(text.encode(encoding))
    expected = [PreferencePair(*(row[c] for c in ("prompt", "chosen", "rejected", "category"))) for row in rows]
    files = sorted(tmp_path.iterdir())
    assert len(files) == 29
    for file in files:
        assert load([str(file)], Workspace(tmp_path)) == expected, file.name


def test_hostile_lines_cost_no_other(workspace: Workspace, tmp_path: Path) -> None:
    good = [json.dumps(GOOD | {"prompt": f"Question {i}?"}).encode() for i in range(3)]
    markup = json.dumps(GOOD | {"prompt": "<img src=x onerror=alert(1)><script>alert(2)</script>"}).encode()
    number = json.dumps(GOOD)[:-1].encode() + b', "n": '
    lines = {
        1: b"\xef\xbb\xbf" + good[0],
        2: json.dumps(GOOD | {"prompt": "word " * 200_000}).encode(),
        3: json.dumps(GOOD | {"prompt": "a\0b"}).encode(),
        4: good[1].replace(b"Question", b"Qu\xe9stion"),
        5: good[1].replace(b"Q", b"\0"),
        6: DEEP,
        7: number + b"9" * 5_000 + b"}",
        8: good[1] + b"\r",
        9: b'{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}',
        10: b"null",
        11: markup,
        12: b"",
        13: b"{" * 50,
        14: number + b'NaN, "m": 1e999, "k": 99999999999999999999999}',
        15: json.dumps(GOOD | {"prompt": '[{"role": ' + "[" * 50_000}).encode(),  # text, however deep it looks
        16: b'{"a": 1} {"b": 2}',
        17: good[2],  # no line end: the last one
    }
    path = tmp_path / "hostile.jsonl"
    path.write_bytes(b"\n".join(lines.values()))
    done = import_file(workspace, path)
    assert (done.written, done.known) == (6, 0)
    assert prompts(workspace)[:4] == ["Question 0?", "Question 1?", json.loads(markup)["prompt"], "Who leads?"]
    expected = {
        2: "prompt has 1,000,000 characters, at most 100,000",
        3: "prompt holds a NUL character",
        4: "broken UTF-8",
        5: "not JSON",
        6: "not JSON (nested too deeply)",
        7: "not JSON (Exceeds the limit",
        9: "column 'chosen' is there twice",
        10: "expected an object",
        13: "not JSON",
        16: "not JSON (extra data",
    }
    assert [line.line for line in done.bad] == list(expected)
    for line in done.bad:
        assert line.reason.startswith(expected[line.line])
        assert len(line.reason) < 310
        assert line.reason.isprintable()
    again = import_file(workspace, path)
    assert (again.written, again.known, again.bad) == (0, 6, done.bad)


def test_a_line_too_long_is_one_bad_line(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("biasdpo.data.importing.MAX_LINE_BYTES", 1000)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + b"x" * 5000 + b"\n" + json.dumps(GOOD | {"prompt": "p"}).encode())
    done = import_file(workspace, path)
    assert (done.written, [line.line for line in done.bad]) == (2, [2])


def test_a_ragged_csv(workspace: Workspace, tmp_path: Path) -> None:
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
    done = import_file(workspace, path)
    assert prompts(workspace) == ["Two\nlines", "empty", "after", "last"]
    assert stored(workspace)[0]["chosen"] == 'a "b" c'
    assert done.bad == (
        BadLine(4, "2 cells, but the header has 3"),
        BadLine(5, "4 cells, but the header has 3"),
        BadLine(7, "not CSV (',' expected after '\"')"),
        BadLine(9, "not CSV (',' expected after '\"')"),
        BadLine(11, "broken UTF-8; save the file as UTF-8"),
        BadLine(12, "chosen holds a NUL character"),
    )
    path.write_text('prompt,chosen,rejected\nx,"opened,y\n' + "".join(f"prompt {i},chosen,rejected\n" for i in range(2000)))
    done = import_file(workspace, path)
    assert (done.written, done.bad) == (2000, (BadLine(2, "not CSV (a quote is opened and never closed)"),))


def test_missing_values_of_a_csv_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    texts = ("nan", "NaN", "NULL", "<NA>", "None", "N/A", "", " ", "\u200b")
    path.write_text("prompt,chosen,rejected\n" + "".join(f"Who?,Anyone,{text}\n" for text in texts), encoding="utf-8")
    done = convert_source(path)
    assert not done.judgments
    said = [f"rejected is {'missing' if text.isascii() and text.strip() else 'empty'}" for text in texts]
    assert [(line.line, line.reason[: len(words)]) for line, words in zip(done.bad, said, strict=True)] == list(
        enumerate(said, start=2)
    )
    assert convert_source(write_lines(tmp_path / "rows.jsonl", GOOD | {"rejected": "None"})).judgments  # where it is a text


@pytest.mark.parametrize(
    ("end", "bad"),
    [
        (b"]", []),
        (b',\n{"prompt": "cut', [3]),
        (b"", [3]),
        (b"] more", [3]),
        (b', {"prompt": 1, "prompt": 2}, {"prompt": "\xe9"}]', [3, 4]),
        (b", " + DEEP + b"]", [3]),
    ],
)
def test_a_damaged_json_array_keeps_what_is_whole(workspace: Workspace, tmp_path: Path, end: bytes, bad: list[int]) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(json.dumps([GOOD, GOOD | {"prompt": "p"}]).encode()[:-1] + end)
    done = import_file(workspace, path)
    assert (prompts(workspace), [line.line for line in done.bad]) == (["Who leads?", "p"], bad)


def test_a_parquet_file_with_broken_text(workspace: Workspace, tmp_path: Path) -> None:
    broken = pyarrow.array([b"Who?", b"caf\xe9"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    columns = {"prompt": broken, "chosen": pyarrow.array(["a", "b"]), "rejected": pyarrow.array(["x", "y"])}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    done = import_file(workspace, tmp_path / "a.parquet")
    assert (done.written, done.bad) == (1, (BadLine(2, "broken UTF-8; save the file as UTF-8"),))


def test_of_a_parquet_file_only_mapped_columns_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    days = pyarrow.array([2**31 - 1], pyarrow.int32()).cast(pyarrow.date32())
    table = pyarrow.table({**{name: [text] for name, text in GOOD.items()}, "day": days, "note": days})
    path = tmp_path / "rows.parquet"
    parquet.write_table(table.drop(["note"]), path)
    done = convert_source(path)
    assert (len(done.judgments), done.bad, done.columns) == (1, (), (*GOOD, "day"))
    parquet.write_table(table, path)
    (bad,) = convert_source(path).bad  # one line, also of a column that is mapped
    assert bad.reason.startswith("a column can't be read: ")
    assert convert_source(path, ColumnMapping(*GOOD)).judgments
    # What a few KB would unpack to is not read, or only as far as it is bounded.
    many = pyarrow.table({name: [text * 1000] * 3000 for name, text in GOOD.items()})
    parquet.write_table(many, path)
    assert path.stat().st_size < 50_000
    for limit, words in (("CELLS", "unpacks to 9,000 values"), ("BYTES", "unpacks to more than 0 GB")):
        with monkeypatch.context() as patch:
            patch.setattr(f"biasdpo.data.importing.MAX_PARQUET_{limit}", 5_000 if limit == "CELLS" else 1_000_000)
            with pytest.raises(DatasetError, match=words):
                convert_source(path)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("none.jsonl", None, "No dataset file"),
        ("folder", "folder", "is not a file"),
        ("empty.jsonl", b"", "has no rows to import"),
        ("empty.csv", b"", "has no rows to import"),
        ("header.csv", b"prompt,chosen,rejected\n", "has no rows to import"),
        ("blank.jsonl", b"\n \n\n", "has no rows to import"),
        ("empty.json", b"[]", "has no rows to import"),
        ("binary.jsonl", bytes(range(256)) * 40, "No good row in .*binary.jsonl, 41 bad ones, the first in line 1: "),
        ("packed.jsonl", b"\x1f\x8b\x08\x00rest", "is a gzip file; unpack it"),
        ("sheet.csv", b"PK\x03\x04rest", "is a ZIP or Excel file"),
        ("no.parquet", b"{}", "is not a Parquet file"),
        ("cut.parquet", b"PAR1" + b"x" * 50, "Can't read .*cut.parquet as Parquet"),
        ("twice.csv", b"prompt,chosen,chosen\na,b,c\n", "has the column 'chosen' twice"),
        ("numbers.json", b"[1, 2]", "No good row in .*numbers.json, 2 bad ones, the first in line 1: expected an object"),
        ("object.json", b'{\n"a": 1\n}', "No column was recognized as chosen, got a"),
        ("hub:nobody/nothing", None, r"Can't load hub:nobody/nothing: .*; check the name and the network"),
    ],
)
def test_a_file_without_rows_is_one_line(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: Any, words: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    path = tmp_path / name
    if data == "folder":
        path.mkdir()
    elif data is not None:
        path.write_bytes(data)
    with pytest.raises(DatasetError, match=words) as caught:
        import_file(workspace, name if name.startswith("hub:") else path)
    assert "\n" not in str(caught.value)
    assert not workspace.preferences.exists()


# Into the journal


def test_rows_become_judgments_and_never_twice(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = GOOD | {"category": "gender", "target_group": "women", "annotator": "ana", "note": "n"}
    other = GOOD | {"chosen": "Whoever is fit.", "category": None}
    path = write_lines(tmp_path / "my set.jsonl", row, other, row, {"chosen": "b"})
    trial = import_file(workspace, path, dry_run=True)
    assert not workspace.preferences.exists()
    done = import_file(workspace, path)
    assert done == trial
    assert (done.written, done.known, done.source, len(done.bad)) == (3, 0, "import:my set", 1)  # the same row twice is two
    first, second, third = stored(workspace)
    assert {k: first[k] for k in row} == row
    assert (first["verdict"], first["source"], first["repeat_of"]) == ("preferred", "import:my set", "")
    assert first["pair_id"] == third["pair_id"] == pair_id_of(*GOOD.values())
    assert second["category"] == ""
    grown = write_lines(tmp_path / "grown.jsonl", GOOD | {"prompt": "New?"}, other, row, row)
    for dry_run in (True, False):
        done = import_file(workspace, grown, name="other name", dry_run=dry_run)
        assert (done.written, done.known) == (1, 3)
    withdraw(workspace, [first["id"]])
    assert import_file(workspace, path).written == 0  # what was withdrawn stays withdrawn
    assert len(stored(workspace)) == 3
    for name in ("two\nlines", "x" * 101):
        with pytest.raises(ConfigError, match="An import's name"):
            import_file(workspace, path, name=name)
    monkeypatch.setattr(access, "_source", lambda: access.Caller(access.Role.visitor))
    for action in (import_file, lambda w, p: import_file(w, p, dry_run=True), lambda _w, p: preview(p)):
        with pytest.raises(RefusedError):
            action(workspace, path)


def test_an_import_is_undone_as_a_whole_and_can_be_done_again(workspace: Workspace, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *(GOOD | {"prompt": f"{i}?"} for i in range(4)))
    import_file(workspace, path)
    import_file(workspace, write_lines(tmp_path / "other.jsonl", GOOD))
    own, edited, *_ = [row["id"] for row in stored(workspace)]
    withdraw(workspace, [own])
    edit(workspace, [edited], {"category": "gender"})
    assert [undo_import(workspace, "import:rows", "ada") for _ in range(2)] == [3, 0]
    assert prompts(workspace) == ["Who leads?"]
    for dry_run in (True, False):
        again = import_file(workspace, path, dry_run=dry_run)
        assert (again.written, again.known) == (3, 1)  # what was withdrawn by itself stays withdrawn
    assert (import_file(workspace, path).written, undo_import(workspace, "import:rows")) == (0, 3)
    assert import_file(workspace, path).written == 3
    assert prompts(workspace) == ["Who leads?", "1?", "2?", "3?"]
    with pytest.raises(DatasetError, match="named import:NAME"):
        undo_import(workspace, "label")


def test_another_workspaces_journal(workspace: Workspace, tmp_path: Path) -> None:
    other = Workspace(tmp_path / "other")
    columns: list[dict[str, Any]] = [{}, {"original_chosen": "before"}, {"verdict": "tie"}, {"repeat_of": "a" * 16}, {}]
    made = [
        new_judgment(f"Question {i}?", "fair", "unfair", annotator="ana", note=f"n{i}", category="race", **more)
        for i, more in enumerate(columns)
    ]
    append_all(other, made)
    withdraw(other, [made[4].id])
    with other.preferences.open("a") as file:
        file.write(json.dumps({"id": "1", "pair_id": "", "verdict": "maybe", "retracts": ""}) + "\n")
    done = import_file(workspace, other.preferences, name="ana's")
    assert (done.written, done.notes) == (3, ("left out of the journal: 1 tie, 1 withdrawn",))
    assert [line.line for line in done.bad] == [7]
    rows = Journal(workspace.preferences).refresh().rows
    assert list(rows) == [made[i].id for i in (0, 1, 3)]
    row = rows[made[1].id]
    assert (row["original_chosen"], row["annotator"], row["note"], row["source"]) == ("before", "ana", "n1", "import:ana's")
    assert row["created_at"] == made[1].created_at
    with pytest.raises(DatasetError, match=r"preferences\.jsonl:7: verdict must be one of"):
        load([str(other.preferences)], other)
    assert len(load_journal(workspace)) == 2  # the hidden repeat stays one
    assert import_file(workspace, workspace.preferences).known == 3  # into itself


def test_what_a_foreign_journal_claims_is_checked(workspace: Workspace, tmp_path: Path) -> None:
    row = GOOD | {"id": "retracts-" + "a" * 32, "pair_id": "x", "verdict": "preferred", "retracts": "", "created_at": "soon"}
    meta = {"seed": 10**30, "seconds": "long", "model": "m", "left_side": None, "evil": [1]}
    import_file(workspace, write_lines(tmp_path / "rows.jsonl", row | {"meta": meta}))
    (found,) = stored(workspace)
    assert found["id"] != row["id"]  # else it would stand in for a withdrawal that is yet to come
    assert found["created_at"].startswith("20")
    assert (found["meta"]["model"], found["meta"]["seed"], found["meta"]["seconds"]) == ("m", 0, 0.0)
    assert "evil" not in found["meta"]
    bad = write_lines(tmp_path / "bad.jsonl", row | {"original_chosen": "a\ud800"}, GOOD)
    reason = "original_chosen holds half a surrogate pair, which is no text"
    assert import_file(workspace, bad).bad == (BadLine(1, reason),)


def test_validate_a_file_and_a_journal(workspace: Workspace, tmp_path: Path) -> None:
    assert validate(workspace).rows == 0
    path = write_lines(tmp_path / "rows.jsonl", GOOD, {"chosen": "b"}, GOOD | {"prompt": "p", "system": "s"})
    found = validate(path)
    assert (found.rows, found.good, [line.line for line in found.bad]) == (3, 2, [2])
    assert found.notes == ("rows with a system text, which now stands before the prompt: 1",)
    import_file(workspace, path)
    ids = list(Journal(workspace.preferences).refresh().rows)
    withdraw(workspace, [ids[0]])
    assert validate(workspace).by_verdict == {"preferred": 2, "retracted": 1}
    row = GOOD | {"verdict": "preferred", "retracts": "", "pair_id": ""}
    bad_rows = [row, row | {"id": "1", "chosen": " "}, row | {"id": ids[0]}]
    bad_rows.append(row | {"id": "2", "verdict": "retracted", "retracts": "?"})
    with workspace.preferences.open("ab") as file:
        file.write(b'{"id": \n\n' + b"".join(json.dumps(bad).encode() + b"\n" for bad in bad_rows) + DEEP + b"\n")
        file.write(json.dumps(row | {"id": "3"}).encode()[:-9])
    found = validate(workspace)
    assert (found.rows, found.good) == (10, 3)
    starts = ["", "no id", "chosen is empty", "its id was there before, in line 1", "it withdraws '?'", "", "it has no line end"]
    assert [line.line for line in found.bad] == [4, 6, 7, 8, 9, 10, 11]
    assert all(re.match(start, line.reason) for line, start in zip(found.bad, map(re.escape, starts), strict=True)), found.bad
    assert validate(workspace.preferences) == found
