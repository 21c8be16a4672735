"""Where things lie on disk: the workspace folder, ids, hashes, atomic writes, locks."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from biasdpo.errors import ConfigError, WorkspaceError

_PACKAGE = Path(__file__).resolve().parent
ASSETS = next(path for path in (_PACKAGE.parent / "assets", _PACKAGE / "assets") if (path / "models.toml").is_file())
"""In a checkout beside the package, installed in it."""
PRIVACY = ASSETS.parent / "docs" / "privacy.md"
"""What is stored about people; the page links it."""
MAX_JSON_BYTES = 256 * 1024 * 1024
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
os.umask(_UMASK := os.umask(0o077))  # it can only be read by being set


@dataclass(frozen=True)
class Workspace:
    """One folder that holds all a user makes; back it up and nothing is lost. Only `cache` may be deleted at any time."""

    root: Path

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def preferences(self) -> Path:
        return self.root / "preferences.jsonl"

    def run_folder(self, run_id: str) -> Path:
        """The folder of a run, whether it exists or not."""
        return self.runs / check_id(run_id, "run")


def is_id(text: str) -> bool:
    """Whether a text can be the id of a job. Ids are names of folders, never paths."""
    return _ID.fullmatch(text) is not None


def check_id(text: str, noun: str) -> str:
    """The id of a run, an evaluation or an export. Raises ConfigError for what can't be one."""
    if not is_id(text):
        raise ConfigError(
            f"{noun.capitalize()} ids have 1 to 64 letters, digits, '.', '_' or '-': got {text!r}; choose such a name"
        )
    return text


def nearest_id(text: str, length: int = 64) -> str:
    """The id that is most like a text; "" if none is."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:length]


def is_public_space() -> bool:
    """True on a Hugging Face Space, where every visitor is a stranger."""
    return bool(os.environ.get("SPACE_ID"))


def is_zerogpu() -> bool:
    """True on a ZeroGPU Space, in the app's own process: a GPU is lent to it for one call at a time (see `backends.zerogpu`)."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path, *, mode: int = 0o666 & ~_UMASK) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it takes `path`'s place, else it is removed.

    mode   permissions; by default what the process's umask leaves
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value so that a reader sees the old file or the new one, never half of either."""
    with replacing(path) as temporary:
        temporary.write_text(as_json(value), encoding="utf-8")


def as_json(value: Any) -> str:
    """The text of a JSON file of one value."""
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def read_json(path: Path) -> Any:
    """The JSON value in a file. A missing, damaged, too large or too deeply nested file is a WorkspaceError."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:
            raise ValueError(f"it has more than {MAX_JSON_BYTES // 2**20} MiB")
        return json.loads(content.decode("utf-8"))
    except FileNotFoundError as exc:
        raise WorkspaceError(f"No file {path}: it was moved or never written; restore it or make it again") from exc
    except (OSError, ValueError, RecursionError) as exc:
        reason = "it is nested too deeply" if isinstance(exc, RecursionError) else " ".join(str(exc).split())
        raise WorkspaceError(f"Can't read {path} as JSON: {reason}; restore it from a backup or delete it") from exc


@contextmanager
def locked(path: Path, timeout_seconds: float = 30.0) -> Iterator[None]:
    """Hold the lock that belongs to `path` (a file `path.lock` beside it), across processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(path.name + ".lock"), timeout=timeout_seconds)
    try:
        lock.acquire(poll_interval=0.002)
    except Timeout as exc:
        raise WorkspaceError(
            f"{path} has been locked by another process for {timeout_seconds:g} s; end that process, then try again"
        ) from exc
    except OSError as exc:
        raise WorkspaceError(f"Can't lock {path}: {exc.strerror or exc}; make its folder writable, then try again") from exc
    try:
        yield
    finally:
        lock.release()
