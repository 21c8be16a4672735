"""A process that outlives the one that starts it, and that begins only when what is known of it is written down."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from biasdpo.run_state import reap

ROOT = Path(__file__).resolve().parent.parent
# The process waits for the end of its input, so that its status is written before it writes itself; then it becomes the command.
_WAIT = "import os, sys; sys.stdin.read(); os.execv(sys.argv[1], sys.argv[1:])"


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
