"""A causal language model of transformers, taught to compute packed rows; what it does with ordinary input stays as it was."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from trl.trainer.utils import FusedCausalLMOutput

from training.packing import Branches, Packing, attend, pack
from training.projection import score_tokens

ARCHITECTURES = ("LlamaForCausalLM", "PhiForCausalLM")
ATTENTION = "packed_or_sdpa"


def why_not_packed(model: Any) -> str:
    """Why a base model can't be taught, as the end of a sentence; "" where it can."""
    name = type(model).__name__
    if name not in ARCHITECTURES:
        return f"{name} is neither {' nor '.join(ARCHITECTURES)}"
    if model.config.attention_dropout:
        return f"its attention has dropout ({model.config.attention_dropout})"
    if model.get_output_embeddings().weight.requires_grad:
        return "its vocabulary projection is trained"
    return ""


def add_packed_forward(model: Any) -> None:
    """Teach a base model, on which TRL's `add_fused_lm_head` was called already, two more ways to be called.

    model(packing=...)                              the last hidden states of a packed row, (1, T, H)
    model(input_ids, attention_mask, labels, fused_lm_head=True)
                                                    TRL's call, a batch of rows [chosen; rejected] padded at their right; the
                                                    same output, computed packed

    In `forward` itself, so that what wraps the model (PEFT, autocast, data parallel) wraps these calls too.
    """
    original = model.forward
    model.set_attn_implementation(ATTENTION)

    @functools.wraps(original)
    def forward(
        self: Any, *args: Any, packing: Packing | None = None, fused_lm_head: bool = False, **kwargs: Any
    ) -> torch.Tensor | FusedCausalLMOutput:
        if packing is not None:
            return _last_hidden(self, packing)
        if fused_lm_head:
            return _pair_scores(self, kwargs["input_ids"], kwargs["attention_mask"], kwargs["labels"])
        return original(*args, **kwargs)

    model.forward = MethodType(forward, model)


def _last_hidden(model: Any, packing: Packing) -> torch.Tensor:
    # A mask of four dimensions is passed on as it is: none gets built, and `_attention` needs none.
    unused_mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=packing.ids.device)
    outputs = model.model(
        input_ids=packing.ids, position_ids=packing.positions, attention_mask=unused_mask, packing=packing, use_cache=False
    )
    hidden: torch.Tensor = outputs.last_hidden_state
    return hidden


def _pair_scores(model: Any, ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> FusedCausalLMOutput:
    """TRL's per-token scores (2B, L - 1) of a padded batch ids (2B, L): zero where the label is -100."""
    packing = pack(unpad(ids, attention_mask, labels), ids.device)
    scores = score_tokens(_last_hidden(model, packing)[0, packing.sources], model.get_output_embeddings(), packing.targets)
    mask = labels[:, 1:] != -100
    lengths = _in_turn(
        mask.sum(1).tolist()
    )  # in the packed row chosen and rejected take turns; in the batch all chosen come first

    def unpacked(values: torch.Tensor) -> torch.Tensor:
        parts = torch.split(values, lengths)
        return values.new_zeros(mask.shape).masked_scatter(mask, torch.cat(parts[0::2] + parts[1::2]))

    return FusedCausalLMOutput(
        log_probs=unpacked(scores.logps),
        entropy=unpacked(scores.entropies),
        mean_logits=unpacked(scores.mean_logits),
        is_top1=unpacked(scores.are_top),
        label_mask=mask,
    )


def unpad(ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> list[Branches]:
    """TRL's batch, rows [chosen; rejected] (2B, L) padded at their right, as B prompts with two completions each."""
    lengths = attention_mask.sum(1).tolist()
    completions = (labels != -100).sum(1).tolist()
    split = [
        (tuple(row[: length - completion]), tuple(row[length - completion : length]))
        for row, length, completion in zip(ids.tolist(), lengths, completions, strict=True)
    ]
    half = len(split) // 2
    pairs = []
    for (prompt, chosen), (other_prompt, rejected) in zip(split[:half], split[half:], strict=True):
        if prompt != other_prompt:
            raise ValueError("Chosen and rejected of a pair must follow the same prompt: truncate at the end, not at the start")
        pairs.append(Branches(prompt, (chosen, rejected)))
    return pairs


def _in_turn(lengths: list[int]) -> list[int]:
    """[a1, a2, b1, b2] -> [a1, b1, a2, b2]."""
    half = len(lengths) // 2
    pairs: Iterable[tuple[int, int]] = zip(lengths[:half], lengths[half:], strict=True)
    return [length for pair in pairs for length in pair]


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **settings: Any
) -> tuple[torch.Tensor, None]:
    """What each attention layer calls: packed where the model was given a packed row, else what transformers would do."""
    packing = settings.get("packing")
    if packing is None:
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
        return result
    attended = attend(query, key, value, packing, settings["scaling"])
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
