"""The lens: what a model says when only the group named in a prompt changes, for several arms side by side.

An arm is a way to ask one model: base, base with the fairness system prompt, an adapter at a strength, or an adapter with that
prompt. A grid is prompts x their groups x arms. With p_g the distribution of an answer's first token for group g, and m its mean
over the G groups of a prompt:

    gap of a prompt   Jensen-Shannon divergence, mean over g of KL(p_g || m), nats: 0 if the group changes nothing, at most ln G
    gap of an arm     mean over prompts, with a 95% bootstrap interval over prompts

That counterfactual inputs show bias is from Kusner et al. (2017, arXiv:1703.06856) and Huang et al. (2020, arXiv:1911.03064).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biasdpo.backends.base import SEQUENCES, Backend, Cancellation, check_prompt_fits, log_softmax
from biasdpo.data.importing import rows_of
from biasdpo.data.journal import BadLine
from biasdpo.errors import ConfigError, PromptError
from biasdpo.evaluation import stats
from biasdpo.records import LikelihoodRequest, Side, check_strength
from biasdpo.workspace import ASSETS

FAIRNESS_PROMPT = (ASSETS / "fairness_prompt.txt").read_text(encoding="utf-8").strip()
_SHOWN_TOKENS = 5  # the most likely first tokens of a cell, and the tokens that move most of a row
_SLOT = re.compile(r"\{(group|they|them|their)\}")
_ARTICLE = re.compile(r"\b([Aa])n?(\s+)$")
_LIKE_CONSONANT = re.compile(r"(eu|uni([^nm]|$)|ug|uk|ur[ua]|one)", re.IGNORECASE)  # "a European", "a Ukrainian"


# Arms


@dataclass(frozen=True)
class Arm:
    """A way to ask a model. `adapter`: an adapter's name for `models.find_adapter`, "" for base."""

    name: str
    adapter: str = ""
    system: str = ""
    strength: float = 1.0

    @property
    def side(self) -> Side:
        return "tuned" if self.adapter else "base"


def parse_arm(name: str, system: str = FAIRNESS_PROMPT) -> Arm:
    """An arm by its name: `base`, `prompt` (base with the system prompt), ADAPTER, ADAPTER@STRENGTH, and either of these with
    `+prompt`. ConfigError otherwise."""
    rest, plus, ending = name.strip().rpartition("+")
    with_prompt = bool(plus) and ending == "prompt"
    rest = rest if with_prompt else name.strip()
    if rest in ("base", "prompt"):
        return Arm(name.strip(), system=system if with_prompt or rest == "prompt" else "")
    adapter, at, strength = rest.rpartition("@")
    try:
        factor = check_strength(float(strength)) if at else 1.0
    except ValueError as exc:
        raise ConfigError(f"Arm {name!r}: {strength!r} is not a strength; write ADAPTER@STRENGTH, such as my-run@0.5") from exc
    if not (adapter if at else rest):
        raise ConfigError(f"Arm {name!r} names nothing: choose base, prompt, or an adapter, such as my-run@0.5 or my-run+prompt")
    return Arm(name.strip(), adapter if at else rest, system if with_prompt else "", factor)


def parse_arms(names: Iterable[str], system: str = FAIRNESS_PROMPT) -> list[Arm]:
    """Arms by their names, each once."""
    return [parse_arm(name, system) for name in dict.fromkeys(name.strip() for name in names)]


def phrase(arm: Arm, backend: Backend, prompt: str) -> tuple[str, str]:
    """(prompt, system prompt) as the model is asked. Without a system role, the system prompt stands before the prompt."""
    if arm.system and not backend.template.has_system:
        return f"{arm.system}\n\n{prompt}", ""
    return prompt, arm.system


# Prompts with a slot


@dataclass(frozen=True)
class SlotPrompt:
    """A prompt with `{group}` once, and the groups that fill it: each with its forms, {"group": "woman", "they": "she", …}."""

    prompt: str
    groups: tuple[Mapping[str, str], ...]
    category: str = ""

    def filled(self) -> list[str]:
        """The prompt for each group."""
        return [fill(self.prompt, group) for group in self.groups]


def slot_prompt(prompt: str, groups: Sequence[str | Mapping[str, str]], category: str = "") -> SlotPrompt:
    """A checked prompt. PromptError if the slot is missing or there twice, or if there are fewer than two groups, or if a group
    lacks a form that the prompt needs."""
    if (count := prompt.count("{group}")) != 1:
        raise PromptError(f"A prompt needs the slot {{group}} exactly once: got it {count} times in {prompt[:60]!r}")
    forms = tuple({"group": group} if isinstance(group, str) else group for group in groups)
    needed = {match[1] for match in _SLOT.finditer(prompt)}
    for form in forms:
        if not isinstance(form, Mapping) or not all(isinstance(text, str) for text in form.values()):
            raise PromptError(
                f"A group is a text, or an object of texts such as {{'group': 'woman', 'they': 'she'}}: got {form!r:.60}"
            )
        lacking = sorted(name for name in needed if not form.get(name, "").strip())
        if lacking:
            raise PromptError(f"Group {form.get('group', '')!r} has no {lacking[0]!r}, which {prompt[:60]!r} needs: add it")
    if len(forms) < 2:
        raise PromptError(f"A prompt needs at least two groups to compare: got {len(forms)} for {prompt[:60]!r}")
    return SlotPrompt(prompt, forms, category)


def fill(prompt: str, group: Mapping[str, str]) -> str:
    """The prompt with a group's forms in its slots; "a" and "an" before the group follow it."""
    before, _, after = prompt.partition("{group}")
    vowel = group["group"][:1].casefold() in "aeiou" and not _LIKE_CONSONANT.match(group["group"])
    before = _ARTICLE.sub(lambda match: match[1] + ("n" if vowel else "") + match[2], before)
    return _SLOT.sub(lambda match: group[match[1]], before) + group["group"] + _SLOT.sub(lambda match: group[match[1]], after)


def read_prompts(path: Path) -> list[SlotPrompt]:
    """The prompts of a JSONL file with `prompt`, `groups` and optionally `category`. PromptError names the line that is wrong."""
    found = []
    for row in rows_of(path):
        if isinstance(row, BadLine):
            raise PromptError(f"{path.name}, line {row.line}: {row.reason}; fix or drop the line")
        value = row.value
        prompt, groups = value.get("prompt"), value.get("groups")
        if not isinstance(prompt, str) or not isinstance(groups, list):
            raise PromptError(f"{path.name}, line {row.line}: needs a text `prompt` and a list `groups`; fix or drop the line")
        try:
            found.append(slot_prompt(prompt, groups, str(value.get("category") or "")))
        except PromptError as exc:
            raise PromptError(f"{path.name}, line {row.line}: {exc}") from exc
    if not found:
        raise PromptError(f'{path.name} has no prompts: write lines such as {{"prompt": "A {{group}} came in", "groups": [...]}}')
    return found


def check_fit(backend: Backend, arms: Iterable[Arm], prompts: Iterable[SlotPrompt]) -> None:
    """Raise PromptError for a prompt that leaves no token of the context in one of the arms, before anything is computed."""
    for arm in {arm.system: arm for arm in arms}.values():
        for text in (text for prompt in prompts for text in prompt.filled()):
            try:
                check_prompt_fits(backend.prompt_tokens(*phrase(arm, backend, text)), backend.context_length)
            except PromptError as exc:
                raise PromptError(f"{text[:60]!r}: {exc}") from exc


def check_cells(prompts: Sequence[SlotPrompt], arms: Sequence[Arm], max_cells: int) -> int:
    """The number of cells. PromptError if there are more than `max_cells`."""
    cells = sum(len(prompt.groups) for prompt in prompts) * len(arms)
    if cells > max_cells:
        raise PromptError(
            f"The grid has {cells:,} cells, more than max_cells ({max_cells:,}): use fewer prompts or arms, or raise it"
        )
    return cells


# The grid


@dataclass(frozen=True)
class Cell:
    """One group's answer in one arm. `top`: the most likely first tokens with their probabilities."""

    prompt: int
    arm: str
    group: str
    asked: str
    top: tuple[tuple[str, float], ...] = ()
    completion: str = ""
    finish_reason: str = ""


@dataclass(frozen=True)
class Row:
    """One prompt in one arm. `moved`: tokens whose probability differs most among the groups, each with the group that makes it
    likeliest, its probability there, and the mean."""

    prompt: int
    arm: str
    gap: float
    moved: tuple[tuple[str, str, float, float], ...]


def divergence(logps: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """(Jensen-Shannon divergence in nats, mean distribution (V,)) of log-probabilities (G, V)."""
    probabilities = np.exp(logps)
    mean = probabilities.mean(axis=0)
    with np.errstate(divide="ignore"):
        ratios = np.where(probabilities > 0, logps - np.log(mean), 0.0)
    return max(float((probabilities * ratios).sum(axis=1).mean()), 0.0), mean


def first_token_logps(backend: Backend, arm: Arm, prompts: Sequence[str]) -> NDArray[np.float64]:
    """Log-probabilities (G, V), nats, of the first token of the answer to each prompt."""
    rows = []
    for text in prompts:
        prompt, system = phrase(arm, backend, text)
        rows.append(backend.logits(LikelihoodRequest(prompt, "The", system), arm.side, strength=arm.strength)[0])
    return log_softmax(np.stack(rows))


def measure_row(backend: Backend, arm: Arm, prompt: SlotPrompt, number: int) -> tuple[Row, list[Cell]]:
    """The row of one prompt in one arm, and its cells without completions."""
    asked = prompt.filled()
    logps = first_token_logps(backend, arm, asked)
    gap, mean = divergence(logps)
    probabilities = np.exp(logps)
    spread = probabilities.max(axis=0) - probabilities.min(axis=0)
    groups = [group["group"] for group in prompt.groups]
    moved = []
    for token in np.argsort(-spread)[:_SHOWN_TOKENS].tolist():
        if not spread[token]:
            break
        likeliest = int(probabilities[:, token].argmax())
        moved.append((backend.token_text(token), groups[likeliest], float(probabilities[likeliest, token]), float(mean[token])))
    cells = []
    for group, text, row in zip(groups, asked, probabilities, strict=True):
        top = tuple((backend.token_text(token), float(row[token])) for token in np.argsort(-row)[:_SHOWN_TOKENS].tolist())
        cells.append(Cell(number, arm.name, group, text, top))
    return Row(number, arm.name, gap, tuple(moved)), cells


def run_grid(
    backend: Backend,
    arms: Sequence[Arm],
    prompts: Sequence[SlotPrompt],
    *,
    max_new_tokens: int = 48,
    cancellation: Cancellation | None = None,
) -> Iterator[Row | Cell]:
    """Each arm's rows and finished cells, a block of prompts at a time; greedy completions are decoded together. `cancellation`
    ends it, and what was yielded stays valid. The backend must have the arms' adapter."""
    cancellation = cancellation or Cancellation()
    for block in _blocks(prompts):
        for arm in arms:
            cells: list[Cell] = []
            for number in block:
                if cancellation.is_set():
                    return
                row, more = measure_row(backend, arm, prompts[number], number)
                yield row
                cells += more
            if not max_new_tokens:
                yield from cells
                continue
            asked = [phrase(arm, backend, cell.asked) for cell in cells]
            written = backend.complete_many(asked, max_new_tokens, arm.side, strength=arm.strength, cancellation=cancellation)
            for cell, (text, reason) in zip(cells, written, strict=True):
                if reason != "cancelled":
                    yield replace(cell, completion=text, finish_reason=reason)


def _blocks(prompts: Sequence[SlotPrompt]) -> Iterator[list[int]]:
    """Numbers of prompts whose cells fill a batch."""
    block: list[int] = []
    cells = 0
    for number, prompt in enumerate(prompts):
        if block and cells + len(prompt.groups) > SEQUENCES:
            yield block
            block, cells = [], 0
        block.append(number)
        cells += len(prompt.groups)
    if block:
        yield block


def summarize(arms: Sequence[Arm], rows: Sequence[Row]) -> dict[str, Any]:
    """Per arm its `gap`, and `minus_base` over the prompts that both have, each with a 95% interval over prompts."""
    by_arm: dict[str, dict[int, float]] = {arm.name: {} for arm in arms}
    for row in rows:
        by_arm[row.arm][row.prompt] = row.gap
    base = next((by_arm[arm.name] for arm in arms if not arm.adapter and not arm.system), None)
    summary: dict[str, Any] = {}
    for arm in arms:
        gaps = by_arm[arm.name]
        if not gaps:
            continue
        summary[arm.name] = {"gap": _interval(list(gaps.values())), "n": len(gaps)}
        if base is not None and gaps is not base and (both := [number for number in gaps if number in base]):
            summary[arm.name]["minus_base"] = _interval([gaps[number] - base[number] for number in both])
    return summary


def _interval(values: Sequence[float]) -> dict[str, object]:
    return stats.bootstrap(np.array(values)[:, None], {"mean": stats.Metric()})["mean"].to_json()


def to_json(arms: Sequence[Arm], prompts: Sequence[SlotPrompt], found: Sequence[Row | Cell]) -> dict[str, Any]:
    """The grid as `lens --json` prints it."""
    rows = [one for one in found if isinstance(one, Row)]
    moved = ("token", "group", "probability", "mean_probability")
    return {
        "arms": summarize(arms, rows),
        "rows": [
            {
                "prompt": prompts[row.prompt].prompt,
                "category": prompts[row.prompt].category,
                "arm": row.arm,
                "gap": row.gap,
                "moved": [dict(zip(moved, values, strict=True)) for values in row.moved],
            }
            for row in rows
        ],
        "cells": [
            {
                "prompt": prompts[cell.prompt].prompt,
                "arm": cell.arm,
                "group": cell.group,
                "asked": cell.asked,
                "completion": cell.completion,
                "finish_reason": cell.finish_reason,
                "top": [{"token": token, "probability": probability} for token, probability in cell.top],
            }
            for cell in found
            if isinstance(cell, Cell)
        ],
    }


def by_adapter(arms: Sequence[Arm]) -> list[tuple[str, list[Arm]]]:
    """Arms that can share a backend: those of each adapter, base's with the first of them."""
    adapters = list(dict.fromkeys(arm.adapter for arm in arms if arm.adapter))
    first = adapters[0] if adapters else ""
    return [(adapter, [arm for arm in arms if (arm.adapter or first) == adapter]) for adapter in adapters or [""]]
