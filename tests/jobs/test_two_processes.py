"""A run of two processes: the curve of one, and an end that is as well told, and as well made up for, as that of one."""

from __future__ import annotations

import os
import signal
from typing import Any

import psutil
import pytest

from biasdpo.jobs import store
from biasdpo.jobs.job import JobFolder, Status
from tests.jobs.test_resuming import LONG, assert_same_run
from tests.run_line import TIMEOUT_SECONDS, CommandLine, checkpoints, ended, wait_for

ONE: dict[str, Any] = LONG | {"max_steps": 26, "save_steps": 10, "eval_every": 3, "batch_size": 4}
TWO: dict[str, Any] = ONE | {"num_processes": 2, "batch_size": 2}  # as many pairs a step


def first_steps(folder: JobFolder, key: str) -> list[float]:
    """A metric, line by line, of steps with whole batches: an epoch has seven, of whose last accelerate fills up the odd rows."""
    return [line[key] for line in folder.read_metrics() if key in line and line["step"] <= 6]


def processes_of(status: Status) -> tuple[psutil.Process, list[psutil.Process]]:
    """The launcher, and the training processes by rank."""
    launcher = psutil.Process(status.pid).parent()
    assert launcher is not None
    ranks = {child.environ().get("RANK"): child for child in launcher.children(recursive=True)}
    return launcher, [ranks["0"], ranks["1"]]


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one_killed_stopped_and_resumed(command_line: CommandLine) -> None:
    """Evaluations, the kept step and the probe, which the main process alone completes, among it."""
    one = command_line.train_here("by-one", **ONE)
    whole = command_line.start("by-two", **TWO)
    assert wait_for(whole, ended).state == "finished", whole.read_status().error
    evaluation = next(line for line in one.read_metrics() if "eval_loss" in line)
    evaluated = [key for key in evaluation if key.startswith(("eval_loss", "eval_rewards", "eval_logps"))]
    assert len(evaluated) == 7
    for key, lines in {"loss": 3, **dict.fromkeys(evaluated, 2)}.items():  # logged every 2 steps, evaluated every 3
        curves = [first_steps(folder, key) for folder in (one, whole)]
        assert len(curves[0]) == lines
        assert curves[1] == pytest.approx(curves[0], abs=1e-3), key
    losses = first_steps(one, "loss")
    assert losses[-1] < losses[0] - 0.01  # else equal curves would show nothing
    assert whole.read_probes()[0] == one.read_probes()[0]

    # The second of the two is killed: the run says so in a line, and nothing of it is left behind.
    hurt = command_line.start("hurt", **TWO)
    status = wait_for(hurt, lambda run: run.status.step >= 3 or ended(run)).status
    launcher, training = processes_of(status)
    os.kill(training[1].pid, signal.SIGKILL)
    told = wait_for(hurt, ended).status
    assert told.state in ("failed", "interrupted")  # as the first one learns of it by its connection, or by the launcher
    assert "ended" in told.error
    assert "resume" in told.error
    _gone, alive = psutil.wait_procs([launcher, *training], timeout=TIMEOUT_SECONDS)
    assert alive == []

    # Resumed, it does over what the other did; stopped, it leaves a checkpoint; resumed again, it ends as if nothing had been.
    store.resume_job("hurt", command_line.workspace)
    resumed_at = told.step
    wait_for(hurt, lambda run: run.status.step > resumed_at + 2 or ended(run))
    store.stop_job("hurt", command_line.workspace)
    stopped = wait_for(hurt, ended).status
    assert (stopped.state, stopped.error) == ("stopped", "")
    assert checkpoints(hurt)[-1].name == f"checkpoint-{stopped.step}"
    assert not hurt.adapter.exists()
    store.resume_job("hurt", command_line.workspace)
    assert wait_for(hurt, ended).state == "finished"
    assert_same_run(whole, hurt)
