"""Evaluations in rounds: every held-out pair counts once, whatever the batch and the number of processes."""

from __future__ import annotations

import pytest

from tests.test_trainer import ROWS
from tests.tiny_trainer import build_tiny_trainer
from training.trainer import Round, rounds


def test_one_process_has_full_batches_and_a_rest():
    assert rounds(7, 3, 1, 0) == [Round(range(0, 3), 3), Round(range(3, 6), 3), Round(range(6, 7), 1)]


def test_two_processes_share_the_rest_and_repeat_an_odd_row():
    # 11 rows, 2 x 3 at once: rows 0 to 5; then 2 each of 6 to 9; then row 10, by both.
    assert rounds(11, 3, 2, 0) == [Round(range(0, 3), 6), Round(range(6, 8), 4), Round(range(10, 11), 1)]
    assert rounds(11, 3, 2, 1) == [Round(range(3, 6), 6), Round(range(8, 10), 4), Round(range(10, 11), 1)]


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 7, 16, 31])
def test_every_row_counts_once(count, batch_size, processes):
    by_process = [rounds(count, batch_size, processes, rank) for rank in range(processes)]
    for at_once in zip(*by_process, strict=True):  # as many rounds for each
        assert len({len(round_.rows) for round_ in at_once}) == 1  # of as many rows
        assert 1 <= len(at_once[0].rows) <= batch_size
        different = {row for round_ in at_once for row in round_.rows}
        assert {round_.pairs for round_ in at_once} == {len(different)}
    assert sum(round_.pairs for round_ in by_process[0]) == count
    assert {row for own in by_process for round_ in own for row in round_.rows} == set(range(count))


@pytest.mark.parametrize("batch", [2, 4])
def test_an_evaluation_is_a_mean_over_pairs(tiny_llama, tmp_path, batch):
    """Three pairs by twos: TRL's mean of the batches' means would count the third pair twice. Its own, pair by pair, is right."""
    evaluated = {}
    for way, size in (("ours", batch), ("trl", 1)):
        trainer = build_tiny_trainer(tiny_llama, tmp_path / way, ROWS, way=way, batch=size, trained=0.05, eval_rows=ROWS[:3])
        evaluated[way] = trainer.evaluate()
    per_pair = [key for key in evaluated["trl"] if "reward" in key or "logps" in key or key == "eval_loss"]
    assert len(per_pair) == 7  # the loss, four of rewards, two of logps
    for key in per_pair:
        assert evaluated["ours"][key] == pytest.approx(evaluated["trl"][key], abs=1e-4), key
    assert len(set(evaluated["trl"].values())) > 5  # they differ from one another, and from nothing learned
    assert abs(evaluated["trl"]["eval_rewards/margins"]) > 1e-3
