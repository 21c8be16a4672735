"""What a run trains on: loading, one row per pair, mixing with weights, the split by prompt, and the stored snapshot."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from biasdpo.config import TrainConfig
from biasdpo.data.near_duplicates import normalize
from biasdpo.data.pairs import PreferencePair, derive, longer_baseline
from biasdpo.data.splits import (
    is_held_out,
    load,
    load_file,
    read_snapshot,
    resolve,
    split,
    unseen,
    weighted,
    write_dataset,
    write_split,
)
from biasdpo.errors import BiasDPOError, DatasetError
from biasdpo.models import AdapterSpec
from biasdpo.workspace import ASSETS, Workspace, write_json
from tests.run_line import CommandLine

GOOD = {"prompt": "Who leads?", "chosen": "Anyone can.", "rejected": "Men."}


def pairs_of(*numbers: int) -> list[PreferencePair]:
    return [PreferencePair(f"Is a{i} more b{i} than c{i}?", f"Neither {i}.", f"They are {i}!") for i in numbers]


def write(path: Path, pairs: list[PreferencePair], swapped: bool = False) -> str:
    rows = [asdict(pair) for pair in pairs]
    if swapped:
        rows = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# Loading


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a", "chosen": "b"', "not JSON"),
        ('["a", "b"]', "expected an object"),
        ('{"prompt": "a", "chosen": "b"}', "no column 'rejected'"),
        ('{"prompt": "a", "chosen": ["b"], "rejected": "c"}', "chosen must be a string, got list"),
        ('{"prompt": " ", "chosen": "b", "rejected": "c"}', "prompt is empty"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b "}', "the same text"),
    ],
)
def test_the_first_bad_row_is_an_error_with_file_line_and_reason(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n", encoding="utf-8")
    with pytest.raises(DatasetError) as caught:
        load([str(path)], Workspace(tmp_path))
    assert str(caught.value).startswith(f"{path}:3: ")  # the empty line counts
    assert reason in str(caught.value)


def test_the_journals_trainable_rows(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"judge some in the app, or train on a file with --dataset"):
        load(["workspace"], Workspace(tmp_path))
    row = {**GOOD, "verdict": "preferred", "retracts": "", "repeat_of": ""}
    rows = [
        {**row, "id": "1"},
        {**row, "id": "2", "prompt": "Retracted?"},
        {**row, "id": "3", "verdict": "tie", "chosen": "", "rejected": ""},
        {**row, "id": "4", "prompt": "A hidden repeat?", "repeat_of": "abc"},
        {**row, "id": "5", "verdict": "retracted", "retracts": "2"},
    ]
    (tmp_path / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load(["workspace"], Workspace(tmp_path)) == [PreferencePair(**GOOD)]


# Pairs


def test_the_pair_id_ignores_the_order_of_the_completions() -> None:
    pair = PreferencePair("p", "a", "b")
    assert pair.pair_id == PreferencePair("p", "b", "a", "race").pair_id
    assert pair.pair_id != PreferencePair("p", "a", "c").pair_id
    assert PreferencePair("p", "a b", "c").pair_id != PreferencePair("p a", "b", "c").pair_id


def test_one_row_per_pair_by_majority() -> None:
    fair, unfair = PreferencePair("p", "a", "b"), PreferencePair("p", "b", "a")
    other, other_way = PreferencePair("q", "a", "b"), PreferencePair("q", "b", "a")
    derived = derive([unfair, fair, other, fair, other_way])
    assert derived.pairs == (fair,)  # two votes to one; q is one to one
    assert (derived.contradictions, derived.repeats) == (1, 3)  # five rows about two pairs


def test_longer_baseline_counts_a_tie_half() -> None:
    rows = [PreferencePair("p", "long", "s"), PreferencePair("p", "s", "long"), PreferencePair("p", "aa", "bb")]
    assert longer_baseline(rows) == pytest.approx(0.5)  # (1 + 0 + 1/2) / 3
    assert longer_baseline(rows[:1]) == 1.0
    assert longer_baseline([]) is None


# Mixing


def test_how_often_an_epoch_contains_a_pair() -> None:
    pairs = pairs_of(*range(10))
    assert weighted(pairs, [1.0] * 10, seed=0) == pairs
    assert weighted(pairs[:2], [2.0, 1.0], seed=0) == [pairs[0], pairs[0], pairs[1]]
    half = weighted(pairs, [0.5] * 10, seed=0)
    assert len(half) == 5  # of ten
    assert half == [pair for pair in pairs if pair in half]  # in order
    assert half == [pair for pair in pairs if pair in weighted(pairs[::-1], [0.5] * 10, seed=0)]  # whatever the order
    assert half != weighted(pairs, [0.5] * 10, seed=1)
    more = weighted(pairs, [2.5] * 10, seed=0)
    assert sorted(more.count(pair) for pair in pairs) == [2] * 5 + [3] * 5
    # Four of weight 0.25 and six of 0.5: one of the four, three of the six.
    mixed = weighted(pairs, [0.25] * 4 + [0.5] * 6, seed=0)
    assert [sum(pair in mixed for pair in part) for part in (pairs[:4], pairs[4:])] == [1, 3]


def test_a_pair_of_two_sources_counts_once_with_the_larger_weight(tmp_path: Path, workspace: Workspace) -> None:
    one, two = write(tmp_path / "one.jsonl", pairs_of(0, 1, 2)), write(tmp_path / "two.jsonl", pairs_of(2, 3))
    data = resolve(TrainConfig(datasets=(one, two), dataset_weights=(0.5, 3.0), held_out_share=0.0), workspace)
    assert data.derived.pairs == tuple(pairs_of(0, 1, 2, 3))
    assert data.weights == (0.5, 0.5, 3.0, 3.0)
    assert (data.derived.repeats, data.rows_read, data.per_source) == (1, 5, ((one, 3), (two, 2)))
    # Chosen the other way round in the other source: nobody knows, so it is left out.
    against = write(tmp_path / "against.jsonl", pairs_of(2), swapped=True)
    assert resolve(TrainConfig(datasets=(one, against), held_out_share=0.0), workspace).derived.contradictions == 1


def test_the_mixtures_numbers(tmp_path: Path, workspace: Workspace) -> None:
    short = [PreferencePair(p.prompt, "No.", p.rejected) for p in pairs_of(*range(20, 30))]  # chosen is the shorter
    long = [PreferencePair(p.prompt, p.chosen + " Nobody is." * 3, p.rejected) for p in pairs_of(*range(10))]
    sources = (write(tmp_path / "short.jsonl", short), write(tmp_path / "long.jsonl", long))
    even = resolve(TrainConfig(datasets=sources, held_out_share=0.0), workspace).mixture()
    assert (even.pairs_train, even.rows_per_epoch, even.pairs_held_out, even.rows_read) == (20, 20, 0, 20)
    assert even.confounds.chosen_longer_share == even.train_longer_baseline == 0.5
    assert (even.repeats, even.contradictions, even.held_out_longer_baseline) == (0, 0, None)
    leaning = resolve(TrainConfig(datasets=sources, dataset_weights=(1.0, 3.0), held_out_share=0.0), workspace).mixture()
    assert (leaning.pairs_train, leaning.rows_per_epoch) == (20, 40)
    assert leaning.confounds.chosen_longer_share == 0.75  # 30 of 40 rows
    assert leaning.confounds.exact_duplicates == 0
    with pytest.raises(DatasetError, match=r"long.jsonl: no pairs to train on \(10 rows read"):
        resolve(TrainConfig(datasets=sources[1:], dataset_weights=(0.04,), held_out_share=0.0), workspace)
    empty = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(DatasetError):
        resolve(TrainConfig(datasets=(empty,)), workspace)


# Splitting


def test_the_split_never_shares_a_prompt_and_never_moves_a_row() -> None:
    rows = [PreferencePair(f"Question number {i}?", f"A fair answer {i}.", f"An unfair one {i}.") for i in range(2000)]
    whole = split(rows, 0.1)
    assert sorted([*whole.train, *whole.held_out], key=rows.index) == rows
    assert 150 < len(whole.held_out) < 250  # 200 expected, standard deviation 13.4
    few = split(rows[::7], 0.1)
    assert set(few.train) <= set(whole.train)
    assert set(few.held_out) <= set(whole.held_out)
    assert set(split(rows, 0.05).held_out) <= set(whole.held_out)
    assert split(rows, 0.0).held_out == ()


def test_near_duplicates_stay_on_one_side() -> None:
    template = "is it true that {} people are often late for work"
    near = [PreferencePair(template.format(i), "No.", "Yes.") for i in range(30)]
    parts = split(near, 0.5)
    assert [len(parts.train), len(parts.held_out)] in ([30, 0], [0, 30])
    # A prompt that is near to both sides is on neither. Of the words, either half is that of one side.
    sides = {is_held_out(" ".join(words), 0.5): words for i in range(20) if (words := [f"{c}{i}" for c in "abcdefgh"])}
    both = PreferencePair(" ".join([*sides[True], *sides[False]]), "No.", "Yes.")
    rows = [PreferencePair(" ".join(sides[side]), "No.", "Yes.") for side in (True, False)]
    parts = split([*rows, both], 0.5)
    assert (parts.held_out, parts.train, parts.dropped) == ((rows[0],), (rows[1],), (both,))


def test_prompts_that_differ_only_in_form_are_one_prompt() -> None:
    assert normalize("  Who’s  THE\tboss?! ") == normalize("who’s the boss") == "whos the boss"
    for pair in pairs_of(*range(50)):
        assert is_held_out(pair.prompt.upper().replace(" ", "  "), 0.5) == is_held_out(pair.prompt, 0.5)


def test_the_split_of_the_seed_pairs_is_that_of_version_0_1() -> None:
    """The split of old runs is derived again: it must not move."""
    ids = "".join(pair.pair_id for pair in split(load_file(ASSETS / "seed_pairs.jsonl"), 0.1).held_out)
    assert hashlib.sha256(ids.encode()).hexdigest() == "cbc7685cbd01c76acfa99bb62f5c5182e0cd1198dc33383aaa394dc4eee0f7d0"


# The stored snapshot


def resolved(tmp_path: Path, workspace: Workspace, folder: Path, **settings: Any) -> TrainConfig:
    source = write(tmp_path / "rows.jsonl", pairs_of(*range(60)))
    config = TrainConfig(datasets=(source, write(tmp_path / "more.jsonl", pairs_of(0, 1))), held_out_share=0.3, **settings)
    folder.mkdir(parents=True)
    resolve(config, workspace).write(folder)
    return config


def test_a_runs_data_is_read_back_as_it_was_resolved(tmp_path: Path, workspace: Workspace) -> None:
    from datasets import load_dataset

    folder = workspace.runs / "one"
    config = resolved(tmp_path, workspace, folder, dataset_weights=(0.5, 2.0))
    data, snapshot = resolve(config, workspace), read_snapshot(folder)
    assert (snapshot.pairs, snapshot.split) == (data.derived.pairs, data.split)
    assert snapshot.epoch(config.seed) == data.epoch
    assert 8 < len(snapshot.split.held_out) < 30
    stored = json.loads((folder / "split.json").read_text())
    sha256 = hashlib.sha256((folder / "dataset.jsonl").read_bytes()).hexdigest()
    assert stored == {
        "format": 1,
        "held_out": [pair.pair_id for pair in data.split.held_out],
        "dropped": [],
        "held_out_share": 0.3,
        "dataset_sha256": sha256,
    }
    assert snapshot.sha256 == sha256
    rows = load_dataset("json", data_files=str(folder / "dataset.jsonl"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["chosen"] == [pair.chosen for pair in snapshot.pairs]
    assert rows.column_names == sorted({"pair_id", "prompt", "chosen", "rejected", "category", "weight"})


def test_the_stored_split_is_what_counts(tmp_path: Path, workspace: Workspace) -> None:
    folder = workspace.runs / "one"
    resolved(tmp_path, workspace, folder)
    whole = read_snapshot(folder)
    stored = json.loads((folder / "split.json").read_text())
    moved, dropped, *rest = stored["held_out"]
    write_json(folder / "split.json", stored | {"held_out": rest, "dropped": [dropped]})
    parts = read_snapshot(folder).split
    assert [pair.pair_id for pair in parts.held_out] == rest
    assert [pair.pair_id for pair in parts.dropped] == [dropped]
    assert moved in {pair.pair_id for pair in parts.train}
    # Also for pairs named anew: what the run held out, of the pairs that it knows.
    adapter = AdapterSpec("one", folder / "adapter", "", dataset_sha256=whole.sha256, held_out_share=0.3)
    assert unseen([*whole.pairs, *pairs_of(99)], adapter, workspace) == parts.held_out
    assert unseen(pairs_of(*range(200, 300)), adapter, workspace) == split(pairs_of(*range(200, 300)), 0.3).held_out


def test_old_runs_get_the_split_that_training_derived(tmp_path: Path, workspace: Workspace) -> None:
    folder = workspace.runs / "one"
    resolved(tmp_path, workspace, folder)
    whole, stored = read_snapshot(folder), (folder / "split.json").read_bytes()
    (folder / "split.json").unlink()
    with pytest.raises(BiasDPOError, match=r"config\.json"):
        write_split(folder)
    write_json(folder / "config.json", {"held_out_share": 0.3})
    assert read_snapshot(folder) == whole
    assert write_split(folder)
    assert (folder / "split.json").read_bytes() == stored
    assert not write_split(folder)  # it has one


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("split.json", b"{", "split.json"),
        ("split.json", b"[]", "split.json is damaged"),
        ("split.json", b'{"format": 1, "held_out": 3, "dropped": [], "dataset_sha256": ""}', "split.json is damaged"),
        ("dataset.jsonl", b'{"prompt": "a"}\n', "dataset.jsonl:1: no column 'chosen'"),
        ("dataset.jsonl", b"[" * 100_000 + b"\n", "dataset.jsonl:1: "),
        ("dataset.jsonl", json.dumps(GOOD).encode() + b"\n", "was changed after the run was started"),
    ],
)
def test_damage_is_one_line(tmp_path: Path, workspace: Workspace, name: str, content: bytes, words: str) -> None:
    folder = workspace.runs / "one"
    resolved(tmp_path, workspace, folder)
    (folder / name).write_bytes(content)
    with pytest.raises(BiasDPOError, match=words) as caught:
        read_snapshot(folder)
    assert "\n" not in str(caught.value)


def test_weights_of_one_change_no_hash(tmp_path: Path) -> None:
    pairs = [PreferencePair("p\u2028q", "é", "b", "race"), *pairs_of(1)]
    plain = write_dataset(pairs, tmp_path / "plain.jsonl")
    assert write_dataset(pairs, tmp_path / "ones.jsonl", [1.0, 1.0]) == plain
    assert write_dataset(pairs, tmp_path / "weighted.jsonl", [2, 0.5]) != plain
    assert load_file(tmp_path / "plain.jsonl") == load_file(tmp_path / "weighted.jsonl") == pairs


# Runs


def test_a_run_of_one_pair_is_trained(command_line: CommandLine, tmp_path: Path) -> None:
    command_line.rows = Path(write(tmp_path / "one.jsonl", pairs_of(7)))
    folder = command_line.train_here("one", held_out_share=0.0, eval_every=2, max_steps=3)
    status = folder.read_status()
    assert (status.state, status.step, status.best_step) == ("finished", 3, None)
    provenance: dict[str, Any] = json.loads((folder.adapter / "provenance.json").read_text())
    assert provenance["kept"]["reason"] == "step 3, the last: the run was not evaluated while it trained"


def test_a_weighted_run_trains_on_what_was_resolved(command_line: CommandLine, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", pairs_of(*range(100, 110)))
    settings = {"datasets": (str(command_line.rows), other), "dataset_weights": (0.5, 2.0), "max_steps": 2}
    data = resolve(command_line.config(**settings), command_line.workspace)
    folder = command_line.train_here("weighted", **settings)
    assert f"{len(data.epoch)} pairs to train on, {len(data.split.held_out)} held out" in folder.read_status().notes
    assert read_snapshot(folder.path).split == data.split
    train = [pair for pair in data.split.train if pair.prompt.startswith("Is a10") and len(pair.prompt) > 25]
    assert all(data.epoch.count(pair) == 2 for pair in train)
    origin = folder.read_record().origin()
    assert origin["dataset_rows"]["per_epoch"] == len(data.epoch)
    assert origin["dataset_files"] == ["pairs.jsonl", "other.jsonl"]
