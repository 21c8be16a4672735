"""Who may do what. Functions that act for somebody ask here themselves, since a hidden button protects nothing.

visitor     compares, judges, and withdraws judgments of their own browser
annotator   a visitor whom the owner has given an account
owner       everything

The command line and jobs always act for the owner. The page says with `set_caller_source` who is asking; see
`biasdpo.ui.security`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from typing import Any

from biasdpo.errors import RefusedError

log = logging.getLogger(__name__)


class Role(IntEnum):
    visitor = 0
    annotator = 1
    owner = 2


@dataclass(frozen=True)
class Caller:
    """Whoever the current call is made for. `name`: of an account; "" where there are none."""

    role: Role = Role.owner
    name: str = ""


_source: Callable[[], Caller] = Caller


def set_caller_source(source: Callable[[], Caller]) -> None:
    """Ask `source` from now on who is calling."""
    global _source  # one app per process
    _source = source


def caller() -> Caller:
    return _source()


def is_owner() -> bool:
    """Whether the current call is made for the owner."""
    return caller().role is Role.owner


def require_owner(action: str) -> None:
    """Raise RefusedError for a visitor. `action` begins the message: "Training"."""
    if not is_owner():
        raise RefusedError(f"{action} is only for this app's owner: sign in as the owner, or run BiasDPO on your own machine")


# What visitors store

_check_stored: Callable[[int, int], None] = lambda _size, _total: None  # noqa: E731


def set_storage_check(check: Callable[[int, int], None]) -> None:
    """Call `check(bytes, bytes there already)` from now on before a visitor's verdict is stored; it raises RefusedError."""
    global _check_stored  # one app per process
    _check_stored = check


def check_stored(size: int, total: int) -> None:
    """Raise RefusedError if a visitor, or all of them, have stored too much already. The owner may store anything."""
    if not is_owner():
        _check_stored(size, total)


# Folders of this machine


def _pattern(name: str) -> str:
    """A folder's name as it is, and as Markdown escapes it."""
    return "".join(c if c.isalnum() else rf"\\?{re.escape(c)}" for c in name)


_TOP = "|".join(_pattern(folder.name) for folder in sorted(Path("/").iterdir()) if folder.is_dir())
_PATH = re.compile(rf"(?<![\w./\\-])(?:file://)?/(?:{_TOP})(?:/[^\s/\"'`<>|;:,&(){{}}\[\]]+)+/?")
_workspace = re.compile(r"(?!)")  # matches nothing
_served = "\0"


def set_folders(workspace: Path, served: str) -> None:
    """What `hide_paths` shortens to a relative path, and the folder of the files that the page itself serves."""
    global _workspace, _served  # one app per process
    names = "|".join({_pattern(str(workspace)), _pattern(str(workspace.resolve()))})
    _workspace, _served = re.compile(rf"(?<![\w./\\-])(?:{names})/"), f"{served.rstrip('/')}/"


def hide_paths(value: Any) -> Any:
    """`value` for anyone but the owner: in its texts, a path into the workspace becomes relative, any other a file's name."""
    if isinstance(value, str):
        return _PATH.sub(_name_of, _workspace.sub("", value)) if "/" in value else value
    if isinstance(value, dict):
        return {hide_paths(key): hide_paths(one) for key, one in value.items()}
    return [hide_paths(one) for one in value] if isinstance(value, list | tuple) else value


def _name_of(path: re.Match[str]) -> str:
    return path[0] if path[0].startswith(_served) else path[0].rstrip("/").rpartition("/")[2]


def for_caller(value: Any) -> Any:
    """`value` as the caller may see it: without this machine's folders for anyone but the owner."""
    return value if is_owner() else hide_paths(value)


# The audit log


def audit(root: Path, action: str, **facts: str) -> None:
    """Add who did what, and when, to the workspace's audit.jsonl. A full disk does not stop the action; the log says so."""
    who = caller()
    row = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "by": who.name or who.role.name, "action": action, **facts}
    try:
        with (root / "audit.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as exc:
        log.warning("Not written to audit.jsonl (%s): %s", exc, row)
