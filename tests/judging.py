"""Judgments and prompts for tests, and a journal of them."""

from __future__ import annotations

import random
from collections.abc import Iterable

from biasdpo.data import journal
from biasdpo.data.journal import Journal
from biasdpo.records import Judgment, JudgmentMeta, Verdict
from biasdpo.workspace import Workspace

LONG, SHORT = "A fair answer that takes its time.", "A short one."


def say(
    prompt: str = "Who leads?",
    chosen: str = LONG,
    rejected: str = SHORT,
    *,
    left: str = "",
    took: str = "",
    verdict: Verdict = "preferred",
    **columns: str,
) -> Judgment:
    """A judgment; `left` is the side that stood left, `took` the side that was chosen."""
    meta = JudgmentMeta(left_side=left, chosen_side=took)
    return journal.new_judgment(prompt, chosen, rejected, verdict=verdict, meta=meta, **columns)


def store(workspace: Workspace, judgments: Iterable[Judgment]) -> list[Judgment]:
    judgments = list(judgments)
    journal.append_all(workspace, judgments)
    return judgments


def standing(workspace: Workspace) -> list[dict[str, object]]:
    return Journal(workspace.preferences).refresh().standing()


def prompts(count: int, seed: int = 1) -> list[str]:
    """Twelve words each; a fifth of them begin alike, another fifth vary an earlier one."""
    rng = random.Random(seed)
    vocabulary = [f"word{i}" for i in range(3000)]
    made: list[str] = []
    for i in range(count):
        text = rng.choices(vocabulary, k=12)
        if i % 5 == 1:
            text[:4] = ["why", "do", "people", "think"]
        elif i % 5 == 2:
            text = rng.choice(made).split()
            for _ in range(rng.randint(1, 3)):
                text[rng.randrange(12)] = rng.choice(vocabulary)
        made.append(" ".join(text))
    return made
