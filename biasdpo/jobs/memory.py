"""How a job gets the memory that open models take: it asks every app of the workspace to close them, through files.

    WORKSPACE/.jobs/apps/PID.json           a running app: pid, pid_created
    WORKSPACE/.jobs/apps/PID.DEVICE.TOKEN   a request to that app, which deletes it once its models on that device are closed

The app answers in a thread of its own, whether a page is open or not.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import psutil

from biasdpo.errors import WorkspaceError
from biasdpo.jobs.job import Device, Status, is_alive, shared_folder
from biasdpo.workspace import Workspace, read_json, write_json

TIMEOUT_SECONDS = 20.0
_POLL_SECONDS = 0.2
_log = logging.getLogger(__name__)


class Pool(Protocol):
    def release(self, device: Device) -> bool:
        """Close the models on a device that nobody uses at this moment; whether none is left open there."""


def serve_requests(pool: Pool, workspace: Workspace) -> None:
    """Register this process as an app and answer requests in a daemon thread for as long as it lives."""
    me = psutil.Process()
    folder = _folder(workspace)
    registration = folder / f"{me.pid}.json"
    write_json(registration, {"pid": me.pid, "pid_created": me.create_time()})
    atexit.register(registration.unlink, missing_ok=True)

    def answer() -> None:
        while True:
            time.sleep(_POLL_SECONDS)
            for device in ("cpu", "gpu"):
                requests = list(folder.glob(f"{me.pid}.{device}.*"))
                try:
                    if requests and pool.release(device):
                        for request in requests:
                            request.unlink(missing_ok=True)
                except Exception:  # the thread must survive whatever closing a model raises
                    _log.exception("Models on %s could not be closed", device)

    threading.Thread(target=answer, name="memory requests", daemon=True).start()


def request_memory(workspace: Workspace, device: Device, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
    """Ask all live apps to close their models on a device. Returns once each has done so or is dead, or after the timeout."""
    waiting = {}
    for app in _live_apps(workspace):
        request = _folder(workspace) / f"{app.pid}.{device}.{uuid.uuid4().hex}"
        try:
            request.touch()
        except OSError as exc:  # a full disk: go on with the memory there is
            _log.warning("The app (pid %d) could not be asked to close its models: %s", app.pid, exc)
        else:
            waiting[request] = app
    end = time.monotonic() + timeout_seconds
    while waiting and time.monotonic() < end:
        time.sleep(_POLL_SECONDS / 4)
        waiting = {request: app for request, app in waiting.items() if request.exists() and is_alive(app)}
    for request, app in waiting.items():
        _log.warning("The app (pid %d) did not close its models within %g s", app.pid, timeout_seconds)
        request.unlink(missing_ok=True)


def _folder(workspace: Workspace) -> Path:
    return shared_folder(workspace) / "apps"


def _live_apps(workspace: Workspace) -> Iterator[Status]:
    """The registered apps as the status of a process; what dead ones left is removed."""
    for registration in _folder(workspace).glob("*.json"):
        try:
            values = read_json(registration)
            app = Status("running", pid=values["pid"], pid_created=values["pid_created"])
        except (WorkspaceError, KeyError, TypeError, ValueError):
            continue
        if is_alive(app):
            yield app
        elif app.pid != os.getpid():
            for left in _folder(workspace).glob(f"{app.pid}.*"):
                left.unlink(missing_ok=True)
