"""The process of `lm_eval_model`, as the measurements talk to it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any


class LmEval:
    """lm-evaluation-harness's `hf` model on the CPU in float32, base and tuned. Use it as a context."""

    def __init__(self, python: str, folder: Path, adapter: Path | None, threads: int) -> None:
        script = Path(__file__).with_name("lm_eval_model.py")
        command = [python, str(script), str(folder), "none" if adapter is None else str(adapter), str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        self._read("ready")

    def ask(self, **asked: Any) -> dict[str, Any]:
        """See `lm_eval_model`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._read("answer ").removeprefix("answer "))
        return answer

    def _read(self, beginning: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # lm_eval prints of its own
            if line.startswith(beginning):
                return line
        raise SystemExit(f"lm_eval's process ended (status {self._process.wait()}): is lm_eval installed for that interpreter?")

    def __enter__(self) -> LmEval:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def has_lm_eval(python: str) -> bool:
    """Whether an interpreter can import lm_eval."""
    check = "import importlib.util, sys; sys.exit(importlib.util.find_spec('lm_eval') is None)"
    try:
        return subprocess.run([python, "-c", check], check=False).returncode == 0
    except OSError:
        return False
