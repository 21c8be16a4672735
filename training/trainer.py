"""TRL's DPO trainer, fed with rows that are tokenised already, and kept near the base model on plain text.

The extra term is ours: DPO holds the policy near the reference only on the pairs' completions. `text_kl_weight` adds
KL(base || policy), nats per token, on bare text (no template), which is where an unanchored run gets more perplexed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from trl import DPOTrainer


class TokenisedDPOTrainer(DPOTrainer):  # type: ignore[misc]  # trl has no types
    """DPOTrainer on rows of `prompt_ids`, `chosen_ids`, `rejected_ids`; the rest of TRL 1.16 is left as it is.

    text_kl_weight   weight of the KL term; 0 leaves TRL's loss as it is
    anchor_texts     token ids of the bare texts; each step draws a batch of them, by seed and step
    """

    def __init__(self, *args: Any, text_kl_weight: float = 0.0, anchor_texts: Sequence[list[int]] = (), **kwargs: Any) -> None:
        self._text_kl_weight = text_kl_weight
        self._anchor_texts = anchor_texts
        super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset: Any, *_args: Any, **_kwargs: Any) -> Any:
        return dataset

    def create_model_card(self, *_args: Any, **_kwargs: Any) -> None:
        """No card in each checkpoint: the run's own provenance says more."""

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        result = super()._compute_loss(model, inputs, return_outputs)
        if not self._text_kl_weight or not self.model.training:
            return result
        # A draw of its own for each step, so that a resumed run sees the texts an uninterrupted one would.
        draw = random.Random(f"{self.args.seed}-{self.state.global_step}-{len(self._metrics['train']['text_kl'])}")
        count = min(self.args.per_device_train_batch_size, len(self._anchor_texts))
        kl = text_kl(model, draw.sample(self._anchor_texts, count), self.accelerator)
        self._metrics["train"]["text_kl"].append(kl.item())
        if return_outputs:
            loss, outputs = result
            return loss + self._text_kl_weight * kl, outputs
        return result + self._text_kl_weight * kl


def text_kl(model: Any, texts: Sequence[list[int]], accelerator: Any) -> torch.Tensor:
    """KL(base || policy), (), nats, mean over the tokens of `texts`. `model` is a PeftModel; base is it without its adapter."""
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

    with torch.no_grad(), peft_model.disable_adapter():
        base = log_probabilities()
    policy = log_probabilities()
    kl: torch.Tensor = (base.exp() * (base - policy)).sum(-1).mean()
    return kl
