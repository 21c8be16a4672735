"""The vocabulary projection, only where it is asked for and in slices of rows: no (tokens, V) tensor of a whole batch.

The head is frozen (LoRA leaves it alone), so a row's value depends on its own hidden state h alone, and its gradient d value /
d h is a vector as small as h. It is computed at once, while the slice's logits are there: nothing is kept of them, and nothing
is projected again in the backward pass, which only scales these vectors. V: vocabulary, H: hidden size, N: tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

LOGITS_A_SLICE = 2**23  # numbers: 32 MiB in float32


@dataclass(frozen=True)
class TokenScores:
    """What the model thinks of N tokens, each (N,), float32.

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
    """KL(base || policy) of the next-token distributions of two models that share a head, (N, H) each -> (N,), nats.

    With p of base, q of the policy: KL = sum p (log p - log q), and d KL / d h = (q - p) W.
    """
    wants_gradient = torch.is_grad_enabled() and hidden.requires_grad
    divergences, gradients = [], []
    with torch.no_grad():
        weight, bias = _head(hidden, head)
        for rows in _slices(hidden, weight):
            base = _logits(base_hidden[rows], weight, bias).log_softmax(-1)
            policy = _logits(hidden[rows], weight, bias).log_softmax(-1)
            probabilities = base.exp()
            divergences.append(torch.linalg.vecdot(probabilities, base.sub_(policy)))
            if wants_gradient:
                gradients.append(_expected(weight, policy.exp_().sub_(probabilities)))
    divergence = torch.cat(divergences)
    return _with_gradient(hidden, divergence, torch.cat(gradients)) if wants_gradient else divergence


def kl_to_average(base_hidden: torch.Tensor, hidden: torch.Tensor, head: torch.nn.Linear) -> torch.Tensor:
    """KL(p || policy) where p is the average of base's next-token distributions over K texts: (K, N, H) each -> (K, N), nats.

    KL = sum p (log p - log q_k), and d KL / d h_k = (q_k - p) W.
    """
    wants_gradient = torch.is_grad_enabled() and hidden.requires_grad
    divergences, gradients = [], []
    with torch.no_grad():
        weight, bias = _head(hidden, head)
        for rows in _slices(hidden[0], weight):
            texts = [_logits(base, weight, bias).log_softmax(-1) for base in base_hidden[:, rows]]
            average = torch.stack(texts).logsumexp(0) - math.log(len(texts))
            probabilities = average.exp()
            policies = [_logits(states, weight, bias).log_softmax(-1) for states in hidden[:, rows]]
            divergences.append(torch.stack([torch.linalg.vecdot(probabilities, average - policy) for policy in policies]))
            if wants_gradient:
                gradients.append(torch.stack([_expected(weight, policy.exp_().sub_(probabilities)) for policy in policies]))
    divergence = torch.cat(divergences, dim=1)
    if not wants_gradient:
        return divergence
    known = _with_gradient(hidden.flatten(0, 1), divergence.flatten(), torch.cat(gradients, dim=1).flatten(0, 1))
    return known.view_as(divergence)


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
    """The head's weight (V, H) and bias (V,), in the type that matrix products are computed in."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    return head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)


def _slices(hidden: torch.Tensor, weight: torch.Tensor) -> Iterator[slice]:
    rows = max(1, LOGITS_A_SLICE // weight.shape[0])
    for start in range(0, max(1, len(hidden)), rows):  # no rows: one empty slice
        yield slice(start, start + rows)


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(rows, V), float32."""
    return functional.linear(hidden.to(weight.dtype), weight, bias).float()


def _expected(weight: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """The head's rows summed with coefficients (rows, V): (rows, H), float32."""
    return (coefficients.to(weight.dtype) @ weight).float()
