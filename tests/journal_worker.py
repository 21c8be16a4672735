"""A process that appends judgments: `python -m tests.journal_worker WORKSPACE NAME COUNT ACKNOWLEDGED [BYTES]`.

Each judgment's id is written to the file ACKNOWLEDGED once `append` has returned. Started again after a kill it goes on where
its acknowledgements end, so it tries the judgment in flight a second time, as the page does. BYTES: limit of a file's size.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from biasdpo.data import journal
from biasdpo.errors import WorkspaceError
from biasdpo.records import Judgment
from biasdpo.workspace import Workspace


def judgment(name: str, number: int) -> Judgment:
    """Its texts follow from its id; every tenth is long, so that a kill can meet a write half done."""
    text = f"{name} {number} " * (20_000 if number % 10 == 0 else 20)
    return Judgment(f"{name}-{number}", "2024-07-18T00:00:00+00:00", f"{number:016x}", f"Prompt {number}?", text, "No.")


def worker(workspace: Workspace, name: str, *arguments: object) -> list[str]:
    """The command line of such a process."""
    return [sys.executable, "-m", "tests.journal_worker", str(workspace.root), name, *map(str, arguments)]


def ids_in_file(path: Path) -> list[str]:
    """Ids line by line, as anyone reads JSON lines: every line must be whole."""
    return [json.loads(line)["id"] for line in path.read_bytes().splitlines()]


def main(workspace: Workspace, name: str, count: int, acknowledged: Path) -> None:
    done = len(acknowledged.read_text().split()) if acknowledged.exists() else 0
    with acknowledged.open("ab", buffering=0) as acks:
        for number in range(done, count):
            journal.append(workspace, judgment(name, number))
            acks.write(f"{name}-{number}\n".encode())


def full_disk(workspace: Workspace, limit: int) -> None:
    """A file may not grow past `limit` bytes; when the limit is gone, the same judgment is stored."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    late = judgment("late", 10)
    try:
        journal.append(workspace, late)
    except WorkspaceError as exc:
        print(exc)
    print(workspace.preferences.stat().st_size)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    print(journal.append(workspace, late).written)


if __name__ == "__main__":
    if len(sys.argv) > 5:
        full_disk(Workspace(Path(sys.argv[1])), int(sys.argv[5]))
    else:
        main(Workspace(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
