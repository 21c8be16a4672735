"""What the training process says of itself: status.json, and whether it was asked to stop. Imports nothing heavy."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from typing import Any

import psutil

from biasdpo.errors import BiasDPOError
from biasdpo.run_endings import memory_kills
from biasdpo.run_folder import RunFolder, State, Status


class StoppedError(Exception):
    """The run was asked to stop while it was not between two training steps."""


class StatusWriter:
    """status.json, written by the main process alone, but for a failure, which any process reports.

    may_leave   whether the process may end at any moment and nothing is lost: until its first step begins
    """

    def __init__(self, folder: RunFolder, *, rank: int = 0, processes: int = 1) -> None:
        self.folder = folder
        self.rank = rank
        self.processes = processes
        self.stops = False  # whether a stop was seen, which all processes see at the same place
        self.status = Status("running", pid=os.getpid(), pid_created=psutil.Process().create_time())
        self.may_leave = True
        self._lock = threading.RLock()  # `leave` is another thread's

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def begin(self) -> None:
        """Take over from the launcher; what was known of the steps stays."""
        with suppress(BiasDPOError):
            before = self.folder.read_status()
            self.status = replace(self.status, step=before.step, total_steps=before.total_steps, device=before.device)
        self.status = replace(self.status, phase="loading the libraries", memory_kills=memory_kills())
        with self._lock:
            if self.is_main:
                self.folder.write_status(self.status)

    def update(self, **changes: Any) -> None:
        with self._lock:
            self.status = replace(self.status, **changes)
            if self.is_main and not self._another_ended():
                self.folder.write_status(self.status)

    def note(self, text: str) -> None:
        """Tell the user something, in the log and in the status."""
        if self.is_main:
            print(text, flush=True)
        self.update(notes=(*self.status.notes, text))

    def end(self, state: State, error: str = "") -> None:
        """The last word. A disk so full that it can't be written leaves it to the log."""
        with self._lock:
            self.may_leave = False
            last = replace(self.status, state=state, phase="", error=error, eta_seconds=0.0 if state == "finished" else None)
            self.status = last
            if (not self.is_main and state != "failed") or self._another_ended():
                return
            try:
                self.folder.write_last_status(last)
            except OSError as exc:
                print(f"status.json could not be written ({exc}): {state} {error}", file=sys.stderr, flush=True)

    def _another_ended(self) -> bool:
        """Whether a process has said why it failed, or that the run was stopped: what the others say after it is of the
        connection that it broke."""
        return self.processes > 1 and self.ended_state() in ("failed", "stopped")

    def ended_state(self) -> State | None:
        """The state that status.json shows; None where it can't be read."""
        with suppress(BiasDPOError):
            return self.folder.read_status().state
        return None

    # Stopping

    def stay(self) -> None:
        """The first step begins: from here on a stop saves a checkpoint, and nobody leaves."""
        with self._lock:
            self.may_leave = False

    def leave(self) -> None:
        """End this process at once, stopped, whatever its main thread does; after `stay` or `end` nothing happens."""
        with self._lock:  # for good: the main thread writes nothing any more
            if not self.may_leave:
                return
            self.end("stopped")
            os._exit(0)

    def stop_requested(self) -> bool:
        """Whether to stop. With several processes all must ask at the same place: they agree on what the main one sees."""
        if self.processes == 1:
            self.stops = self.folder.stop_request.exists()
            return self.stops
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():  # before that nobody may leave the others alone
            seen = [self.folder.stop_request.exists()]
            distributed.broadcast_object_list(seen, src=0)
            self.stops = seen[0]
        return self.stops

    def check_stop(self) -> None:
        """Raise StoppedError where a stop was asked for; a place that all processes pass."""
        if self.stop_requested():
            raise StoppedError

    def check_stop_alone(self) -> None:
        """The same, where the main process works and no other waits for it."""
        if self.folder.stop_request.exists():
            raise StoppedError
