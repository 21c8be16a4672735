"""Where a benchmark's rows come from: a folder of DATA_DIR in the upstream format, or the Hub. None comes with us."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biasdpo.data.importing import SourceRow, rows_of
from biasdpo.errors import DatasetError

_TABLES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Origin:
    """Of one benchmark: its folder in DATA_DIR, and where the Hub has it.

    configs   of the Hub data set; "" stands for its only one
    """

    folder: str
    hub_id: str
    split: str
    configs: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class Row:
    """One row, and where it stands: the file, config or type it is of, and its line."""

    source: str
    line: int
    value: dict[str, Any]
    where: str  # for messages
    hub_id: str

    def text(self, *names: str) -> str:
        """The text in the first of these columns that the row has; none is a DatasetError."""
        value = self.get(*names)
        if not isinstance(value, str) or not value.strip():
            raise self.fault(f"column {names[0]!r} is {type(value).__name__} {value!r:.40}, not a text")
        return value

    def get(self, *names: str) -> Any:
        """The value in the first of these columns that the row has; none is a DatasetError."""
        for name in names:
            if name in self.value:
                return self.value[name]
        raise self.fault(f"no column {' or '.join(map(repr, names))} (has {', '.join(map(str, self.value)) or 'none'})")

    def fault(self, what: str) -> DatasetError:
        """The error of a row that is not as upstream has it."""
        return DatasetError(f"{self.where}: {what}; get {self.hub_id} again, in its upstream format")


@dataclass(frozen=True)
class Rows:
    """Rows, and the SHA-256 of the files' names and bytes ("" from the Hub)."""

    rows: tuple[Row, ...]
    sha256: str


def load_rows(origin: Origin, data_dir: Path | None) -> Rows:
    """The rows of every table in DATA_DIR/FOLDER in the order of the files' names; of the Hub where DATA_DIR is None."""
    if data_dir is None:
        return Rows(tuple(_hub_rows(origin)), "")
    files = find_files(origin, data_dir, _TABLES)
    rows: list[Row] = []
    for file in files:
        for found in rows_of(file):
            where = f"{file}, line {found.line}"
            if not isinstance(found, SourceRow):
                raise DatasetError(f"{where}: {found.reason}; get {origin.hub_id} again, in its upstream format")
            rows.append(_row(file.stem, found.line, found.value, where, origin))
    if not rows:
        raise DatasetError(f"{files[0]} has no rows: get {origin.hub_id} again, in its upstream format")
    return Rows(tuple(rows), sha256_of_files(files))


def find_files(origin: Origin, data_dir: Path, endings: Iterable[str]) -> list[Path]:
    """The files of DATA_DIR/FOLDER that end so; none is a DatasetError that says where it looked and what to get."""
    folder = data_dir / origin.folder
    files = sorted(file for file in folder.glob("*") if file.name.endswith(tuple(endings))) if folder.is_dir() else []
    if not files:
        what = f"no {' or '.join(sorted(endings))} file in {folder}" if folder.is_dir() else f"no folder {folder.absolute()}"
        raise DatasetError(
            f"No items of {origin.folder}: {what}; get {origin.hub_id} from the Hub, and name with --data-dir the folder that "
            f"holds {origin.folder}/"
        )
    return files


def sha256_of_files(files: Sequence[Path]) -> str:
    """Of the files' names and bytes, in order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _hub_rows(origin: Origin) -> Iterable[Row]:
    from datasets import load_dataset

    for config in origin.configs:
        name = f"{origin.hub_id}{f' ({config})' if config else ''}"
        try:
            table = load_dataset(origin.hub_id, config or None, split=origin.split)
        except Exception as exc:  # datasets raises a dozen unrelated kinds, all of which mean "not to be had"
            reason = str(exc).strip().split("\n")[0][:160] or type(exc).__name__
            raise DatasetError(
                f"Can't load {name} from the Hub: {reason}; check the network, or name with --data-dir the folder that holds "
                f"{origin.folder}/"
            ) from exc
        for number, value in enumerate(table, start=1):
            yield _row(config, number, value, f"{name}, row {number}", origin)


def _row(source: str, line: int, value: Any, where: str, origin: Origin) -> Row:
    row = Row(source, line, value if isinstance(value, dict) else {}, where, origin.hub_id)
    if not isinstance(value, dict):
        raise row.fault(f"{type(value).__name__}, not an object")
    return row
