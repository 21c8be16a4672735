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
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path

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


def audit(root: Path, action: str, **facts: str) -> None:
    """Add who did what, and when, to the workspace's audit.jsonl. A full disk does not stop the action; the log says so."""
    who = caller()
    row = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "by": who.name or who.role.name, "action": action, **facts}
    try:
        with (root / "audit.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as exc:
        log.warning("Not written to audit.jsonl (%s): %s", exc, row)
