"""One run at a time on a device, first come, first served. Run as a program, it is a run's waiting process:

    python -m biasdpo.run_queue WORKSPACE/runs/ID DEVICE COMMAND...

It waits for the device, then becomes COMMAND (`accelerate launch`), with the device's lock as its standard input: launchers
hand that on to the processes that train, and the kernel frees the lock when the last of them is gone, whatever it died of. The
order is that of the lines of WORKSPACE/runs/.queue-DEVICE, each a run's id; a run that has ended, or is dead, stands in nobody's
way.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from biasdpo.errors import BiasDPOError
from biasdpo.run_folder import ACTIVE, RunFolder, Status
from biasdpo.run_state import START_MARK, STARTING, poll
from biasdpo.workspace import Workspace, locked, replacing

_WAIT_SECONDS = 0.2


def join(workspace: Workspace, device: str, run_id: str) -> None:
    """Stand at the end of a device's queue."""
    path = _queue_file(workspace, device)
    with locked(path):
        waiting = [other for other in _read(path) if other != run_id and _is_active(workspace, other)]
        with replacing(path) as temporary:
            temporary.write_text("".join(f"{other}\n" for other in [*waiting, run_id]), encoding="utf-8")


def holders(workspace: Workspace, device: str) -> list[str]:
    """The runs that have a device or wait for it, in their order."""
    return [other for other in _read(_queue_file(workspace, device)) if _is_active(workspace, other)]


def ahead(workspace: Workspace, device: str, run_id: str) -> list[str]:
    """The runs that have the device before this one, in their order."""
    waiting = _read(_queue_file(workspace, device))
    place = waiting.index(run_id) if run_id in waiting else len(waiting)
    return [other for other in waiting[:place] if _is_active(workspace, other)]


def _queue_file(workspace: Workspace, device: str) -> Path:
    return workspace.runs / f".queue-{device}"


def _read(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except FileNotFoundError:
        return []


def _is_active(workspace: Workspace, run_id: str) -> bool:
    folder = RunFolder(workspace.runs / run_id)
    try:
        return poll(folder).status.state in ACTIVE
    except BiasDPOError:  # deleted, or damaged: it trains no more
        return False


def wait_and_become(folder: RunFolder, device: str, command: list[str]) -> int:
    """The waiting process. Returns only where the run was stopped before it had the device."""
    workspace = Workspace(folder.path.parent.parent)
    me = psutil.Process()
    sys.stdin.read()  # until `runs` has written who we are, or is dead

    def say(**changes: Any) -> None:
        status = replace(folder.read_status(), pid=me.pid, pid_created=me.create_time(), device=device, waits_for="", phase="")
        folder.write_status(replace(status, **changes))

    lock = os.open(workspace.runs / f".lock-{device}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    shown: str | None = None
    while not folder.stop_request.exists():
        before = ahead(workspace, device, folder.id)
        if not before and _take(lock):
            say(state="queued", phase=STARTING)
            print(f"{START_MARK}{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\n{' '.join(command)}", flush=True)
            os.dup2(lock, 0)  # a standard stream, which launchers do not close
            os.execv(command[0], command)
        waits_for = before[0] if before else ""
        if waits_for != shown:
            phase = f"waits for run {waits_for}" if waits_for else "waits for the device"
            say(state="queued", phase=phase, waits_for=waits_for)
            shown = waits_for
        time.sleep(_WAIT_SECONDS)
    say(state="stopped")
    return 0


def _take(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def main(arguments: list[str]) -> int:
    """Wait and become; what goes wrong before is written to the status."""
    folder = RunFolder(Path(arguments[0]))
    try:
        return wait_and_become(folder, arguments[1], arguments[2:])
    except Exception as exc:
        traceback.print_exc()
        reason = str(exc) if isinstance(exc, BiasDPOError) else f"{type(exc).__name__}: {exc}; the whole story is in train.log"
        folder.write_last_status(Status("failed", pid=os.getpid(), error=f"The run could not be queued: {reason}"))
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
