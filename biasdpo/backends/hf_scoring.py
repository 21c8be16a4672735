"""The likelihoods of the transformers backend: rows of tokens that share their beginnings, and their log-probabilities.

A row is a tree of texts that begin alike (see `prefixes`), laid out depth first: each token sees those before it in its own
text, by a mask, and has the position that it has there. What all texts begin with (a template's system message, the examples
before a question) is computed once, ahead of the rows. Logits are computed where a scored token is predicted, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from biasdpo.backends.prefixes import Path, Row, lay_out, split_into_rows, trunk_length

# Models whose attention takes any mask and any positions, and whose layers mix tokens in no other way: the answers that the
# tests compare with those of one text after another. Of other models every text is a row.
_SHARING = ("LlamaForCausalLM", "PhiForCausalLM")

_LEAST_TRUNK = 16  # tokens; a shorter beginning is not worth a computation of its own
_LOGIT_ROWS = 256  # positions whose logits over the whole vocabulary are held at a time


class Trunk:
    """Keys and values of what all rows begin with, for a model to take as its cache. Nothing is added to it."""

    def __init__(self, cache: Any) -> None:
        self._layers = [(layer.keys, layer.values) for layer in cache.layers]
        self.tokens: int = cache.get_seq_length()

    def update(self, keys: Any, values: Any, layer: int, *_: Any) -> tuple[Any, Any]:
        """What a layer attends to: the trunk's keys and values, then those of the rows, (rows, heads, trunk + W, d)."""
        first_keys, first_values = (tensor.expand(len(keys), -1, -1, -1) for tensor in self._layers[layer])
        return torch.cat((first_keys, keys), dim=2), torch.cat((first_values, values), dim=2)


def shares_beginnings(model: Any) -> bool:
    """Whether the texts of one row may share their beginnings in this model."""
    return type(model).__name__ in _SHARING and model.config._attn_implementation == "sdpa"


def plan_rows(paths: Sequence[Path], *, sharing: bool) -> tuple[int, list[Row]]:
    """(tokens that all sorted paths begin with and that are computed ahead, rows with what comes after these)."""
    if not sharing:
        return 0, [lay_out([path], 0) for path in paths]
    trunk = trunk_length(paths, _LEAST_TRUNK)
    return trunk, [lay_out(part, trunk) for part in split_into_rows(paths, trunk)]


def batches(rows: Sequence[Row], tokens: int) -> Iterator[list[Row]]:
    """Rows in batches of like length, each of at most `tokens` padded tokens (one row at least), longest first."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        if batch and (len(batch) + 1) * len(batch[0].tokens) > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def compute_trunk(model: Any, device: torch.device, tokens: Sequence[int]) -> Trunk:
    """The beginning of all rows."""
    cache = DynamicCache()
    model.model(input_ids=torch.tensor([tokens], device=device), past_key_values=cache, use_cache=True)
    return Trunk(cache)


def score_rows(model: Any, device: torch.device, rows: Sequence[Row], trunk: Trunk | None) -> list[tuple[int, float]]:
    """For each path of the rows: its index, and the log-probability of its scored tokens, summed, nats."""
    hidden = _hidden(model, device, rows, trunk)
    width = hidden.shape[1]
    # A node that predicts tokens of several paths is projected to the vocabulary once.
    wanted = [
        (place * width + node, token, path.index)
        for place, row in enumerate(rows)
        for path, nodes in zip(row.paths, row.nodes, strict=True)
        for node, token in zip(nodes, path.scored, strict=True)
    ]
    nodes, sources = np.unique(np.array([node for node, _, _ in wanted]), return_inverse=True)
    logps = _logps(model, hidden.flatten(0, 1), nodes, sources, [token for _, token, _ in wanted])
    totals: dict[int, float] = {}
    for (_, _, index), logp in zip(wanted, logps, strict=True):
        totals[index] = totals.get(index, 0.0) + logp
    return list(totals.items())


def logits_of(model: Any, device: torch.device, given: Sequence[int], scored: Sequence[int]) -> NDArray[np.float32]:
    """Logits (T, V) that predict the T scored tokens of one text, computed as a bare model computes them."""
    ids = torch.tensor([[*given, *scored[:-1]]], device=device)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits: NDArray[np.float32] = model.get_output_embeddings()(hidden[0, len(given) - 1 :]).float().cpu().numpy()
    return logits


def _hidden(model: Any, device: torch.device, rows: Sequence[Row], trunk: Trunk | None) -> Any:
    """Last hidden states (rows, W, H), padded on the right."""
    width = max(len(row.tokens) for row in rows)
    ids = _padded((row.tokens for row in rows), width, device)
    if trunk is None and all(len(row.paths) == 1 for row in rows):
        # No mask is needed: in a causal model no position sees what comes after it, such as padding.
        return model.model(input_ids=ids, use_cache=False).last_hidden_state
    places = torch.arange(width, device=device)
    ends = torch.maximum(_padded((row.ends for row in rows), width, device), places + 1)  # padding sees itself
    mask = (places <= places[:, None]) & (places[:, None] < ends[:, None, :])
    if trunk is not None:
        mask = torch.cat((mask.new_ones((len(rows), width, trunk.tokens)), mask), dim=-1)
    positions = _padded((row.positions for row in rows), width, device)
    return model.model(
        input_ids=ids, attention_mask=mask[:, None], position_ids=positions, past_key_values=trunk, use_cache=False
    ).last_hidden_state


def _padded(rows: Iterable[list[int]], width: int, device: torch.device) -> Any:
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)


def _logps(model: Any, hidden: Any, nodes: NDArray[np.intp], sources: NDArray[np.intp], tokens: Sequence[int]) -> list[float]:
    """Log-probability, nats, of tokens (N), each predicted from nodes[sources[i]] of hidden states (T, H)."""
    head = model.get_output_embeddings()
    logps = np.empty(len(tokens))
    targets = np.asarray(tokens)
    for begin in range(0, len(nodes), _LOGIT_ROWS):
        logits = head(hidden[torch.from_numpy(nodes[begin : begin + _LOGIT_ROWS]).to(hidden.device)]).float()
        here = np.flatnonzero((sources >= begin) & (sources < begin + _LOGIT_ROWS))
        of_logits = torch.from_numpy(sources[here] - begin).to(hidden.device)
        chosen = logits[of_logits, torch.from_numpy(targets[here]).to(hidden.device)]
        logps[here] = (chosen - logits.logsumexp(-1)[of_logits]).double().cpu().numpy()
    return [float(logp) for logp in logps]
