"""A run's folder and process: start, poll, list, stop, resume. Whoever reads a run reads its files, nobody holds its process."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from biasdpo import __version__, dataset, models
from biasdpo.errors import ConfigError, DatasetError, RunError
from biasdpo.run_config import RunConfig, load_json
from biasdpo.run_folder import ACTIVE, RunFolder, Status
from biasdpo.workspace import Workspace, read_json, refuse_on_public_space, write_json

ROOT = Path(__file__).resolve().parent.parent

# Kept so that a finished child is reaped, and not left a zombie, for as long as its parent lives.
_children: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True)
class Run:
    """A run as its folder shows it now."""

    folder: RunFolder
    status: Status

    def to_json(self) -> dict[str, Any]:
        """The object of `runs show --json`."""
        origin = read_json(self.folder.origin) if self.folder.origin.is_file() else {}
        provenance = self.folder.adapter / "provenance.json"
        metrics = self.folder.read_metrics()
        return {
            "id": self.folder.id,
            "folder": str(self.folder.path),
            **asdict(self.status),
            "notes": list(self.status.notes),
            "started_at": origin.get("started_at", ""),
            "dataset_sha256": origin.get("dataset_sha256", ""),
            "config": load_json(self.folder.config).to_json() if self.folder.config.is_file() else {},
            "adapter": str(self.folder.adapter) if provenance.is_file() else "",
            "metrics": read_json(provenance)["metrics"] if provenance.is_file() else {},
            "last_logged": metrics[-1] if metrics else {},
        }


# Start


def start(config: RunConfig, run_id: str, workspace: Workspace, command: str = "") -> RunFolder:
    """Make a run's folder, start its process, return at once. `command`: what the user typed, for the provenance.

    Raises RefusedError on a public Space, ConfigError, ModelError or DatasetError for what can't be trained, RunError where
    the id is taken.
    """
    refuse_on_public_space("Training")
    folder = RunFolder(workspace.run_folder(run_id))
    if folder.path.exists():
        raise RunError(
            f"Run {run_id!r} exists already ({folder.path}): choose another id, go on with it with --resume, or delete its folder"
        )
    if not config.model:
        raise ConfigError("No model to train: name one with --model, e.g. smollm2")
    if not config.datasets:
        raise ConfigError("No data to train on: name some with --dataset FILE.jsonl, hub:OWNER/NAME or workspace")
    models.find(config.model)
    rows = dataset.load(config.datasets, workspace)
    derived = dataset.derive(rows)
    pairs = dataset.split(derived.pairs, config.held_out_share)
    if not pairs.train:
        raise DatasetError(
            f"{', '.join(config.datasets)}: no pairs to train on ({len(rows)} rows read, {len(pairs.held_out)} held out, "
            f"{derived.contradictions} contradict each other); add rows or lower held_out_share"
        )
    try:
        folder.path.mkdir(parents=True)
    except FileExistsError as exc:  # another start was faster
        raise RunError(f"Run {run_id!r} exists already ({folder.path}): choose another id") from exc
    write_json(folder.config, config.to_json())
    write_json(
        folder.origin,
        {
            "dataset_sha256": dataset.snapshot(derived.pairs, folder.snapshot),
            "dataset_files": [name if name.startswith(dataset.HUB) else Path(name).name for name in config.datasets],
            "dataset_rows": {
                "read": len(rows),
                "pairs": len(derived.pairs),
                "repeats": derived.repeats,
                "contradictions": derived.contradictions,
                "bridging": len(pairs.bridging),
            },
            "command": command,
            "code_version": code_version(),
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    _launch(folder, config)
    return folder


def resume(run_id: str, workspace: Workspace) -> RunFolder:
    """Go on with a stopped, interrupted or failed run from its last checkpoint (from the start where there is none)."""
    refuse_on_public_space("Training")
    run = show(run_id, workspace)
    if run.status.state in (*ACTIVE, "finished"):
        raise RunError(f"Run {run_id!r} is {run.status.state}: only a stopped, interrupted or failed run can be resumed")
    run.folder.stop_request.unlink(missing_ok=True)
    _launch(run.folder, load_json(run.folder.config))
    return run.folder


def _launch(folder: RunFolder, config: RunConfig) -> None:
    """Start the process in a session of its own, so that neither Ctrl-C nor the app's end reaches it."""
    folder.write_status(Status("queued", phase="starting"))
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    threads = config.threads or max(1, _usable_cores() // config.num_processes)
    environment["OMP_NUM_THREADS"] = str(threads)
    with folder.log.open("ab") as log:
        process = subprocess.Popen(
            launch_command(folder, config, threads),
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _children.append(process)
    try:
        created = psutil.Process(process.pid).create_time()
    except psutil.NoSuchProcess:
        created = 0.0
    if folder.read_status().state == "queued":  # the process may have been faster, and its own word stands
        folder.write_status(Status("queued", pid=process.pid, pid_created=created, phase="starting"))


def launch_command(folder: RunFolder, config: RunConfig, threads: int) -> list[str]:
    """`accelerate launch`, of this very Python."""
    on_gpu = models.free_gpu_memory_gb() > 0
    name = config.accelerate
    if name == "auto":
        name = ("multi_gpu" if config.num_processes > 1 else "one_gpu") if on_gpu else "cpu"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "training" / "accelerate" / f"{name}.yaml"), "--num_cpu_threads_per_process", str(threads)]
    if config.num_processes > 1:
        command += ["--num_processes", str(config.num_processes), "--main_process_port", "0"]
        if name == "cpu":
            command.append("--multi_gpu")  # accelerate's name for torchrun; with use_cpu it runs gloo
    return [*command, "-m", "training.dpo", str(folder.path)]


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Look


def show(run_id: str, workspace: Workspace) -> Run:
    """One run now. Raises RunError where there is none of that name."""
    folder = RunFolder(workspace.run_folder(run_id))
    if not folder.status_file.is_file():
        known = ", ".join(run.folder.id for run in list_runs(workspace)) or "none yet"
        raise RunError(f"No run {run_id!r} in {workspace.root}: there are {known}")
    return poll(folder)


def list_runs(workspace: Workspace) -> list[Run]:
    """All runs, newest first."""
    files = sorted(workspace.runs.glob("*/status.json"), key=lambda file: file.parent.stat().st_ctime, reverse=True)
    return [poll(RunFolder(file.parent)) for file in files]


def poll(folder: RunFolder) -> Run:
    """What status.json says, corrected by what can be seen: a run whose process is gone is `interrupted`."""
    for child in _children:
        child.poll()
    status = folder.read_status()
    if status.state in ACTIVE and not _is_alive(status):
        status = folder.read_status()  # it may have ended well in between
        if status.state in ACTIVE and not _is_alive(status):
            reason = (
                f"The training process (pid {status.pid}) ended without a word at step {status.step}, as it does when it is "
                f"killed or the machine runs out of memory: resume with `python -m biasdpo train --run-id {folder.id} --resume`"
            )
            return Run(folder, replace(status, state="interrupted", phase="", eta_seconds=None, error=reason))
    if status.state in ("queued", "running") and folder.stop_request.exists():
        status = replace(status, state="stopping")
    return Run(folder, status)


def _is_alive(status: Status) -> bool:
    """Alive means pid and creation time, since pids are reused; a zombie is dead."""
    if not status.pid:
        return True  # written a moment ago by `_launch`, which is about to name the pid
    try:
        process = psutil.Process(status.pid)
        # 1 s: psutil derives creation times from the boot time, which a clock correction may shift.
        return bool(abs(process.create_time() - status.pid_created) < 1.0 and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


# Stop


def stop(run_id: str, workspace: Workspace) -> Run:
    """Ask a run to stop after its next step, with a checkpoint. Returns at once; the state is `stopping`, then `stopped`."""
    run = show(run_id, workspace)
    if run.status.state not in ACTIVE:
        raise RunError(f"Run {run_id!r} is {run.status.state}: there is nothing to stop")
    run.folder.stop_request.touch()
    return poll(run.folder)


# Provenance


def code_version() -> str:
    """This project's version, with the git commit where there is one."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__} ({commit})"


def shown_command(arguments: list[str]) -> str:
    """The command line as the provenance keeps it: absolute paths are cut to their last part, relative ones stay."""
    shown = [Path(part).name if part.startswith(("/", "~")) else part for part in arguments]
    return shlex.join(["python", "-m", "biasdpo", *shown])
