"""Exports: what training reads, readable by datasets and TRL as it is, the same texts back; a card that overwrites nobody's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from biasdpo import access
from biasdpo.data import exporting, importing, splits
from biasdpo.data.exporting import COLUMNS
from biasdpo.data.journal import Journal, append, new_judgment, withdraw
from biasdpo.errors import ConfigError, DatasetError, RefusedError, WorkspaceError
from biasdpo.workspace import Workspace, sha256_of

FORMATS = {"jsonl": "json", "csv": "csv", "parquet": "parquet"}
TEXTS = [
    "plain",
    "  spaces before and after \n",
    "a\nb\r\nc\rd\te",
    '"quoted", and ""doubled""; |',
    "emoji 👩🏽‍⚕️, é, ﷽",
    "line separators \u2028 \u2029 \x85",
    "<script>alert(1)</script> | `x`",
    "=1+1",
    "'=1+1",
    "''=1+1",
    "'tis quoted",
    "+1",
    "-1 and 2",
    "@SUM(1)",
    "\t=tab",
    "\r=return",
    "back\\slash \\n",
    "007",
    "2024-01-01",
    "\ufeffmark \x1c",
]


def judge(workspace: Workspace, prompt: str = "Who?", chosen: str = "a", rejected: str = "b", **columns: Any) -> Journal:
    append(workspace, new_judgment(prompt, chosen, rejected, **({"annotator": "ana"} | columns)))
    return Journal(workspace.preferences).refresh()


def load(path: Path, cache: Path, **settings: Any) -> Any:
    """As anybody would: `load_dataset`, with nothing said but the file."""
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_dataset(FORMATS[path.suffix[1:]], data_files=str(path), split="train", cache_dir=str(cache), **settings)


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_same_texts_come_back(suffix, workspace, tmp_path):
    pairs = [(text, f"{text}.", text) for text in TEXTS]
    for prompt, chosen, rejected in pairs:
        judge(workspace, prompt, chosen, rejected, category="race", target_group="é,\n")
    out = tmp_path / "out" / f"pairs.{suffix}"
    done = exporting.export_file(workspace, out)
    assert (done.path, done.rows, done.sha256) == (out, len(TEXTS), sha256_of(out))
    rows = load(out, tmp_path / "cache")
    assert tuple(rows.column_names) == COLUMNS
    stored = [tuple(f"'{text}" if text.lstrip("'")[0] in "=+-@\t\r" else text for text in pair) for pair in pairs]
    assert list(zip(rows["prompt"], rows["chosen"], rows["rejected"], strict=True)) == (stored if suffix == "csv" else pairs)
    assert set(rows["category"]) == {"race"}
    assert set(rows["target_group"]) == {"é,\n"}
    again = [(row.prompt, row.chosen, row.rejected) for row in splits.load([str(out)], workspace)]
    assert again == pairs
    other = Workspace(tmp_path / "other")
    assert importing.import_file(other, out).written == len(TEXTS)
    assert importing.import_file(workspace, out).known == len(TEXTS)  # they are this journal's own
    assert Journal(other.preferences).refresh().rows.keys() == Journal(workspace.preferences).refresh().rows.keys()


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_folder_loads_by_its_card(suffix, workspace, tmp_path):
    import datasets

    datasets.disable_progress_bars()
    for text in ("NA", "None", "1"):
        judge(workspace, text, text, f"{text}.")
    out = tmp_path / "my set" / f"pairs.{suffix}"
    done = exporting.export_file(workspace, out)
    assert done.card == out.with_name("README.md")
    rows = datasets.load_dataset(str(out.parent), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["prompt"] == ["NA", "None", "1"]  # of a CSV, pandas by itself makes nothing of two of them
    kinds = {name: feature.dtype for name, feature in rows.features.items()}
    assert kinds == dict.fromkeys(COLUMNS, "string") | {"votes": "int64", "votes_against": "int64"}
    assert rows["category"] == ["", "", ""]


def test_trl_takes_the_rows_as_plain_preference_pairs(workspace, tmp_path):
    from trl.data_utils import is_conversational, maybe_extract_prompt

    judge(workspace)
    (row,) = load(exporting.export_file(workspace, tmp_path / "pairs.jsonl").path, tmp_path / "cache")
    assert not is_conversational(row)
    assert maybe_extract_prompt(row) == row  # it has its prompt
    assert {"prompt", "chosen", "rejected"} <= row.keys()
    assert not {"messages", "image", "images", "tools", "completion"} & row.keys()  # columns that TRL takes for something else


def test_one_row_a_pair_as_most_judgments_say(workspace, tmp_path):
    judge(workspace, "Most?", "a", "b", annotator="ana", source="compare")
    judge(workspace, "Most?", "a", "b", annotator="ben", source="compare", category="gender")
    judge(workspace, "Most?", "b", "a", annotator="cem")
    judge(workspace, "Split?", "a", "b")
    judge(workspace, "Split?", "b", "a", annotator="ben")
    judge(workspace, "Tie?", verdict="tie")
    judge(workspace, "Repeat?", repeat_of="a" * 16)
    journal = judge(workspace, "Withdrawn?")
    withdraw(workspace, [list(journal.rows)[-1]])
    done = exporting.export_file(workspace, tmp_path / "pairs.jsonl")
    (row,) = [json.loads(line) for line in done.path.read_text().splitlines()]
    first = next(iter(journal.rows.values()))
    texts = {"prompt": "Most?", "chosen": "a", "rejected": "b", "category": "gender", "target_group": ""}
    origin = {column: first[column] for column in ("pair_id", "id", "source", "annotator", "created_at")}
    assert row == texts | {"votes": 2, "votes_against": 1} | origin
    assert (done.rows, done.repeats, done.contradictions) == (1, 3, 1)


def test_the_card_states_what_one_must_know(workspace, tmp_path):
    judge(workspace, "One?", "longer", "b", category="gender", target_group="women | <b>men</b>")
    judge(workspace, "Two?", "long", "lo", category="race", annotator="ben")
    judge(workspace, "Three?", verdict="tie")
    text = exporting.export_file(workspace, tmp_path / "pairs.csv").card.read_text()
    assert "license: cc-by-4.0\n" in text
    for words in (
        "**Content warning.**",
        "| gender | 1 |\n| race | 1 |",
        "| women \\| &lt;b&gt;men&lt;/b&gt; | 1 |",
        "| preferred | 2 |\n| tie | 1 |\n| (withdrawn since) | 0 |",
        "Annotators: 2",
        "| label | 2 |",
        "the longer one in 100.0% of the pairs",
        "Prompts that nearly repeat an earlier one: 0.",
        'load_dataset("csv", data_files="pairs.csv", split="train", keep_default_na=False)',
        "Judgments made in BiasDPO",
    ):
        assert words in text, words
    assert "<b>" not in text
    assert "keep the license" not in text


def test_imported_rows_keep_their_licence_and_are_named(workspace, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n")
    importing.import_file(workspace, tmp_path / "rows.jsonl", name="BiasDPO")
    text = exporting.export_file(workspace, tmp_path / "a" / "pairs.jsonl").card.read_text()
    assert "license: other\n" in text
    assert "license_name: that-of-each-source\n" in text
    assert "Rows of `import:BiasDPO` keep the license" in text
    assert "Judgments made in BiasDPO" not in text
    judge(workspace)
    text = exporting.export_file(workspace, tmp_path / "b" / "pairs.jsonl").card.read_text()
    assert "license_name: cc-by-4.0-and-that-of-each-source\n" in text


def test_nobodys_readme_is_overwritten(workspace, tmp_path):
    judge(workspace)
    mine = tmp_path / "README.md"
    mine.write_text("# My project\n")
    out = tmp_path / "pairs.jsonl"
    other = tmp_path / "pairs.jsonl.README.md"
    assert exporting.export_file(workspace, out).card == other
    judge(workspace, "New?")
    assert exporting.export_file(workspace, out).card == other  # our own, untouched since: written anew
    assert "2 preference pairs" in other.read_text()
    assert mine.read_text() == "# My project\n"
    other.write_text(other.read_text().replace("2 preference", "two preference"))
    before = out.read_bytes()
    with pytest.raises(DatasetError, match=r"README.md and pairs.jsonl.README.md in .* are taken: rename one"):
        exporting.export_file(workspace, out)
    assert out.read_bytes() == before
    mine.unlink()
    assert exporting.export_file(workspace, out).card == mine
    csv = exporting.export_file(workspace, tmp_path / "pairs.csv")
    assert csv.card == tmp_path / "pairs.csv.README.md"  # README is the JSONL's


def test_what_cannot_be_exported(workspace, tmp_path, monkeypatch):
    with pytest.raises(DatasetError, match="No preference pairs in the workspace yet"):
        exporting.export_file(workspace, tmp_path / "pairs.jsonl")
    judge(workspace, verdict="tie")
    with pytest.raises(DatasetError, match="Nothing to export"):
        exporting.export_file(workspace, tmp_path / "pairs.jsonl")
    judge(workspace)
    journal = workspace.preferences.read_bytes()
    with pytest.raises(ConfigError, match=r"ends in .jsonl, .csv or .parquet: got 'pairs.xlsx'"):
        exporting.export_file(workspace, tmp_path / "pairs.xlsx")
    link = tmp_path / "link.jsonl"
    link.hardlink_to(workspace.preferences)
    for path in (workspace.preferences, workspace.root / "runs" / ".." / "preferences.jsonl", link):
        with pytest.raises(ConfigError, match="is the journal itself"):
            exporting.export_file(workspace, path)
    assert workspace.preferences.read_bytes() == journal
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        exporting.export_file(workspace, tmp_path / "folder.csv")
    with pytest.raises(WorkspaceError, match="Can't write"):
        exporting.export_file(workspace, link / "in a file" / "pairs.jsonl")
    monkeypatch.setattr(access, "_source", lambda: access.Caller(access.Role.visitor))
    with pytest.raises(RefusedError):
        exporting.export_file(workspace, tmp_path / "pairs.jsonl")
    assert not (tmp_path / "pairs.jsonl").exists()


def test_a_failed_write_leaves_the_old_file(workspace, tmp_path, monkeypatch):
    judge(workspace)
    out = tmp_path / "pairs.csv"
    exporting.export_file(workspace, out)
    before = out.read_bytes()
    judge(workspace, "New?")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("csv.DictWriter.writerows", full)
    with pytest.raises(WorkspaceError, match="No space left on device"):
        exporting.export_file(workspace, out)
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "pairs.csv", "workspace"]
