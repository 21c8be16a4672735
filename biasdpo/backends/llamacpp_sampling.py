"""Logits to the next token, by llama.cpp's own samplers, in the order that `records.Sampling` states."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from biasdpo.records import Sampling

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


def build_chain(sampling: Sampling, vocabulary_size: int, context_length: int) -> Any:
    """A llama_sampler for one stream; the caller frees it. The repetition penalty looks at the whole context."""
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())

    def add(sampler: Any) -> None:
        llama_cpp.llama_sampler_chain_add(chain, sampler)

    if sampling.repetition_penalty != 1.0:
        add(llama_cpp.llama_sampler_init_penalties(vocabulary_size, context_length, sampling.repetition_penalty, 0.0, 0.0))
    if sampling.temperature == 0.0:
        add(llama_cpp.llama_sampler_init_greedy())
        return chain
    add(llama_cpp.llama_sampler_init_temp(sampling.temperature))
    if sampling.top_k > 0:
        add(llama_cpp.llama_sampler_init_top_k(sampling.top_k))
    if sampling.top_p < 1.0:
        add(llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1))
    add(llama_cpp.llama_sampler_init_dist(sampling.seed))
    return chain


def sample_from(chain: Any, logits: NDArray[np.float32]) -> int:
    """Draw from stored logits (V,), as `llama_sampler_sample` does from a context's."""
    candidates = np.zeros(len(logits), dtype=_CANDIDATE)
    candidates["id"] = np.arange(len(logits), dtype=np.int32)
    candidates["logit"] = logits
    array = llama_cpp.llama_token_data_array(
        data=candidates.ctypes.data_as(llama_cpp.llama_token_data_p), size=len(candidates), selected=-1, sorted=False
    )
    llama_cpp.llama_sampler_apply(chain, ctypes.byref(array))
    token = int(array.data[array.selected].id)
    llama_cpp.llama_sampler_accept(chain, token)
    return token
