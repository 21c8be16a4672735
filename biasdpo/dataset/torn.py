"""A last line that a power loss or a kill left torn: set aside before the next append, in preferences.jsonl.torn, and reported.

Nothing acknowledged is in it: a row is acknowledged when it is on the disk as a whole.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from biasdpo.workspace import Workspace

_BLOCK = 4096  # read at first: most lines are shorter


def repair(file: int, path: Path) -> bool:
    """Mend the last line of an open journal, under its lock; True if there was something to mend.

    A whole row gets its line end; a torn one is cut off. A line that has its end and is no JSON was torn as well: the file's
    length can reach the disk before its middle does. Raises OSError; what is begun then is done by the next repair.
    """
    size = os.fstat(file).st_size
    line = last_line(file, size)
    ended = line.endswith(b"\n")
    whole = _is_json(line)
    if size == 0 or (ended and (whole or line.isspace())):
        return False
    _set_aside(path, size - len(line), line, kept=whole)
    if whole:
        os.write(file, b"\n")
    else:
        os.ftruncate(file, size - len(line))
    os.fsync(file)
    return True


def last_line(file: int, size: int) -> bytes:
    """The last line of an open file of that size, with its end if it has one."""
    start, tail = size, b""
    while start > 0 and b"\n" not in tail[:-1]:
        step = min(_BLOCK if not tail else len(tail), start)  # doubling: a long line costs no more than a few reads
        start -= step
        tail = os.pread(file, step, start) + tail
    return tail[tail.rfind(b"\n", 0, max(0, len(tail) - 1)) + 1 :]


def torn_file(path: Path) -> Path:
    """Where the torn lines of a journal are set aside."""
    return path.with_name(path.name + ".torn")


def repaired_lines(workspace: Workspace) -> int:
    """How many torn lines were repaired so far."""
    return len(_notes(torn_file(workspace.preferences)))


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some file systems can't; what is in the files is synced by itself
        pass
    finally:
        os.close(handle)


def _set_aside(path: Path, offset: int, line: bytes, *, kept: bool) -> None:
    aside = torn_file(path)
    text = line.decode("utf-8", "replace")
    last = _notes(aside)[-1:]
    if last and (last[0].get("offset"), last[0].get("text")) == (offset, text):
        return  # a repair that was killed before it was done
    note = {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "kept": kept, "offset": offset, "text": text}
    with aside.open("ab") as record:
        # The line end before it parts it from a note that was itself torn.
        record.write(b"\n" * (record.tell() > 0) + orjson.dumps(note) + b"\n")
        record.flush()
        os.fsync(record.fileno())
    sync_folder(path.parent)


def _notes(aside: Path) -> list[dict[str, Any]]:
    lines = aside.read_bytes().split(b"\n") if aside.is_file() else []
    return [orjson.loads(line) for line in lines if _is_json(line)]


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except ValueError:
        return False
