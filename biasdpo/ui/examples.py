"""The example prompts by category (assets/prompts.jsonl)."""

from __future__ import annotations

import json

from biasdpo.workspace import ASSETS


def by_category() -> dict[str, list[str]]:
    """Prompts by category, in the file's order."""
    found: dict[str, list[str]] = {}
    for line in (ASSETS / "prompts.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["category"], []).append(row["prompt"])
    return found
