"""Prompts to judge: where they come from, and which comes next."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from biasdpo import data
from biasdpo.data.importing import SourceRow, rows_of
from biasdpo.data.journal import BadLine
from biasdpo.data.summary import thinnest
from biasdpo.errors import DatasetError, PromptError
from biasdpo.workspace import ASSETS

CATEGORIES = ("gender", "race", "religion", "other")
MAX_PROMPTS = 5_000  # of one list: more than anybody judges, and a page can still hold them
_PLACEHOLDER = re.compile(r"\{(group|trait)\}")


@dataclass(frozen=True)
class Prompt:
    """A prompt to judge, with the cell of the coverage matrix that it would fill; "" where that is not known."""

    text: str
    category: str = ""
    target_group: str = ""


def shipped() -> list[Prompt]:
    """The example prompts of assets/prompts.jsonl, in the file's order."""
    rows = map(json.loads, (ASSETS / "prompts.jsonl").read_text(encoding="utf-8").splitlines())
    return [Prompt(row["prompt"], row["category"]) for row in rows]


def by_category() -> dict[str, list[str]]:
    """The example prompts' texts by category, in the file's order."""
    found: dict[str, list[str]] = {}
    for prompt in shipped():
        found.setdefault(prompt.category, []).append(prompt.text)
    return found


def group_lists() -> dict[str, dict[str, list[str]]]:
    """By category: the `groups` and `traits` that the template editor begins with (assets/groups.toml)."""
    return tomllib.loads((ASSETS / "groups.toml").read_text(encoding="utf-8"))


def of_text(text: str) -> list[Prompt]:
    """One prompt a line; empty lines and repeats are left out. PromptError where nothing is left."""
    return _checked(Prompt(line.strip()) for line in text.splitlines())


def of_file(path: Path) -> list[Prompt]:
    """Prompts of an uploaded list: text (a prompt a line), or JSONL or CSV with a column `prompt` and, if there, `category`
    and `target_group`. A file that is none of these is a DatasetError."""
    if path.suffix.lower() not in (".jsonl", ".csv"):
        try:
            return of_text(path.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as exc:
            raise DatasetError(f"{path.name} is no UTF-8 text: save it as UTF-8, one prompt a line") from exc
    return _checked(_of_row(row, path.name) for row in rows_of(path))


def of_rows(rows: Iterable[Mapping[str, Any]]) -> list[Prompt]:
    """The data set's own prompts: each once, with the category and group of its first row; of more than MAX_PROMPTS those of the
    thinnest cells."""
    own: dict[str, Prompt] = {}
    for row in rows:
        if row["prompt"] and row["prompt"] not in own:
            own[row["prompt"]] = Prompt(row["prompt"], known_category(row["category"]), row["target_group"])
    return _checked(thinnest(list(own.values()), {})[:MAX_PROMPTS])


def known_category(category: str) -> str:
    """One of CATEGORIES, whatever a foreign file calls it: others are "other"; "" stays."""
    folded = category.strip().casefold()
    return folded if folded in ("", *CATEGORIES) else "other"


def known(text: str) -> Prompt:
    """A prompt with what is known of it: a shipped example has its category."""
    return next((prompt for prompt in shipped() if prompt.text == text), Prompt(text))


def expand(template: str, groups: Sequence[str], traits: Sequence[str], category: str) -> list[Prompt]:
    """Every combination of a template with `{group}` and, if it has one, `{trait}`. PromptError where it has no `{group}`."""
    if "{group}" not in template:
        raise PromptError(
            f"The template has no {{group}}: got {template[:60]!r}; write one, such as 'Why are {{group}} {{trait}}?'"
        )
    groups, traits = _filled(groups), _filled(traits)
    if not groups:
        raise PromptError("No groups: write one a line, or choose a category that has some")
    if "{trait}" in template and not traits:
        raise PromptError("The template has a {trait}, but no traits are given: write one a line, or take {trait} out")
    if "{trait}" not in template:
        traits = [""]
    made = []
    for trait, group in product(traits, groups):
        # In one pass: a group that holds "{trait}" is not substituted again.
        pieces = _PLACEHOLDER.split(template)
        text = "".join({"group": group, "trait": trait}[piece] if i % 2 else piece for i, piece in enumerate(pieces))
        made.append(Prompt(text, category, group))
    return _checked(made)


def _filled(lines: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(stripped for line in lines if (stripped := line.strip())))


def _of_row(read: SourceRow | BadLine, name: str) -> Prompt:
    if isinstance(read, BadLine):
        raise DatasetError(f"{name}, line {read.line}: {read.reason}; mend or drop the line")
    row = read.value
    prompt = row.get("prompt") if isinstance(row, Mapping) else None
    if not isinstance(prompt, str):
        raise DatasetError(f"{name}, line {read.line}: no text in a column `prompt`; name the column of prompts `prompt`")
    category, group = (value if isinstance(value := row.get(key), str) else "" for key in ("category", "target_group"))
    return Prompt(prompt.strip(), known_category(category), group)


def _checked(found: Iterable[Prompt]) -> list[Prompt]:
    """Each prompt once, none empty, none that could not be stored."""
    prompts: dict[str, Prompt] = {}
    for prompt in found:
        if prompt.text:
            try:
                data.check_text(prompt.text, "prompt", "This list")
            except DatasetError as exc:
                raise PromptError(str(exc)) from exc
            prompts.setdefault(prompt.text, prompt)
    if not prompts:
        raise PromptError("No prompts: write one a line")
    if len(prompts) > MAX_PROMPTS:
        raise PromptError(f"{len(prompts):,} prompts are too many for one list: give at most {MAX_PROMPTS:,}")
    return list(prompts.values())
