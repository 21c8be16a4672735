"""Processes beside the one that starts them: one that outlives it and begins only when what is known of it is written down, and
one that is waited for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from biasdpo.run_state import reap

ROOT = Path(__file__).resolve().parent.parent
# The process waits for the end of its input, so that its status is written before it writes itself; then it becomes the command.
_WAIT = "import os, sys; sys.stdin.read(); os.execv(sys.argv[1], sys.argv[1:])"

_POLL_SECONDS = 0.1


def run_until(
    command: Sequence[str], log: Path, cancelled: Callable[[], bool], env: Mapping[str, str] | None = None
) -> int | None:
    """Run a command to its end and return its exit status; kill it as soon as `cancelled` says so, and return None. What it
    prints is the content of `log`. `env` None: this process's own."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
    try:
        while process.poll() is None:
            if cancelled():
                return None
            time.sleep(_POLL_SECONDS)
        return process.returncode
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@contextmanager
def started(command: Sequence[str], log: Path) -> Iterator[psutil.Process]:
    """A command in a session of its own, so that neither Ctrl-C nor the app's end reaches it; what it prints goes into `log`.

    It begins when the block ends, in which its pid is written down; where that fails it never begins.
    """
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", _WAIT, *command],
            cwd=ROOT,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    reap(process)
    try:
        yield psutil.Process(process.pid)
    except BaseException:
        process.kill()  # nobody would know of it
        raise
    finally:
        assert process.stdin is not None
        process.stdin.close()
