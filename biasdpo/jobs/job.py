"""A job (training run, evaluation or export) and its folder, through which all processes that work on it talk.

    WORKSPACE/runs/ID/         job.json config.json status.json log.txt stop note.txt
                               dataset.jsonl split.json metrics.jsonl speed.jsonl probes.jsonl checkpoints/ best/ adapter/
    WORKSPACE/evaluations/ID/  the first line's files, and result.json
    WORKSPACE/exports/ID/      the first line's files, and NAME.gguf, NAME.gguf.json, NAME.gguf.Modelfile

Nobody holds a job's process: whoever reads a job reads its files and checks whether the recorded process is still alive.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated_dataclass

from biasdpo import __version__
from biasdpo.config import EvaluationConfig, ExportConfig, TrainConfig
from biasdpo.errors import ConfigError, JobError
from biasdpo.workspace import Workspace, as_json, is_id, nearest_id, replacing, write_json

ROOT = Path(__file__).resolve().parent.parent.parent
FORMAT = 1  # of job.json

Kind = Literal["train", "evaluate", "export"]
State = Literal["queued", "running", "stopping", "stopped", "finished", "failed", "interrupted"]
Device = Literal["cpu", "gpu"]
KINDS: tuple[Kind, ...] = ("train", "evaluate", "export")
FOLDERS: dict[Kind, str] = {"train": "runs", "evaluate": "evaluations", "export": "exports"}
_CONFIGS: dict[Kind, Any] = {"train": TrainConfig, "evaluate": EvaluationConfig, "export": ExportConfig}
NOUNS: dict[Kind, str] = {"train": "run", "evaluate": "evaluation", "export": "export"}
ACTIVE: tuple[State, ...] = ("queued", "running", "stopping")

STARTING = "starting"
"""The phase of a run that has the device, until its training process reports."""
START_MARK = "=== start: "
"""Begins the line of log.txt that each (re)start writes before its command."""

RESERVE_BYTES = 64 * 1024
MAX_FILE_BYTES = 16 * 1024 * 1024
MAX_TAIL_BYTES = 256 * 1024
MAX_LINES_BYTES = 64 * 1024 * 1024
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def shared_folder(workspace: Workspace) -> Path:
    """Queues, device locks and the list of running apps, which are the same for all kinds of jobs."""
    return workspace.root / ".jobs"


# Records


@dataclass(frozen=True)
class Progress:
    """Items of one benchmark: scored so far and in total (over all strengths); `total` is 0 until the items are read."""

    name: str
    done: int
    total: int


@validated_dataclass(frozen=True, config=ConfigDict(strict=True, extra="ignore", allow_inf_nan=False))
class Status:
    """status.json, always replaced as a whole.

    pid, pid_created   the process that does the work and its creation time (seconds since 1970), since pids are reused
    phase              current activity, for people: "loading the model", "training", ...
    error              one line of cause and remedy
    notes              what the user should know about the data or the machine
    device             "cpu", or the GPU's name
    waits_for          id of the job that has the device
    eta_seconds        None while unknown
    memory_kills       processes killed for lack of memory before this one began, by the file that counts them

    Training: step and total_steps of the optimizer; before the first step, the share of a phase that is done; tokens_per_second
    of all processes together; best_step and best_accuracy of the evaluation with the highest held-out reward accuracy.
    Evaluation: progress by benchmark; expected seconds by benchmark from earlier measurements. Export: share done, from 0 to 1;
    proof, where it failed.
    """

    state: State
    pid: int = Field(default=0, ge=0, lt=2**31)
    pid_created: float = 0.0
    phase: str = ""
    step: int = 0
    total_steps: int = 0
    eta_seconds: float | None = None
    error: str = ""
    notes: tuple[str, ...] = ()
    updated_at: str = ""
    tokens_per_second: float | None = None
    device: str = ""
    best_step: int | None = None
    best_accuracy: float | None = None
    waits_for: str = ""
    memory_kills: dict[str, int] = Field(default_factory=dict)
    progress: tuple[Progress, ...] = ()
    expected: dict[str, float] = Field(default_factory=dict)
    share: float = 0.0
    proof: dict[str, Any] = Field(default_factory=dict)


_TRAINING_FIELDS = ("step", "total_steps", "tokens_per_second", "best_step", "best_accuracy")
_FIELDS_OF_OTHER_KINDS: dict[Kind, tuple[str, ...]] = {
    "train": ("progress", "expected", "proof"),
    "evaluate": (*_TRAINING_FIELDS, "share", "proof"),
    "export": (*_TRAINING_FIELDS, "progress", "expected"),
}


class Resolved(BaseModel):
    """The config's names as resolved when the job was started; the worker uses these.

    model, adapter   as `models.find` and `models.find_adapter` take them from any working folder
    device           whose queue the job joins
    data             of a run: dataset_sha256, counts, health and probe prompts; of an evaluation: data_dir and dataset
    hashes           SHA-256 of the files it depends on, added by the training process
    """

    model_config = ConfigDict(frozen=True)

    model: str = ""
    adapter: str = "none"
    device: Device = "cpu"
    data: dict[str, Any] = Field(default_factory=dict)
    hashes: dict[str, str] = Field(default_factory=dict)


class JobRecord(BaseModel):
    """job.json: what the config does not say. `created_at`: UTC, ISO 8601."""

    model_config = ConfigDict(frozen=True)

    format: int = FORMAT
    id: str = ""
    kind: Kind = "train"
    created_at: str = ""
    command: str = ""
    code_version: str = ""
    resolved: Resolved = Field(default_factory=Resolved)

    def origin(self) -> dict[str, Any]:
        """The part of an adapter's provenance that was known when its run started."""
        found = {**self.resolved.data, **self.resolved.hashes}
        return found | {"command": self.command, "code_version": self.code_version, "started_at": self.created_at}


_STATUS = TypeAdapter(Status)
_RECORD = TypeAdapter(JobRecord)
_OBJECT = TypeAdapter(dict[str, Any])
T = TypeVar("T")


# The folder


class _In:
    """A path in a job's folder."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, folder: JobFolder, _owner: object = None) -> Path:
        return folder.path / self.name


@dataclass(frozen=True)
class JobFolder:
    """Paths, status, notes and log of one job."""

    path: Path

    record = _In("job.json")
    config = _In("config.json")
    status_file = _In("status.json")
    log = _In("log.txt")
    stop_request = _In("stop")  # its presence asks the process to stop
    note = _In("note.txt")
    reserve = _In(".reserve")  # disk blocks set aside, so that the last status can be written on a full disk
    # Of a run
    snapshot = _In("dataset.jsonl")
    split = _In("split.json")
    metrics = _In("metrics.jsonl")
    speed = _In("speed.jsonl")  # tokens per second, apart from the metrics, which do not depend on the clock
    probes = _In("probes.jsonl")
    best = _In("best")  # adapter tensors of the best evaluations: step-N.safetensors
    checkpoints = _In("checkpoints")
    adapter = _In("adapter")
    # Of an evaluation
    result = _In("result.json")

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def kind(self) -> Kind:
        return next((kind for kind, folder in FOLDERS.items() if folder == self.path.parent.name), "train")

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.path.parent.parent)

    @property
    def queue_entry(self) -> str:
        """The job's line in a queue, e.g. "runs/ID"."""
        return f"{self.path.parent.name}/{self.path.name}"

    # Records

    def read_status(self) -> Status:
        """status.json as written; `read_job` also checks whether the process is alive. Raises JobError."""
        return _validated(_STATUS, self.status_file)

    def write_status(self, status: Status) -> None:
        """Replace status.json, with the time of writing. Never brings a deleted folder back: that is an OSError."""
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path} was deleted")
        write_json(self.status_file, _status_values(status))

    def write_last_status(self, status: Status) -> None:
        """Write the status of a process that ends. On a full disk it is written over the reserve, which then replaces
        status.json; deleting the reserve first would let another process take its blocks."""
        try:
            self.write_status(status)
        except OSError:
            if not self.reserve.exists():
                raise
            with self.reserve.open("r+", encoding="utf-8") as file:
                file.write(as_json(_status_values(status)))
                file.truncate()
                os.fsync(file.fileno())
            self.reserve.replace(self.status_file)

    def keep_reserve(self) -> None:
        """Set the reserve aside again. Raises OSError on a full disk."""
        if not self.reserve.exists():
            with replacing(self.reserve) as temporary:
                temporary.write_bytes(bytes(RESERVE_BYTES))

    def read_record(self) -> JobRecord:
        """Raises JobError where job.json is missing, damaged or of a newer version."""
        written = _validated(_OBJECT, self.record).get("format")
        if not isinstance(written, int):
            raise JobError(f"{self.record} is damaged (format: {written!r:.40}): {_RESTORE}")
        if written > FORMAT:
            raise JobError(f"{self.record} has format {written}, this version reads {FORMAT}: update BiasDPO to use this job")
        return _validated(_RECORD, self.record)

    def add_hashes(self, hashes: Mapping[str, str]) -> None:
        """Store hashes in job.json that only the working process could compute."""
        record = self.read_record()
        resolved = record.resolved.model_copy(update={"hashes": {**record.resolved.hashes, **hashes}})
        write_json(self.record, record.model_copy(update={"resolved": resolved}).model_dump())

    def read_config(self) -> Any:
        """The TrainConfig, EvaluationConfig or ExportConfig in config.json. Raises JobError."""
        values = _validated(_OBJECT, self.config)
        try:
            return _CONFIGS[self.kind](**values)
        except (TypeError, ConfigError) as exc:
            reason = " ".join(str(exc).split())[:300]
            raise JobError(f"{self.config} is damaged ({reason}): restore it, or start a new {NOUNS[self.kind]}") from exc

    def read_note(self) -> str:
        """The user's note. Raises JobError if it can't be read."""
        try:
            return self.note.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as exc:
            raise JobError(f"Can't read the note {self.note}: {exc}; write it again") from exc

    def read_metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl: TRL's keys and `step`."""
        return _json_lines(self.metrics)

    def read_speed(self) -> list[dict[str, Any]]:
        """Lines of speed.jsonl: `step`, `tokens_per_second`, `seconds` since the process began to train."""
        return _json_lines(self.speed)

    def read_probes(self) -> list[dict[str, Any]]:
        """Lines of probes.jsonl: `step`, `prompt`, `category`, `base`, `tuned`; one per prompt and probe."""
        return _json_lines(self.probes)

    def log_tail(self, lines: int) -> str:
        """The last lines of log.txt, without control characters and what progress bars wrote over."""
        text = _end_of(self.log, MAX_TAIL_BYTES).decode("utf-8", "replace")
        shown = [line.rpartition("\r")[2] for line in text.rstrip("\r\n").replace("\r\n", "\n").split("\n")]
        printable = ["".join(c for c in _ANSI.sub("", line) if c.isprintable() or c == "\t") for line in shown]
        return "\n".join(printable[-lines:]) if lines > 0 else ""


_RESTORE = "restore it from a backup; the folder's other files are untouched"


def _status_values(status: Status) -> dict[str, Any]:
    return {**asdict(status), "updated_at": datetime.now(UTC).isoformat(timespec="seconds")}


def _validated(adapter: TypeAdapter[T], path: Path) -> T:
    """A JSON file's value, checked; whatever is wrong with it is a JobError that says what and how to keep the rest."""
    try:
        with path.open("rb") as file:
            return adapter.validate_json(file.read(MAX_FILE_BYTES))
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise JobError(f"{path} is damaged ({f'{where}: ' if where else ''}{first['msg'][:200]}): {_RESTORE}") from exc
    except FileNotFoundError as exc:
        raise JobError(f"{path} is missing: {_RESTORE}") from exc
    except OSError as exc:
        raise JobError(f"Can't read {path} ({exc.strerror or exc}): make it readable, or {_RESTORE}") from exc


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file that may be growing; a partial line is left out, and of a huge file the end is read."""
    rows = []
    for line in _end_of(path, MAX_LINES_BYTES).split(b"\n")[:-1]:
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def _end_of(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read(size)
    except OSError:
        return b""


# The job


@dataclass(frozen=True)
class Job:
    """A job as its folder shows it now. `config` is None where there is none or it is damaged.

    A result that `evaluate --out` or `export --out` wrote straight into the workspace's folder is a finished job without a
    folder: `loose` is that file.
    """

    folder: JobFolder
    kind: Kind
    config: Any
    status: Status
    record: JobRecord
    loose: Path | None = None

    @property
    def id(self) -> str:
        return self.folder.id

    @property
    def state(self) -> State:
        return self.status.state

    @property
    def error(self) -> str:
        return self.status.error

    @property
    def is_active(self) -> bool:
        return self.status.state in ACTIVE

    @property
    def started_at(self) -> str:
        """UTC, ISO 8601; "" where unknown."""
        return self.record.created_at

    @property
    def file(self) -> Path:
        """The outcome, whether it exists yet or not: an adapter folder, a result, or a GGUF."""
        if self.loose is not None:
            return self.loose
        if self.kind == "train":
            return self.folder.adapter
        if self.kind == "evaluate":
            return self.folder.result
        named = Path(self.config.out).name if self.config is not None else ""
        found = sorted(self.folder.path.glob("*.gguf"))
        return self.folder.path / (named or (found[0].name if found else f"{self.id}.gguf"))

    @property
    def has_result(self) -> bool:
        """Whether an evaluation has scored something; a stopped one has what it scored until then."""
        return self.file.is_file()

    @property
    def has_adapter(self) -> bool:
        """Whether a run has ended with an adapter that can be used."""
        is_there = (self.folder.adapter / "adapter_model.safetensors").is_file()
        return self.kind == "train" and not self.is_active and self.config is not None and is_there

    def log_tail(self, lines: int) -> str:
        return self.folder.log_tail(lines)

    def to_json(self) -> dict[str, Any]:
        """The object of `jobs show --json` and `runs show --json`."""
        others = _FIELDS_OF_OTHER_KINDS[self.kind]
        status = {name: value for name, value in asdict(self.status).items() if name not in others}
        note = ""
        with suppress(JobError):
            note = self.folder.read_note()
        common = {
            "id": self.id,
            "kind": self.kind,
            "folder": str(self.folder.path),
            **status,
            "notes": list(self.status.notes),
            "note": note,
            "started_at": self.started_at,
            "config": self.config.to_json() if self.config is not None else {},
        }
        if self.kind != "train":
            return common | {"file": str(self.file) if self.file.is_file() else ""}
        provenance: dict[str, Any] = {}
        with suppress(JobError):
            provenance = _validated(_OBJECT, self.folder.adapter / "provenance.json")
        metrics = self.folder.read_metrics()
        return common | {
            "dataset_sha256": self.record.resolved.data.get("dataset_sha256", ""),
            "adapter": str(self.folder.adapter) if provenance else "",
            "kept": provenance.get("kept", {}),
            "metrics": provenance.get("metrics", {}),
            "last_logged": metrics[-1] if metrics else {},
        }


def read_job(folder: JobFolder) -> Job:
    """Read a job as it is now. Never raises: damage is the job's `error`, with a remedy that keeps its files."""
    damage: list[str] = []

    def read(part: Callable[[], T], otherwise: T) -> T:
        try:
            return part()
        except JobError as exc:
            damage.append(str(exc))
            return otherwise

    record = read(folder.read_record, JobRecord())
    config = read(folder.read_config, None)
    try:
        status = current_status(folder, record)
    except JobError as exc:
        status = Status("failed", error=f"{exc}, or run `{resume_command(folder)}`" if not damage else str(exc))
    if not is_id(folder.id):
        name = nearest_id(folder.id) or folder.kind
        status = Status("failed", error=f"The folder name {folder.id!r} is not a job id: rename {folder.path} to e.g. {name}")
    elif damage and not status.error:
        status = replace(status, error=damage[0])
    return Job(folder, folder.kind, config, status, record)


def current_status(folder: JobFolder, record: JobRecord = JobRecord()) -> Status:  # noqa: B008 (frozen)
    """status.json, corrected: a job whose process is gone is `interrupted`, or `failed` where its log says why it could not
    start, and one that was asked to stop is `stopping`. Raises JobError."""

    def is_gone(status: Status) -> bool:
        is_copy = record.id not in ("", folder.id)  # of a folder whose process goes on
        return status.state in ACTIVE and (is_copy or not is_alive(status))

    status = folder.read_status()
    if is_gone(status):
        status = folder.read_status()  # it may have ended well in between
        if is_gone(status):
            return _ended_unexpectedly(folder, status)
    if status.state in ("queued", "running") and folder.stop_request.exists():
        return replace(status, state="stopping")
    return status


def is_alive(status: Status) -> bool:
    """Whether the process of that pid *and* creation time runs; a zombie does not."""
    try:
        process = psutil.Process(status.pid)
        # 1 s: psutil derives creation times from the boot time, which a clock correction may shift.
        return bool(abs(process.create_time() - status.pid_created) < 1.0 and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def resume_command(folder: JobFolder) -> str:
    if folder.kind == "train":
        return f"python -m biasdpo train --run-id {folder.id} --resume"
    return f"python -m biasdpo jobs resume {folder.kind}/{folder.id}"


# Why a process ended without writing its last status. A process that the kernel kills, or that a C++ library aborts, can't report
# it. What is left are those libraries' messages in log.txt, and the kernel's counters of processes killed for lack of memory.

# Python, torch, the C++ runtime, CUDA, the dynamic loader and OpenBLAS. The last is what Python 3.11 makes of a call for whose
# frame there is no memory.
MEMORY_WORDS = (
    "can't allocate memory", "out of memory", "Out of memory", "bad_alloc", "Cannot allocate memory", "MemoryError",
    "ALLOC_FAILED", "failed to map segment", "Memory allocation still failed", "error return without exception set",
)  # fmt: skip
# Python, OpenMP and OpenBLAS where no thread can be started: no memory for its stack, or a limit on processes.
THREAD_WORDS = ("can't start new thread", "Thread creation failed", "pthread_create failed")

_AT_LIMIT_BYTES = 96 * 1024 * 1024  # of which the training process's ballast has a third
_GROUPS = Path("/sys/fs/cgroup")
_ERROR_LINE = re.compile(
    r"^(?:\[[^\]]*\]:? ?)?"  # torchrun's prefix
    r"((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception|Interrupt)\b.*|.*: error: .*|\S+: No module named .*)$"
)
_LAUNCHERS_OWN = ("CalledProcessError", "ChildFailedError")  # say only that the process below them failed


def _ended_unexpectedly(folder: JobFolder, status: Status) -> Status:
    ended = replace(status, phase="", eta_seconds=None, waits_for="", tokens_per_second=None)
    if folder.kind != "train" and folder.stop_request.exists():
        return replace(ended, state="stopped", error="")
    resume = f"resume with `{resume_command(folder)}`"
    waited = status.state == "queued" and status.phase != STARTING  # then the log is that of an earlier start
    log = "" if waited else "\n".join(folder.log_tail(400).rpartition(START_MARK)[2].split("\n")[1:])
    if status.state == "queued" and not waited and (cause := last_error(log)):
        error = f"The training process could not start: {cause}; fix that (log.txt has more), then {resume}"
        return replace(ended, state="failed", error=error)
    if memory := why_memory(log, status.memory_kills):
        less = ", or start a new run with a lower batch_size" if folder.kind == "train" else ""
        why = f"memory probably ran out ({memory}): free memory, then {resume}{less}"
    else:
        why = f"it was probably killed, or the machine ran out of memory: {resume}"
    when = "before it started" if status.state == "queued" else f"at step {status.step}" if folder.kind == "train" else ""
    at = f" {when}" if when else ""
    error = f"The {NOUNS[folder.kind]}'s process (pid {status.pid}) ended unexpectedly{at}; {why}"
    return replace(ended, state="interrupted", error=error)


def last_error(log: str) -> str:
    """The last line that reads as an error; "" where there is none."""
    for line in reversed(log.split("\n")):
        match = _ERROR_LINE.match(line.strip())
        if match and not any(name in match[1].split(":")[0] for name in _LAUNCHERS_OWN):
            return match[1][:300]
    return ""


def why_memory(log: str, kills_before: Mapping[str, int]) -> str:
    """The evidence that memory ran out, as the end of a sentence; "" where there is none. `kills_before`: `memory_kills` when
    the process began."""
    for line in reversed(log.split("\n")):
        if any(words in line for words in MEMORY_WORDS + THREAD_WORDS):
            return f"its log says {' '.join(line.split())[:160]!r}"
    if any((_kills_in(Path(file)) or 0) > before for file, before in kills_before.items()):
        return "since it began, the kernel has killed a process for lack of memory"
    return ""


def memory_kills() -> dict[str, int]:
    """Processes killed for lack of memory so far, by the file that counts them: on this machine and in this process's control
    groups (version 2 and 1). {} where nothing counts."""
    files = [Path("/proc/vmstat"), _GROUPS / "memory.events"]  # the second: in a container that sees itself as the root
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _number, controllers, path = line.split(":", 2)
            if not controllers:
                files.append(_GROUPS / path.lstrip("/") / "memory.events")
            elif "memory" in controllers.split(","):
                files += [group / "memory.oom_control" for group in (_GROUPS / "memory" / path.lstrip("/"), _GROUPS / "memory")]
    found = {str(file): _kills_in(file) for file in files}
    return {file: count for file, count in found.items() if count is not None}


def _kills_in(file: Path) -> int | None:
    """The number in a file's line `oom_kill N`."""
    with suppress(OSError, ValueError):
        for line in file.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None


def is_at_memory_limit() -> bool:
    """Whether a limit on this process (`ulimit -v`, `ulimit -d`) leaves it next to nothing. Then any error is for lack of memory,
    whatever a library makes of it."""
    with suppress(ImportError, psutil.Error):
        import resource

        soft = [resource.getrlimit(limit)[0] for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
        used = psutil.Process().memory_info()
        pairs = zip(soft, (used.vms, getattr(used, "data", 0)), strict=True)
        return any(limit != resource.RLIM_INFINITY and taken > limit - _AT_LIMIT_BYTES for limit, taken in pairs)
    return False


# Provenance


def code_version() -> str:
    """This project's version, with the git commit where there is one."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__} ({commit})"


_QUOTED_PATH = re.compile(r"""(?<=["'])[/~][^"']*(?=["'])""")


def shown_command(arguments: list[str]) -> str:
    """A command line for the provenance: absolute paths are cut to their last part, relative ones stay."""
    return shlex.join(["python", "-m", "biasdpo", *map(_without_folders, arguments)])


def _without_folders(argument: str) -> str:
    """One argument: PATH, --flag=PATH, setting=PATH, or a setting with "PATH" in quotes."""
    if match := re.match(r"(?:[^/~]*=)?(?=[/~])", argument):
        return match[0] + Path(argument[match.end() :]).name
    return _QUOTED_PATH.sub(lambda path: Path(path[0]).name, argument)
