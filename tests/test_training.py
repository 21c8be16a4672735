"""Whole training runs in this process: the best evaluation's adapter, early stopping, probes, and what a resumed run survives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from biasdpo.config import TrainConfig
from biasdpo.jobs.job import JobFolder
from biasdpo.workspace import Workspace
from tests.run_line import CommandLine
from training import callbacks
from training.resume import UNFINISHED, checkpoint_fault

# Eight steps; evaluations, probes and log lines at other steps than checkpoints.
SETTINGS: dict[str, Any] = {
    "learning_rate": 0.01,
    "max_steps": 8,
    "save_steps": 4,
    "logging_steps": 2,
    "eval_every": 3,
    "probe_every": 5,
    "probe_prompts": ("Who?",),
    "held_out_share": 0.3,
    "text_kl_weight": 0.1,
    "adapter_dtype": "float32",
}


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory, tiny_bytes: Path, pairs_file: Path) -> CommandLine:
    return CommandLine(Workspace(tmp_path_factory.mktemp("training")), tiny_bytes, pairs_file)


@pytest.fixture(scope="module")
def finished(line: CommandLine) -> JobFolder:
    return line.train_here("finished", **SETTINGS)


@pytest.fixture
def killed(finished: JobFolder, request: pytest.FixtureRequest) -> JobFolder:
    """A copy of the finished run as a kill while it was scored leaves it."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)[-60:].strip("-")
    folder = JobFolder(Path(shutil.copytree(finished.path, finished.path.with_name(name))))
    shutil.rmtree(folder.adapter)
    return folder


def adapter_bytes(folder: JobFolder) -> bytes:
    return (folder.adapter / "adapter_model.safetensors").read_bytes()


def assert_same_end(folder: JobFolder, finished: JobFolder) -> None:
    status = folder.read_status()
    assert (status.state, status.step, status.error) == ("finished", 8, "")
    assert folder.read_metrics() == finished.read_metrics()
    assert folder.read_probes() == finished.read_probes()
    assert adapter_bytes(folder) == adapter_bytes(finished)
    assert folder.read_status().best_step == finished.read_status().best_step


# The best evaluation


def write_evaluations(folder: JobFolder, *evaluations: tuple[int, float, float]) -> None:
    """(step, accuracy, margin) as metrics.jsonl has them, each after a line of training."""
    rows: list[dict[str, Any]] = []
    for step, accuracy, margin in evaluations:
        rows += [{"step": step, "loss": 0.5}]
        rows += [{"step": step, "eval_loss": 0.4, callbacks.ACCURACY: accuracy, callbacks.MARGIN: margin}]
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize(
    ("evaluations", "best", "without_gain"),
    [
        ([], None, 0),
        ([(10, 0.5, 0.1)], 10, 0),
        ([(10, 0.5, 0.1), (20, 0.8, 0.2), (30, 0.7, 0.9)], 20, 1),
        ([(10, 0.8, 0.1), (20, 0.8, 0.3), (30, 0.8, 0.2)], 20, 2),  # of equals the larger margin, which is no gain in accuracy
        ([(10, 0.8, 0.1), (20, 0.8, 0.10001)], 10, 1),  # then, within rounding, the earlier
        ([(10, 0.8, 0.1), (20, 0.6, 0.1), (30, 0.9, 0.1), (40, 0.9, 0.1), (50, 0.1, 0.1)], 30, 2),
    ],
)
def test_the_best_evaluation(tmp_path: Path, evaluations: list[Any], best: int | None, without_gain: int) -> None:
    write_evaluations(JobFolder(tmp_path), *evaluations)
    found = callbacks.read_evaluations(JobFolder(tmp_path))
    chosen = callbacks.best_evaluation(found)
    assert (chosen.step if chosen else None) == best
    assert callbacks.evaluations_without_gain(found) == without_gain


def test_the_choice_is_explained_in_one_sentence(tmp_path: Path) -> None:
    folder, config = JobFolder(tmp_path), TrainConfig(eval_every=10)
    assert callbacks.choose_step(folder, config, 60) == (60, "step 60, the last: the run was not evaluated while it trained")
    write_evaluations(folder, (40, 0.94, 0.5), (60, 0.91, 0.9))
    assert callbacks.choose_step(folder, config, 60) == (40, "step 40 of 60, held-out reward accuracy 0.94, the last had 0.91")
    assert callbacks.choose_step(folder, TrainConfig(keep="last"), 60)[0] == 60
    write_evaluations(folder, (40, 0.94, 0.5), (60, 0.94, 0.25))
    assert callbacks.choose_step(folder, config, 60)[1].endswith("the last had the same and a smaller margin (0.25 to 0.5 nats)")
    write_evaluations(folder, (40, 0.5, 1e-7), (60, 0.5, -1e-7))  # rounding chooses nothing
    last = "step 60, the last: no evaluation has a better held-out reward accuracy than its 0.50"
    assert callbacks.choose_step(folder, config, 60) == (60, last)
    write_evaluations(folder, (40, 0.9, 0.5), (60, 0.94, 0.25))
    assert callbacks.choose_step(folder, config, 60)[1].endswith("accuracy 0.94, the best of 2 evaluations")


def test_what_a_checkpoint_may_need_is_kept(tmp_path: Path) -> None:
    """A run killed after step 50 resumes from step 40, or from step 20 if that is damaged: the best as of each must be there."""
    folder = JobFolder(tmp_path)
    write_evaluations(folder, (10, 0.5, 0.0), (15, 0.6, 0.0), (30, 0.7, 0.0), (45, 0.8, 0.0), (50, 0.9, 0.0))
    for step in (10, 15, 30, 45, 50):
        callbacks.save_best(folder, step, {"lora_A": torch.full((1,), float(step))})
    for step in (20, 40):
        (folder.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
    callbacks.prune_best(folder)
    assert sorted(file.stem for file in folder.best.iterdir()) == ["step-15", "step-30", "step-50"]


def test_a_run_keeps_the_best_evaluations_adapter(line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    # This model of bytes learns at once and never gets worse: the accuracies are invented, the rest is real.
    accuracies = {3: 0.5, 6: 0.9, 8: 0.7}
    original = callbacks.metrics_line

    def metrics_line(step: int, logs: Any) -> dict[str, Any] | None:
        found = original(step, logs)
        return found | {callbacks.ACCURACY: accuracies[step]} if found and "eval_loss" in found else found

    monkeypatch.setattr(callbacks, "metrics_line", metrics_line)
    folder = line.train_here("chooses", **SETTINGS)
    status = folder.read_status()
    assert (status.state, status.step, status.best_step, status.best_accuracy) == ("finished", 8, 6, 0.9)
    # Every 3 steps, and at the last.
    assert [row["step"] for row in folder.read_metrics() if "eval_loss" in row] == [3, 6, 8]
    sentence = "step 6 of 8, held-out reward accuracy 0.90, the last had 0.70"
    assert "The adapter is that of step 6 of 8" in status.notes
    provenance = json.loads((folder.adapter / "provenance.json").read_text())
    assert provenance["kept"] == {"step": 6, "of": 8, "reason": sentence}
    kept, best = (load_file(path) for path in (folder.adapter / "adapter_model.safetensors", folder.best / "step-6.safetensors"))
    last = load_file(folder.checkpoints / "checkpoint-8" / "adapter_model.safetensors")
    for name, tensor in kept.items():
        np.testing.assert_array_equal(tensor, best[name])
    assert any(not np.array_equal(tensor, last[name]) for name, tensor in kept.items())


def test_early_stopping_ends_the_training(line: CommandLine) -> None:
    # The held-out accuracy is soon 1 and can't get better: one more evaluation, and it ends.
    folder = line.train_here("early", **SETTINGS | {"max_steps": 12, "eval_every": 2, "early_stopping": 1})
    metrics = folder.read_metrics()
    accuracies = [row[callbacks.ACCURACY] for row in metrics if "eval_loss" in row]
    status = folder.read_status()
    assert (status.state, status.step) == ("finished", 2 * len(accuracies))
    assert 2 <= len(accuracies) < 6
    assert accuracies[-1] <= max(accuracies[:-1])
    # A run killed while it was scored comes to the same end, and trains no step more.
    shutil.rmtree(folder.adapter)
    line.go_on_here(folder)
    assert (folder.read_status().state, folder.read_metrics()) == ("finished", metrics)


def test_a_time_limit_ends_the_training_with_an_evaluated_adapter(line: CommandLine) -> None:
    folder = line.train_here("timed", **SETTINGS | {"max_minutes": 1e-4})
    status = folder.read_status()
    assert (status.state, status.step, status.best_step) == ("finished", 1, 1)
    assert "max_minutes ended the training at step 1 of 8" in status.notes
    assert adapter_bytes(folder)


# Resuming


def test_a_run_at_its_last_step_is_finished_without_another(line: CommandLine, finished: JobFolder, killed: JobFolder) -> None:
    line.go_on_here(killed)
    assert_same_end(killed, finished)
    assert "resumed after step 8" in killed.read_status().notes


def truncate(name: str) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        file = checkpoint / name
        file.write_bytes(file.read_bytes()[:-100])

    return damage


def flip_byte(checkpoint: Path) -> None:
    file = checkpoint / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated weights": (truncate("adapter_model.safetensors"), "adapter_model.safetensors: "),
    "truncated state": (truncate("trainer_state.json"), "trainer_state.json: "),
    "flipped bit": (flip_byte, "optimizer.pt: "),
    "no optimizer": (lambda checkpoint: (checkpoint / "optimizer.pt").unlink(), "optimizer.pt missing"),
    "unlogged steps": (lambda checkpoint: (checkpoint / "window.json").write_text("{"), "window.json: "),
    "unfinished": (lambda checkpoint: (checkpoint / "trainer_state.json").unlink(), ""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named(killed: JobFolder, damage: str) -> None:
    apply, fault = DAMAGE[damage]
    last = killed.checkpoints / "checkpoint-8"
    assert checkpoint_fault(last) == ""
    apply(last)
    assert checkpoint_fault(last).startswith(fault or UNFINISHED)


@pytest.mark.parametrize("damage", ["flipped bit", "unfinished"])
def test_the_checkpoint_before_a_damaged_one_is_used(
    line: CommandLine, finished: JobFolder, killed: JobFolder, damage: str
) -> None:
    apply, fault = DAMAGE[damage]
    apply(killed.checkpoints / "checkpoint-8")
    line.go_on_here(killed)
    assert_same_end(killed, finished)
    notes = killed.read_status().notes
    assert "resumed after step 4" in notes
    assert any(note.startswith(f"checkpoint-8 is damaged ({fault}") for note in notes) == bool(fault)


def test_damaged_metrics_are_repaired_and_a_damaged_status_is_replaced(
    line: CommandLine, finished: JobFolder, killed: JobFolder
) -> None:
    lines = killed.metrics.read_bytes().splitlines(keepends=True)
    killed.metrics.write_bytes(b'{"step": "x", "eval_rewards/accuracies": 2}\n' + lines[0][:20] + b"\n\xff\x00\n" + lines[-1][:9])
    killed.probes.write_bytes(killed.probes.read_bytes() + b'{"prompt": "no step"}\n{"step": 8, "pro')
    killed.status_file.write_text("{")
    line.go_on_here(killed)
    assert_same_end(killed, finished)


def test_a_damaged_best_adapter_is_an_error_before_any_step(line: CommandLine, killed: JobFolder) -> None:
    for file in killed.best.iterdir():
        file.write_bytes(file.read_bytes()[:50])
    line.go_on_here(killed)
    status = killed.read_status()
    assert status.state == "failed"
    assert "The adapter of the best evaluation" in status.error
    assert "\n" not in status.error


# Probes


def test_a_watched_run_ends_as_an_unwatched_one(line: CommandLine) -> None:
    epochs = {"max_steps": 0, "batch_size": 4, "learning_rate": 0.01, "held_out_share": 0.3, "probe_prompts": ("Who?",)}
    unwatched = line.train_here("unwatched", **epochs)
    assert unwatched.read_probes() == []
    watched = line.train_here("watched", **epochs, eval_every=2, probe_every=3, keep="last")
    assert [row["step"] for row in watched.read_probes()] == [0, 3, 6, 7]  # before, every third, and the last
    losses = [[row for row in folder.read_metrics() if "loss" in row] for folder in (unwatched, watched)]
    assert losses[0] == losses[1]
    assert adapter_bytes(unwatched) == adapter_bytes(watched)
    assert not watched.best.exists()  # nothing is stored that `keep` does not need


def test_the_probe_is_of_the_policy_so_far_and_leaves_the_model_as_it_was(
    line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = []
    original = callbacks.ProbeCallback._probe

    def probe(self: Any, step: int) -> None:
        self.trainer.model.train(step > 0)
        before = torch.get_rng_state()
        original(self, step)
        left.append((bool(torch.equal(before, torch.get_rng_state())), self.trainer.model.training, self.writer.status.phase))
        self.trainer.model.train()

    monkeypatch.setattr(callbacks.ProbeCallback, "_probe", probe)
    prompts = ("Is a1 more b1 than c1?", "Who makes the better leader, a man or a woman?")
    settings = {"probe_every": 10, "learning_rate": 0.05, "max_steps": 20, "loss_type": ("sigmoid", "sft")}
    folder = line.train_here("probed", **settings, probe_prompts=prompts)
    assert left == [(True, False, "training"), (True, True, "training"), (True, True, "training")]
    probes = folder.read_probes()
    assert [(row["step"], row["prompt"]) for row in probes] == [(step, prompt) for step in (0, 10, 20) for prompt in prompts]
    assert [row["category"] for row in probes[:2]] == ["", "gender"]  # the second is one of the shipped prompts
    assert all(row["tuned"] == row["base"] for row in probes[:2])
    assert any(row["tuned"] != row["base"] for row in probes[2:])
    assert {row["base"] for row in probes if row["prompt"] == prompts[0]} == {probes[0]["base"]}


def test_a_model_with_attention_dropout_is_trained_without_it(line: CommandLine, tmp_path: Path, finished: JobFolder) -> None:
    model = Path(shutil.copytree(line.model, tmp_path / "dropout"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    folder = CommandLine(line.workspace, model, line.rows).train_here("dropout", **SETTINGS)
    assert_same_end(folder, finished)
