"""The tuned side in llama.cpp against PEFT in transformers: the same logits, token for token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from biasdpo import models
from biasdpo.backends.base import kl_divergence
from biasdpo.backends.hf import open_transformers
from biasdpo.backends.hf_loading import hf_copy
from biasdpo.backends.llamacpp import open_llamacpp
from biasdpo.gguf import write
from biasdpo.models import AdapterSpec
from biasdpo.records import LikelihoodRequest, Side
from biasdpo.workspace import ASSETS
from tests import tiny_models

PAIRS = [json.loads(line) for line in (ASSETS / "seed_pairs.jsonl").read_text(encoding="utf-8").splitlines()[:8]]
NEAR_TIE = 0.1  # logits: two tokens so close may change places by llama.cpp's 8-bit activations, which PEFT does not have


def logits(backend: Any, side: Side) -> np.ndarray:
    """Logits (T, V) of all continuations, one after the other."""
    requests = [LikelihoodRequest(pair["prompt"], pair["chosen"]) for pair in PAIRS]
    return np.concatenate([backend.logits(request, side) for request in requests])


def same_argmax(one: np.ndarray, other: np.ndarray, near_tie: float = 0.0) -> float:
    """Share of positions with the same likeliest token, without those where `other` has a near tie."""
    second, first = np.sort(np.partition(other, -2, axis=-1)[:, -2:], axis=-1).T
    return float((one.argmax(-1) == other.argmax(-1))[first - second > near_tie].mean())


@pytest.mark.slow
def test_a_quantized_base_with_the_shipped_adapter_equals_peft(smollm2, session_workspace):
    adapter = models.find_adapter("", smollm2, session_workspace)
    lora = write.cached_lora(adapter, smollm2.gguf_path, session_workspace)
    ours = open_llamacpp(smollm2.gguf_path, smollm2.template, lora, 1024, kv_cache="f32")
    theirs = open_transformers(hf_copy(smollm2, session_workspace), smollm2.template, adapter.folder, 1024)
    try:
        tuned, base, peft = logits(ours, "tuned"), logits(ours, "base"), logits(theirs, "tuned")
        assert len(peft) > 300
        assert same_argmax(tuned, peft, NEAR_TIE) >= 0.97
        assert same_argmax(tuned, peft) >= 0.94
        assert kl_divergence(peft, tuned) <= 0.01
        # A control: the adapter matters here, so that a tuned side without it would fail.
        assert kl_divergence(peft, base) > 2 * kl_divergence(peft, tuned)
    finally:
        ours.close()
        theirs.close()


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_an_f32_model_with_an_adapter_equals_peft(request, kind, tmp_path):
    folder, adapter, gguf = (request.getfixturevalue(f"tiny_{kind}{end}") for end in ("", "_adapter", "_gguf"))
    template = tiny_models.LLAMA_TEMPLATE if kind == "llama" else tiny_models.PHI_TEMPLATE
    lora: Path = write.lora(AdapterSpec("tiny", adapter, ""), gguf, tmp_path / "lora.gguf")
    ours = open_llamacpp(gguf, template, lora, tiny_models.CONTEXT_LENGTH, kv_cache="f32")
    theirs = open_transformers(folder, template, adapter, tiny_models.CONTEXT_LENGTH)
    try:
        for side in ("base", "tuned"):
            a, b = logits(ours, side), logits(theirs, side)
            assert kl_divergence(b, a) <= 1e-5
            assert same_argmax(a, b, 0.02) == 1.0  # ggml's GELU goes through F16, so near ties may fall either way
        assert kl_divergence(logits(theirs, "tuned"), logits(ours, "base")) > 0.1
    finally:
        ours.close()
        theirs.close()
