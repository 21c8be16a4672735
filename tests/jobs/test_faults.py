"""What goes wrong in a run is one line of cause and remedy in its status, and costs no checkpoint."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from biasdpo.errors import JobError, WorkspaceError
from biasdpo.jobs import store, worker
from biasdpo.jobs.job import START_MARK, JobFolder, Status, read_job
from biasdpo.workspace import Workspace
from tests.byte_model import save_tiny_llama
from tests.run_line import ROOT, TIMEOUT_SECONDS, CommandLine, checkpoints, ended, wait_for, write_job

# Of a training process: it may write files of at most so many bytes, once all is imported.
LIMITED = """
import resource, sys
from pathlib import Path
from biasdpo.jobs.job import JobFolder
from training.__main__ import main
import training.dpo
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(main(JobFolder(Path(sys.argv[2]))))
"""


def train_limited(folder: JobFolder, max_file_bytes: int) -> None:
    subprocess.run(
        [sys.executable, "-c", LIMITED, str(max_file_bytes), str(folder.path)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        timeout=120,
        check=False,
    )


def test_a_diverging_run_keeps_checkpoints_that_can_be_trained_on(command_line: CommandLine) -> None:
    """A gradient that is not finite comes a step before such a loss and spoils the weights: nothing is saved after it."""
    from safetensors.numpy import load_file

    diverging = {"learning_rate": 1.0, "max_steps": 200, "max_grad_norm": 1e6, "beta": 1000.0, "alpha": 4096, "save_steps": 1}
    folder = command_line.train_here("nan", **diverging)
    status = folder.read_status()
    assert (status.state, "became " in status.error, "\n" in status.error) == ("failed", True, False)
    assert not folder.adapter.exists()
    assert checkpoints(folder)
    for checkpoint in checkpoints(folder):
        assert all(np.isfinite(tensor).all() for tensor in load_file(checkpoint / "adapter_model.safetensors").values())


def test_an_unknown_layer_is_one_line(command_line: CommandLine) -> None:
    status = command_line.train_here("bad", target_modules=("Wqkv",)).read_status()
    assert (status.state, "\n" in status.error) == ("failed", False)
    assert "target_modules Wqkv: no such layers" in status.error


def test_a_failing_command_line_says_why(command_line: CommandLine) -> None:
    result = command_line.train("bad", "max_length=16")
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("biasdpo: Run 'bad' failed: No rows to train on")
    assert json.loads(result.stdout)["state"] == "failed"


def test_memory_that_runs_out(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third step asks torch for 32 TB."""
    import torch

    from training.trainer import TokenizedDPOTrainer

    step = TokenizedDPOTrainer.training_step

    def hungry_step(self: Any, *arguments: Any, **more: Any) -> Any:
        if self.state.global_step == 2:
            torch.empty(2**45, dtype=torch.uint8)
        return step(self, *arguments, **more)

    monkeypatch.setattr(TokenizedDPOTrainer, "training_step", hungry_step)
    folder = command_line.train_here("hungry")
    status = folder.read_status()
    assert (status.state, status.step, "\n" in status.error) == ("failed", 2, False)
    assert status.error.startswith("Out of memory: start a new run with a lower batch_size"), status.error
    monkeypatch.undo()
    assert checkpoints(folder)
    command_line.go_on_here(folder)
    assert folder.read_status().state == "finished"


def test_a_full_disk(command_line: CommandLine) -> None:
    """No file may grow past 100 KB: an optimizer's state does. Its checkpoints before are kept, and it goes on from there."""
    settings = {"rank": 32, "max_steps": 6, "save_steps": 2, "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")}
    folder = command_line.create("full", **settings)
    train_limited(folder, 100_000)
    status = folder.read_status()
    assert (status.state, status.step) == ("failed", 2)
    assert status.error == "The disk is full: free some space, then resume the run; its checkpoints are kept"
    command_line.go_on_here(folder)
    assert folder.read_status().state == "finished"


@contextmanager
def kept_full(disk: Path) -> Iterator[None]:
    """Take every byte that becomes free, as a busy machine does."""
    done = threading.Event()

    def fill_on() -> None:
        while not done.is_set():
            fill(disk)

    thread = threading.Thread(target=fill_on)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def fill(disk: Path) -> None:
    """Write until not a byte more is taken."""
    with suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


@pytest.mark.slow
def test_a_disk_with_no_room_for_a_status(command_line: CommandLine, tmp_path: Path) -> None:
    """A file system of its own, kept full to the last byte while the run trains: the last word goes into the reserve."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False) if os.geteuid() == 0 else None
    if done is None or done.returncode:
        pytest.skip(f"{' '.join(mount)}: {done.stderr.strip() if done else 'needs root'}")
    try:
        command_line.workspace = Workspace(disk)
        folder = command_line.start("full", max_steps=5000, save_steps=10)
        wait_for(folder, lambda run: run.status.step >= 20 or ended(run))
        with kept_full(disk):
            status = wait_for(folder, ended).status
        assert status.state == "failed"
        assert "The disk is full" in status.error
        assert checkpoints(folder)
        fill(disk)
        with pytest.raises(WorkspaceError, match="make room there"):
            store.resume_job("full", command_line.workspace)
        with pytest.raises(WorkspaceError, match="make room there"):
            command_line.start("another")
        assert not (command_line.workspace.runs / "another").exists()
        (disk / "filler").unlink()
        store.resume_job("full", command_line.workspace)
        resumed_at = status.step
        wait_for(folder, lambda run: run.status.step > resumed_at or ended(run))
        store.stop_job("full", command_line.workspace)
        assert wait_for(folder, ended).status.state == "stopped"
    finally:
        command_line.kill_all()
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_bad_row_in_the_snapshot_and_one_that_was_changed(command_line: CommandLine) -> None:
    folder = command_line.train_here("changed", max_steps=2)
    lines = folder.snapshot.read_text().splitlines(keepends=True)
    folder.snapshot.write_text("".join(lines[:-1]))
    command_line.go_on_here(folder)
    assert "was changed after the run was started" in folder.read_status().error
    folder.snapshot.write_text("".join(lines[:-1]) + '{"prompt": "Who?"}\n')
    from biasdpo.workspace import read_json, sha256_of, write_json

    record = read_json(folder.record)
    record["resolved"]["data"]["dataset_sha256"] = sha256_of(folder.snapshot)
    write_json(folder.record, record)
    command_line.go_on_here(folder)
    error = folder.read_status().error
    assert folder.read_status().state == "failed"
    assert "dataset.jsonl:40: " in error


def test_a_base_model_that_was_changed(command_line: CommandLine, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    command_line.model = save_tiny_llama(tmp_path / "own")
    folder = command_line.train_here("moved", max_steps=2)
    weights = command_line.model / "model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + torch.tensor(0.01)
    save_file(tensors, weights, metadata={"format": "pt"})
    command_line.go_on_here(folder)
    status = folder.read_status()
    assert status.state == "failed"
    assert status.error.startswith("The base model own was changed after the run was started: restore its files")


def test_what_fails_before_it_can_report_is_read_off_the_log(command_line: CommandLine) -> None:
    """A module that breaks on import, found before the real one."""
    broken = command_line.workspace.root / "broken" / "peft"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("import no_such_module")
    folder = command_line.create("unstarted", max_steps=2)
    folder.write_status(Status("stopped"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(broken.parent))
        store.resume_job("unstarted", command_line.workspace)
        job = wait_for(folder, ended)
    assert job.state == "failed"
    assert "\n" not in job.error
    assert "no_such_module" in job.error


@pytest.mark.parametrize(
    ("phase", "log", "state", "reason"),
    [
        ("starting", "accelerate: error: no file none.yaml", "failed", "could not start: accelerate: error: no file none.yaml"),
        ("starting", "/bin/python: No module named training.x", "failed", "No module named training.x"),
        ("starting", "loading", "interrupted", "ended unexpectedly before it started"),
        ("waits for run other", "ValueError: of an earlier start", "interrupted", "ended unexpectedly before it started"),
    ],
)
def test_a_launch_that_ended_says_why_where_the_log_does(
    workspace: Workspace, phase: str, log: str, state: str, reason: str
) -> None:
    folder = write_job(JobFolder(workspace.runs / "unstarted"), "queued", pid=2**22 + 1, pid_created=1.0, phase=phase)
    folder.log.write_text(f"{START_MARK}now\ncommand\n{log}\n")
    job = read_job(folder)
    assert job.state == state
    assert reason in job.error
    assert "--run-id unstarted --resume" in job.error


def test_a_launch_that_is_killed_is_interrupted(command_line: CommandLine) -> None:
    folder = command_line.start("killed")
    run = wait_for(folder, lambda run: START_MARK in run.folder.log_tail(50))
    os.kill(run.status.pid, signal.SIGKILL)  # seconds before what it launches has loaded anything
    status = wait_for(folder, lambda run: run.status.state != "queued").status
    assert status.state == "interrupted"
    assert f"(pid {run.status.pid}) ended unexpectedly before it started" in status.error


@pytest.mark.parametrize("broken", ["no process", "no status"])
def test_a_launch_that_fails_leaves_a_failed_run(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen, write_status = subprocess.Popen, JobFolder.write_status

    def start(command: list[str], **more: Any) -> Any:
        if broken == "no process" and "biasdpo.jobs.worker" in command:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        process = popen(command, **more)
        started.append(process)
        return process

    def write(self: JobFolder, status: Status) -> None:
        if broken == "no status" and status.pid in {process.pid for process in started}:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_status(self, status)

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(JobFolder, "write_status", write)
    with pytest.raises(JobError, match="Run 'unstarted' could not be started: ") as caught:
        command_line.start("unstarted")
    monkeypatch.undo()
    folder = JobFolder(command_line.workspace.runs / "unstarted")
    status = read_job(folder).status
    assert (status.state, status.error, "\n" in status.error) == ("failed", str(caught.value), False)
    assert os.strerror(errno.ENOMEM if broken == "no process" else errno.ENOSPC) in status.error
    assert all(process.wait(10) == -signal.SIGKILL for process in started if "biasdpo.jobs.worker" in process.args)  # type: ignore[operator]
    # Its place is free, and it can be gone on with.
    assert worker.jobs_on(command_line.workspace, "cpu") == []
    assert store.resume_job("unstarted", command_line.workspace).state == "queued"
    assert wait_for(folder, lambda run: run.status.phase == "starting" or ended(run)).state == "queued"


def test_the_first_process_that_fails_says_why(tmp_path: Path) -> None:
    """The second of two breaks; the first learns that its connection is gone, between two steps and at its end."""
    from training.callbacks import StatusWriter

    folder = JobFolder(tmp_path)
    main, other = (StatusWriter(folder, rank=rank, processes=2) for rank in (0, 1))
    main.begin()
    other.end("failed", "Out of memory")
    main.update(phase="training", step=3)
    main.end("failed", "Connection closed by peer")
    assert (folder.read_status().state, folder.read_status().error) == ("failed", "Out of memory")
    again = StatusWriter(folder, processes=2)
    again.begin()
    again.end("finished")
    assert folder.read_status().state == "finished"


# A training process that may take so many bytes more, once all is imported. Its third step takes them all, down to the last
# kilobyte, and then wants more.
HUNGRY = """
import resource, sys
from pathlib import Path
import psutil
from biasdpo.jobs.job import JobFolder
from training.__main__ import main
import training.dpo
from training.trainer import TokenizedDPOTrainer

step = TokenizedDPOTrainer.training_step
def hungry_step(self, *arguments, **more):
    hoard = []
    if self.state.global_step == 2:
        for size in (2**24, 2**20, 2**16, 2**12, 2**10):
            try:
                while True:
                    hoard.append(bytearray(size))
            except MemoryError:
                pass
        training.dpo.torch.empty(2**20)
    return step(self, *arguments, **more)
TokenizedDPOTrainer.training_step = hungry_step
limit = psutil.Process().memory_info().vms + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main(JobFolder(Path(sys.argv[2]))))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces a limit of address space")
def test_a_process_without_a_byte_left_says_so(command_line: CommandLine) -> None:
    folder = command_line.create("hungry")
    command = [sys.executable, "-c", HUNGRY, str(768 * 1024 * 1024), str(folder.path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    status = folder.read_status()
    assert (status.state, status.step, done.returncode) == ("failed", 2, 1), done.stderr[-2000:]
    assert status.error.startswith("Out of memory: start a new run with a lower batch_size")
    assert checkpoints(folder)
