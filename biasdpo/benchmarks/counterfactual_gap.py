"""How much the group that a prompt names changes which answer is likely: 60 prompts of our own, 20 each on gender, race and
religion (assets/lens_check.jsonl), none of them a prompt of the lens.

A prompt has G = 4 groups, which should make no difference, and K = 6 short answers that suit all of them. With p_g the answers'
likelihoods after the prompt with group g, rendered with the chat template and normalized to a distribution over the K, and m the
mean of p_g over the groups:

    gap_nats              Jensen-Shannon divergence, mean over g of KL(p_g || m), averaged over prompts: 0 if the group changes
                          nothing, at most ln G = 1.39
    same_answer_percent   prompts for which every group has the same likeliest answer

How frequent an answer or a group is cancels. The gap also falls if a model prefers one answer more strongly, whatever the group.
The lens (biasdpo/lens.py) takes the divergence of the whole distribution of the first token instead.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from biasdpo.benchmarks.base import LikelihoodBenchmark
from biasdpo.evaluation.stats import Metric
from biasdpo.lens import SlotPrompt, divergence, slot_prompt
from biasdpo.records import Likelihood, LikelihoodRequest, Request
from biasdpo.workspace import ASSETS, sha256_of

FILE = ASSETS / "lens_check.jsonl"


@dataclass(frozen=True)
class Question:
    """A prompt with its groups, and the answers whose likelihoods are compared."""

    prompt: SlotPrompt
    answers: tuple[str, ...]

    @property
    def category(self) -> str:
        return self.prompt.category


class CounterfactualGap(LikelihoodBenchmark[Question]):
    """Numbers of an item, as in `columns`; `same_answer` is 0 or 1."""

    name = "counterfactual_gap"
    columns = ("gap_nats", "same_answer")

    def requests(self, item: Question) -> list[Request]:
        return [LikelihoodRequest(prompt, f"{answer}.") for prompt in item.prompt.filled() for answer in item.answers]

    def scores(self, item: Question, outputs: Sequence[Likelihood]) -> list[float]:
        logps = np.array([output.logp for output in outputs], dtype=np.float64).reshape(-1, len(item.answers))
        logps -= np.logaddexp.reduce(logps, axis=1, keepdims=True)
        return [divergence(logps)[0], float(len(set(logps.argmax(axis=1).tolist())) == 1)]

    def describe(self, item: Question) -> dict[str, str]:
        groups = [group["group"] for group in item.prompt.groups]
        return {
            "prompt": item.prompt.filled()[0],
            "compared_with": " | ".join(groups[1:]),
            "answers": " | ".join(item.answers),
            "category": item.category,
        }

    def outcome(self, _item: Question, numbers: Sequence[float]) -> str:
        """Whether the groups have the same likeliest answer, as `same_answer_percent` counts it."""
        return "the same answer for every group" if numbers[1] else "another answer for some group"

    def side_metrics(self) -> dict[str, Metric]:
        return {
            "gap_nats": Metric(better="lower"),
            "same_answer_percent": Metric(features=lambda items: 100.0 * items[..., [1]], better="higher"),
        }


def build(file: Path = FILE) -> CounterfactualGap:
    """The shipped prompts."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    items = [Question(slot_prompt(row["prompt"], row["groups"], row["category"]), tuple(row["answers"])) for row in rows]
    return CounterfactualGap(items, sha256_of(file))
