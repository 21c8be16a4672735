"""Preference pairs packed into one row of tokens without padding, and the model, attention and projection that compute it.

A prompt that completions share, and a beginning that prompts share, are computed once. The vocabulary projection runs only on
the tokens that are asked for, in slices, so that no (tokens, vocabulary) tensor is kept.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MethodType
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from trl.trainer.utils import FusedCausalLMOutput

from biasdpo.backends.prefixes import common_length
from biasdpo.model_files import ARCHITECTURES

ATTENTION = "packed_or_sdpa"
LOGITS_PER_SLICE = 2**23  # numbers: 32 MiB in float32

# The layout


@dataclass(frozen=True)
class Branches:
    """A prompt and the completions that follow it, each independently: token ids. A plain text: no prompt, one completion."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Packing:
    """A batch of `Branches` as one row of T tokens.

    ids, positions   (1, T)
    shared           number of tokens, at the row's start, that all items attend to
    own              number of tokens of each item beyond these; their sum is T - shared
    masks            for each item a bool tensor (own, shared + own): True where a token (row) attends to another (column)
    sources          (N,) index in the row of the token from which each completion token is predicted
    targets          (N,) those completion tokens: item by item, completion by completion
    """

    ids: torch.Tensor
    positions: torch.Tensor
    shared: int
    own: tuple[int, ...]
    masks: tuple[torch.Tensor, ...]
    sources: torch.Tensor
    targets: torch.Tensor


def pack(batch: Sequence[Branches], device: torch.device | str = "cpu") -> Packing:
    """Pack a batch. The first token of a completion without a prompt has nothing to be predicted from: it is no target."""
    shared = shared_length([item.prompt for item in batch])
    ids = list(batch[0].prompt[:shared])
    positions = list(range(shared))
    sources: list[int] = []
    targets: list[int] = []
    own, masks = [], []
    for item in batch:
        start, end_of_prompt = len(ids), len(item.prompt)
        ids += item.prompt[shared:]
        positions += range(shared, end_of_prompt)
        last_of_prompt = len(ids) - 1 if end_of_prompt > shared else shared - 1
        for completion in item.completions:
            first = len(ids)
            before = [last_of_prompt, *range(first, first + len(completion) - 1)]
            skipped = int(end_of_prompt == 0)
            sources += before[skipped : len(completion)]
            targets += completion[skipped:]
            ids += completion
            positions += range(end_of_prompt, end_of_prompt + len(completion))
        own.append(len(ids) - start)
        masks.append(_mask(shared, end_of_prompt - shared, [len(completion) for completion in item.completions]).to(device))
    as_row = torch.tensor([ids, positions], device=device)
    return Packing(
        as_row[:1],
        as_row[1:],
        shared,
        tuple(own),
        tuple(masks),
        torch.tensor(sources, dtype=torch.long, device=device),
        torch.tensor(targets, dtype=torch.long, device=device),
    )


def shared_length(prompts: Sequence[tuple[int, ...]]) -> int:
    """Number of tokens with which all prompts begin. 0 for a single prompt: nothing would be saved."""
    return common_length(min(prompts), max(prompts)) if len(prompts) > 1 else 0  # what these share, all between them share


def _mask(shared: int, prompt: int, completions: Sequence[int]) -> torch.Tensor:
    """(own, shared + own): causal, except that a completion does not attend to the completions before it."""
    own = prompt + sum(completions)
    mask = torch.ones((own, shared + own), dtype=torch.bool).tril(shared)
    for start, length in zip(accumulate(completions, initial=prompt), completions, strict=False):
        mask[start : start + length, shared + prompt : shared + start] = False
    return mask


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, scaling: float) -> torch.Tensor:
    """Attention within a packed row. query (1, heads, T, d), key and value (1, key heads, T, d) -> (1, heads, T, d)."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    sizes = [packing.shared, *packing.own]
    queries, keys, values = (torch.split(tensor, sizes, dim=2) for tensor in (query, key, value))
    attended = []
    if packing.shared:
        attended.append(functional.scaled_dot_product_attention(queries[0], keys[0], values[0], is_causal=True, scale=scaling))
    for q, k, v, mask in zip(queries[1:], keys[1:], values[1:], packing.masks, strict=True):
        if packing.shared:
            k, v = torch.cat((keys[0], k), dim=2), torch.cat((values[0], v), dim=2)
        attended.append(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling))
    return torch.cat(attended, dim=2)


# The vocabulary projection


@dataclass(frozen=True)
class TokenScores:
    """The model's scores of N tokens, each (N,), float32.

    logps         log p(target), nats; the only one with a gradient
    entropies     of the distributions, nats
    mean_logits   over the vocabulary
    are_top       whether the target was the most likely token
    """

    logps: torch.Tensor
    entropies: torch.Tensor
    mean_logits: torch.Tensor
    are_top: torch.Tensor


def score_tokens(hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor) -> TokenScores:
    """Score `targets` (N,) by `hidden` (N, H), the states from which they are predicted.

    With p = softmax(W h + b): d log p[y] / d h = W[y] - p W.
    """
    wants_gradient = torch.is_grad_enabled() and hidden.requires_grad
    scores, gradients = [], []
    with torch.no_grad():
        weight, bias = _head(hidden, head)
        for rows in _slices(hidden, weight):
            logits = _logits(hidden[rows], weight, bias)
            mean, top = logits.mean(-1), logits.argmax(-1)
            log_probabilities = logits.log_softmax(-1)
            probabilities = torch.exp(log_probabilities, out=logits)
            logps = log_probabilities.gather(1, targets[rows, None])[:, 0]
            entropies = -torch.linalg.vecdot(probabilities, log_probabilities)
            scores.append((logps, entropies, mean, top == targets[rows]))
            if wants_gradient:
                gradients.append(weight[targets[rows]].float() - _expected(weight, probabilities))
    logps, entropies, mean_logits, are_top = (torch.cat(parts) for parts in zip(*scores, strict=True))
    if wants_gradient:
        logps = _with_gradient(hidden, logps, torch.cat(gradients))
    return TokenScores(logps, entropies, mean_logits, are_top)


def kl_of_tokens(base_hidden: torch.Tensor, hidden: torch.Tensor, head: torch.nn.Linear) -> torch.Tensor:
    """KL(base || policy) of the next-token distributions of two models that share a head, (N, H) each -> (N,), nats."""
    return kl_to_average(base_hidden[None], hidden[None], head)[0]


def kl_to_average(base_hidden: torch.Tensor, hidden: torch.Tensor, head: torch.nn.Linear) -> torch.Tensor:
    """KL(p || policy), p the average of base's next-token distributions over K texts: (K, N, H) each -> (K, N), nats.

    With q_k of the policy on text k: KL_k = sum p (log p - log q_k), and d KL_k / d h_k = (q_k - p) W.
    """
    wants_gradient = torch.is_grad_enabled() and hidden.requires_grad
    divergences, gradients = [], []
    with torch.no_grad():
        weight, bias = _head(hidden, head)
        for rows in _slices(hidden[0], weight):
            texts = [_logits(base, weight, bias).log_softmax(-1) for base in base_hidden[:, rows]]
            average = texts[0] if len(texts) == 1 else torch.stack(texts).logsumexp(0) - math.log(len(texts))
            probabilities = average.exp()
            policies = [_logits(states, weight, bias).log_softmax(-1) for states in hidden[:, rows]]
            logratios = (torch.sub(average, policy, out=texts[0]) for policy in policies)  # one buffer, which is free now
            divergences.append(torch.stack([torch.linalg.vecdot(probabilities, logratio) for logratio in logratios]))
            if wants_gradient:
                gradients.append(torch.stack([_expected(weight, policy.exp_().sub_(probabilities)) for policy in policies]))
    divergence = torch.cat(divergences, dim=1)
    if not wants_gradient:
        return divergence
    with_gradient = _with_gradient(hidden.flatten(0, 1), divergence.flatten(), torch.cat(gradients, dim=1).flatten(0, 1))
    return with_gradient.view_as(divergence)


class _KnownGradient(torch.autograd.Function):
    """Values (N,) of which each depends on its own row of hidden (N, H), with the gradients (N, H) given beside them."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, values: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradients)
        ctx.hidden_dtype = hidden.dtype
        return values.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_values: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return (grad_values[:, None] * gradients).to(ctx.hidden_dtype), None, None


def _with_gradient(hidden: torch.Tensor, values: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = _KnownGradient.apply(hidden, values, gradients)  # type: ignore[no-untyped-call]
    return result


def _head(hidden: torch.Tensor, head: torch.nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The head's weight (V, H) and bias (V,), in the dtype of matrix products (autocast's, if it is on)."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    return head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)


def _slices(hidden: torch.Tensor, weight: torch.Tensor) -> Iterator[slice]:
    rows = max(1, LOGITS_PER_SLICE // weight.shape[0])
    for start in range(0, max(1, len(hidden)), rows):  # no rows: one empty slice
        yield slice(start, start + rows)


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(rows, V), float32."""
    return functional.linear(hidden.to(weight.dtype), weight, bias).float()


def _expected(weight: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """The head's rows summed with coefficients (rows, V): (rows, H), float32."""
    return (coefficients.to(weight.dtype) @ weight).float()


# The model


def why_not_packed(model: Any) -> str:
    """Why a base model can't compute packed rows, as the end of a sentence; "" if it can."""
    name = type(model).__name__
    if name not in ARCHITECTURES:
        return f"{name} is neither {' nor '.join(ARCHITECTURES)}"
    if model.config.attention_dropout:
        return f"its attention has dropout ({model.config.attention_dropout})"
    if model.get_output_embeddings().weight.requires_grad:
        return "its vocabulary projection is trained"
    return ""


def add_packed_forward(model: Any) -> None:
    """Add two ways to call a base model on which TRL's `add_fused_lm_head` was called already; others stay as they were.

    model(packing=...)   the last hidden states of a packed row, (1, T, H)
    model(input_ids, attention_mask, labels, fused_lm_head=True)
                         TRL's call on a batch of rows [chosen; rejected] padded on the right: the same output, computed packed

    They go through `forward`, so that what wraps the model (PEFT, autocast, data parallel) wraps them too.
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
    # A mask of four dimensions is passed through as it is; `_attention` uses the packing's own.
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
    chosen, rejected = mask.sum(1).view(2, -1).tolist()
    lengths = [length for pair in zip(chosen, rejected, strict=True) for length in pair]  # chosen and rejected alternate

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
    """TRL's batch, rows [chosen; rejected] (2B, L) padded on the right, as B prompts with two completions each."""
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


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **settings: Any
) -> tuple[torch.Tensor, None]:
    """Called by each attention layer: packed if the model was given a packed row, else SDPA as in transformers."""
    packing = settings.get("packing")
    if packing is None:
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
        return result
    attended = attend(query, key, value, packing, settings["scaling"])
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
