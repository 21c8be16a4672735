"""Preference pairs as one row of tokens without padding: what pairs share is computed once.

    [shared | prompt 1 | chosen 1 | rejected 1 | prompt 2 | chosen 2 | rejected 2 | ...]

`shared` is what every prompt of the batch begins with (a template's system message). A completion sees `shared`, its own prompt
and itself; never the other completion, never another pair. Rejected's positions go on from the prompt's end, as chosen's do,
so each completion gets the log-probabilities that it would get in a row of its own. All but attention works token by token
and needs to know nothing of this; attention is computed pair by pair, over the tokens that a pair may see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Branches:
    """A prompt and the completions that follow it, each on its own: token ids. A bare text: no prompt, one completion."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Packing:
    """A batch of `Branches` as one row of T tokens.

    ids, positions   (1, T)
    shared           number of tokens, at the row's start, that all see
    own              number of tokens of each item beyond these; their sum is T - shared
    masks            for each item a bool tensor (own, shared + own): True where a token (row) sees another (column)
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
    """Lay a batch out. A first completion token without any prompt has nothing to be predicted from: it is no target."""
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
    """Number of tokens with which all prompts begin. Of a single prompt: 0, for nothing is saved."""
    if len(prompts) < 2:
        return 0
    shortest, longest = min(prompts), max(prompts)  # what these two share, all between them share
    same = [a == b for a, b in zip(shortest, longest, strict=False)]
    return same.index(False) if False in same else len(same)


def _mask(shared: int, prompt: int, completions: Sequence[int]) -> torch.Tensor:
    """(own, shared + own): causal, but for a completion that does not see the completions before it."""
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
