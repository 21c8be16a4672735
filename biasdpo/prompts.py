"""Prompts to judge: shipped examples, templates times groups, own lists, the dataset's own; and those of the live probe."""

from __future__ import annotations

import logging
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from biasdpo.config import TrainConfig
from biasdpo.data.importing import Read, rows_of
from biasdpo.data.journal import BadLine
from biasdpo.data.pairs import text_fault
from biasdpo.data.summary import Cell
from biasdpo.errors import DatasetError, PromptError
from biasdpo.workspace import ASSETS

logger = logging.getLogger(__name__)

CATEGORIES = ("gender", "race", "religion", "other")
MAX_PROMPTS = 5_000  # of one list: more than anybody judges, and still shown by a page
_PLACEHOLDER = re.compile(r"\{(group|trait)\}")


@dataclass(frozen=True)
class Prompt:
    """A prompt to judge, with the cell of the coverage matrix that it would fill; "" if unknown."""

    text: str
    category: str = ""
    target_group: str = ""

    @property
    def cell(self) -> Cell:
        return self.category, self.target_group


def shipped() -> list[Prompt]:
    """The example prompts of assets/prompts.jsonl, in order; damaged lines are logged and skipped."""
    found = []
    for row in rows_of(ASSETS / "prompts.jsonl"):
        try:
            found.append(_prompt_of(row, "assets/prompts.jsonl"))
        except DatasetError as exc:
            logger.warning("Skipped a prompt: %s", exc)
    return found


def by_category() -> dict[str, list[str]]:
    """The texts of the example prompts by category, in order."""
    found: dict[str, list[str]] = {}
    for prompt in shipped():
        found.setdefault(prompt.category, []).append(prompt.text)
    return found


def group_lists() -> dict[str, dict[str, list[str]]]:
    """By category: the `groups` and `traits` that the template editor starts with (assets/groups.toml)."""
    return tomllib.loads((ASSETS / "groups.toml").read_text(encoding="utf-8"))


def of_text(text: str) -> list[Prompt]:
    """One prompt per line, without empty lines and repeats. PromptError if none is left."""
    return _checked(Prompt(line.strip()) for line in text.splitlines())


def of_file(path: Path) -> list[Prompt]:
    """Prompts of an uploaded list: text (one per line), or JSONL or CSV with a column `prompt` and optionally `category` and
    `target_group`. Any other file is a DatasetError."""
    if path.suffix.lower() in (".jsonl", ".csv"):
        return _checked(_prompt_of(row, path.name) for row in rows_of(path))
    try:
        return of_text(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as exc:
        raise DatasetError(f"{path.name} is not UTF-8 text: save it as UTF-8, one prompt per line") from exc


def of_rows(rows: Iterable[Mapping[str, Any]]) -> list[Prompt]:
    """The dataset's own prompts with their first rows' category and group: at most MAX_PROMPTS, least-covered cells first."""
    own: dict[str, Prompt] = {}
    for row in rows:
        if row["prompt"] and row["prompt"] not in own:
            own[row["prompt"]] = Prompt(row["prompt"], known_category(row["category"]), row["target_group"])
    return _checked(least_covered(list(own.values()), {})[:MAX_PROMPTS])


def least_covered(prompts: Sequence[Prompt], counts: Mapping[Cell, int]) -> list[Prompt]:
    """Order prompts so that the next one always comes from the cell with the fewest judgments.

    A prompt counts as judged once it is offered, so that the cells fill side by side. Ties, and prompts of one cell, keep their
    order.
    """
    filled = Counter(counts)
    judged = []  # in each prompt's cell, once it is offered
    for prompt in prompts:
        judged.append(filled[prompt.cell])
        filled[prompt.cell] += 1
    return [prompts[place] for place in sorted(range(len(prompts)), key=judged.__getitem__)]


def known_category(category: str) -> str:
    """One of CATEGORIES, whatever a foreign file calls it: unknown ones become "other"; "" stays."""
    folded = category.strip().casefold()
    return folded if folded in ("", *CATEGORIES) else "other"


def known(text: str) -> Prompt:
    """A prompt with what is known of it: a shipped example has its category."""
    return next((prompt for prompt in shipped() if prompt.text == text), Prompt(text))


def probe_prompts(config: TrainConfig) -> list[dict[str, str]]:
    """The prompts of the live probe ({prompt, category}): the config's, or else the first shipped one of each trained category;
    none if there is no probe."""
    if not config.probe_every:
        return []
    chosen = [known(text) for text in config.probe_prompts]
    if not chosen:
        examples = shipped()
        chosen = [next(p for p in examples if p.category == category) for category in ("gender", "race", "religion")]
    return [{"prompt": prompt.text, "category": prompt.category} for prompt in chosen]


def expand(template: str, groups: Sequence[str], traits: Sequence[str], category: str) -> list[Prompt]:
    """Every combination of a template with `{group}` and, if it has one, `{trait}`. PromptError if it has no `{group}`."""
    if "{group}" not in template:
        raise PromptError(
            f"The template has no {{group}}: got {template[:60]!r}; write one, such as 'Why are {{group}} {{trait}}?'"
        )
    groups, traits = _distinct(groups), _distinct(traits)
    if not groups:
        raise PromptError("No groups: write one per line, or choose a category that has some")
    if "{trait}" not in template:
        traits = [""]
    elif not traits:
        raise PromptError("The template has a {trait}, but no traits are given: write one per line, or take {trait} out")
    _check_count(len(groups) * len(traits))
    made = []
    for trait, group in product(traits, groups):
        # In one pass: a group that contains "{trait}" is not substituted again.
        pieces = _PLACEHOLDER.split(template)
        text = "".join({"group": group, "trait": trait}[piece] if i % 2 else piece for i, piece in enumerate(pieces))
        made.append(Prompt(text, category, group))
    return _checked(made)


def _distinct(lines: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(stripped for line in lines if (stripped := line.strip())))


def _prompt_of(row: Read, name: str) -> Prompt:
    if isinstance(row, BadLine):
        raise DatasetError(f"{name}, line {row.line}: {row.reason}; fix or drop the line")
    value = row.value if isinstance(row.value, Mapping) else {}
    prompt = value.get("prompt")
    if not isinstance(prompt, str):
        raise DatasetError(f"{name}, line {row.line}: no text in a column `prompt`; name the column of prompts `prompt`")
    category, group = (text if isinstance(text := value.get(key), str) else "" for key in ("category", "target_group"))
    return Prompt(prompt.strip(), known_category(category), group)


def _check_count(count: int) -> None:
    if count > MAX_PROMPTS:
        raise PromptError(f"{count:,} prompts are too many for one list: give at most {MAX_PROMPTS:,}")


def _checked(found: Iterable[Prompt]) -> list[Prompt]:
    """Each prompt once, none empty, all fit to be stored."""
    prompts: dict[str, Prompt] = {}
    for prompt in found:
        if prompt.text:
            prompts.setdefault(prompt.text, prompt)
            _check_count(len(prompts))
    if not prompts:
        raise PromptError("No prompts: write one per line")
    for text in prompts:
        if fault := text_fault(text, "prompt"):
            raise PromptError(f"This list: {fault}; fix or drop the prompt")
    return list(prompts.values())
