"""A folder for what an export has not finished, beside its target: removed at its end, or by the next after a crash."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from biasdpo.errors import ExportError

_SUFFIX = ".exporting"


@contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out`, on the same disk. It is locked: one export writes `out` at a time.

    Folders that killed exports left in `out`'s folder are removed. Raises ExportError where another export writes `out`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(out.parent)
    folder = out.parent / f".{out.name}{_SUFFIX}"
    folder.mkdir(exist_ok=True)
    lock = FileLock(folder / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as exc:
        raise ExportError(f"Another export writes {out} now: wait for its end, or choose another name") from exc
    try:
        yield folder
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def finish(file: Path, out: Path) -> None:
    """Give a complete file its final name: on the disk first, then by one rename."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    file.chmod(0o644)
    file.replace(out)


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f".*{_SUFFIX}"):
        lock = FileLock(folder / "lock", timeout=0)
        try:
            lock.acquire()
        except (Timeout, OSError):
            continue
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)
