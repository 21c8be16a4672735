"""What a training process reports: status.json, stop requests, and its error in one line. Loads no heavy library."""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import psutil

from biasdpo.errors import BiasDPOError
from biasdpo.jobs.job import MEMORY_WORDS, THREAD_WORDS, JobFolder, State, Status, is_at_memory_limit, memory_kills

logger = logging.getLogger(__name__)

GRACE_SECONDS = 3.0  # the main thread has this long to act on a stop request before the watcher does
POLL_SECONDS = 0.2


class StoppedError(Exception):
    """The run was asked to stop."""


class StatusWriter:
    """Writes status.json. Only the main process (rank 0) writes it, but any process reports a failure.

    stopping        whether a stop request was seen; all processes see it at the same point
    can_exit        whether nothing is lost if the process exits now: true until the first step begins
    """

    def __init__(self, folder: JobFolder, rank: int = 0, processes: int = 1) -> None:
        self.folder = folder
        self.rank = rank
        self.processes = processes
        self.stopping = False
        self.can_exit = True
        self.status = Status("running", pid=os.getpid(), pid_created=psutil.Process().create_time())
        self._lock = threading.RLock()  # `exit_stopped` is called by the watcher's thread

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def begin(self) -> None:
        """Take over from the launcher, keeping the step count of an earlier start. A damaged status.json is replaced."""
        with suppress(BiasDPOError):
            before = self.folder.read_status()
            self.status = replace(self.status, step=before.step, total_steps=before.total_steps, device=before.device)
        self.status = replace(self.status, phase="loading the libraries", memory_kills=memory_kills())
        with self._lock:
            if self.is_main:
                self.folder.write_status(self.status)

    def update(self, **changes: Any) -> None:
        """Change the status; a new phase has no share yet, unless it is given."""
        with self._lock:
            self.status = replace(self.status, **({"share": 0.0} if "phase" in changes else {}) | changes)
            if self.is_main and not self._another_ended():
                self.folder.write_status(self.status)

    def note(self, text: str) -> None:
        """Tell the user something, in the log and in the status."""
        if self.is_main:
            logger.info(text)
        self.update(notes=(*self.status.notes, text))

    def end(self, state: State, error: str = "") -> None:
        """Write the final status. If the disk is too full even for that, the log has it."""
        with self._lock:
            self.can_exit = False
            eta = 0.0 if state == "finished" else None
            last = replace(self.status, state=state, phase="", share=0.0, error=error, eta_seconds=eta)
            self.status = last
            if (not self.is_main and state != "failed") or self._another_ended():
                return
            try:
                self.folder.write_last_status(last)
            except OSError as exc:
                logger.error("status.json could not be written (%s): %s %s", exc, state, error)

    def _another_ended(self) -> bool:
        """Whether another process has reported the end: later errors are only about the connection that broke."""
        return self.processes > 1 and self._written_state() in ("failed", "stopped")

    def _written_state(self) -> State | None:
        with suppress(BiasDPOError):
            return self.folder.read_status().state
        return None

    # Stopping

    def check_stop(self) -> None:
        """Raise StoppedError if a stop was requested. All processes must call it at the same point."""
        if self.stop_requested():
            raise StoppedError

    def check_stop_alone(self) -> None:
        """Raise StoppedError if a stop was requested, where the main process works and no other waits for it."""
        if self.folder.stop_request.exists():
            raise StoppedError

    def stop_requested(self) -> bool:
        """Whether to stop. Several processes must ask at the same point: they agree on what the main one sees."""
        self.stopping = self._agreed(self.folder.stop_request.exists(), before=self.stopping)
        return self.stopping

    def is_late(self, max_minutes: float) -> bool:
        """Whether the run's process has had its time (0: unlimited). Several processes must ask at the same point."""
        seconds = time.time() - self.status.pid_created
        return max_minutes > 0 and self._agreed(seconds >= 60 * max_minutes, before=False)

    def _agreed(self, seen: bool, *, before: bool) -> bool:
        """What the main process sees; `before` as long as the processes can't talk, since none may leave the others alone."""
        if self.processes == 1:
            return seen
        distributed = sys.modules.get("torch.distributed")
        if distributed is None or not distributed.is_available() or not distributed.is_initialized():
            return before
        values = [seen]
        distributed.broadcast_object_list(values, src=0)
        return bool(values[0])

    def forbid_exit(self) -> None:
        """The first step begins: from now on a stop saves a checkpoint first."""
        with self._lock:
            self.can_exit = False

    def exit_stopped(self) -> None:
        """End this process now, whatever its main thread is doing, with the status "stopped"; does nothing once `can_exit` is
        false."""
        with self._lock:  # never released: the main thread writes nothing anymore
            if self.can_exit:
                self.end("stopped")
                os._exit(0)

    def watch(self) -> None:
        """Exit soon after a stop request, as long as `can_exit`."""
        requested_at: float | None = None
        while self.can_exit:
            time.sleep(POLL_SECONDS)
            if not self.folder.stop_request.exists():
                requested_at = None
                continue
            requested_at = requested_at or time.monotonic()
            # The main process exits first and reports the stop: otherwise it would report the others' exit as a failure.
            if time.monotonic() - requested_at >= GRACE_SECONDS if self.is_main else self._written_state() == "stopped":
                self.exit_stopped()


def watch_for_stop(writer: StatusWriter) -> None:
    """Watch for a stop request in a thread, for when the main thread can't look: while it imports libraries or loads a model.
    It ends the process with `os._exit`."""
    threading.Thread(target=writer.watch, name="stop-watcher", daemon=True).start()


# Errors

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_FULL_WORDS = (
    "No space left on device", "Disk quota exceeded", "File too large", "os error 28", "os error 27",
    "PytorchStreamWriter failed", "unexpected pos", "iostream error",  # torch.save, which hides the reason
)  # fmt: skip
# gloo's and NCCL's words when the process at the other end is gone.
_CONNECTION_WORDS = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "NCCL error: remote")


def cause_and_remedy(exc: BaseException, log: str = "the run's log.txt") -> str:
    """One line that says what went wrong and what to do. `log`: where the traceback is."""
    if isinstance(exc, BiasDPOError):
        return str(exc)
    text = str(exc)
    out_of_memory = isinstance(exc, MemoryError) or type(exc).__name__ == "OutOfMemoryError"
    if out_of_memory or any(words in text for words in MEMORY_WORDS) or is_at_memory_limit():
        return (
            "Out of memory: start a new run with a lower batch_size (and gradient_accumulation raised as much) or max_length, or "
            "free memory and resume; the checkpoints are kept"
        )
    if any(words in text for words in THREAD_WORDS):
        return (
            "Out of memory or of processes, since no thread could be started: free memory, lower `threads`, or raise the limit "
            "of processes (ulimit -u), then resume; the checkpoints are kept"
        )
    if (isinstance(exc, OSError) and exc.errno in _DISK_FULL) or any(words in text for words in _DISK_FULL_WORDS):
        return "The disk is full: free some space, then resume the run; its checkpoints are kept"
    if any(words in text for words in _CONNECTION_WORDS):
        return (
            "Another of the run's processes ended unexpectedly, as it does when it is killed or the machine runs out of "
            f"memory: resume the run, or start a new one with fewer num_processes; {log} has more"
        )
    first_line = (text.strip() or type(exc).__name__).split("\n")[0]
    return f"{type(exc).__name__}: {first_line[:300]}; the full traceback is in {log}"
