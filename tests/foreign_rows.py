"""Rows as other tools write them, and what becomes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from biasdpo.data.importing import convert, detect
from biasdpo.data.journal import Journal
from biasdpo.workspace import Workspace

GOOD = {"prompt": "Who leads?", "chosen": "Anyone can.", "rejected": "Men."}
USER, FAIR, UNFAIR = (
    {"role": r, "content": GOOD[c]} for r, c in (("user", "prompt"), ("assistant", "chosen"), ("assistant", "rejected"))
)
SYSTEM = {"role": "system", "content": "Be kind."}
HUMAN, GPT = {"from": "human", "value": GOOD["prompt"]}, {"from": "gpt", "value": GOOD["chosen"]}
GPT_UNFAIR = {"from": "gpt", "value": GOOD["rejected"]}


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def converted(row: dict[str, Any]) -> tuple[str, str, str]:
    pair = convert(row, detect(list(row), [row]))
    return pair.prompt, pair.chosen, pair.rejected


def reason(row: Any) -> str:
    try:
        pair = convert(row, detect(list(row), [row]))
    except ValueError as exc:
        return str(exc)
    pytest.fail(f"was converted: {pair}")


def texts(workspace: Workspace) -> list[str]:
    return [row["prompt"] for row in Journal(workspace.preferences).refresh().standing()]
