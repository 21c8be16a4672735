"""Runs finish what they start: stopped, killed or short of something, they say so in a line, and go on as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from biasdpo.jobs.job import START_MARK, JobFolder
from biasdpo.workspace import Workspace
from tests.run_line import ROOT, SMALL, TIMEOUT_SECONDS, CommandLine, checkpoints, ended, wait_for
from training.status import StatusWriter

# Evaluated, probed and logged at steps that differ from those of the checkpoints; a stop falls between two log lines.
LONG: dict[str, Any] = {
    "max_steps": 60,
    "save_steps": 20,
    "logging_steps": 2,
    "text_kl_weight": 0.1,
    "learning_rate": 0.003,
    "eval_every": 7,
    "probe_every": 13,
    "probe_prompts": ("Who?",),
    "held_out_share": 0.3,
    "adapter_dtype": "float32",
}


def assert_same_run(one: JobFolder, other: JobFolder) -> None:
    """Metrics line by line to 1e-4, the same probes, the same step kept, the same adapter to 1e-4."""
    lines = [folder.read_metrics() for folder in (one, other)]
    assert [sorted(line) for line in lines[1]] == [sorted(line) for line in lines[0]]
    for line, other_line in zip(*lines, strict=True):
        assert other_line == pytest.approx(line, abs=1e-4)
    assert other.read_probes() == one.read_probes()
    kept = [json.loads((folder.adapter / "provenance.json").read_text())["kept"] for folder in (one, other)]
    assert kept[0] == kept[1]
    tensors = [load_file(folder.adapter / "adapter_model.safetensors") for folder in (one, other)]
    for name, tensor in tensors[0].items():
        np.testing.assert_allclose(tensors[1][name], tensor, atol=1e-4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_bytes: Path, pairs_file: Path) -> JobFolder:
    """The run that nothing interrupted."""
    line = CommandLine(Workspace(tmp_path_factory.mktemp("whole")), tiny_bytes, pairs_file)
    return line.train_here("whole", **LONG)


@pytest.mark.slow
def test_killed_and_resumed_a_run_ends_as_if_nothing_had_been(command_line: CommandLine, whole: JobFolder) -> None:
    assert whole.read_status().state == "finished"
    assert len([line for line in whole.read_metrics() if "eval_loss" in line]) == 9  # 60 / 7, and the last

    # Killed at a step drawn by lot, twice at most.
    killed = command_line.start("killed", **LONG)
    step = random.randint(3, 50)
    print(f"killed at step {step}")
    run = wait_for(killed, lambda run: run.status.step >= step or ended(run))
    assert run.status.state == "running"
    os.kill(run.status.pid, signal.SIGKILL)
    interrupted = wait_for(killed, ended)
    assert interrupted.status.state == "interrupted"
    assert "--run-id killed --resume" in interrupted.status.error
    shown = json.loads(command_line("runs", "show", "killed", "--json").stdout)
    assert (shown["state"], shown["error"]) == ("interrupted", interrupted.status.error)
    resumed = command_line("train", "--run-id", "killed", "--resume", "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(whole, killed)

    again = command_line("train", "--run-id", "killed", "--resume")
    assert (again.returncode, "only a stopped, interrupted or failed run" in again.stderr) == (2, True)
    with_settings = command_line("train", "--run-id", "killed", "--resume", "--set", "beta=1")
    assert (with_settings.returncode, "--set" in with_settings.stderr) == (2, True)


def stop_in(patch: pytest.MonkeyPatch, folder: JobFolder, phase: str) -> None:
    """Request a stop once the run reports this phase, after its first step where it trains."""
    update = StatusWriter.update

    def update_and_stop(self: StatusWriter, **changes: Any) -> None:
        update(self, **changes)
        if self.status.phase == phase and (self.status.step > 0 or phase == "reading the data"):
            folder.stop_request.touch()

    patch.setattr(StatusWriter, "update", update_and_stop)


PHASES = {  # where a stop is asked for: the status's phase then, and the checkpoints' steps after one stop and after another
    "reading the data": (None, None),
    "training": (1, 2),
    "evaluating on the held-out pairs": (7, 7),
    "completing the probe's prompts": (13, 13),
    "scoring the held-out pairs": (60, 60),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_stop_ends_every_phase(
    command_line: CommandLine, whole: JobFolder, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """Stopped again where the resumed run makes up for it, the checkpoint is not written a second time."""
    folder = command_line.create("stopped", **LONG)
    stop_in(monkeypatch, folder, phase)
    saved: dict[Path, int] = {}
    for step in PHASES[phase]:
        folder.stop_request.unlink(missing_ok=True)
        command_line.go_on_here(folder)
        status, states = folder.read_status(), [path / "trainer_state.json" for path in checkpoints(folder)]
        assert (status.state, status.error, folder.adapter.exists()) == ("stopped", "", False)
        assert (states[-1].parent.name if states else None) == (f"checkpoint-{step}" if step else None)
        evaluated = [line["step"] for line in folder.read_metrics() if "eval_loss" in line]
        assert evaluated == [*range(7, step or 0, 7), *([60] if step == 60 else [])]
        written = {state: state.stat().st_mtime_ns for state in states}
        assert all(written[state] == at for state, at in saved.items() if state in written)
        saved = written
    monkeypatch.undo()
    folder.stop_request.unlink()
    command_line.go_on_here(folder)
    assert_same_run(whole, folder)


def test_a_run_stopped_while_it_is_scored_trains_no_step_more(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without evaluations or checkpoints; 5 steps are no whole epochs (28 pairs in eights: 4 steps). The probe of the last step,
    cut out here, is made up for."""
    few = LONG | {"max_steps": 5, "batch_size": 8, "eval_every": 0, "probe_every": 2, "save_steps": 0}
    whole = command_line.train_here("whole", **few)
    assert whole.read_status().state == "finished"
    folder = command_line.create("stopped", **few)
    with monkeypatch.context() as patch:
        stop_in(patch, folder, "scoring the held-out pairs")
        command_line.go_on_here(folder)
    assert folder.read_status().state == "stopped"
    assert checkpoints(folder)[-1].name == "checkpoint-5"
    probes = [json.dumps(row) + "\n" for row in folder.read_probes() if row["step"] < 5]
    assert len(probes) == len(whole.read_probes()) - 1
    folder.probes.write_text("".join(probes))
    folder.stop_request.unlink()
    command_line.go_on_here(folder)
    status = folder.read_status()
    assert (status.state, status.step, status.total_steps) == ("finished", 5, 5)
    assert "resumed after step 5" in status.notes
    assert_same_run(whole, folder)


def test_a_stop_before_anything_is_loaded(command_line: CommandLine) -> None:
    folder = command_line.start("early", max_steps=5000)
    wait_for(folder, lambda run: START_MARK in run.folder.log_tail(50))  # it has the device, and its launcher loads
    asked_at = time.monotonic()
    assert json.loads(command_line("runs", "stop", "early", "--json").stdout)["state"] in ("stopping", "stopped")
    assert wait_for(folder, ended).status.state == "stopped"
    assert time.monotonic() - asked_at < 30  # 10 s where nothing else takes the cores


def test_ctrl_c_asks_the_run_to_stop(command_line: CommandLine) -> None:
    folder = JobFolder(command_line.workspace.runs / "interactive")
    sets = [part for setting in (*SMALL, "max_steps=5000") for part in ("--set", setting)]
    files = ["--model", str(command_line.model), "--dataset", str(command_line.rows), "--workspace"]
    arguments = [*files, str(command_line.workspace.root), "--run-id", "interactive", *sets]
    process = subprocess.Popen(
        [sys.executable, "-m", "biasdpo", "train", *arguments],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a background job inherits ignored
    )
    end = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < end and not (folder.status_file.is_file() and folder.read_status().step >= 1):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 2
    assert "was stopped at step" in stderr.splitlines()[-1]
    assert "--resume" in stderr.splitlines()[-1]
    assert folder.read_status().state == "stopped"
