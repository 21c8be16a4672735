"""`python app.py` as a process, as a user starts it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_app(workspace: Path, *flags: str, **environment: str) -> Iterator[str]:
    """The address of a started app; it is stopped when the block ends. Its output goes to `workspace`/app.log."""
    port = free_port()
    process = start_app(workspace, port, *flags, **environment)
    try:
        url = f"http://127.0.0.1:{port}/"
        wait_for_page(url, process, workspace / "app.log")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def start_app(workspace: Path, port: int, *flags: str, **environment: str) -> subprocess.Popen[bytes]:
    """Start the app and do not wait for it. Its output goes to `workspace`/app.log."""
    command = [sys.executable, "app.py", "--host", "127.0.0.1", "--port", str(port), "--workspace", str(workspace), *flags]
    kept = {name: value for name, value in os.environ.items() if name not in ("SPACE_ID", "BIASDPO_WORKSPACE")}
    with (workspace / "app.log").open("w") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=kept | {"HF_HUB_OFFLINE": "1"} | environment, stdout=output, stderr=subprocess.STDOUT
        )


def wait_for_page(url: str, process: subprocess.Popen[bytes], log: Path, timeout_seconds: float = 60.0) -> None:
    """Wait for the first page; an app that ends before it fails with its output."""
    end = time.monotonic() + timeout_seconds
    while time.monotonic() < end:
        assert process.poll() is None, f"app.py ended with {process.returncode}:\n{log.read_text()}"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                assert answer.status == 200
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise AssertionError(f"No page at {url} after {timeout_seconds:g} s:\n{log.read_text()}")
