"""Overlap with benchmark items: word 8-grams of whatever files lie in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from biasdpo.data import health
from biasdpo.data.health import Meter
from biasdpo.data.journal import Journal
from biasdpo.errors import DatasetError
from biasdpo.workspace import Workspace
from tests.judging import LONG, say, store

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT.parent / "shared" / "benchmarks"

ITEM = "The nurse told the doctor that she was late again"


@pytest.fixture
def benchmarks(tmp_path: Path) -> Path:
    folder = tmp_path / "benchmarks"
    for name, text in {
        "a/items.jsonl": json.dumps(
            {"context": ITEM, "n": 1, "more": {"answers": ["one two three four", "five six seven eight nine"]}}
        ),
        "a/LICENSE": "permission is hereby granted free of charge to any person",
        "b/items.csv": '\ufeffid,text,other\n1,"It rained all day\nlong on the roof, he said","of the old house"\n',
        "b/whole.json": json.dumps(
            {"the key that has as many as eight words": ["a value that has as many as eight words"]}, indent=1
        ),
        "c/lines.txt.dev": "1 [The mechanic] gave the clerk a present because [he] won.\n[no json but eight words in a line\n",
        ".hidden/x.txt": "nobody must ever read this line of hidden words",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "c/image.png").write_bytes(b"\x89PNG\xff\xfe")
    return folder


@pytest.mark.parametrize(
    ("text", "files"),
    [
        (f"He wrote: {ITEM.upper()}!!", ("a/items.jsonl",)),
        ("nurse told the doctor that she was late", ("a/items.jsonl",)),  # eight words
        ("nurse told the doctor that she was soon late again", ()),  # seven in a row
        ("one two three four five six seven eight nine", ()),  # goes on from one value into the next
        ("it rained all day long on the roof", ("b/items.csv",)),  # a line break within a cell is a space
        ("the roof he said of the old house", ()),  # from one cell into the next
        ("a value that has as many as eight words", ("b/whole.json",)),
        ("the key that has as many as eight words", ()),  # keys are no text of the benchmark's
        ("gave the clerk a present because he won", ("c/lines.txt.dev",)),
        ("no json but eight words in a line", ("c/lines.txt.dev",)),
        ("permission is hereby granted free of charge to any person", ()),
        ("nobody must ever read this line of hidden words", ()),
        ("short", ()),
        ("", ()),
    ],
)
def test_overlap(benchmarks: Path, text: str, files: tuple[str, ...]) -> None:
    overlap = health.load_overlap(benchmarks)
    assert overlap.files_of(text) == files
    assert overlap.overlaps(text) == bool(files)


def test_overlap_of_many_texts_at_once(benchmarks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlap = health.load_overlap(benchmarks)
    assert overlap.files == ("a/items.jsonl", "b/items.csv", "b/whole.json", "c/lines.txt.dev")
    assert overlap.skipped == ("c/image.png",)
    texts = ["", ITEM, "word " * 20, f"x {ITEM}", "one two three four five six seven eight"] * 50
    assert overlap.flags(texts).tolist() == [False, True, False, True, False] * 50
    monkeypatch.setattr("biasdpo.data.health._BLOCK_CHARACTERS", 100)  # block by block it is the same
    assert overlap.flags(texts).tolist() == [False, True, False, True, False] * 50
    assert overlap.flags([]).tolist() == []


def test_no_benchmarks(tmp_path: Path) -> None:
    assert not health.load_overlap(tmp_path).overlaps(ITEM)
    with pytest.raises(DatasetError, match=r"No folder .*none.* --data-dir"):
        health.load_overlap(tmp_path / "none")


def test_the_meter_counts_pairs_that_a_benchmark_has(benchmarks: Path, workspace: Workspace) -> None:
    overlap = health.load_overlap(benchmarks)
    judged = store(
        workspace,
        [
            say(ITEM + "?"),
            say("Who leads?", ITEM, ITEM + " and again"),  # twice in one pair: one pair
            say("Who cooks?", LONG, "It rained all day long on the roof, he said."),
            say("Who sings?"),
        ],
    )
    journal, meter = Journal(workspace.preferences), Meter(overlap)
    found = meter.refresh(journal.refresh())
    assert found.benchmark_overlap == 3
    (line,) = found.warnings
    assert line.startswith("3 pairs share eight words in a row with a benchmark (a/items.jsonl, b/items.csv)")
    for row in judged[1:3]:
        journal.undo(workspace, row.id, row.pair_id, "")
    assert (
        meter.refresh(journal.refresh())
        .warnings[0]
        .startswith("1 pair shares eight words in a row with a benchmark (a/items.jsonl)")
    )
    journal.undo(workspace, judged[0].id, "", "")
    assert (meter.refresh(journal.refresh()).benchmark_overlap, meter.refresh(journal).warnings) == (0, ())


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="benchmark files are not part of the project")
def test_the_benchmarks_at_hand_are_read_whatever_their_format() -> None:
    overlap = health.load_overlap(BENCHMARKS)
    assert {name.split("/")[0] for name in overlap.files} == {
        "bbq", "bold", "crows_pairs", "real_toxicity_prompts", "stereoset", "truthfulqa", "winobias",
    }  # fmt: skip
    assert overlap.skipped == ()
    for line in (BENCHMARKS / "bbq" / "Religion.jsonl").read_text(encoding="utf-8").splitlines()[:20]:
        assert "bbq/Religion.jsonl" in overlap.files_of(json.loads(line)["context"])
    assert not overlap.overlaps("Creative Commons Corporation is not a law firm and does not provide legal services")
