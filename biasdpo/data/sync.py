"""The journal's copy on the Hub (`--sync`), for disks that don't last: a private bucket or dataset repository.

Each batch of rows is a new file, verdicts/TIME-HASH.jsonl, that is never changed. What the Hub has is known from the files there:
each is read once, at the start and after every failure, and copied to WORKSPACE/cache/sync. So it doesn't matter at which point
an upload broke off, here or there: what arrived is found in the listing, and the rest is sent again. Rows are told apart by id.

The journal stays what everything else reads. Rows of other replicas are appended to it when their files are read.
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from biasdpo.data.journal import Mark, Row, append_all, journal_of, parse_row
from biasdpo.errors import BiasDPOError, ConfigError, plural
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


# A place on the Hub


@dataclass(frozen=True)
class HubFiles:
    """The files of a `target`, bucket:OWNER/NAME or dataset:OWNER/NAME. Raises what huggingface_hub raises."""

    target: str

    @property
    def id(self) -> str:
        return self.target.partition(":")[2]

    @property
    def is_bucket(self) -> bool:
        return self.target.startswith("bucket:")

    @property
    def api(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi(library_name="biasdpo")

    def create(self) -> bool:
        """Create it, private, unless it exists; return whether it is private."""
        if self.is_bucket:
            self.api.create_bucket(self.id, private=True, exist_ok=True)
            return bool(self.api.bucket_info(self.id).private)
        self.api.create_repo(self.id, repo_type="dataset", private=True, exist_ok=True)
        return bool(self.api.dataset_info(self.id).private)

    def sizes(self) -> dict[str, int]:
        """All files: bytes by path."""
        if self.is_bucket:
            entries = self.api.list_bucket_tree(self.id, recursive=True)
        else:
            entries = self.api.list_repo_tree(self.id, repo_type="dataset", recursive=True)
        return {entry.path: entry.size for entry in entries if hasattr(entry, "size")}

    def fetch(self, names: Iterable[str], folder: Path) -> None:
        """Download files into a folder, each whole or not at all."""
        names = sorted(names)
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
            if names and self.is_bucket:
                self.api.download_bucket_files(self.id, [(name, Path(scratch, name)) for name in names])
            elif names:
                patterns = names if len(names) < 100 else [f"{FOLDER}/*.jsonl"]  # each is matched with each file
                self.api.snapshot_download(self.id, repo_type="dataset", allow_patterns=patterns, local_dir=scratch)
            for name in names:
                Path(scratch, name).replace(folder / name)

    def change(self, add: Mapping[str, bytes], delete: Iterable[str], title: str) -> None:
        """Add and delete files, all at once."""
        if self.is_bucket:
            self.api.batch_bucket_files(self.id, add=[(data, name) for name, data in add.items()], delete=list(delete))
            return
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations = [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in add.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in delete),
        ]
        self.api.create_commit(self.id, operations, commit_message=title, repo_type="dataset")


def check(target: str) -> None:
    """Raise ConfigError where nothing could be sent: without a token."""
    from huggingface_hub import get_token

    if not get_token():
        raise ConfigError(
            f"--sync {target} needs a Hub token that may write there, and there is none: set HF_TOKEN (on a Space: a secret of "
            "that name under Settings), or run `hf auth login`"
        )


def reason_of(exc: Exception) -> str:
    """Why the Hub couldn't be used, in one line."""
    if isinstance(exc, BiasDPOError):
        return str(exc)
    status = getattr(getattr(exc, "response", None), "status_code", None)
    known = {
        401: "the Hub does not accept the token: set another HF_TOKEN",
        403: "the token may not write there: use one with write access",
        404: "the Hub has no such repository, or the token may not see it: check the name and the token",
        429: "the Hub's rate limit is reached",
    }
    if status is not None:
        return known.get(status, f"the Hub answered with status {status}")
    line = " ".join(str(exc).split())[:200]
    return f"the Hub can't be reached ({type(exc).__name__}{': ' * bool(line)}{line})"


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
    try:
        return _rewrite(HubFiles(target), _copies(workspace, target), replaced, dry_run=dry_run)
    except Exception:
        if not dry_run:  # what is erased must not stay here either
            shutil.rmtree(_copies(workspace, target), ignore_errors=True)
        raise


def _rewrite(files: HubFiles, copies: Path, replaced: Callable[[list[bytes]], list[bytes | None]], *, dry_run: bool) -> int:
    names, gone, _others = _copy(files, copies)
    lines = [(name, line) for name in (*names, *gone) for line in (copies / name).read_bytes().splitlines()]
    new = list(zip(lines, replaced([line for _, line in lines]), strict=True))
    changed = sorted({name for (name, line), now in new if line != now})
    removed = sum(now is None for (name, _), now in new if name in names)
    if dry_run:
        return removed
    add = {}
    for name in changed:
        data = b"".join(now + b"\n" for (of, _), now in new if of == name and now is not None)
        (copies / name).unlink()
        if name in gone:
            (copies / name).write_bytes(data)
        elif data:
            add[_file_of(data, name.partition("/")[2].partition("-")[0])] = data
    if delete := [name for name in changed if name in names]:
        files.change(add, delete, "Erase rows")
    if not files.is_bucket:  # always: a former erasure may have broken off before it
        files.api.super_squash_history(files.id, repo_type="dataset")
    return removed


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
        self._damaged: list[str] = []
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
            rows = f"{state.unsent:,} row{'s' * (state.unsent != 1)}"
            where = self._workspace.preferences
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
            notes = [] if is_private else [f"{self._files.target} is public: everybody can read the labels in it"]
            notes += [f"{name} is not a file of this app: skipped" for name in others]
            notes += [f"{len(gone)} of its files were deleted: their rows are not sent again"] if gone else []
            found: list[Row] = []
            sent: set[str] = set()
            for name in (name for name in (*names, *gone) if name not in self._known):
                rows, bad = _rows_in(self._copies / name)
                sent.update(row["id"] for row in rows)
                found += rows if name in names else []
                self._damaged += [f"{name}: lines that are not rows, skipped: {bad}"] if bad else []
            if found:
                append_all(self._workspace, [Judgment(**row | {"meta": JudgmentMeta(**row["meta"])}) for row in found])
        self._acknowledge(sent, {*names, *gone})
        self._notes = (*notes, *self._damaged)

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
