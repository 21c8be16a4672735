"""The jobs of a workspace: start, stop, resume, delete, list, note."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from biasdpo.access import audit, require_owner
from biasdpo.config import EvaluationConfig, ExportConfig, TrainConfig
from biasdpo.errors import BiasDPOError, ConfigError, EvaluationError, JobError, RunError, WorkspaceError
from biasdpo.jobs import estimate
from biasdpo.jobs.job import (
    FOLDERS,
    KINDS,
    NOUNS,
    ROOT,
    Job,
    JobFolder,
    JobRecord,
    Kind,
    Progress,
    Resolved,
    Status,
    code_version,
    read_job,
    resume_command,
    shared_folder,
)
from biasdpo.jobs.resolve import device_of, parts, resolve_evaluation, resolve_export, resolve_training, training_refusal
from biasdpo.jobs.worker import UNFINISHED, join_queue
from biasdpo.workspace import Workspace, check_id, is_id, is_zerogpu, locked, nearest_id, replacing, write_json

MAX_NOTE_CHARACTERS = 10_000
_KILL_SECONDS = 5.0
_log = logging.getLogger(__name__)

# Kept so that finished children are reaped for as long as this process lives.
_children: list[subprocess.Popen[bytes]] = []


# Start


def start_training(config: TrainConfig, workspace: Workspace, job_id: str = "", command: str = "") -> Job:
    """Make a run's folder, start its process, return at once; it waits where another job has the device.

    command   what the user typed, for the provenance
    Raises RefusedError for a visitor, ConfigError, ModelError or DatasetError for what can't be trained, RunError where the
    memory can't suffice, JobError where the id is taken or no process can be started, WorkspaceError where the disk is full.
    """
    return _launch(create_training(config, workspace, job_id, command))


def create_training(config: TrainConfig, workspace: Workspace, job_id: str = "", command: str = "") -> JobFolder:
    """`start_training` without the process: the folder that `python -m training` takes. It exists whole or not at all."""
    require_owner("Training")
    _check_trains_here()
    job_id = job_id or free_id("train", config.model, workspace)
    _check_free(_folder(job_id, workspace, "train"))
    run = resolve_training(config, workspace)
    estimate.refuse_oversized_run(run.config, run.spec, workspace)

    def write_data(folder: JobFolder) -> Resolved:
        sha256 = run.data.write(folder.path)
        return run.resolved.model_copy(update={"data": {"dataset_sha256": sha256, **run.resolved.data}})

    return _create("train", job_id, run.config, workspace, command, write_data)


def _check_trains_here() -> None:
    if reason := training_refusal():
        raise RunError(reason)


def start_evaluation(config: EvaluationConfig, workspace: Workspace, job_id: str = "", command: str = "") -> Job:
    """Start an evaluation in a process of its own, return at once; it waits where another job has the device.

    Raises RefusedError for a visitor, ConfigError, ModelError or AdapterError for what can't be evaluated, JobError where no
    process can be started, WorkspaceError where the disk is full. Faults in the data show in the job, which fails at once.
    """
    require_owner("Evaluation")
    config, resolved = resolve_evaluation(config, workspace)
    seconds = estimate.known_seconds(config, workspace)
    expected = {name: each for name, each in seconds.items() if each is not None}
    progress = {
        "progress": tuple(Progress(name, 0, 0) for name in parts(config)),
        "expected": expected,
        "eta_seconds": sum(expected.values()) if len(expected) == len(seconds) else None,
    }
    name = config.model if config.adapter == "none" else config.adapter
    with _one_at_a_time(workspace):
        job_id = job_id or free_id("evaluate", name, workspace)
        return _launch(_create("evaluate", job_id, config, workspace, command, lambda _folder: resolved, progress))


def start_export(config: ExportConfig, workspace: Workspace, job_id: str = "", command: str = "") -> Job:
    """Start an export in a process of its own, return at once; it waits for the CPU, since it takes the memory of a whole model.

    Its file is exports/ID/NAME.gguf, whatever folder `config.out` names. Raises RefusedError for a visitor, ConfigError,
    ModelError or AdapterError for what can't be exported, JobError where the id is taken or no process can be started,
    WorkspaceError where the disk is full.
    """
    require_owner("Export")
    config, _spec, adapter = resolve_export(config, workspace)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}\.gguf", config.out.name):
        raise ConfigError(f"An export's name is letters, digits, '.', '_' or '-', then .gguf: got {config.out.name!r}")
    resolved = Resolved(model=config.model, adapter="none" if adapter is None else config.adapter or config.run)
    with _one_at_a_time(workspace):
        job_id = job_id or config.out.stem
        config = config.replace(out=Path(config.out.name))
        return _launch(_create("export", job_id, config, workspace, command, lambda _folder: resolved))


def free_id(kind: Kind, name: str, workspace: Workspace) -> str:
    """A free, readable id: smollm2-1, smollm2-2, ...; of an export its file's name: NAME, NAME-2, ..."""
    stem = name.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    stem = nearest_id(stem, 48) or NOUNS[kind]
    folder = workspace.root / FOLDERS[kind]
    taken = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    number = 1
    while True:
        job_id = stem if kind == "export" and number == 1 else f"{stem}-{number}"
        if not taken & {job_id, f"{job_id}.json", f"{job_id}.gguf"}:
            return job_id
        number += 1


def _folder(job_id: str, workspace: Workspace, kind: Kind) -> JobFolder:
    """The folder of a job, whether it exists or not."""
    return JobFolder(workspace.root / FOLDERS[kind] / check_id(job_id, NOUNS[kind]))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Convert a failure to write there."""
    try:
        yield
    except OSError as exc:
        raise WorkspaceError(f"Can't write {path}: {exc.strerror or exc}; make room there") from exc


def _check_free(folder: JobFolder) -> None:
    if folder.path.exists():
        raise JobError(
            f"{NOUNS[folder.kind].capitalize()} {folder.id!r} already exists ({folder.path}): choose another id, or resume it "
            f"with `{resume_command(folder)}`"
        )


def _create(
    kind: Kind,
    job_id: str,
    config: Any,
    workspace: Workspace,
    command: str,
    resolve: Callable[[JobFolder], Resolved],
    status: dict[str, Any] | None = None,
) -> JobFolder:
    """Write a job's folder beside its place and rename it. `resolve` may write data into it."""
    folder = _folder(job_id, workspace, kind)
    _check_free(folder)
    parent, now = folder.path.parent, datetime.now(UTC).isoformat(timespec="seconds")
    with _writing(folder.path):
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{job_id}.", dir=parent) as scratch:
            draft = JobFolder(Path(scratch) / job_id)
            draft.path.mkdir()
            draft.keep_reserve()
            write_json(draft.config, config.to_json())
            known: dict[str, Any] = {"command": command, "code_version": code_version(), "resolved": resolve(draft)}
            write_json(draft.record, JobRecord(id=job_id, kind=kind, created_at=now, **known).model_dump())
            draft.write_status(_queued(**status or {}))
            try:
                draft.path.rename(folder.path)
            except OSError:
                _check_free(folder)  # another start was faster
                raise
    audit(workspace.root, "start", job=f"{kind}/{job_id}")
    return folder


def _queued(**more: Any) -> Status:
    me = psutil.Process()
    return Status("queued", pid=me.pid, pid_created=me.create_time(), phase="starting", **more)


def _launch(folder: JobFolder) -> Job:
    """Start the worker; where that fails, the job is `failed` and blocks nobody."""
    try:
        _start_worker(folder)
    except (OSError, BiasDPOError, psutil.Error) as exc:
        reason = str(exc) if isinstance(exc, BiasDPOError) else getattr(exc, "strerror", None) or str(exc)
        noun = NOUNS[folder.kind].capitalize()
        error = f"{noun} {folder.id!r} could not be started: {reason}; fix that, then resume with `{resume_command(folder)}`"
        with suppress(OSError, BiasDPOError):
            folder.write_last_status(replace(folder.read_status(), state="failed", phase="", error=error))
        raise JobError(error) from exc
    return read_job(folder)


def _start_worker(folder: JobFolder) -> None:
    """Start the worker in a session of its own, so that neither Ctrl-C nor the app's end reaches it."""
    _children[:] = [child for child in _children if child.poll() is None]
    join_queue(folder, folder.read_record().resolved.device)
    with folder.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "biasdpo.jobs.worker", str(folder.path)],
            cwd=ROOT,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", **_no_zerogpu()},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _children.append(process)
    # The worker waits for the end of its input, so that its pid is recorded before it writes anything itself.
    try:
        status = folder.read_status()
        created = 0.0
        with suppress(psutil.NoSuchProcess):
            created = psutil.Process(process.pid).create_time()
        folder.write_status(replace(status, pid=process.pid, pid_created=created))
    except BaseException:
        process.kill()  # it has not begun, and nobody would know about it
        raise
    finally:
        assert process.stdin is not None
        process.stdin.close()
    _log.info("Started %s with pid %d", folder.queue_entry, process.pid)


def _no_zerogpu() -> dict[str, str]:
    """Environment of a job: on a ZeroGPU Space it runs on the CPU, since a GPU is lent to the app alone."""
    return {"SPACES_ZERO_GPU": "", "CUDA_VISIBLE_DEVICES": ""} if is_zerogpu() else {}


# Read


def list_jobs(workspace: Workspace, kind: Kind | None = None) -> list[Job]:
    """All jobs, newest first. A damaged one is listed with the reason as its error."""
    jobs = [job for each in KINDS if kind in (None, each) for job in _jobs_of(workspace, each)]
    return sorted(jobs, key=_when, reverse=True)


def find_job(job_id: str, workspace: Workspace, kind: Kind | None = None) -> Job:
    """The job of an id, or of KIND/ID (e.g. train/first), as it is now. Raises JobError where there is none, or several."""
    prefix, _, rest = job_id.partition("/")
    for each in KINDS:
        if rest and prefix in (each, FOLDERS[each], NOUNS[each]):
            kind, job_id = each, rest
    found = [job for each in KINDS if kind in (None, each) for job in _jobs_of(workspace, each, job_id)]
    if len(found) > 1:
        raise JobError(f"{job_id!r} is the id of several jobs: name one of {', '.join(f'{job.kind}/{job.id}' for job in found)}")
    if not found:
        known = [job.id if kind else f"{job.kind}/{job.id}" for job in list_jobs(workspace, kind)]
        shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
        raise JobError(f"No {NOUNS[kind] if kind else 'job'} {job_id!r} in {workspace.root}: there are {shown or 'none yet'}")
    return found[0]


def load_result(job: Job) -> dict[str, Any]:
    """An evaluation's result. Raises EvaluationError where there is none or it is damaged."""
    from biasdpo.evaluation import results

    if not job.has_result:
        raise EvaluationError(f"Evaluation {job.id!r} is {job.state} and has no result: wait for it, or resume it")
    return results.load(job.file)


def _jobs_of(workspace: Workspace, kind: Kind, job_id: str | None = None) -> Iterator[Job]:
    """The jobs of a kind, or the one of an id. Ids are compared with what is there, never opened as paths."""
    parent = workspace.root / FOLDERS[kind]
    try:
        names = sorted(path.name for path in parent.iterdir() if not path.name.startswith("."))
    except OSError:
        return
    folders = {name for name in names if (parent / name).is_dir()}
    for name in names:
        path = parent / name
        if name in folders:
            if job_id in (None, name) and any((path / file).exists() for file in ("status.json", "job.json", "config.json")):
                job = read_job(JobFolder(path))
                if path.is_dir():  # else it was deleted meanwhile
                    yield job
        elif path.suffix == {"evaluate": ".json", "export": ".gguf"}.get(kind):
            stem = path.stem if path.stem not in folders else name
            if job_id in (None, stem) and (loose := _loose(path, stem, kind)) is not None:
                yield loose


def _loose(path: Path, job_id: str, kind: Kind) -> Job | None:
    """A result or GGUF that a foreground command wrote straight into the workspace's folder."""
    status = Status("finished")
    try:
        written = path.stat()
    except OSError:  # deleted meanwhile
        return None
    if kind == "evaluate":
        from biasdpo.evaluation import results

        interrupted, error = results.summary(path, written.st_mtime_ns)
        status = Status("failed" if error else "stopped" if interrupted else "finished", error=error)
    at = datetime.fromtimestamp(written.st_mtime, UTC).isoformat(timespec="seconds")
    return Job(JobFolder(path.parent / job_id), kind, None, status, JobRecord(id=job_id, kind=kind, created_at=at), loose=path)


def _when(job: Job) -> tuple[float, float, str]:
    """When a job was started (to the second), and when its config was written, seconds since 1970."""
    written = 0.0
    for file in (job.folder.config, job.folder.path):
        with suppress(OSError):
            written = file.stat().st_mtime
            break
    with suppress(ValueError, OverflowError):
        return datetime.fromisoformat(job.record.created_at).timestamp(), written, job.id
    return written, written, job.id


# Stop, resume, delete, note


@contextmanager
def _one_at_a_time(workspace: Workspace) -> Iterator[None]:
    """While no other process starts, resumes or deletes a job."""
    with locked(shared_folder(workspace) / "changing"):
        yield


def stop_job(job_id: str, workspace: Workspace, kind: Kind | None = None) -> Job:
    """Ask a job to stop, and return at once. It is `stopping`, then `stopped`.

    A run saves a checkpoint after its next step; an evaluation's scores so far become its result, or it is killed where it was
    asked before; an export is killed, and nothing of its file is left. Raises JobError where the job is not active.
    """
    job = find_job(job_id, workspace, kind)
    require_owner(f"Stopping {_one(job)}")
    if not job.is_active:
        raise JobError(f"{_name(job)} is {job.state}: there is nothing to stop")
    kills = job.kind == "export" or (job.kind == "evaluate" and job.state == "stopping")
    with _writing(job.folder.stop_request):
        job.folder.stop_request.touch()
    if kills:
        _kill(job.status)
        _remove_unfinished(job.folder)
    audit(workspace.root, "stop", job=f"{job.kind}/{job.id}")
    return read_job(job.folder)


def _kill(status: Status) -> None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(status.pid)
        if abs(process.create_time() - status.pid_created) < 1.0 and process.pid != os.getpid():  # else the pid is another's
            family = [process, *process.children(recursive=True)]
            for one in family:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(family, timeout=_KILL_SECONDS)


def _remove_unfinished(folder: JobFolder) -> None:
    for left in folder.path.glob(f"{UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)


def resume_job(job_id: str, workspace: Workspace, kind: Kind | None = None) -> Job:
    """Resume a stopped, interrupted or failed job: a run from its last checkpoint, an evaluation with what it has scored, an
    export from its start."""
    job = find_job(job_id, workspace, kind)
    require_owner(f"Resuming {_one(job)}")
    if job.kind == "train":
        _check_trains_here()
    with _one_at_a_time(workspace):
        job = find_job(job_id, workspace, job.kind)
        if job.is_active or job.state == "finished":
            raise JobError(f"{_name(job)} is {job.state}: only a stopped, interrupted or failed {NOUNS[job.kind]} can be resumed")
        if job.loose is not None:
            raise JobError(f"{_name(job)} has no config to resume with: it was written to {job.loose}; start a new one")
        if not is_id(job.id):
            raise JobError(job.error)
        folder, record, config = job.folder, job.folder.read_record(), job.folder.read_config()
        record = record.model_copy(update={"id": folder.id, "kind": folder.kind})  # of a copied folder
        device = device_of(config)
        _check_still_here(config, workspace)
        known = job.status
        with _writing(folder.path):
            folder.stop_request.unlink(missing_ok=True)
            folder.keep_reserve()
            resolved = record.resolved.model_copy(update={"device": device})
            write_json(folder.record, record.model_copy(update={"resolved": resolved}).model_dump())
            saved = [path.parent.name for path in folder.checkpoints.glob("checkpoint-*/trainer_state.json")]
            step = max((int(name.rpartition("-")[2]) for name in saved), default=0)
            left: dict[str, Any] = {"progress": known.progress, "expected": known.expected}
            folder.write_status(_queued(step=step, total_steps=known.total_steps, **left))
        audit(workspace.root, "resume", job=f"{job.kind}/{job.id}")
        return _launch(folder)


def _check_still_here(config: Any, workspace: Workspace) -> None:
    """Raise ModelError or AdapterError where what the job was resolved to is gone."""
    from biasdpo import models

    if isinstance(config, ExportConfig):
        resolve_export(config, workspace)
        return
    spec = models.find(config.model)
    if isinstance(config, EvaluationConfig):
        models.find_adapter(config.adapter, spec, workspace)


def delete_job(job_id: str, workspace: Workspace, kind: Kind | None = None) -> None:
    """Delete a job with all it made. Raises JobError while it is active."""
    job = find_job(job_id, workspace, kind)
    require_owner(f"Deleting {_one(job)}")
    try:
        with _one_at_a_time(workspace):
            job = find_job(job_id, workspace, job.kind)
            if job.is_active:
                raise JobError(f"{_name(job)} is {job.state}: stop it first, then delete it")
            audit(workspace.root, "delete", job=f"{job.kind}/{job.id}")
            if job.loose is not None:
                beside = [job.loose.with_name(job.loose.name + suffix) for suffix in (".json", ".Modelfile", ".md")]
                for path in [job.loose, *(beside if job.kind == "export" else ())]:
                    path.unlink(missing_ok=True)
                return
            trash = Path(tempfile.mkdtemp(prefix=".deleted-", dir=job.folder.path.parent))
            job.folder.path.rename(trash / job.id)  # gone from listings at once, even if deleting its files fails
        shutil.rmtree(trash)
        for left in trash.parent.glob(".deleted-*"):  # by a process that was killed meanwhile
            shutil.rmtree(left, ignore_errors=True)
    except OSError as exc:
        raise WorkspaceError(f"Can't delete {job.file}: {exc.strerror or exc}; make it writable, then try again") from exc


def write_note(job_id: str, workspace: Workspace, text: str, kind: Kind | None = None) -> Job:
    """Replace the note on a job; an empty text removes it."""
    require_owner("Writing notes on jobs")
    folder = find_job(job_id, workspace, kind).folder
    clean = text.encode("utf-8", "replace").decode("utf-8").strip()
    if len(clean) > MAX_NOTE_CHARACTERS:
        raise JobError(f"A note has at most {MAX_NOTE_CHARACTERS:,} characters: got {len(clean):,}; shorten it")
    with suppress(JobError):  # an unreadable note is replaced
        if clean == folder.read_note():
            return read_job(folder)
    with _writing(folder.note):
        if clean:
            with replacing(folder.note) as temporary:
                temporary.write_text(clean, encoding="utf-8")
        else:
            folder.note.unlink(missing_ok=True)
    return read_job(folder)


def _name(job: Job) -> str:
    return f"{NOUNS[job.kind].capitalize()} {job.id!r}"


def _one(job: Job) -> str:
    return "a run" if job.kind == "train" else f"an {NOUNS[job.kind]}"
