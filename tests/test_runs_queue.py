"""One run at a time on a device: others wait their turn, can be stopped meanwhile, and start whatever ended the one before."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from biasdpo import run_queue, runs
from biasdpo.errors import RunError
from biasdpo.run_folder import RunFolder, Status
from biasdpo.workspace import Workspace
from tests.run_line import ROOT, CommandLine, ended, wait_for


def waits(run: runs.Run) -> bool:
    return bool(run.status.waits_for)


def test_runs_wait_their_turn(command_line: CommandLine) -> None:
    first = command_line.start("first", max_steps=5000)
    second = command_line.start("second")
    third = command_line.start("third")
    run = wait_for(second, waits)
    assert (run.status.state, run.status.waits_for, run.status.phase) == ("queued", "first", "waits for run first")
    assert wait_for(third, waits).status.waits_for == "first"

    # A waiting process is a light one.
    process = psutil.Process(run.status.pid)
    assert "biasdpo.run_queue" in process.cmdline()
    assert process.memory_info().rss < 120e6
    assert not any("torch" in file.path for file in process.memory_maps())

    # The third is stopped while it waits: it never trains. The first goes on.
    assert runs.stop("third", command_line.workspace).status.state in ("stopping", "stopped")
    stopped = wait_for(third, ended).status
    assert (stopped.state, stopped.step, stopped.waits_for) == ("stopped", 0, "")
    assert third.read_metrics() == []
    assert wait_for(first, lambda run: run.status.step > 0 or ended(run)).status.state == "running"
    assert runs.poll(second).status.state == "queued"

    # It is resumed, and stands behind the second.
    runs.resume("third", command_line.workspace)
    # The first is killed at once: the second starts, then the third.
    os.kill(runs.poll(first).status.pid, signal.SIGKILL)
    assert wait_for(first, ended).status.state == "interrupted"
    assert wait_for(third, lambda run: run.status.waits_for == "second" or ended(run)).status.state == "queued"
    assert wait_for(second, ended).status.state == "finished"
    assert wait_for(third, ended).status.state == "finished"
    steps = [min(file.stat().st_mtime for file in folder.path.glob("adapter")) for folder in (second, third)]
    assert steps == sorted(steps)


def test_a_waiting_process_that_is_killed_is_interrupted_and_in_nobodys_way(command_line: CommandLine) -> None:
    first = command_line.start("first", max_steps=5000)
    second = command_line.start("second")
    third = command_line.start("third", max_steps=5000)
    waiting = wait_for(second, waits)
    os.kill(waiting.status.pid, signal.SIGKILL)
    status = wait_for(second, ended).status
    assert (status.state, status.waits_for) == ("interrupted", "")
    assert "ended before it began to train" in status.error
    assert "--run-id second --resume" in status.error
    runs.stop("first", command_line.workspace)
    assert wait_for(first, ended).status.state == "stopped"
    assert wait_for(third, lambda run: run.status.state == "running" or ended(run)).status.state == "running"


def test_the_lock_outlives_the_launcher(command_line: CommandLine) -> None:
    """The launcher is killed, and what trains goes on: the device is not free until that has ended, too."""
    first = command_line.start("first", max_steps=5000)
    training = wait_for(first, lambda run: run.status.step > 0 or ended(run)).status
    launcher = psutil.Process(training.pid).parent()
    assert launcher is not None
    assert "accelerate.commands.launch" in launcher.cmdline()
    launcher.kill()
    second = command_line.start("second")
    assert wait_for(second, waits).status.waits_for == "first"
    assert runs.poll(first).status.state == "running"
    (command_line.workspace.runs / ".queue-cpu").write_text("second\n")  # not even where the order is lost
    seen = wait_for(second, lambda run: run.status.phase == "waits for the device")
    assert seen.status.state == "queued"
    assert runs.poll(first).status.state == "running"
    psutil.Process(training.pid).kill()
    assert wait_for(second, ended).status.state == "finished"


def test_the_order_is_that_of_arrival_and_passes_over_the_ended(workspace: Workspace) -> None:
    me = psutil.Process()

    def write(run_id: str, state: str) -> None:
        RunFolder(workspace.run_folder(run_id)).write_status(
            Status(state, pid=me.pid, pid_created=me.create_time())  # type: ignore[arg-type]
        )

    for run_id in ("a", "b", "c"):
        write(run_id, "queued")
        run_queue.join(workspace, "cpu", run_id)
    run_queue.join(workspace, "gpu", "elsewhere")
    assert [run_queue.ahead(workspace, "cpu", run_id) for run_id in ("a", "b", "c")] == [[], ["a"], ["a", "b"]]
    write("a", "finished")
    assert run_queue.ahead(workspace, "cpu", "c") == ["b"]
    write("a", "queued")
    run_queue.join(workspace, "cpu", "a")  # resumed: at the end
    assert [run_queue.ahead(workspace, "cpu", run_id) for run_id in ("a", "b", "c")] == [["b", "c"], [], ["b"]]
    RunFolder(workspace.run_folder("b")).write_status(Status("queued", pid=me.pid, pid_created=me.create_time() - 60))
    assert run_queue.ahead(workspace, "cpu", "a") == ["c"]  # dead


def test_the_app_that_started_it_may_be_killed(command_line: CommandLine) -> None:
    """The app dies between two lines of `start`, as late as can be: its run is started, or seen to be interrupted."""
    script = (
        "import os, signal, sys\n"
        "from biasdpo import runs\n"
        "from biasdpo.config import TrainConfig\n"
        "from biasdpo.workspace import Workspace\n"
        "if sys.argv[4] == 'before': runs._launch = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "config = TrainConfig(model=sys.argv[1], datasets=(sys.argv[2],), threads=1, max_steps=3, batch_size=2)\n"
        "runs.start(config, sys.argv[4], Workspace(__import__('pathlib').Path(sys.argv[3])))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for when, state in (("before", "interrupted"), ("after", "finished")):
        command_line.run_ids.append(when)
        arguments = [str(command_line.model), str(command_line.rows), str(command_line.workspace.root), when]
        done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, check=False, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert wait_for(RunFolder(command_line.workspace.run_folder(when)), ended).status.state == state


@pytest.mark.parametrize("leftover", [".x.abc", ".deleted-x.abc"])
def test_what_a_crash_left_is_no_run(workspace: Workspace, leftover: str) -> None:
    folder = workspace.runs / leftover / "x"
    RunFolder(Path(folder)).write_status(Status("queued"))
    RunFolder(folder.parent).write_status(Status("queued"))
    assert runs.list_runs(workspace) == []


def test_a_run_resumed_twice_at_once_has_one_process(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = runs.make_folder(command_line.config(max_steps=5000), "once", command_line.workspace)
    command_line.run_ids.append("once")
    folder.write_status(Status("stopped"))
    popen, started = subprocess.Popen, []

    def start(command: list[str], **more: Any) -> Any:
        process = popen(command, **more)
        if "biasdpo.run_queue" in command:
            started.append(process.pid)
            time.sleep(0.5)  # the other one has long looked by then
        return process

    monkeypatch.setattr(subprocess, "Popen", start)
    at_once = threading.Barrier(2)

    def act(action: Callable[[str, Workspace], object]) -> str:
        at_once.wait()
        try:
            action("once", command_line.workspace)
        except RunError as exc:
            return str(exc)
        return ""

    with ThreadPoolExecutor(2) as threads:
        said = sorted(threads.map(act, (runs.resume, runs.resume)))
    assert len(started) == 1
    assert said[0] == ""
    assert re.match(r"Run 'once' is (queued|running): only a stopped", said[1])
    runs.stop("once", command_line.workspace)
    wait_for(folder, ended)

    # Resumed and deleted at once: one of both.
    with ThreadPoolExecutor(2) as threads:
        resumed, deleted = threads.map(act, (runs.resume, runs.delete))
    assert bool(resumed) != bool(deleted)
    assert folder.path.exists() == (not resumed)
