"""Result files: read, and told from other JSON."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from biasdpo.errors import EvaluationError, WorkspaceError
from biasdpo.workspace import read_json


def load(file: Path) -> dict[str, Any]:
    """The result in a file. Raises EvaluationError where there is none, or something else."""
    try:
        value = read_json(file)
    except WorkspaceError as exc:
        raise EvaluationError(str(exc)) from exc
    parts = value.values() if isinstance(value, dict) else ()
    if not isinstance(value, dict) or not all(isinstance(value.get(name), dict) for name in ("benchmarks", "provenance")):
        what = f"an object of {len(parts)} keys" if isinstance(value, dict) else type(value).__name__
        raise EvaluationError(f"{file} is no evaluation's result (got {what}): delete it, or evaluate again")
    return value


@lru_cache(maxsize=256)
def summary(file: Path, _modified_ns: int) -> tuple[bool, str]:
    """Whether the evaluation in a file was interrupted, and what is wrong with the file ("" for nothing). Results are large: each
    is read once."""
    try:
        return bool(load(file)["provenance"].get("interrupted")), ""
    except EvaluationError as exc:
        return False, str(exc)
