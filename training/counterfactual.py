"""Two terms of the loss that need no preference pair: what is said of a group should not depend on the group.

counterfactual KL   KL(p || policy), nats per token, where p is the base model's next-token distribution averaged over two texts
                    that differ in the group alone, taken on both texts, at every token after the first place where they
                    differ. Zero where the policy says of either group what base says of both on average
question loss       -log sigmoid(logp(right) - logp(wrong) - margin), mean over a question's wrong answers, then over questions
                    that a text does or does not answer

Texts: `biasdpo.counterfactuals`, bare, without a chat template. For models with `add_packed_forward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from biasdpo.backends.hf_copy import begin_ids, encode_text
from biasdpo.counterfactuals import Question, Twins
from training.packing import Branches, pack
from training.projection import kl_to_average, score_tokens
from training.text_kl import without_and_with_adapter

MARGIN = 2.0  # nats by which a right answer should lead each wrong one


@dataclass(frozen=True)
class TwinIds:
    """Two texts as token ids, and in each the index of the token from which each shared token after the first difference is
    predicted, so that both lists of `spots` are of one length."""

    ids: tuple[tuple[int, ...], tuple[int, ...]]
    spots: tuple[tuple[int, ...], tuple[int, ...]]


def encode_twins(twins: Twins, tokenizer: Any) -> TwinIds:
    """Token ids of twins: part by part, so that what they share is the same tokens in both."""
    ids: list[list[int]] = [begin_ids(tokenizer), begin_ids(tokenizer)]
    spots: list[list[int]] = [[], []]
    differ = False
    for part in twins.parts:
        for i in (0, 1):
            tokens = encode_text(tokenizer, part if isinstance(part, str) else part[i])
            if isinstance(part, str) and differ:
                spots[i] += range(len(ids[i]) - 1, len(ids[i]) + len(tokens) - 1)
            ids[i] += tokens
        differ = differ or not isinstance(part, str)
    return TwinIds((tuple(ids[0]), tuple(ids[1])), (tuple(spots[0]), tuple(spots[1])))


def counterfactual_kl(model: Any, twins: Sequence[TwinIds], accelerator: Any) -> torch.Tensor:
    """The counterfactual KL of a PeftModel, mean over the tokens of both texts, ()."""
    peft_model = accelerator.unwrap_model(model)
    packing = pack([Branches((), (text,)) for pair in twins for text in pair.ids], accelerator.device)
    indices: list[list[int]] = [[], []]
    start = 0
    for pair in twins:
        for i in (0, 1):
            indices[i] += [start + spot for spot in pair.spots[i]]
            start += len(pair.ids[i])
    spots = torch.tensor(indices, device=accelerator.device)

    def hidden() -> torch.Tensor:
        states: torch.Tensor = model(packing=packing)
        return states[0][spots]

    with accelerator.autocast():
        base, policy = without_and_with_adapter(peft_model, hidden)
        return kl_to_average(base, policy, peft_model.get_base_model().get_output_embeddings()).mean()


def question_loss(model: Any, questions: Sequence[Question], tokenizer: Any, accelerator: Any) -> tuple[torch.Tensor, float]:
    """The question loss, (), mean over the questions, and the share of them with the right answer ahead."""
    peft_model = accelerator.unwrap_model(model)
    branches = [
        Branches(
            tuple(begin_ids(tokenizer) + encode_text(tokenizer, question.context)),
            tuple(tuple(encode_text(tokenizer, answer)) for answer in (question.right, *question.wrong)),
        )
        for question in questions
    ]
    packing = pack(branches, accelerator.device)
    with accelerator.autocast():
        hidden = model(packing=packing)[0][packing.sources]
        logps = score_tokens(hidden, peft_model.get_base_model().get_output_embeddings(), packing.targets).logps
    lengths = [len(completion) for branch in branches for completion in branch.completions]
    answers = torch.stack([part.sum() for part in torch.split(logps, lengths)])
    leads = [part[0] - part[1:] for part in torch.split(answers, [len(branch.completions) for branch in branches])]
    loss = torch.stack([functional.softplus(MARGIN - lead).mean() for lead in leads]).mean()
    return loss, sum(bool((lead > 0).all()) for lead in leads) / len(leads)
