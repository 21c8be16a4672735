"""KL(base || policy) on plain text, nats per token: what holds a policy near its base where no pair does.

`model` is a PeftModel, wrapped or not; base is it without its adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from training.packing import Branches, pack
from training.projection import kl_of_tokens


def packed_text_kl(model: Any, texts: Sequence[Sequence[int]], accelerator: Any) -> torch.Tensor:
    """Mean over the tokens of `texts` (token ids), (): no padding, no logits kept. For models with `add_packed_forward`."""
    peft_model = accelerator.unwrap_model(model)
    packing = pack([Branches((), (tuple(text),)) for text in texts], accelerator.device)
    head = peft_model.get_base_model().get_output_embeddings()

    def hidden() -> torch.Tensor:
        states: torch.Tensor = model(packing=packing)
        return states[0]

    with accelerator.autocast():
        base, policy = without_and_with_adapter(peft_model, hidden)
        return kl_of_tokens(base, policy, head).mean()


def padded_text_kl(model: Any, texts: Sequence[Sequence[int]], accelerator: Any) -> torch.Tensor:
    """The same for any model: rows padded at their right."""
    peft_model = accelerator.unwrap_model(model)
    width = max(map(len, texts))
    ids = torch.zeros((len(texts), width), dtype=torch.long)
    mask = torch.zeros((len(texts), width), dtype=torch.long)
    for i, text in enumerate(texts):
        ids[i, : len(text)] = torch.tensor(text)
        mask[i, : len(text)] = 1
    ids, mask = ids.to(accelerator.device), mask.to(accelerator.device)

    def log_probabilities() -> torch.Tensor:
        with accelerator.autocast():
            logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits[mask.bool()].float().log_softmax(-1)

    base, policy = without_and_with_adapter(peft_model, log_probabilities)
    kl: torch.Tensor = (base.exp() * (base - policy)).sum(-1).mean()
    return kl


def without_and_with_adapter(peft_model: Any, compute: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What `compute` gives of base (without gradients) and of the policy."""
    with torch.no_grad(), peft_model.disable_adapter():
        base = compute()
    return base, compute()
