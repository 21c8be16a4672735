"""Reads a benchmark's rows, from a folder of DATA_DIR in the upstream format or from the Hub. No benchmark data is shipped."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.constants import HF_HOME

from biasdpo.data.importing import SourceRow, rows_of
from biasdpo.errors import DatasetError

Item = TypeVar("Item")

_TABLES = (".jsonl", ".json", ".csv", ".parquet")
_NO_ITEMS = ("dataset_infos.json", "dataset_info.json", "state.json", "additional_metadata.csv", "prompts.csv")
_HUB_FILE = re.compile(r"(?:(?:^|/)(?P<config>[^/]+)/)?(?P<split>[a-z]+)(?:-\d{5}-of-\d{5}|/\d{4})\.\w+$")


@dataclass(frozen=True)
class Origin:
    """Where a benchmark's rows are: its folder in DATA_DIR, and its Hub dataset with split and configs ("": the only one).

    repository   on GitHub, where the Hub has the rows in another form
    """

    folder: str
    hub_id: str
    split: str
    configs: tuple[str, ...] = ("",)
    repository: str = ""

    @property
    def download(self) -> str:
        """The command that gets files that can be read here."""
        command = f"hf download {self.hub_id} --repo-type dataset --local-dir"
        if self.repository:
            command = f"git clone https://github.com/{self.repository}"
        return f"`{command} DIR/{self.folder}`, where DIR is the --data-dir"

    @property
    def again(self) -> str:
        """The remedy for files that are not as upstream has them."""
        return f"empty that folder, then get it again with {self.download}"


@dataclass(frozen=True)
class Row:
    """One row with its location.

    source   stem of the file or name of the Hub config it is from
    where    file and line, for error messages
    """

    source: str
    value: dict[str, Any]
    where: str
    origin: Origin

    def text(self, *names: str) -> str:
        """The text in the first of these columns that exists. Raises DatasetError if there is none."""
        value = self.get(*names)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"column {names[0]!r} is {type(value).__name__} {value!r:.40}, not a text")
        return value

    def get(self, *names: str) -> Any:
        """The value in the first of these columns that exists. Raises DatasetError if there is none."""
        for name in names:
            if name in self.value:
                return self.value[name]
        raise self.error(f"no column {' or '.join(map(repr, names))} (has {', '.join(map(str, self.value)) or 'none'})")

    def error(self, problem: str) -> DatasetError:
        """The error for a row that differs from the upstream format."""
        return DatasetError(f"{self.where}: {problem}; {self.origin.again}")


def is_present(origin: Origin, data_dir: Path | None) -> bool:
    """Whether DATA_DIR has the folder, or, if it is None, the cache of `datasets` the dataset."""
    if data_dir is not None:
        return (data_dir / origin.folder).is_dir()
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets").expanduser()
    return (cache / origin.hub_id.replace("/", "___")).is_dir()


def load_items(origin: Origin, data_dir: Path | None, parse: Callable[[Row], Item]) -> tuple[list[Item], str]:
    """`load_rows` with every row parsed."""
    rows, sha256 = load_rows(origin, data_dir)
    return [parse(row) for row in rows], sha256


def load_rows(origin: Origin, data_dir: Path | None) -> tuple[list[Row], str]:
    """The rows of every table in DATA_DIR/FOLDER, ordered by file name, and the SHA-256 of the files' names and bytes. From the
    Hub, with "", if DATA_DIR is None."""
    if data_dir is None:
        return list(_hub_rows(origin)), ""
    files = find_files(origin, data_dir, _TABLES)
    rows = [row for file in files for row in read_rows(file, origin)]
    if not rows:
        raise DatasetError(f"{files[0]} has no rows; {origin.again}")
    return rows, sha256_of_files(files)


def read_rows(file: Path, origin: Origin) -> Iterator[Row]:
    """The rows of one table. Raises DatasetError at the first that can't be read."""
    source = next((c for c in origin.configs if c and (c in file.parts or file.stem.startswith(c))), file.stem)
    for found in rows_of(file):
        where = f"{file}, line {found.line}"
        if not isinstance(found, SourceRow):
            raise DatasetError(f"{where}: {found.reason}; {origin.again}")
        yield _row(source, found.value, where, origin)


def read_text(file: Path, origin: Origin) -> str:
    """The text of an upstream file that is no table. Raises DatasetError if it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise DatasetError(f"Can't read {file} as UTF-8 text: {exc}; {origin.again}") from exc


def find_files(origin: Origin, data_dir: Path, endings: Iterable[str]) -> list[Path]:
    """The files of DATA_DIR/FOLDER with these endings: in it, in its folder `data`, or else anywhere below, as in a copy of a
    repository. Of a Hub dataset's, those of the split and the configs. Raises DatasetError, with what to get, if there are none.
    """
    folder = data_dir / origin.folder
    below = {file: file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()}
    below = {
        file: path
        for file, path in below.items()
        if path.name.endswith(tuple(endings)) and path.name not in _NO_ITEMS and not any(p.startswith(".") for p in path.parts)
    }
    near = [[file for file, path in below.items() if path.parent == Path(parent)] for parent in (".", "data")]
    files = near[0] or near[1] or list(below)
    hub = {file: found for file in files if (found := _HUB_FILE.search(below[file].as_posix()))}
    for part, wanted in (("split", (origin.split,)), ("config", origin.configs)):
        if any(found[part] in wanted for found in hub.values()):
            hub = {file: found for file, found in hub.items() if found[part] in wanted}
    files = [file for file in files if file in hub or not _HUB_FILE.search(below[file].as_posix())]
    if not files:
        what = f"no {' or '.join(sorted(endings))} file in {folder}" if folder.is_dir() else f"no folder {folder.absolute()}"
        raise DatasetError(
            f"No items of {origin.folder}: {what}; get them with {origin.download}, or leave it out to use the Hub"
        )
    return files


def sha256_of_files(files: Sequence[Path]) -> str:
    """Hex SHA-256 over the files' names and bytes, in order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _hub_rows(origin: Origin) -> Iterator[Row]:
    from datasets import load_dataset

    for config in origin.configs:
        name = f"{origin.hub_id}{f' ({config})' if config else ''}"
        try:
            table = load_dataset(origin.hub_id, config or None, split=origin.split)
        except Exception as exc:  # datasets raises a dozen unrelated kinds
            reason = str(exc).strip().split("\n")[0][:160] or type(exc).__name__
            raise DatasetError(
                f"Can't load {name} from the Hub: {reason}; check the network, or get it with {origin.download}"
            ) from exc
        for number, value in enumerate(table, start=1):
            yield _row(config, value, f"{name}, row {number}", origin)


def _row(source: str, value: Any, where: str, origin: Origin) -> Row:
    row = Row(source, value if isinstance(value, dict) else {}, where, origin)
    if not isinstance(value, dict):
        raise row.error(f"{type(value).__name__}, not an object")
    return row
