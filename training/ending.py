"""A term of the loss that keeps completions as long as base's: whether to end here is decided as base decides it.

ending KL   sum over the places of a completion, its first token's to the one after its last, of KL(base || policy) of "the next
            token is end-of-text", a yes or no; mean over the completions, nats a completion

BiasDPO's chosen completions are short and closed. A policy that learns their manner ends early in what it writes itself, though
no end was trained on, and though on the chosen completions it is no likelier than under base. So the completions are the
policy's own: what it writes greedily to the batch's prompts. For models with `add_packed_forward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from training.packing import Branches, pack
from training.projection import score_tokens
from training.text_kl import without_and_with_adapter

MAX_NEW_TOKENS = 96
_MOST_LOGP = -1e-6  # p = 1 in float32 has no log(1 - p)


def write(model: Any, prompts: Sequence[tuple[int, ...]], end_of_text: int, accelerator: Any) -> list[Branches]:
    """What the policy writes to prompts (token ids), greedily, at most MAX_NEW_TOKENS each, without the end. Draws no random
    number, and leaves the model in the mode it was in."""
    peft_model = accelerator.unwrap_model(model)
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    ids = torch.tensor([[end_of_text] * left + list(prompt) for left, prompt in zip(padding, prompts, strict=True)])
    mask = torch.tensor([[0] * left + [1] * len(prompt) for left, prompt in zip(padding, prompts, strict=True)])
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
    """The ending KL of a PeftModel over all completions, (). They hold no end-of-text."""
    peft_model = accelerator.unwrap_model(model)
    ended = [Branches(one.prompt, tuple((*completion, end_of_text) for completion in one.completions)) for one in written]
    packing = pack(ended, accelerator.device)
    head = peft_model.get_base_model().get_output_embeddings()

    def ends() -> torch.Tensor:
        hidden = model(packing=packing)[0][packing.sources]
        targets = torch.full_like(packing.targets, end_of_text)
        return score_tokens(hidden, head, targets).logps.clamp(max=_MOST_LOGP)

    with accelerator.autocast():
        base, policy = without_and_with_adapter(peft_model, ends)
    kl = base.exp() * (base - policy) - torch.expm1(base) * (_log_of_rest(base) - _log_of_rest(policy))
    return kl.sum() / sum(len(one.completions) for one in written)


def _log_of_rest(logps: torch.Tensor) -> torch.Tensor:
    """log(1 - p)."""
    return torch.log(-torch.expm1(logps))
