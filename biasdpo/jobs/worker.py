"""A job's process: python -m biasdpo.jobs.worker FOLDER

It waits for the device (one job at a time on each, first come, first served), asks open apps for memory, and does the work: a
training run by becoming `accelerate launch -m training FOLDER`, an evaluation or export in this process.

The order is that of the lines of WORKSPACE/.jobs/queue-DEVICE; ended, dead and deleted jobs are passed over. Whoever works holds
a lock on WORKSPACE/.jobs/device-DEVICE. Training inherits it as its standard input, which launchers hand on to the processes that
train: the kernel frees the lock when the last of them is gone, whatever it died of.
"""

from __future__ import annotations

import faulthandler
import fcntl
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from biasdpo.errors import BiasDPOError, ConfigError, DatasetError, ExportError, JobError, WorkspaceError
from biasdpo.jobs.job import (
    ACTIVE,
    MEMORY_WORDS,
    NOUNS,
    ROOT,
    START_MARK,
    STARTING,
    Device,
    JobFolder,
    Progress,
    State,
    Status,
    code_version,
    current_status,
    is_at_memory_limit,
    memory_kills,
    shared_folder,
)
from biasdpo.jobs.memory import request_memory
from biasdpo.workspace import Workspace, locked, replacing, write_json

if TYPE_CHECKING:
    from biasdpo.benchmarks.base import Benchmark
    from biasdpo.benchmarks.toxicity import ToxicityScorer
    from biasdpo.config import EvaluationConfig, ExportConfig, TrainConfig
    from biasdpo.gguf.export import ExportRecord
    from biasdpo.models import AdapterSpec

_WAIT_SECONDS = 0.2
_WRITE_SECONDS = 0.25  # between two status files of one phase
_RATE_SECONDS = 20.0  # of the latest batches, whose speed predicts the rest


class StoppedError(JobError):
    """The job was asked to stop before it had anything to keep."""


# The queue


def join_queue(folder: JobFolder, device: Device) -> None:
    """Put a job at the end of a device's queue."""
    path = _queue_file(folder.workspace, device)
    with locked(path):
        waiting = [entry for entry in _queue(path) if entry != folder.queue_entry and _is_active(folder.workspace, entry)]
        with replacing(path) as temporary:
            temporary.write_text("".join(f"{entry}\n" for entry in [*waiting, folder.queue_entry]), encoding="utf-8")


def jobs_on(workspace: Workspace, device: Device) -> list[str]:
    """Queue entries of the jobs that have a device or wait for it, in order."""
    return [entry for entry in _queue(_queue_file(workspace, device)) if _is_active(workspace, entry)]


def jobs_ahead(folder: JobFolder, device: Device) -> list[str]:
    """Queue entries of the jobs that get the device before this one, in order."""
    entries = takewhile(lambda entry: entry != folder.queue_entry, _queue(_queue_file(folder.workspace, device)))
    return [entry for entry in entries if _is_active(folder.workspace, entry)]


def _queue_file(workspace: Workspace, device: Device) -> Path:
    return shared_folder(workspace) / f"queue-{device}"


def _queue(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []


def _is_active(workspace: Workspace, entry: str) -> bool:
    try:
        return current_status(JobFolder(workspace.root / entry)).state in ACTIVE
    except JobError:  # deleted or damaged: it does not use the device
        return False


# Waiting


def main(path: Path) -> int:
    """Wait, then work; whatever goes wrong is written to the status. Returns the exit status."""
    folder = JobFolder(path)
    sys.stdin.read()  # until `store` has recorded this process, or is dead
    try:
        record = folder.read_record()
        if not _wait_for_device(folder, record.resolved.device):
            return 0
        if folder.kind == "train":
            _become_training(folder, record.resolved.device)
        return _work(folder)
    except FileNotFoundError as exc:
        if not path.is_dir():  # deleted by hand
            return 1
        return _fail(folder, exc)
    except Exception as exc:
        return _fail(folder, exc)


def _wait_for_device(folder: JobFolder, device: Device) -> bool:
    """Hold the device's lock in file descriptor 0, with the apps' memory freed. False where the job was stopped or deleted."""
    me = psutil.Process()

    def write(state: State, **changes: Any) -> None:
        status = replace(folder.read_status(), pid=me.pid, pid_created=me.create_time(), waits_for="", phase="", state=state)
        folder.write_status(replace(status, **changes))

    lock = os.open(shared_folder(folder.workspace) / f"device-{device}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    shown: str | None = None
    while not folder.stop_request.exists():
        ahead = jobs_ahead(folder, device)
        if not ahead and _try_lock(lock):
            os.dup2(lock, 0)  # a standard stream, which launchers do not close
            write("queued", phase="freeing memory")
            request_memory(folder.workspace, device)
            if not folder.stop_request.exists():
                return True
            continue
        waits_for = ahead[0] if ahead else ""
        if waits_for != shown:
            other = JobFolder(folder.workspace.root / waits_for)
            phase = f"waits for {NOUNS[other.kind]} {other.id}" if waits_for else "waits for the device"
            write("queued", phase=phase, waits_for=other.id if waits_for else "")
            shown = waits_for
        if not folder.path.is_dir():
            return False
        time.sleep(_WAIT_SECONDS)
    write("stopped")
    return False


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _mark_start(what: str) -> None:
    """Begin a new start in log.txt, which this process's output is."""
    print(f"{START_MARK}{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\n{what}", flush=True)


def _fail(folder: JobFolder, exc: Exception) -> int:
    with suppress(MemoryError):
        traceback.print_exc()
    if isinstance(exc, BiasDPOError):
        error = str(exc)
    elif isinstance(exc, MemoryError) or is_at_memory_limit() or any(words in str(exc) for words in MEMORY_WORDS):
        error = "Out of memory: free memory, then resume, or choose a smaller model"
    else:
        error = f"The {NOUNS[folder.kind]} failed ({type(exc).__name__}: {' '.join(str(exc).split())[:300]}); log.txt has more"
    proof = exc.proof.to_json() if hasattr(exc, "proof") else {}
    with suppress(OSError):
        status = Status("failed")
        with suppress(JobError):
            status = folder.read_status()
        ended = replace(status, state="failed", error=error, phase="", waits_for="", eta_seconds=None, proof=proof)
        folder.write_last_status(ended)
    return 1


# A training run


def _become_training(folder: JobFolder, device: Device) -> None:
    from biasdpo.jobs.resolve import threads_of, training_environment

    config = folder.read_config()
    threads = threads_of(config)
    command = launch_command(folder, config, device, threads)
    folder.write_status(replace(folder.read_status(), phase=STARTING))
    _mark_start(" ".join(command))
    os.execve(command[0], command, training_environment(threads))


def launch_command(folder: JobFolder, config: TrainConfig, device: Device, threads: int) -> list[str]:
    """`accelerate launch`, with this very Python."""
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


# An evaluation or export


def _work(folder: JobFolder) -> int:
    faulthandler.enable()  # the reason for a library's abort or segmentation fault, in the log
    config = folder.read_config()
    device = folder.read_record().resolved.device
    status = replace(folder.read_status(), state="running", phase="starting", device=device, memory_kills=memory_kills())
    folder.write_status(status)
    _mark_start(folder.kind)
    progress = JobProgress(folder, status)
    stopped = False
    try:
        if folder.kind == "evaluate":
            result = run_evaluation(config, folder.workspace, progress)
            stopped = bool(result["provenance"]["interrupted"])
            write_json(folder.result, result)
        else:
            config = config.replace(out=folder.path / config.out.name)
            run_export(config, folder.workspace, progress.share, folder.read_record().command)
    except Exception:
        if not progress.should_stop():
            raise
        traceback.print_exc()
        stopped = True
    progress.end("stopped" if stopped else "finished")
    return 0


@dataclass
class EvaluationProgress:
    """Receives an evaluation's progress and tells it when to stop. This one reports to nobody."""

    def phase(self, text: str) -> None:
        """Called before each stage. May raise to end the evaluation."""

    def begin(self, benchmarks: Sequence[Benchmark[Any]], limit: int | None, rounds: int) -> None:
        """Called when the items are known, each of which is scored in `rounds` rounds."""

    def warn(self, note: str) -> None:
        """Called with what the user should know before the evaluation ends."""

    def on_item(self, name: str, done: int, total: int) -> None:
        """Called with the number of items of a benchmark that are done."""

    def should_stop(self) -> bool:
        return False


@dataclass
class JobProgress(EvaluationProgress):
    """Writes status.json. A full disk does not end the job."""

    folder: JobFolder
    status: Status
    _written: float = 0.0
    _reported: float = 0.0
    _seen: dict[str, list[tuple[float, int]]] = field(default_factory=dict)  # by benchmark: (seconds spent on it, items done)

    def should_stop(self) -> bool:
        return self.folder.stop_request.exists()

    def phase(self, text: str) -> None:
        """Raises StoppedError where the job was asked to stop."""
        if self.should_stop():
            raise StoppedError("The job was stopped before it had a result")
        self._write(replace(self.status, phase=text))

    def begin(self, benchmarks: Sequence[Benchmark[Any]], limit: int | None, rounds: int) -> None:
        items = {one.name: len(one.items) if limit is None else min(limit, len(one.items)) for one in benchmarks}
        progress = tuple(Progress(name, 0, rounds * count) for name, count in items.items())
        self._reported = time.monotonic()
        self._write(replace(self.status, progress=progress, phase="scoring"))

    def warn(self, note: str) -> None:
        self._write(replace(self.status, notes=(*self.status.notes, note)))

    def on_item(self, name: str, done: int, total: int) -> None:
        now = time.monotonic()
        seen = self._seen.setdefault(name, [(0.0, 0)])
        seen.append((seen[-1][0] + now - self._reported, done))
        self._reported = now
        while len(seen) > 2 and seen[-1][0] - seen[1][0] > _RATE_SECONDS:
            seen.pop(0)
        progress = tuple(Progress(name, done, total) if one.name == name else one for one in self.status.progress)
        status = replace(self.status, progress=progress)
        self._write(replace(status, eta_seconds=self._seconds_left(status)), at_once=done >= total)

    def share(self, share: float, phase: str) -> None:
        """The share of an export that is done, from 0 to 1, and its phase."""
        is_new = phase != self.status.phase
        self._write(replace(self.status, share=min(max(share, 0.0), 1.0), phase=phase), at_once=is_new)

    def end(self, state: State) -> None:
        with suppress(OSError):
            self.folder.write_last_status(replace(self.status, state=state, phase="", eta_seconds=None))

    def _write(self, status: Status, *, at_once: bool = True) -> None:
        self.status = status
        if at_once or time.monotonic() - self._written >= _WRITE_SECONDS:
            self._written = time.monotonic()
            with suppress(OSError):
                self.folder.write_status(status)

    def _seconds_left(self, status: Status) -> float | None:
        """By the measured speed of benchmarks under way and the expected time of the others; None where one has neither."""
        seconds = 0.0
        for one in status.progress:
            if one.total and one.done >= one.total:
                continue
            (begin, first), (end, last) = (self._seen[one.name][0], self._seen[one.name][-1]) if one.name in self._seen else _NONE
            if last > first:
                seconds += (one.total - one.done) * (end - begin) / (last - first)
            elif one.name in status.expected:
                seconds += status.expected[one.name]
            else:
                return None
        return seconds


_NONE = ((0.0, 0), (0.0, 0))


def run_evaluation(config: EvaluationConfig, workspace: Workspace, progress: EvaluationProgress) -> dict[str, Any]:
    """Score a resolved config's benchmarks; if it is asked to stop, return what is scored so far, marked as interrupted.

    Benchmarks that can't be loaded are named in the result and do not stop the others. Raises DatasetError if none can be.
    """
    from biasdpo import models
    from biasdpo.engines import EngineKey, open_engine
    from biasdpo.evaluation import run

    progress.phase("reading the items")
    adapter = models.find_adapter(config.adapter, models.find(config.model), workspace)
    benchmarks, missing = build_benchmarks(config, adapter, workspace)
    for name, reason in missing.items():
        progress.warn(missing_note(name, reason))
    progress.phase("loading the model")
    engine = open_engine(EngineKey(config.model, config.adapter, config.backend), workspace)
    try:
        progress.begin(benchmarks, config.limit, len(run.strength_order(config.strengths)))
        return run.run(
            engine,
            benchmarks,
            config.strengths,
            limit=config.limit,
            seed=config.seed,
            workspace=workspace,
            missing=missing,
            on_item=progress.on_item,
            should_stop=progress.should_stop,
        )
    finally:
        engine.backend.close()


def build_benchmarks(
    config: EvaluationConfig, adapter: AdapterSpec | None, workspace: Workspace
) -> tuple[list[Benchmark[Any]], dict[str, str]]:
    """Read the items of a config's benchmarks. Returns those that could be loaded and, by name, why the others could not.

    Raises DatasetError if none could be loaded, ConfigError for an unknown toxicity scorer.
    """
    from biasdpo import benchmarks as known
    from biasdpo.evaluation.run import preference_benchmark

    generation = known.Generation(config.samples, config.max_new_tokens, _toxicity_scorer(config.toxicity_scorer))
    data_dir = Path(config.data_dir) if config.data_dir else None
    loaded: list[Benchmark[Any]] = []
    missing: dict[str, str] = {}
    for name in known.expand(config.benchmarks):
        try:
            if name == "preference":
                loaded.append(preference_benchmark(config.dataset, adapter, workspace))
            else:
                loaded.append(known.build(name, data_dir, generation))
        except BiasDPOError as exc:
            missing[name] = str(exc)
    if not loaded:
        raise DatasetError(" · ".join(missing.values()))
    return loaded, missing


def missing_note(name: str, reason: str) -> str:
    """One line about a benchmark that was not scored. `reason` ends with what to do."""
    from biasdpo.benchmarks.titles import benchmark_title

    return f"{benchmark_title(name)} was not scored: {reason}"


def _toxicity_scorer(name: str) -> Callable[[], ToxicityScorer]:
    """A function that opens the named scorer on first use."""
    from biasdpo.benchmarks.toxicity import profanity_check

    if name in ("", "profanity_check"):
        return profanity_check
    hub_id = name.removeprefix("hub:")
    if hub_id in ("", name):
        raise ConfigError(f"Unknown toxicity scorer {name!r}: choose profanity_check or a classifier, as hub:OWNER/NAME")

    def open_classifier() -> ToxicityScorer:
        from biasdpo.backends.hf import open_classifier

        return open_classifier(hub_id)

    return open_classifier


def run_export(
    config: ExportConfig, workspace: Workspace, on_progress: Callable[[float, str], None], command: str = ""
) -> ExportRecord:
    """Export to `config.out` and return the record. A failed or killed export leaves what was under that name before."""
    from biasdpo.gguf.export import export
    from biasdpo.jobs.resolve import resolve_export

    config, spec, adapter = resolve_export(config, workspace)
    with unfinished_folder(config.out) as folder:
        return export(
            config, spec, adapter, folder, workspace, command=command, code_version=code_version(), on_progress=on_progress
        )


UNFINISHED = ".export-"


@contextmanager
def unfinished_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` for its file while it is written and proven; deleted at the end, whatever that is.

    What killed exports left beside `out` (gigabytes) is deleted first: the kernel has freed the locks of dead processes. Raises
    ExportError where another process exports to `out`, WorkspaceError where nothing can be written.
    """
    folder = out.with_name(f"{UNFINISHED}{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in out.parent.glob(f"{UNFINISHED}*/"):
            with suppress(OSError):
                lock = _lock_of(left)
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)
        draft = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=out.parent))
        lock = _lock_of(draft)
        try:
            draft.rename(folder)
        except OSError as exc:
            os.close(lock)
            shutil.rmtree(draft, ignore_errors=True)
            if folder.is_dir():
                raise ExportError(f"{out.name} is being exported already: wait for it, or choose another name") from exc
            raise
    except OSError as exc:
        raise WorkspaceError(f"Can't write to {out.parent}: {exc.strerror or exc}; make it writable, or make room there") from exc
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _lock_of(folder: Path) -> int:
    """A descriptor that holds a folder's lock. Raises BlockingIOError where another process has it."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    sys.exit(main(Path(sys.argv[1])))
