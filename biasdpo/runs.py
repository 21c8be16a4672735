"""Training runs: start, resume, stop, delete, estimate. Whoever reads a run reads its files, nobody holds its process."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import psutil

from biasdpo import __version__, models, prompts, run_estimate, run_queue
from biasdpo.config import TrainConfig, load_json
from biasdpo.data import splits
from biasdpo.data.splits import Mixture
from biasdpo.errors import BiasDPOError, ConfigError, RunError, WorkspaceError
from biasdpo.models import ModelSpec
from biasdpo.run_estimate import Estimate, estimate, known_estimate
from biasdpo.run_folder import ACTIVE, RunFolder, Status
from biasdpo.run_state import STARTING, Run, list_runs, poll, reap, show
from biasdpo.workspace import Workspace, locked, refuse_on_public_space, replacing, write_json

__all__ = [
    "Estimate",
    "Mixture",
    "Run",
    "code_version",
    "delete",
    "estimate",
    "known_estimate",
    "list_runs",
    "mixture",
    "new_run_id",
    "poll",
    "resume",
    "show",
    "shown_command",
    "start",
    "stop",
    "write_note",
]

ROOT = Path(__file__).resolve().parent.parent
MAX_NOTE_CHARACTERS = 10_000
_QUOTED_PATH = re.compile(r"""(?<=["'])[/~][^"']*(?=["'])""")


# Start


def start(config: TrainConfig, run_id: str, workspace: Workspace, command: str = "") -> RunFolder:
    """Make a run's folder, start its process, return at once. `command`: what the user typed, for the provenance.

    The run waits where another has the device. Raises RefusedError on a public Space, ConfigError, ModelError or DatasetError for
    what can't be trained, RunError where the id is taken, the memory can't suffice or no process can be started, WorkspaceError
    where the disk is full.
    """
    folder = make_folder(config, run_id, workspace, command)
    _launch(folder, config)
    return folder


def make_folder(config: TrainConfig, run_id: str, workspace: Workspace, command: str = "") -> RunFolder:
    """All of `start` but the process: the folder that `python -m training` takes. It is there whole or not at all."""
    refuse_on_public_space("Training")
    folder = RunFolder(workspace.run_folder(run_id))
    if folder.path.exists():
        raise RunError(
            f"Run {run_id!r} exists already ({folder.path}): choose another id, go on with it with --resume, or delete its folder"
        )
    spec = _model_of(config)
    data = splits.resolve(config, workspace)
    run_estimate.refuse_what_can_not_fit(config, spec, workspace)
    origin = {
        **data.provenance(),
        "probe_prompts": prompts.probe_prompts(config),
        "command": command,
        "code_version": code_version(),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        workspace.runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{run_id}.", dir=workspace.runs) as scratch:
            unfinished = RunFolder(Path(scratch) / run_id)
            unfinished.path.mkdir()
            unfinished.keep_reserve()
            write_json(unfinished.config, config.to_json())
            write_json(unfinished.origin, {"dataset_sha256": data.write(unfinished.path), **origin})
            unfinished.write_status(_queued(psutil.Process()))
            unfinished.path.rename(folder.path)
    except OSError as exc:
        if folder.path.exists():  # another start was faster
            raise RunError(f"Run {run_id!r} exists already ({folder.path}): choose another id") from exc
        raise WorkspaceError(f"Can't write the run's folder {folder.path}: {exc.strerror or exc}; make room there") from exc
    return folder


def resume(run_id: str, workspace: Workspace) -> RunFolder:
    """Go on with a stopped, interrupted or failed run from its last checkpoint (from the start where there is none)."""
    refuse_on_public_space("Training")
    with _changing(run_id, workspace) as run:
        if run.status.state in (*ACTIVE, "finished"):
            raise RunError(f"Run {run_id!r} is {run.status.state}: only a stopped, interrupted or failed run can be resumed")
        config = load_json(run.folder.config)
        models.find(config.model)
        try:
            run.folder.stop_request.unlink(missing_ok=True)
            run.folder.keep_reserve()
            run.folder.write_status(replace(_queued(psutil.Process()), step=run.status.step, total_steps=run.status.total_steps))
        except OSError as exc:
            raise WorkspaceError(
                f"Can't write in the run's folder {run.folder.path}: {exc.strerror or exc}; make room there"
            ) from exc
        _launch(run.folder, config)
    return run.folder


@contextmanager
def _changing(run_id: str, workspace: Workspace) -> Iterator[Run]:
    """A run as it is now, while nobody else resumes or deletes one."""
    show(run_id, workspace)  # of no run no lock is made
    with locked(workspace.runs / ".changing"):
        yield show(run_id, workspace)


def _model_of(config: TrainConfig) -> ModelSpec:
    if not config.model:
        raise ConfigError("No model to train: name one with --model, e.g. smollm2")
    return models.find(config.model)


def _queued(process: psutil.Process) -> Status:
    return Status("queued", pid=process.pid, pid_created=process.create_time(), phase=STARTING)


def _launch(folder: RunFolder, config: TrainConfig) -> None:
    """Start the waiting process; where that fails, the run is `failed`, and stands in nobody's way."""
    try:
        _start_process(folder, config)
    except (OSError, BiasDPOError, psutil.Error) as exc:
        reason = str(exc) if isinstance(exc, BiasDPOError) else f"{getattr(exc, 'strerror', None) or exc}; mend that"
        remedy = f"then go on with `python -m biasdpo train --run-id {folder.id} --resume`"
        error = f"Run {folder.id!r} could not be started: {reason}, {remedy}"
        with suppress(OSError, BiasDPOError):
            folder.write_last_status(replace(folder.read_status(), state="failed", phase="", error=error))
        raise RunError(error) from exc


def _start_process(folder: RunFolder, config: TrainConfig) -> None:
    """Start the waiting process in a session of its own, so that neither Ctrl-C nor the app's end reaches it."""
    device = run_estimate.device_of(config)
    threads = run_estimate.threads_of(config)
    workspace = Workspace(folder.path.parent.parent)
    run_queue.join(workspace, device, folder.id)
    with folder.log.open("ab") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "biasdpo.run_queue",
                str(folder.path),
                device,
                *launch_command(folder, config, device, threads),
            ],
            cwd=ROOT,
            env=run_estimate.environment(threads),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    reap(process)
    # The process waits for the end of its input: what it is written down as is written before it writes itself.
    try:
        status = folder.read_status()
        folder.write_status(
            replace(status, pid=process.pid, pid_created=psutil.Process(process.pid).create_time(), device=device)
        )
    except psutil.NoSuchProcess:
        folder.write_status(replace(status, pid=process.pid, pid_created=0.0))
    except BaseException:
        process.kill()  # it has not begun, and nobody would know of it
        raise
    finally:
        assert process.stdin is not None
        process.stdin.close()


def launch_command(folder: RunFolder, config: TrainConfig, device: str, threads: int) -> list[str]:
    """`accelerate launch`, of this very Python."""
    name = config.accelerate
    if name == "auto":
        name = ("multi_gpu" if config.num_processes > 1 else "one_gpu") if device == "gpu" else "cpu"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "training" / "accelerate" / f"{name}.yaml"), "--num_cpu_threads_per_process", str(threads)]
    if config.num_processes > 1:
        command += ["--num_processes", str(config.num_processes), "--main_process_port", "0"]
        if name == "cpu":
            command.append("--multi_gpu")  # accelerate's name for torchrun; with use_cpu it runs gloo
    return [*command, "-m", "training", str(folder.path)]


def mixture(config: TrainConfig, workspace: Workspace) -> Mixture:
    """What a config's data are: counts, and the confounds of the rows that an epoch sees. Raises as `start` does for data."""
    return splits.resolve(config, workspace).mixture()


def new_run_id(model: str, workspace: Workspace) -> str:
    """A free, readable id for a run of a model: smollm2-1, smollm2-2, …"""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rstrip("/").rpartition("/")[2].removesuffix(".gguf")).strip("-._")[:48] or "run"
    number = 1
    while (workspace.runs / f"{name}-{number}").exists():
        number += 1
    return f"{name}-{number}"


# Stop, delete, note


def stop(run_id: str, workspace: Workspace) -> Run:
    """Ask a run to stop after its next step, with a checkpoint. Returns at once; the state is `stopping`, then `stopped`."""
    run = show(run_id, workspace)
    if run.status.state not in ACTIVE:
        raise RunError(f"Run {run_id!r} is {run.status.state}: there is nothing to stop")
    run.folder.stop_request.touch()
    return poll(run.folder)


def delete(run_id: str, workspace: Workspace) -> None:
    """Delete a run's folder, adapter and all. Raises RunError while it is active."""
    refuse_on_public_space("Deleting a run")
    try:
        with _changing(run_id, workspace) as run:
            if run.status.state in ACTIVE:
                raise RunError(f"Run {run_id!r} is {run.status.state}: stop it first, then delete it")
            gone = Path(tempfile.mkdtemp(prefix=f".deleted-{run_id}.", dir=workspace.runs))
            run.folder.path.rename(gone / run_id)  # at once, whatever becomes of its files
        shutil.rmtree(gone)
    except OSError as exc:
        raise WorkspaceError(f"Can't delete {run.folder.path}: {exc.strerror or exc}; make it writable, then try again") from exc


def write_note(run_id: str, workspace: Workspace, text: str) -> None:
    """Replace what is noted on a run; an empty text takes the note away."""
    refuse_on_public_space("Writing notes on runs")
    folder = show(run_id, workspace).folder
    clean = text.encode("utf-8", "replace").decode("utf-8").strip()
    if len(clean) > MAX_NOTE_CHARACTERS:
        raise RunError(f"A note has at most {MAX_NOTE_CHARACTERS:,} characters: got {len(clean):,}; shorten it")
    with suppress(RunError):  # an unreadable note is written anew
        if clean == folder.read_note():
            return
    if not clean:
        folder.note.unlink(missing_ok=True)
        return
    with replacing(folder.note) as temporary:
        temporary.write_text(clean, encoding="utf-8")


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
    return shlex.join(["python", "-m", "biasdpo", *map(_without_folders, arguments)])


def _without_folders(argument: str) -> str:
    """One argument: PATH, --flag=PATH, setting=PATH, or a setting with "PATH" in quotes."""
    if match := re.match(r"(?:[^/~]*=)?(?=[/~])", argument):
        return match[0] + Path(argument[match.end() :]).name
    return _QUOTED_PATH.sub(lambda path: Path(path[0]).name, argument)
