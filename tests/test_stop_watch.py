"""A run is stopped where its main thread can't look: nothing is lost, and the launcher sees no failure."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from biasdpo.jobs.job import JobFolder, Status
from tests.run_line import ROOT, TIMEOUT_SECONDS
from training import callbacks
from training.callbacks import StatusWriter

# `python -m training`, whose work is never done and never looks: it stands for the import of torch, or a model that is read.
BUSY = """
import runpy, sys, time, types
busy = types.ModuleType("training.dpo")
busy.train = lambda folder, writer: (print("busy", flush=True), time.sleep(600))
sys.modules["training.dpo"] = busy
sys.argv[0] = "training"
runpy.run_module("training", run_name="__main__")
"""


def start_busy(folder: JobFolder, rank: int, processes: int) -> subprocess.Popen[str]:
    """Start it, and return when it is at work."""
    environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(processes)}
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, str(folder.path)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "busy\n"
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
            process.communicate()
    status = folder.read_status()
    assert (status.state, status.step, status.error, status.phase) == ("stopped", 40, "", "")


def test_the_main_process_leaves_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one waits for its word, or the broken connection would be the last that is heard of the run."""
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(callbacks, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(callbacks, "LOOK_SECONDS", 0.001)
    folder = JobFolder(tmp_path)
    main, other = (StatusWriter(folder, rank=rank, processes=2) for rank in (0, 1))
    main.begin()
    folder.stop_request.touch()
    callbacks.watch(other)
    time.sleep(0.05)
    assert left == []
    callbacks.watch(main)
    end = time.monotonic() + TIMEOUT_SECONDS
    while len(left) < 2 and time.monotonic() < end:
        time.sleep(0.001)
    assert left == [0, 0]
    other.end("failed", "Connection closed by peer")
    assert folder.read_status().state == "stopped"


@pytest.mark.parametrize("after", ["the first step", "the end"])
def test_nobody_leaves_once_there_is_something_to_lose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    writer = StatusWriter(JobFolder(tmp_path))
    writer.begin()
    if after == "the end":
        writer.end("failed", "The disk is full")
    else:
        writer.stay()
    writer.leave()
    assert left == []
    assert writer.folder.read_status().state == ("failed" if after == "the end" else "running")
