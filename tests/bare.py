"""Bare llama-cpp-python, the yardstick: `llama_cpp.Llama` as its users make it, with the default KV cache and batch sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import llama_cpp
import numpy as np


def cpu_has_amx() -> bool:
    """Whether llama.cpp would choose its AMX kernels, which crash as pip builds them (see `backends.llamacpp_model`)."""
    try:
        return " amx_tile" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False


@contextmanager
def bare_llama(
    gguf: Path, lora: Path | None = None, *, threads: int = 1, context_length: int = 4096, **options: Any
) -> Iterator[Any]:
    """A `llama_cpp.Llama`. Where our backend leaves llama.cpp's AMX kernels alone (they crash), so does this one."""
    defaults = llama_cpp.llama_model_default_params

    def safe_params() -> Any:
        params = defaults()
        if cpu_has_amx():
            params.use_extra_bufts = False
        return params

    with mock.patch.object(llama_cpp.llama_cpp, "llama_model_default_params", safe_params):
        llama = llama_cpp.Llama(
            str(gguf),
            lora_path=None if lora is None else str(lora),
            n_ctx=context_length,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
            **options,
        )
    try:
        yield llama
    finally:
        llama.close()


def greedy(llama: Any, tokens: list[int], count: int, *, keep_going: bool = False) -> list[int]:
    """The `count` likeliest tokens in turn, the end-of-text token last if it comes (`keep_going`: suppressed)."""
    eos = llama.token_eos()

    def suppress(_ids: Any, scores: np.ndarray) -> np.ndarray:
        scores[eos] = -np.inf
        return scores

    processors = llama_cpp.LogitsProcessorList([suppress]) if keep_going else None
    written: list[int] = []
    for token in llama.generate(tokens, temp=0.0, top_k=1, repeat_penalty=1.0, logits_processor=processors):
        written.append(token)
        if len(written) == count or token == eos:
            break
    return written


def text_of(llama: Any, tokens: list[int]) -> str:
    """The text of tokens, special ones left out."""
    return b"".join(llama.detokenize([token]) for token in tokens if token != llama.token_eos()).decode("utf-8", "replace")
