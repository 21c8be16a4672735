"""Data of several sources, each with a weight: how often an epoch sees a pair, and what a run's snapshot keeps of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from biasdpo import runs
from biasdpo.config import TrainConfig
from biasdpo.data import splits
from biasdpo.data.pairs import PreferencePair
from biasdpo.errors import DatasetError
from biasdpo.workspace import Workspace
from tests.run_line import CommandLine


def pairs_of(*numbers: int) -> list[PreferencePair]:
    return [PreferencePair(f"Is a{i} more b{i} than c{i}?", f"Neither {i}.", f"They are {i}!") for i in numbers]


def write(path: Path, pairs: list[PreferencePair], **swapped: bool) -> str:
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    if swapped:
        rows = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_how_often_an_epoch_sees_a_pair() -> None:
    pairs = pairs_of(*range(10))
    assert splits.weighted(pairs, [1.0] * 10, seed=0) == pairs
    assert splits.weighted(pairs[:2], [2.0, 1.0], seed=0) == [pairs[0], pairs[0], pairs[1]]
    half = splits.weighted(pairs, [0.5] * 10, seed=0)
    assert len(half) == 5  # of ten
    assert half == [pair for pair in pairs if pair in half]  # in their order
    assert half == [pair for pair in pairs if pair in splits.weighted(pairs[::-1], [0.5] * 10, seed=0)]  # whatever the order
    assert half != splits.weighted(pairs, [0.5] * 10, seed=1)
    more = splits.weighted(pairs, [2.5] * 10, seed=0)
    assert len(more) == 25
    assert sorted(more.count(pair) for pair in pairs) == [2] * 5 + [3] * 5
    # Four of weight 0.25 and six of 0.5: one of the four, three of the six.
    mixed = splits.weighted(pairs, [0.25] * 4 + [0.5] * 6, seed=0)
    assert [sum(pair in mixed for pair in part) for part in (pairs[:4], pairs[4:])] == [1, 3]


def test_a_pair_of_two_sources_counts_once_with_the_larger_weight(tmp_path: Path, workspace: Workspace) -> None:
    one, two = write(tmp_path / "one.jsonl", pairs_of(0, 1, 2)), write(tmp_path / "two.jsonl", pairs_of(2, 3))
    mixed = splits.mix([one, two], [0.5, 3.0], workspace)
    assert mixed.derived.pairs == tuple(pairs_of(0, 1, 2, 3))
    assert mixed.weights == (0.5, 0.5, 3.0, 3.0)
    assert (mixed.derived.repeats, mixed.rows_read, mixed.per_source) == (1, 5, ((one, 3), (two, 2)))
    # Chosen the other way round in the other source: nobody knows, so it is left out.
    against = write(tmp_path / "against.jsonl", pairs_of(2), swapped=True)
    assert splits.mix([one, against], [], workspace).derived.contradictions == 1


def test_the_snapshot_keeps_the_weights_and_opens_as_ever(tmp_path: Path) -> None:
    from datasets import load_dataset

    pairs = pairs_of(0, 1, 2)
    plain = splits.write_dataset(pairs, tmp_path / "plain.jsonl")
    assert splits.write_dataset(pairs, tmp_path / "ones.jsonl", [1.0, 1.0, 1.0]) == plain  # weights of 1 change no hash
    assert splits.write_dataset(pairs, tmp_path / "weighted.jsonl", [2, 0.5, 1]) != plain
    for name in ("plain", "weighted"):
        path = tmp_path / f"{name}.jsonl"
        assert splits.load_file(path) == pairs
        rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / name))
        assert rows["chosen"] == [pair.chosen for pair in pairs]
        assert rows.column_names == sorted(
            {"pair_id", "prompt", "chosen", "rejected", "category", *(["weight"] * (name != "plain"))}
        )


def test_what_the_meter_is_given(tmp_path: Path, workspace: Workspace) -> None:
    short = [PreferencePair(p.prompt, "No.", p.rejected) for p in pairs_of(*range(20, 30))]  # chosen is the shorter
    long = [PreferencePair(p.prompt, p.chosen + " Nobody is." * 3, p.rejected) for p in pairs_of(*range(10))]
    sources = (write(tmp_path / "short.jsonl", short), write(tmp_path / "long.jsonl", long))
    config = TrainConfig(model="smollm2", datasets=sources, held_out_share=0.0)
    even = runs.mixture(config, workspace)
    assert (even.pairs_train, even.rows_per_epoch, even.pairs_held_out, even.rows_read) == (20, 20, 0, 20)
    assert even.confounds.chosen_longer_share == even.train_longer_baseline == 0.5
    assert (even.repeats, even.contradictions, even.held_out_longer_baseline) == (0, 0, None)
    leaning = runs.mixture(TrainConfig(**{**vars(config), "dataset_weights": (1.0, 3.0)}), workspace)
    assert (leaning.pairs_train, leaning.rows_per_epoch) == (20, 40)
    assert leaning.confounds.chosen_longer_share == 0.75  # 30 of 40 rows
    assert leaning.confounds.exact_duplicates == 0
    with pytest.raises(DatasetError, match=r"long.jsonl: no pairs to train on \(10 rows read"):
        runs.mixture(TrainConfig(datasets=sources[1:], dataset_weights=(0.04,), held_out_share=0.0), workspace)


@pytest.mark.parametrize("rows", [0, 1])
def test_too_little_data(tmp_path: Path, workspace: Workspace, rows: int) -> None:
    source = write(tmp_path / "few.jsonl", pairs_of(*range(rows)))
    if rows == 0:
        with pytest.raises(DatasetError):
            runs.mixture(TrainConfig(datasets=(source,)), workspace)
        return
    mixture = runs.mixture(TrainConfig(datasets=(source,), held_out_share=0.0), workspace)
    assert (mixture.pairs_train, mixture.held_out_longer_baseline) == (1, None)


def test_a_run_of_one_pair_is_trained(command_line: CommandLine, tmp_path: Path) -> None:
    command_line.rows = Path(write(tmp_path / "one.jsonl", pairs_of(7)))
    folder = command_line.train_here("one", held_out_share=0.0, eval_every=2, max_steps=3)
    status = folder.read_status()
    assert (status.state, status.step, status.best_step) == ("finished", 3, None)
    provenance: dict[str, Any] = json.loads((folder.adapter / "provenance.json").read_text())
    assert provenance["kept"]["reason"] == "step 3, the last: the run was not evaluated while it trained"


def test_a_weighted_run_trains_on_what_the_mixture_says(command_line: CommandLine, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", pairs_of(*range(100, 110)))
    datasets, weights = (str(command_line.rows), other), (0.5, 2.0)
    settings = {"datasets": datasets, "dataset_weights": weights, "max_steps": 2}
    data = splits.resolve(command_line.config(**settings), command_line.workspace)
    folder = command_line.train_here("weighted", **settings)
    assert f"{len(data.epoch)} pairs to train on, {len(data.split.held_out)} held out" in folder.read_status().notes
    train = [pair for pair in data.split.train if pair.prompt.startswith("Is a10") and len(pair.prompt) > 25]
    assert all(data.epoch.count(pair) == 2 for pair in train)
    origin = json.loads(folder.origin.read_text())
    assert origin["dataset_rows"]["per_epoch"] == len(data.epoch)
    assert origin["dataset_files"] == ["pairs.jsonl", "other.jsonl"]
