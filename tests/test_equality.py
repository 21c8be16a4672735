"""The tuned side in llama.cpp against PEFT in transformers: the same logits, token for token, on every backend."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from biasdpo import models
from biasdpo.backends.base import kl_divergence
from biasdpo.backends.hf import TransformersBackend, open_transformers
from biasdpo.backends.hf_loading import hf_copy
from biasdpo.backends.llamacpp import LlamaCppBackend, open_llamacpp
from biasdpo.gguf import write
from biasdpo.models import AdapterSpec
from biasdpo.records import LikelihoodRequest, Side
from biasdpo.workspace import ASSETS
from tests import tiny_models
from tests.lora_factory import write_lora

PAIRS = [json.loads(line) for line in (ASSETS / "seed_pairs.jsonl").read_text(encoding="utf-8").splitlines()[:40]]
NEAR_TIE = 0.1  # logits: two tokens so close may change places by llama.cpp's 8-bit activations, which PEFT does not have


def requests() -> list[LikelihoodRequest]:
    return [LikelihoodRequest(pair["prompt"], pair["chosen"]) for pair in PAIRS]


def logits(backend: LlamaCppBackend | TransformersBackend, side: Side) -> list[np.ndarray]:
    """Logits (T, V) of each request's continuation."""
    return [backend.logits(request, side) for request in requests()]


def agreement(one: list[np.ndarray], other: list[np.ndarray]) -> tuple[float, float, float, int]:
    """(share of positions with the same likeliest token, the same where `other` has no near tie, KL(other || one) in nats, mean
    over positions, positions)."""
    a, b = np.concatenate(one), np.concatenate(other)
    same = a.argmax(-1) == b.argmax(-1)
    second, first = np.sort(np.partition(b, -2, axis=-1)[:, -2:], axis=-1).T
    return float(same.mean()), float(same[first - second > NEAR_TIE].mean()), kl_divergence(b, a), len(a)


def test_quantized_base_with_a_random_adapter_equals_peft(smollm2, session_workspace, tmp_path):
    adapter = AdapterSpec("random", write_lora(tmp_path / "random"), "smollm2")
    compare(smollm2, adapter, session_workspace)


def test_the_shipped_adapter_equals_peft(smollm2, session_workspace):
    adapter = models.find_adapter("", smollm2, session_workspace)
    assert adapter is not None
    compare(smollm2, adapter, session_workspace)


def compare(spec: models.ModelSpec, adapter: AdapterSpec, workspace) -> None:
    lora = write.cached_lora(adapter, spec.gguf_path, workspace)
    ours = open_llamacpp(spec.gguf_path, spec.template, lora, 1024, kv_cache="f32")
    theirs = open_transformers(hf_copy(spec, workspace), spec.template, adapter.folder, 1024)
    try:
        tuned, base = logits(ours, "tuned"), logits(ours, "base")
        same, decided, kl, positions = agreement(tuned, peft := logits(theirs, "tuned"))
        print(f"{adapter.id}: {same:.4f} of {positions} positions, {decided:.4f} without near ties, KL {kl:.5f} nats")
        assert positions > 2000
        assert decided >= 0.97
        assert same >= 0.95
        assert kl <= 0.01
        # A control: the adapter matters here, so that a tuned side without it would fail.
        assert agreement(base, peft)[2] > 2 * kl
    finally:
        ours.close()
        theirs.close()


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_f32_model_with_adapter_equals_peft(request, kind, tmp_path):
    folder: Path = request.getfixturevalue(f"tiny_{kind}")
    adapter_folder: Path = request.getfixturevalue(f"tiny_{kind}_adapter")
    gguf: Path = request.getfixturevalue(f"tiny_{kind}_gguf")
    template = tiny_models.LLAMA_TEMPLATE if kind == "llama" else tiny_models.PHI_TEMPLATE
    lora = write.lora(AdapterSpec("tiny", adapter_folder, ""), gguf, tmp_path / "lora.gguf")
    ours = open_llamacpp(gguf, template, lora, tiny_models.CONTEXT_LENGTH, kv_cache="f32")
    theirs = open_transformers(folder, template, adapter_folder, tiny_models.CONTEXT_LENGTH)
    try:
        for side in ("base", "tuned"):
            a, b = (np.concatenate(rows) for rows in (logits(ours, side), logits(theirs, side)))
            assert kl_divergence(b, a) <= 1e-5
            top_two = np.sort(b, axis=-1)[:, -2:]
            clear = top_two[:, 1] - top_two[:, 0] > 0.02  # ggml's GELU goes through F16, so near ties may fall either way
            assert clear.mean() > 0.95
            np.testing.assert_array_equal(a.argmax(-1)[clear], b.argmax(-1)[clear])
        assert agreement(logits(ours, "base"), logits(theirs, "tuned"))[2] > 0.1
    finally:
        ours.close()
        theirs.close()
