"""What the process of an evaluation tells those who watch it: its status file, and whether it is asked to end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from biasdpo.benchmarks.base import Benchmark
from biasdpo.errors import BiasDPOError, EvaluationError
from biasdpo.evaluations.status import EvaluationFiles, EvaluationStatus, Progress, State, ahead

_WAIT_SECONDS = 0.2
_WRITE_SECONDS = 0.25  # between two status files of one phase
_RATE_SECONDS = 20.0  # of the last batches that tell how fast it goes: what was known already says nothing of the rest


class StopError(EvaluationError):
    """Ended before there was anything to score, since it was asked to."""


@dataclass
class Watch:
    """Writes what is told into the status file, if there is one. A full disk keeps no evaluation from going on."""

    files: EvaluationFiles | None = None
    status: EvaluationStatus = field(default_factory=lambda: EvaluationStatus("running"))
    _written: float = 0.0
    _told: float = 0.0  # when something was told last
    _seen: dict[str, list[tuple[float, int]]] = field(default_factory=dict)  # by benchmark: (seconds of work on it, items done)

    def should_stop(self) -> bool:
        return self.files is not None and self.files.stop_request.exists()

    def phase(self, text: str) -> None:
        """Say what comes now. Raises StopError where it is not to come any more."""
        if self.should_stop():
            raise StopError("The evaluation was cancelled before anything was scored: resume it to score all")
        self._write(replace(self.status, phase=text))

    def begin(self, benchmarks: Sequence[Benchmark[Any]], limit: int | None, rounds: int) -> None:
        """The items are known, of which each is scored in so many rounds."""
        items = {one.name: len(one.items) if limit is None else min(limit, len(one.items)) for one in benchmarks}
        progress = tuple(Progress(name, 0, rounds * count) for name, count in items.items())
        self._told = time.monotonic()
        self._write(replace(self.status, progress=progress, phase="scoring"))

    def on_item(self, name: str, done: int, total: int) -> None:
        """So many items of a benchmark are done."""
        now = time.monotonic()
        seen = self._seen.setdefault(name, [(0.0, 0)])
        seen.append((seen[-1][0] + now - self._told, done))
        self._told = now
        while len(seen) > 2 and seen[-1][0] - seen[1][0] > _RATE_SECONDS:
            seen.pop(0)
        progress = tuple(Progress(name, done, total) if one.name == name else one for one in self.status.progress)
        left = _seconds_left(progress, self._seen, self.status.expected)
        status = replace(self.status, progress=progress, seconds_left=left)
        if now - self._written < _WRITE_SECONDS and done < total:
            self.status = status
        else:
            self._write(status)

    def _write(self, status: EvaluationStatus) -> None:
        self.status, self._written = status, time.monotonic()
        if self.files is not None:
            with suppress(OSError):
                self.files.write_status(status)


def _seconds_left(
    progress: Sequence[Progress], seen: dict[str, list[tuple[float, int]]], expected: dict[str, float]
) -> float | None:
    """Of the benchmarks that are under way by their pace, of the others as expected; None where one is neither."""
    seconds = 0.0
    for one in progress:
        if one.total and one.done >= one.total:
            continue
        (begin, first), (end, last) = (seen[one.name][0], seen[one.name][-1]) if one.name in seen else ((0.0, 0), (0.0, 0))
        if last > first:
            seconds += (one.total - one.done) * (end - begin) / (last - first)
        elif one.name in expected:
            seconds += expected[one.name]
        else:
            return None
    return seconds


@contextmanager
def watched(status_file: Path | None) -> Iterator[Watch]:
    """What an evaluation does in the block is written to its status file; None: to none.

    The block begins when no earlier evaluation has the device. What ends it is told: done, cancelled, or why it failed.
    """
    if status_file is None:
        yield Watch()
        return
    files = EvaluationFiles.of_status(status_file)
    status = files.read_status()
    me = psutil.Process()
    if status is None or status.pid != me.pid:
        raise EvaluationError(f"{status_file} is not this process's: start evaluations from the page, or leave out --status")
    watch = Watch(files, replace(status, phase=""))
    lock = FileLock(files.folder / f".lock-{status.device}")
    try:
        _wait(watch, lock)
        yield watch
    except BaseException as exc:
        state, error = _ending(watch, exc)
        watch._write(replace(watch.status, state=state, error=error, phase="", seconds_left=None))
        raise
    else:
        ended: State = "cancelled" if any(one.done < one.total for one in watch.status.progress) else "finished"
        watch._write(replace(watch.status, state=ended, phase="", seconds_left=None))
    finally:
        lock.release()


def _wait(watch: Watch, lock: FileLock) -> None:
    assert watch.files is not None
    shown = None
    while True:
        before = ahead(watch.files, watch.status)
        if not before:
            with suppress(Timeout):
                lock.acquire(timeout=0)
                return
        phase = f"waits for {before[-1]}" if before else "waits for the device"
        if phase != shown or watch.should_stop():
            watch.phase(phase)
            shown = phase
        time.sleep(_WAIT_SECONDS)


def _ending(watch: Watch, exc: BaseException) -> tuple[State, str]:
    assert watch.files is not None
    if watch.should_stop() or isinstance(exc, KeyboardInterrupt):
        return "cancelled", ""
    if isinstance(exc, BiasDPOError):
        return "failed", str(exc)
    return "failed", f"The evaluation failed ({type(exc).__name__}: {exc}); {watch.files.log} says where"
