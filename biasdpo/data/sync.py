"""The journal's copy on the Hub (`--sync`), for disks that don't last: a private bucket or dataset repository.

Each batch of rows is a new file, verdicts/TIME-HASH.jsonl, that is never changed. What the Hub has is known from the files there:
each is read once, at the start and after every failure, and copied to WORKSPACE/cache/sync. An upload may
therefore fail at any point: the listing shows what arrived, and the rest is sent again. Rows are identified by their id.

The journal stays what everything else reads. Rows of other replicas are appended to it when their files are read.
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import orjson

from biasdpo.data.journal import Mark, Row, append_all, journal_of, parse_row
from biasdpo.errors import BiasDPOError, plural
from biasdpo.hub import HubFiles, reason_of
from biasdpo.records import Judgment, JudgmentMeta
from biasdpo.workspace import Workspace, locked, read_json, replacing, write_json

logger = logging.getLogger(__name__)

FOLDER = "verdicts"
_NAME = re.compile(rf"{FOLDER}/\d{{8}}T\d{{12}}Z-[0-9a-f]{{16}}\.jsonl")
_OF_THE_HUB = {".gitattributes", "README.md"}

POLL_SECONDS = 0.5  # how often the journal's size is looked at
GATHER_SECONDS = 3.0  # from a new row to the upload of its batch
COMMIT_SECONDS = 30.0  # between two commits to a dataset repository: the Hub has an hourly quota
FIRST_RETRY_SECONDS = 2.0
MAX_RETRY_SECONDS = 300.0
_LOCK_SECONDS = 60.0  # how long an upload waits for an erasure, and the other way round
_SHOWN_NAMES = 5


# Files of rows


def _copies(workspace: Workspace, target: str) -> Path:
    return workspace.cache / "sync" / target.replace(":", "/")


def _record(workspace: Workspace) -> Path:
    return workspace.root / "sync.json"


def alone(workspace: Workspace) -> AbstractContextManager[None]:
    """Keep other processes from reading and writing files on the Hub for this workspace."""
    return locked(_record(workspace), _LOCK_SECONDS)


def targets_of(workspace: Workspace) -> list[str]:
    """The targets that this workspace was ever synced with."""
    path = _record(workspace)
    return list(read_json(path)["targets"]) if path.is_file() else []


def _file_of(lines: bytes, stamp: str = "") -> str:
    """The name of a file with this content. Names sort in the order in which their files were made."""
    stamp = stamp or f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}Z"
    return f"{FOLDER}/{stamp}-{hashlib.sha256(lines).hexdigest()[:16]}.jsonl"


def _rows_in(path: Path) -> tuple[list[Row], int]:
    """The rows of a file, and the number of its lines that are none."""
    rows, bad = [], 0
    for line in filter(None, path.read_bytes().split(b"\n")):
        try:
            rows.append(parse_row(line))
        except ValueError:
            bad += 1
    return rows, bad


def _copy(files: HubFiles, copies: Path) -> tuple[list[str], list[str], list[str]]:
    """Copy the files that are new on the Hub; return the names of all files of rows there, of those that were deleted there, and
    of other people's files."""
    for left in (*copies.glob(".fetch-*"), *copies.glob(f"{FOLDER}/.*")):  # by a process that was killed meanwhile
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    (copies / FOLDER).mkdir(parents=True, exist_ok=True)
    sizes = files.sizes()
    names = sorted(filter(_NAME.fullmatch, sizes))
    files.fetch((n for n in names if not (copies / n).is_file() or (copies / n).stat().st_size != sizes[n]), copies)
    copied = {f"{FOLDER}/{path.name}" for path in copies.glob(f"{FOLDER}/*.jsonl")}
    return names, sorted(copied - {*names}), sorted(sizes.keys() - {*names} - _OF_THE_HUB)


def rewrite(
    workspace: Workspace, target: str, replaced: Callable[[list[bytes]], list[bytes | None]], *, dry_run: bool = False
) -> int:
    """Replace lines of all files of a target (None: nothing takes its place); return how many are removed. The caller is `alone`.

    Files that change are replaced in one step, and a dataset repository loses its history, which would keep the old ones.
    """
    files, copies = HubFiles(target), _copies(workspace, target)
    try:
        names, gone, _others = _copy(files, copies)
        lines = [(name, line) for name in (*names, *gone) for line in (copies / name).read_bytes().split(b"\n") if line]
        new = list(zip(lines, replaced([line for _, line in lines]), strict=True))
        removed = sum(now is None for (name, _), now in new if name in names)
        if dry_run:
            return removed
        add, delete = dict[str, bytes](), []
        for name in sorted({name for (name, line), now in new if line != now}):
            data = b"".join(now + b"\n" for (of, _), now in new if of == name and now is not None)
            if name in gone:
                with replacing(copies / name, mode=0o600) as temporary:
                    temporary.write_bytes(data)
                continue
            (copies / name).unlink()
            delete.append(name)
            if data:
                add[_file_of(data, name.partition("/")[2].partition("-")[0])] = data
        if delete:
            files.change(add, delete, "Erase rows")
        files.forget_history()  # always: a former erasure may have broken off before it
        return removed
    except Exception:
        if not dry_run:  # what is erased must not stay here either
            shutil.rmtree(copies, ignore_errors=True)
        raise


# Syncing


@dataclass(frozen=True)
class SyncState:
    """How far the copy on the Hub is. `age_seconds`: for how long this process has known the oldest unsent row; `reason`: why it
    is unsent, or why the Hub was not read yet; "" where neither applies."""

    target: str
    sent: int
    unsent: int
    age_seconds: float
    reason: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Batch:
    name: str
    ids: frozenset[str]
    data: bytes


class HubSync:
    """Sends a workspace's journal to the Hub, in a thread of its own. Thread-safe."""

    def __init__(self, workspace: Workspace, target: str) -> None:
        self._workspace = workspace
        self._files = HubFiles(target)
        self._copies = _copies(workspace, target)
        self._journal = journal_of(workspace)
        self._lock = threading.RLock()
        self._sent: set[str] = set()
        self._unsent: dict[str, tuple[float, Row]] = {}  # with the time when it was first seen
        self._mark: Mark = (0, 0)
        self._known: set[str] = set()  # names of the files whose ids are in _sent
        self._batch: _Batch | None = None  # tried, and perhaps on the Hub
        self._is_read = False  # what is on the Hub; false again after a failure
        self._reason = "it is being read"
        self._notes: tuple[str, ...] = ()
        self._damaged: dict[str, int] = {}  # lines that are not rows, by file
        self._committed_at = float("-inf")
        self._hurry, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="sync", daemon=True)

    def start(self) -> None:
        with alone(self._workspace):
            targets = dict.fromkeys([*targets_of(self._workspace), self._files.target])
            write_json(_record(self._workspace), {"targets": list(targets)})
        self._thread.start()

    def state(self) -> SyncState:
        with self._lock:
            self._look()
            age = max((time.monotonic() - seen for seen, _ in self._unsent.values()), default=0.0)
            reason = self._reason if self._unsent or not self._is_read else ""
            return SyncState(self._files.target, len(self._sent), len(self._unsent), age, reason, self._notes)

    def is_sent(self, judgment_id: str) -> bool:
        """Whether the Hub has acknowledged a row, or lists a file that has it."""
        with self._lock:
            return judgment_id in self._sent

    def hurry(self) -> None:
        """Send what is left without waiting for more: the app is about to end."""
        self._hurry.set()

    def close(self, seconds: float) -> None:
        """Send what is left, for at most so long; the log says what stays behind."""
        self._closing.set()
        self._hurry.set()
        self._thread.join(max(0.0, seconds))
        state = self.state()
        if state.unsent:
            rows, where = plural(state.unsent, "row"), self._workspace.preferences
            logger.warning("%s not saved to %s (%s): only %s has them", rows, state.target, state.reason, where)

    def _run(self) -> None:
        failures = 0
        while not (self._closing.is_set() and not self._look()):
            try:
                if not self._is_read:
                    self._pull()
                    self._is_read = True
                if self._look():
                    self._gather()
                    self._push()
                failures, self._reason = 0, "the next batch is about to be sent"
                self._wait(POLL_SECONDS)
            except Exception as exc:  # whatever it was: the rows are on the disk, and it is tried again
                self._is_read, failures, self._reason = False, failures + 1, reason_of(exc)
                level = logging.WARNING if failures == 1 else logging.INFO
                logger.log(level, "Labels are kept here only, since %s: %s", self._files.target, self._reason)
                self._wait(min(MAX_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2 ** (failures - 1)) * random.uniform(0.5, 1.0))

    def _wait(self, seconds: float) -> None:
        if self._hurry.is_set():
            time.sleep(min(seconds, 0.2))
        else:
            self._hurry.wait(seconds)

    def _look(self) -> int:
        """Read what is new in the journal; return the number of unsent rows."""
        with self._lock:
            with suppress(BiasDPOError):  # the page reports a journal that can't be read
                self._journal.refresh()
            rows, mark = self._journal.since(self._mark)
            if mark[0] != self._mark[0]:
                self._unsent.clear()
            self._mark = mark
            self._unsent |= {row["id"]: (time.monotonic(), row) for row in rows if row["id"] not in self._sent}
            return len(self._unsent)

    def _pull(self) -> None:
        """Read the files that are new on the Hub, and add their rows to the journal.

        Rows of a file that was deleted on the Hub are not sent again: they may have been erased.
        """
        is_private = self._files.create()
        with alone(self._workspace):
            names, gone, others = _copy(self._files, self._copies)
            found: list[Row] = []
            sent: set[str] = set()
            for name in (name for name in (*names, *gone) if name not in self._known):
                rows, bad = _rows_in(self._copies / name)
                sent.update(row["id"] for row in rows)
                found += rows if name in names else []
                self._damaged |= {name: bad} if bad else {}
            if found:
                append_all(self._workspace, [Judgment(**row | {"meta": JudgmentMeta(**row["meta"])}) for row in found])
        self._acknowledge(sent, {*names, *gone})
        damaged = [f"{bad} in {name}" for name, bad in self._damaged.items()]
        notes = {
            f"{self._files.target} is public: everybody can read the labels in it": not is_private,
            f"Files that are not this app's, skipped: {_listed(others)}": others,
            f"{len(gone)} of its files were deleted: their rows are not sent again": gone,
            f"Lines that are not rows, skipped: {_listed(damaged)}": damaged,
        }
        self._notes = tuple(note for note, holds in notes.items() if holds)

    def _gather(self) -> None:
        """Wait for more rows of the same batch, and until the next commit is due."""
        due = 0.0 if self._files.is_bucket else self._committed_at + COMMIT_SECONDS - time.monotonic()
        self._wait(max(GATHER_SECONDS, due))

    def _push(self) -> None:
        """Send the unsent rows. A batch that was tried before is sent again under its name, unless a row was erased meanwhile."""
        with alone(self._workspace):
            self._look()
            with self._lock:
                rows = [row for _, row in self._unsent.values()]
                if self._batch is None or not self._batch.ids <= self._unsent.keys():
                    data = b"".join(orjson.dumps(row) + b"\n" for row in rows)
                    self._batch = _Batch(_file_of(data), frozenset(row["id"] for row in rows), data)
            batch = self._batch
            if not batch.ids:
                return
            self._committed_at = time.monotonic()
            self._files.change({batch.name: batch.data}, (), f"Add {plural(len(batch.ids), 'row')}")
            with replacing(self._copies / batch.name, mode=0o600) as temporary:
                temporary.write_bytes(batch.data)
        self._acknowledge(batch.ids, {batch.name})
        self._batch = None

    def _acknowledge(self, ids: Collection[str], names: set[str]) -> None:
        with self._lock:
            self._sent.update(ids)
            self._known |= names
            self._unsent = {id: seen for id, seen in self._unsent.items() if id not in ids}


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN_NAMES]) + f" and {len(names) - _SHOWN_NAMES:,} more" * (len(names) > _SHOWN_NAMES)


_syncs: dict[Path, HubSync] = {}


def start(workspace: Workspace, target: str) -> HubSync:
    """Start syncing a workspace, once per process."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    _syncs[workspace.root] = HubSync(workspace, target)
    _syncs[workspace.root].start()
    return _syncs[workspace.root]


def sync_of(workspace: Workspace) -> HubSync | None:
    """The running sync of a workspace, if it has one."""
    return _syncs.get(workspace.root)
