"""The rows of a file or a Hub data set, whatever its format, one by one; a row that can't be read is a `BadLine` among them.

Formats: JSONL, a JSON array, CSV (comma, semicolon, tab or bar; quoted line breaks) and Parquet, all UTF-8, with or without a
byte order mark. `.csv` and `.tsv` are CSV; Parquet shows by its first bytes; all else is JSON.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from biasdpo.dataset.csv_rows import csv_rows
from biasdpo.dataset.json_rows import array_items, json_lines
from biasdpo.dataset.rows import BOM, BadLine
from biasdpo.dataset.source_rows import NO_UTF8, SourceRow, bad_line
from biasdpo.errors import DatasetError

HUB = "hub:"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_PACKED = {b"PK\x03\x04": "a ZIP or Excel file", b"\x1f\x8b": "a gzip file", b"\x28\xb5\x2f\xfd": "a zstd file"}


def rows_of(source: str | Path) -> Iterator[SourceRow | BadLine]:
    """The rows of a file or of `hub:OWNER/NAME`. A source that has no rows to read at all (missing, a folder, packed, UTF-16, a
    CSV whose header names a column twice, a damaged Parquet file) is a DatasetError."""
    if str(source).startswith(HUB):
        for number, value in hub_rows(str(source).removeprefix(HUB)):
            yield SourceRow(number, value)
        return
    path = Path(os.path.expanduser(source))  # noqa: PTH111 (which, unlike Path's, leaves an unknown ~user alone)
    try:
        yield from _reader_of(path)(path)
    except OSError as exc:
        raise DatasetError(f"Can't read {path}: {exc.strerror or exc}; name a UTF-8 JSONL file, or CSV or Parquet") from exc


def hub_rows(name: str) -> list[tuple[int, Any]]:
    """Rows of a Hub data set's split `train`, else its first, with their numbers from 1."""
    from datasets import load_dataset

    try:
        splits = load_dataset(name)
        split = "train" if "train" in splits else next(iter(splits))
        return list(enumerate(splits[split], start=1))
    except Exception as exc:  # datasets raises a dozen unrelated kinds, all of which mean "not to be had"
        reason = str(exc).strip().split("\n")[0][:160] or type(exc).__name__
        raise DatasetError(f"Can't load {HUB}{name}: {reason}; check the name and the network, or name a JSONL file") from exc


def _reader_of(path: Path) -> Callable[[Path], Iterator[SourceRow | BadLine]]:
    if not path.exists():
        raise DatasetError(f"No dataset file {path}: check the path (or name hub:OWNER/NAME, or workspace)")
    if not path.is_file():
        raise DatasetError(f"{path} is no file; name a JSONL, JSON, CSV or Parquet file")
    with path.open("rb") as file:
        start = file.read(4096)
        file.seek(max(0, path.stat().st_size - 4096))
        end = file.read()
    for magic, what in _PACKED.items():
        if start.startswith(magic):
            raise DatasetError(f"{path} is {what}; unpack it, or save it as JSONL, CSV or Parquet")
    if start.startswith(_UTF16):
        raise DatasetError(f"{path} is UTF-16; save it as UTF-8")
    if start.startswith(b"PAR1"):
        return _parquet
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        raise DatasetError(f"{path} is no Parquet file, whatever its name says; rename it or make it again")
    if suffix in (".csv", ".tsv"):
        return csv_rows
    is_array = start.removeprefix(BOM).lstrip().startswith(b"[") and (suffix == ".json" or end.rstrip().endswith(b"]"))
    return array_items if is_array else json_lines


def _parquet(path: Path) -> Iterator[SourceRow | BadLine]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise DatasetError(f"{path} has the column {twice[0][:60]!r} twice; rename one of them")
            for batch in file.iter_batches(batch_size=1024):
                for i in range(batch.num_rows):
                    number += 1
                    try:
                        yield SourceRow(number, batch.slice(i, 1).to_pylist()[0])
                    except UnicodeDecodeError:
                        yield bad_line(number, NO_UTF8)
    except pyarrow.ArrowException as exc:
        reason = str(exc).strip().split("\n")[0][:160]
        raise DatasetError(f"Can't read {path} as Parquet: {reason}; make it again") from exc
