"""Stops a run in the stretches in which its main thread can't look for a request: while libraries, data or a model are read.

A thread of each training process. Before the first step nothing is at stake, and a process may end at any moment as if it had
been killed: what it was writing is written anew at the next start. The main thread, which ends tidily, is given a while to see
the request itself.
"""

from __future__ import annotations

import threading
import time

from training.status import StatusWriter

GRACE_SECONDS = 3.0
LOOK_SECONDS = 0.2


def watch(writer: StatusWriter) -> None:
    """Start the thread. It ends this process with `os._exit`: not for a process that has other work."""
    threading.Thread(target=_watch, args=(writer,), name="stop-watch", daemon=True).start()


def _watch(writer: StatusWriter) -> None:
    asked_at: float | None = None
    while writer.may_leave:
        time.sleep(LOOK_SECONDS)
        if not writer.folder.stop_request.exists():
            asked_at = None
            continue
        asked_at = asked_at or time.monotonic()
        # The main process first, which says that it was stopped: else it would take the others' end for a fault.
        if time.monotonic() - asked_at >= GRACE_SECONDS if writer.is_main else writer.ended_state() == "stopped":
            writer.leave()
