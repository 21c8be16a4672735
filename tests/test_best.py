"""The best evaluation's adapter is kept: the choice by hand, and in runs that are stopped, killed and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from biasdpo.config import TrainConfig
from biasdpo.jobs.job import JobFolder
from tests.run_line import CommandLine


def write_evaluations(folder: JobFolder, *evaluations: tuple[int, float, float]) -> None:
    """(step, accuracy, margin) as metrics.jsonl has them, each after a line of training."""
    folder.path.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for step, accuracy, margin in evaluations:
        rows += [{"step": step, "loss": 0.5}]
        rows += [{"step": step, "eval_loss": 0.4, "eval_rewards/accuracies": accuracy, "eval_rewards/margins": margin}]
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize(
    ("evaluations", "best", "without_gain"),
    [
        ([], None, 0),
        ([(10, 0.5, 0.1)], 10, 0),
        ([(10, 0.5, 0.1), (20, 0.8, 0.2), (30, 0.7, 0.9)], 20, 1),
        ([(10, 0.8, 0.1), (20, 0.8, 0.3), (30, 0.8, 0.2)], 20, 2),  # of equals the larger margin, which is no gain in accuracy
        ([(10, 0.8, 0.1), (20, 0.8, 0.1)], 10, 1),  # then the earlier
        ([(10, 0.8, 0.1), (20, 0.6, 0.1), (30, 0.9, 0.1), (40, 0.9, 0.1), (50, 0.1, 0.1)], 30, 2),
    ],
)
def test_the_best_evaluation(tmp_path: Path, evaluations: list[Any], best: int | None, without_gain: int) -> None:
    from training.callbacks import best_of, evaluations_without_gain
    from training.callbacks import evaluations as read

    folder = JobFolder(tmp_path)
    write_evaluations(folder, *evaluations)
    found = best_of(read(folder))
    assert (found.step if found else None) == best
    assert evaluations_without_gain(read(folder)) == without_gain


def test_the_choice_is_said_in_one_sentence(tmp_path: Path) -> None:
    from training.callbacks import choice

    folder = JobFolder(tmp_path)
    config = TrainConfig(eval_every=10)
    assert choice(folder, config, 60) == (60, "step 60, the last: the run was not evaluated while it trained")
    write_evaluations(folder, (40, 0.94, 0.5), (60, 0.91, 0.9))
    assert choice(folder, config, 60) == (40, "step 40 of 60, held-out reward accuracy 0.94, the last had 0.91")
    assert choice(folder, TrainConfig(keep="last"), 60)[0] == 60
    write_evaluations(folder, (40, 0.94, 0.5), (60, 0.94, 0.25))
    assert choice(folder, config, 60)[1] == (
        "step 40 of 60, held-out reward accuracy 0.94, the last had the same and a smaller margin (0.25 to 0.5 nats)"
    )
    write_evaluations(folder, (40, 0.9, 0.5), (60, 0.94, 0.25))
    assert choice(folder, config, 60) == (60, "step 60, the last, held-out reward accuracy 0.94, the best of 2 evaluations")


def test_what_a_checkpoint_may_need_is_kept(tmp_path: Path) -> None:
    """A run killed after step 50 goes on from the checkpoint of step 40, and one whose last is torn from that of step 20: the
    best of those times must still be there."""
    import torch

    from training.callbacks import prune, save_tensors

    folder = JobFolder(tmp_path)
    write_evaluations(folder, (10, 0.5, 0.0), (15, 0.6, 0.0), (30, 0.7, 0.0), (45, 0.8, 0.0), (50, 0.9, 0.0))
    for step in (10, 15, 30, 45, 50):
        save_tensors(folder, step, {"lora_A": torch.full((1,), float(step))})
    for step in (20, 40):
        checkpoint = folder.checkpoints / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    prune(folder)
    # 15 is the best as of 20, 30 as of 40, 50 as of now; 10 and 45 nobody needs.
    assert sorted(file.stem for file in folder.best.iterdir()) == ["step-15", "step-30", "step-50"]


SETTINGS = {
    "learning_rate": 0.01,
    "max_steps": 8,
    "eval_every": 3,
    "held_out_share": 0.3,
    "save_steps": 4,
    "adapter_dtype": "float32",
}


def test_a_run_keeps_the_best_evaluations_adapter(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    from training import callbacks

    # This model of bytes learns at once and never gets worse: the accuracies are told, the rest is real.
    told = {3: 0.5, 6: 0.9, 8: 0.7}

    def evaluations(folder: JobFolder) -> list[callbacks.Evaluation]:
        return [
            callbacks.Evaluation(row["step"], told[row["step"]], row[callbacks.MARGIN])
            for row in folder.read_metrics()
            if callbacks.ACCURACY in row
        ]

    monkeypatch.setattr(callbacks, "evaluations", evaluations)
    folder = command_line.train_here("chooses", **SETTINGS)
    status = folder.read_status()
    assert (status.state, status.step, status.best_step, status.best_accuracy) == ("finished", 8, 6, 0.9)
    # Every 3 steps, and at the last.
    assert [row["step"] for row in folder.read_metrics() if "eval_loss" in row] == [3, 6, 8]
    sentence = "step 6 of 8, held-out reward accuracy 0.90, the last had 0.70"
    assert f"The adapter is that of {sentence}" in status.notes
    provenance = json.loads((folder.adapter / "provenance.json").read_text())
    assert provenance["kept"] == {"step": 6, "of": 8, "reason": sentence}
    # Its tensors are those of step 6, and not those of the last step.
    kept, best_tensors = (
        load_file(path) for path in (folder.adapter / "adapter_model.safetensors", folder.best / "step-6.safetensors")
    )
    last = load_file(folder.last_checkpoint() / "adapter_model.safetensors")  # type: ignore[operator]
    for name, tensor in kept.items():
        np.testing.assert_array_equal(tensor, best_tensors[name])
    assert any(not np.array_equal(tensor, last[name]) for name, tensor in kept.items())
    assert command_line.train_here("keeps-last", **SETTINGS, keep="last").read_status().state == "finished"


def test_early_stopping_ends_the_training(command_line: CommandLine) -> None:
    # The model of bytes learns at once: the held-out accuracy is soon 1 and can't get better; one more evaluation and it ends.
    settings = SETTINGS | {"max_steps": 12, "eval_every": 2, "early_stopping": 1}
    folder = command_line.train_here("early", **settings)
    metrics = folder.read_metrics()
    accuracies = [row["eval_rewards/accuracies"] for row in metrics if "eval_loss" in row]
    status = folder.read_status()
    assert status.state == "finished"
    assert len(accuracies) >= 2
    assert accuracies[-1] <= max(accuracies[:-1])
    assert status.step == 2 * len(accuracies) < 12

    # A run killed while it scored comes to the same end, and trains no step more.
    shutil.rmtree(folder.adapter)
    command_line.go_on_here(folder)
    assert (folder.read_status().state, folder.read_metrics()) == ("finished", metrics)


def test_a_run_at_its_last_step_is_finished_without_another(command_line: CommandLine) -> None:
    folder = command_line.train_here("ended", **SETTINGS)
    metrics, adapter = folder.read_metrics(), (folder.adapter / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(folder.adapter)
    command_line.go_on_here(folder)
    assert (folder.read_status().state, folder.read_status().step) == ("finished", 8)
    assert folder.read_metrics() == metrics
    assert (folder.adapter / "adapter_model.safetensors").read_bytes() == adapter
