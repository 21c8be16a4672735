"""Loss terms beside DPO's, each nats, as a scalar with a gradient.

text KL             mean over the tokens of plain texts of KL(base || policy): DPO holds the policy near its reference only on the
                    pairs' completions, and an unanchored run gets more perplexed everywhere else
everyday KL         the same over the tokens of base's own answers to everyday prompts, after these: what needs no debiasing stays
counterfactual KL   mean over the tokens that two texts about two groups share, after their first difference, of KL(average of
                    base on both || policy): what is said of a group should not depend on which group it is
question loss       mean of softplus(MARGIN - lead), lead = log p(right answer) - log p(wrong answer)
ending KL           mean over completions of the sum over their places of KL(base || policy) of "the next token is end-of-text",
                    a yes or no. BiasDPO's chosen completions are short, and a policy that learns their manner ends early in
                    what it writes itself. So the completions are the policy's own, greedy, to the batch's prompts

`model` is what is trained, a PeftModel or its wrapper. All but `padded_text_kl` need a base model with `add_packed_forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from biasdpo.backends.hf_loading import begin_ids, encode_inner_text, encode_text
from biasdpo.counterfactuals import Question, Twins
from training.packing import Branches, kl_of_tokens, kl_to_average, pack, score_tokens

MARGIN = 2.0  # nats by which a right answer should lead each wrong one
MAX_NEW_TOKENS = 96
_MAX_LOGP = -1e-6  # p = 1 in float32 has no log(1 - p)


# Text KL


def packed_text_kl(model: Any, texts: Sequence[Sequence[int]], accelerator: Any) -> torch.Tensor:
    """The text KL on `texts` (token ids), without padding or stored logits."""
    peft_model = accelerator.unwrap_model(model)
    packing = pack([Branches((), (tuple(text),)) for text in texts], accelerator.device)
    head = peft_model.get_base_model().get_output_embeddings()

    def hidden() -> Any:
        return model(packing=packing)[0]

    with accelerator.autocast():
        return kl_of_tokens(*without_and_with_adapter(peft_model, hidden), head).mean()


def answer_kl(model: Any, answers: Sequence[Branches], accelerator: Any) -> torch.Tensor:
    """The everyday KL on prompts with answers, mean over the answers' tokens."""
    peft_model = accelerator.unwrap_model(model)
    packing = pack(answers, accelerator.device)
    head = peft_model.get_base_model().get_output_embeddings()

    def hidden() -> Any:
        return model(packing=packing)[0][packing.sources]

    with accelerator.autocast():
        return kl_of_tokens(*without_and_with_adapter(peft_model, hidden), head).mean()


def padded_text_kl(model: Any, texts: Sequence[Sequence[int]], accelerator: Any) -> torch.Tensor:
    """The text KL for any model: rows padded on the right."""
    peft_model = accelerator.unwrap_model(model)
    width = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], device=accelerator.device)
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts], device=accelerator.device)

    def log_probabilities() -> torch.Tensor:
        with accelerator.autocast():
            logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits[mask.bool()].float().log_softmax(-1)

    base, policy = without_and_with_adapter(peft_model, log_probabilities)
    kl: torch.Tensor = (base.exp() * (base - policy)).sum(-1).mean()
    return kl


def without_and_with_adapter(peft_model: Any, compute: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`compute()` of base, without gradients, and of the policy."""
    with torch.no_grad(), peft_model.disable_adapter():
        base = compute()
    return base, compute()


# Counterfactual terms


@dataclass(frozen=True)
class TwinIds:
    """Two texts as token ids, and in each the index of the token from which each shared token after the first difference is
    predicted, so that both lists of `spots` are of one length."""

    ids: tuple[tuple[int, ...], tuple[int, ...]]
    spots: tuple[tuple[int, ...], tuple[int, ...]]


def encode_twins(twins: Twins, tokenizer: Any) -> TwinIds:
    """Token ids of twins, encoded part by part, so that what they share is the same tokens in both."""
    ids: list[list[int]] = [begin_ids(tokenizer), begin_ids(tokenizer)]
    spots: list[list[int]] = [[], []]
    differ = False
    for number, part in enumerate(twins.parts):
        encode = encode_inner_text if number else encode_text
        for i in (0, 1):
            tokens = encode(tokenizer, part if isinstance(part, str) else part[i])
            if isinstance(part, str) and differ:
                spots[i] += range(len(ids[i]) - 1, len(ids[i]) + len(tokens) - 1)
            ids[i] += tokens
        differ = differ or not isinstance(part, str)
    return TwinIds((tuple(ids[0]), tuple(ids[1])), (tuple(spots[0]), tuple(spots[1])))


def counterfactual_kl(model: Any, twins: Sequence[TwinIds], accelerator: Any) -> torch.Tensor:
    """The counterfactual KL, mean over the shared tokens of both texts."""
    peft_model = accelerator.unwrap_model(model)
    packing = pack([Branches((), (text,)) for pair in twins for text in pair.ids], accelerator.device)
    indices: list[list[int]] = [[], []]
    start = 0
    for pair in twins:
        for i in (0, 1):
            indices[i] += [start + spot for spot in pair.spots[i]]
            start += len(pair.ids[i])
    spots = torch.tensor(indices, device=accelerator.device)

    def hidden() -> Any:
        return model(packing=packing)[0][spots]

    with accelerator.autocast():
        base, policy = without_and_with_adapter(peft_model, hidden)
        return kl_to_average(base, policy, peft_model.get_base_model().get_output_embeddings()).mean()


def question_loss(model: Any, questions: Sequence[Question], tokenizer: Any, accelerator: Any) -> tuple[torch.Tensor, float]:
    """The question loss, mean over the questions, and the share of them with the right answer ahead."""
    peft_model = accelerator.unwrap_model(model)
    branches = [
        Branches(
            tuple(begin_ids(tokenizer) + encode_text(tokenizer, question.context)),
            tuple(tuple(encode_inner_text(tokenizer, answer)) for answer in (question.right, *question.wrong)),
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


# Ending KL


def generate(model: Any, prompts: Sequence[tuple[int, ...]], end_of_text: int, accelerator: Any) -> list[Branches]:
    """The policy's greedy completions of prompts (token ids), at most MAX_NEW_TOKENS each, without the end. Uses no random
    numbers, and leaves the model in the mode it was in."""
    peft_model = accelerator.unwrap_model(model)
    width = max(map(len, prompts))
    ids = torch.tensor([[*[end_of_text] * (width - len(prompt)), *prompt] for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    was_training = peft_model.training
    peft_model.eval()
    try:
        with torch.no_grad(), accelerator.autocast():
            written = peft_model.generate(
                input_ids=ids.to(accelerator.device),
                attention_mask=mask.to(accelerator.device),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                eos_token_id=end_of_text,
                pad_token_id=end_of_text,
            )
    finally:
        peft_model.train(was_training)
    completions = [tuple(row) for row in written[:, width:].tolist()]
    ends = [row.index(end_of_text) if end_of_text in row else len(row) for row in completions]
    return [Branches(prompt, (row[:end],)) for prompt, row, end in zip(prompts, completions, ends, strict=True)]


def ending_kl(model: Any, written: Sequence[Branches], end_of_text: int, accelerator: Any) -> torch.Tensor:
    """The ending KL, mean over all completions, which hold no end-of-text."""
    peft_model = accelerator.unwrap_model(model)
    ended = [Branches(one.prompt, tuple((*completion, end_of_text) for completion in one.completions)) for one in written]
    packing = pack(ended, accelerator.device)
    head = peft_model.get_base_model().get_output_embeddings()

    def ends() -> torch.Tensor:
        hidden = model(packing=packing)[0][packing.sources]
        targets = torch.full_like(packing.targets, end_of_text)
        return score_tokens(hidden, head, targets).logps.clamp(max=_MAX_LOGP)

    with accelerator.autocast():
        base, policy = without_and_with_adapter(peft_model, ends)
    kl = base.exp() * (base - policy) - torch.expm1(base) * (_log1m(base) - _log1m(policy))
    return kl.sum() / sum(len(one.completions) for one in written)


def _log1m(logps: torch.Tensor) -> torch.Tensor:
    """log(1 - p) of log p."""
    return torch.log(-torch.expm1(logps))
