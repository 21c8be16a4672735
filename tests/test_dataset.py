"""Preference pairs: loading, one row a pair, the split by prompt, the snapshot."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from biasdpo.data import splits
from biasdpo.data.health import normalize
from biasdpo.data.pairs import PreferencePair, derive, longer_baseline
from biasdpo.errors import DatasetError
from biasdpo.workspace import Workspace

GOOD = {"prompt": "Who leads?", "chosen": "Anyone can.", "rejected": "Men."}


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(count: int) -> list[PreferencePair]:
    return [PreferencePair(f"Question number {i}?", f"A fair answer {i}.", f"An unfair one {i}.") for i in range(count)]


def test_jsonl_is_read_with_its_category(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", GOOD, {**GOOD, "prompt": "Who cooks?", "category": "gender", "extra": 1})
    assert splits.load([str(path)], Workspace(tmp_path)) == [
        PreferencePair("Who leads?", "Anyone can.", "Men."),
        PreferencePair("Who cooks?", "Anyone can.", "Men.", "gender"),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a", "chosen": "b"', "no JSON"),
        ('["a", "b"]', "expected an object"),
        ('{"prompt": "a", "chosen": "b"}', "no column 'rejected'"),
        ('{"prompt": "a", "chosen": ["b"], "rejected": "c"}', "chosen must be a string, got list"),
        ('{"prompt": "a", "chosen": null, "rejected": "c"}', "chosen must be a string, got NoneType"),
        ('{"prompt": " ", "chosen": "b", "rejected": "c"}', "prompt is empty"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b "}', "the same text"),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_reason(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n", encoding="utf-8")
    with pytest.raises(DatasetError) as caught:
        splits.load_file(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ")  # the empty line counts
    assert reason in message
    assert "\n" not in message


def test_missing_file_and_binary_file(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="No dataset file"):
        splits.load_file(tmp_path / "none.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match="UTF-8"):
        splits.load_file(tmp_path / "binary.jsonl")


def test_an_empty_workspace_says_how_to_get_pairs(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"judge some in the app, or train on a file with --dataset"):
        splits.load(["workspace"], Workspace(tmp_path))


def test_the_journal_gives_what_is_preferred_and_stands(tmp_path: Path) -> None:
    row = {**GOOD, "verdict": "preferred", "retracts": "", "repeat_of": ""}
    write_rows(
        tmp_path / "preferences.jsonl",
        {**row, "id": "1"},
        {**row, "id": "2", "prompt": "Retracted?"},
        {**row, "id": "3", "verdict": "tie", "chosen": "", "rejected": ""},
        {**row, "id": "4", "prompt": "A hidden repeat?", "repeat_of": "abc"},
        {**row, "id": "5", "verdict": "retracted", "retracts": "2"},
    )
    assert splits.load(["workspace"], Workspace(tmp_path)) == [PreferencePair("Who leads?", "Anyone can.", "Men.")]


def test_a_hub_set_that_is_not_to_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(DatasetError, match="hub:nobody/nothing") as caught:
        splits.load(["hub:nobody/nothing"], Workspace(tmp_path))
    assert "\n" not in str(caught.value)


def test_pair_id_is_of_the_unordered_completions() -> None:
    pair = PreferencePair("p", "a", "b")
    assert pair.pair_id == PreferencePair("p", "b", "a", "race").pair_id
    assert pair.pair_id != PreferencePair("p", "a", "c").pair_id
    assert PreferencePair("p", "a b", "c").pair_id != PreferencePair("p a", "b", "c").pair_id  # no joining by chance


def test_one_row_a_pair_by_majority() -> None:
    fair, unfair = PreferencePair("p", "a", "b"), PreferencePair("p", "b", "a")
    other, other_way = PreferencePair("q", "a", "b"), PreferencePair("q", "b", "a")
    derived = derive([unfair, fair, other, fair, other_way])
    assert derived.pairs == (fair,)  # two votes to one; q is one to one
    assert derived.contradictions == 1
    assert derived.repeats == 3  # five rows say something of two pairs


def test_split_never_shares_a_prompt_and_never_moves_a_row() -> None:
    rows = pairs(2000)
    whole = splits.split(rows, 0.1)
    assert sorted([*whole.train, *whole.held_out], key=rows.index) == rows
    assert 150 < len(whole.held_out) < 250  # 200 expected, standard deviation 13.4
    few = splits.split(rows[::7], 0.1)
    assert set(few.train) <= set(whole.train)
    assert set(few.held_out) <= set(whole.held_out)
    assert set(splits.split(rows, 0.05).held_out) <= set(whole.held_out)
    assert splits.split(rows, 0.0).held_out == ()


def test_split_takes_prompts_that_differ_in_form_alone_for_one() -> None:
    assert normalize("  Who’s  THE\tboss?! ") == normalize("who’s the boss") == "whos the boss"
    for pair in pairs(50):
        shouted = pair.prompt.upper().replace(" ", "  ")
        assert splits.is_held_out(shouted, 0.5) == splits.is_held_out(pair.prompt, 0.5)


def test_longer_baseline_counts_a_tie_half() -> None:
    rows = [PreferencePair("p", "long", "s"), PreferencePair("p", "s", "long"), PreferencePair("p", "aa", "bb")]
    assert longer_baseline(rows) == pytest.approx(0.5)  # (1 + 0 + 1/2) / 3
    assert longer_baseline(rows[:1]) == 1.0
    assert longer_baseline([]) is None


def test_snapshot_reads_back_and_its_hash_is_the_files(tmp_path: Path) -> None:
    rows = [PreferencePair("p\u2028q", "é", "b", "race"), *pairs(3)]
    path = tmp_path / "snapshot.jsonl"
    digest = splits.write_dataset(rows, path)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest() == splits.write_dataset(rows, tmp_path / "again.jsonl")
    assert splits.load_file(path) == rows
