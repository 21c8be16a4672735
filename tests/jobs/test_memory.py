"""A job gets the memory of models that an app holds open, with no page open anywhere."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from biasdpo.jobs import store
from biasdpo.jobs.memory import request_memory
from biasdpo.workspace import Workspace
from tests import evaluating
from tests.run_line import ROOT, ended, kill_jobs, wait_for

APP = """
import sys, time
from biasdpo.engines import EngineKey, EnginePool
from biasdpo.jobs import memory
from biasdpo.migrations import open_workspace
pool = EnginePool(open_workspace(sys.argv[1]))
memory.serve_requests(pool, pool.workspace)
key = EngineKey(sys.argv[2], "none")
with pool.lease(key):
    print("leased", flush=True)
    sys.stdin.readline()
print("idle", flush=True)
while pool.opened():
    time.sleep(0.05)
print("released", flush=True)
sys.stdin.readline()
"""


@contextmanager
def app(workspace: Workspace, model: Path) -> Iterator[subprocess.Popen[str]]:
    """A process with an open model, as app.py has one; its page was never opened."""
    command = [sys.executable, "-c", APP, str(workspace.root), str(model)]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_a_worker_gets_an_apps_memory_before_it_works(workspace: Workspace, tiny_llama_gguf: Path, tmp_path: Path) -> None:
    config = evaluating.request(tiny_llama_gguf, "none", evaluating.write_items(tmp_path / "data", 10))
    with app(workspace, tiny_llama_gguf) as process:
        assert line(process) == "leased"
        request_memory(workspace, "gpu", timeout_seconds=20)  # the model is on the CPU: nothing to close
        began = time.monotonic()
        request_memory(workspace, "cpu", timeout_seconds=0.5)  # in use: it is not closed under a visitor's feet
        assert 0.4 < time.monotonic() - began < 5
        try:
            folder = store.start_evaluation(config, workspace).folder
            job = wait_for(folder, lambda job: job.status.phase == "freeing memory" or ended(job))
            assert job.state == "queued"
            go_on(process)
            assert [line(process), line(process)] == ["idle", "released"]
            assert wait_for(folder, ended).state == "finished"
        finally:
            kill_jobs(workspace)
        assert [path.name for path in (workspace.root / ".jobs" / "apps").iterdir()] == [f"{process.pid}.json"]

    # The app was killed: nobody waits for it, and its registration goes.
    began = time.monotonic()
    request_memory(workspace, "cpu")
    assert time.monotonic() - began < 5
    assert list((workspace.root / ".jobs" / "apps").iterdir()) == []


def test_a_dying_app_ends_the_wait(workspace: Workspace, tiny_llama_gguf: Path) -> None:
    with app(workspace, tiny_llama_gguf) as process:
        assert line(process) == "leased"
        watcher = subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(1); os.kill({process.pid}, 9)"])
        began = time.monotonic()
        request_memory(workspace, "cpu", timeout_seconds=60)
        assert time.monotonic() - began < 20
        watcher.wait()


@pytest.mark.parametrize("text", ["{", "[]", '{"pid": "x", "pid_created": 1}', '{"pid": 1}'])
def test_a_damaged_registration_is_passed_over(workspace: Workspace, text: str) -> None:
    folder = workspace.root / ".jobs" / "apps"
    folder.mkdir(parents=True)
    (folder / "1.json").write_text(text)
    request_memory(workspace, "cpu", timeout_seconds=5)
