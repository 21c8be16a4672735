"""The command line in this process: as a user types it, without the seconds that a process takes to start."""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest import mock

from biasdpo.cli import main


@dataclass(frozen=True)
class Done:
    """A finished command."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The single line of an error that the user can correct; progress bars aside, nothing else was printed."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("biasdpo: ")]
        assert (self.returncode, len(lines)) == (2, 1), self
        assert "Traceback" not in self.stderr
        return lines[0]


def run(*arguments: object, **environment: str) -> Done:
    """Run `python -m biasdpo ARGUMENTS` here."""
    outer = {name: value for name, value in os.environ.items() if name not in ("SPACE_ID", "BIASDPO_WORKSPACE")}
    out, err, words = io.StringIO(), io.StringIO(), [*map(str, arguments)]
    argv = mock.patch.object(sys, "argv", ["biasdpo", *words])  # from which a job's provenance has its command
    with mock.patch.dict(os.environ, outer | environment, clear=True), argv, redirect_stdout(out), redirect_stderr(err):
        status = main(words)
    return Done(status, out.getvalue(), err.getvalue())
