"""A training process's status: stops where its main thread can't look, and who has the last word."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from biasdpo.jobs.job import JobFolder, Status
from tests.run_line import ROOT, TIMEOUT_SECONDS
from training import status
from training.status import StatusWriter, watch_for_stop

# `python -m training` whose work never ends and never looks: it stands for the import of torch, or a model that loads.
BUSY = """
import runpy, sys, time, types
def train(folder, writer):
    writer.note("working")
    print("busy", sorted({"torch", "trl"} & set(sys.modules)), flush=True)
    time.sleep(600)
busy = types.ModuleType("training.dpo")
busy.train = train
sys.modules["training.dpo"] = busy
sys.argv[0] = "training"
runpy.run_module("training", run_name="__main__")
"""


def start_busy(folder: JobFolder, rank: int, processes: int) -> subprocess.Popen[str]:
    """Start it, and return when it is at work."""
    environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(processes)}
    command = [sys.executable, "-c", BUSY, str(folder.path)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "busy []\n"  # it reports before it loads a heavy library
    return process


@pytest.mark.parametrize("processes", [1, 2])
def test_a_busy_run_is_stopped_and_no_failure(tmp_path: Path, processes: int) -> None:
    folder = JobFolder(tmp_path)
    folder.write_status(Status("queued", step=40, total_steps=100))
    busy = [start_busy(folder, rank, processes) for rank in range(processes)]
    try:
        assert folder.read_status().state == "running"
        folder.stop_request.touch()
        assert [process.wait(TIMEOUT_SECONDS) for process in busy] == [0] * processes
    finally:
        for process in busy:
            process.kill()
        logs = [process.communicate()[1] for process in busy]
    assert [f"[{folder.id}] working\n" in log for log in logs] == [True, False][:processes]  # the main process's alone
    found = folder.read_status()
    assert (found.state, found.step, found.error, found.phase) == ("stopped", 40, "", "")


def test_the_main_process_exits_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one waits for its status, or the broken connection would be the run's last word."""
    exited: list[int] = []
    monkeypatch.setattr(os, "_exit", exited.append)
    monkeypatch.setattr(status, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(status, "POLL_SECONDS", 0.001)
    folder = JobFolder(tmp_path)
    main, other = (StatusWriter(folder, rank, processes=2) for rank in (0, 1))
    main.begin()
    folder.stop_request.touch()
    watch_for_stop(other)
    time.sleep(0.05)
    assert exited == []
    watch_for_stop(main)
    end = time.monotonic() + TIMEOUT_SECONDS
    while len(exited) < 2 and time.monotonic() < end:
        time.sleep(0.001)
    assert exited == [0, 0]
    other.end("failed", "Connection closed by peer")
    assert folder.read_status().state == "stopped"


@pytest.mark.parametrize("after", ["the first step", "the end"])
def test_nobody_exits_once_there_is_something_to_lose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str) -> None:
    exited: list[int] = []
    monkeypatch.setattr(os, "_exit", exited.append)
    writer = StatusWriter(JobFolder(tmp_path))
    writer.begin()
    if after == "the end":
        writer.end("failed", "The disk is full")
    else:
        writer.forbid_exit()
    writer.exit_stopped()
    assert exited == []
    assert writer.folder.read_status().state == ("failed" if after == "the end" else "running")
