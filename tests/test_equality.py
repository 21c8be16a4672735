"""The tuned side in llama.cpp against PEFT in transformers: the same logits, token for token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from biasdpo import models
from biasdpo.backends.hf import open_transformers
from biasdpo.backends.hf_loading import hf_copy
from biasdpo.backends.llamacpp import open_llamacpp
from biasdpo.gguf import write
from biasdpo.gguf.proof import kl_by_position
from biasdpo.models import AdapterSpec
from biasdpo.records import LikelihoodRequest, Side
from biasdpo.workspace import ASSETS
from tests import tiny_models

PAIRS = [json.loads(line) for line in (ASSETS / "seed_pairs.jsonl").read_text(encoding="utf-8").splitlines()]
PAIRS.sort(key=lambda pair: len(pair["chosen"]), reverse=True)  # the longest have most positions for one prompt
REQUESTS = [LikelihoodRequest(pair["prompt"], pair["chosen"]) for pair in PAIRS[:30]]


class Agreement(NamedTuple):
    """Shares of positions with the same likeliest token: of all, and of those without a near tie in the second backend."""

    positions: int
    same: float
    clearly_same: float
    kl_nats: float  # KL(second || first), mean over positions


def compare(ours: Any, side: Side, theirs: Any, their_side: Side, near_tie: float, count: int) -> Agreement:
    """Compare two backends on the first `count` texts, one text in memory at a time."""
    same, clear, kls = [], [], []
    for request in REQUESTS[:count]:
        a, b = ours.logits(request, side), theirs.logits(request, their_side)
        second, first = np.partition(b, (-2, -1), axis=-1)[:, -2:].T
        same.append(a.argmax(-1) == b.argmax(-1))
        clear.append(first - second > near_tie)
        kls.append(kl_by_position(b, a))
    all_same = np.concatenate(same)
    return Agreement(
        len(all_same), float(all_same.mean()), float(all_same[np.concatenate(clear)].mean()), float(np.concatenate(kls).mean())
    )


@pytest.mark.slow
def test_a_quantized_base_with_the_shipped_adapter_equals_peft(smollm2, session_workspace):
    adapter = models.find_adapter("", smollm2, session_workspace)
    lora = write.cached_lora(adapter, smollm2.gguf_path, session_workspace)
    ours = open_llamacpp(smollm2.gguf_path, smollm2.template, lora, 1024, threads=1, kv_cache="f32")
    theirs = open_transformers(
        hf_copy(smollm2, session_workspace), smollm2.template, adapter.folder, 1024, device="cpu", threads=1
    )
    try:
        # Near ties may change places by llama.cpp's 8-bit activations, which PEFT does not have.
        tuned = compare(ours, "tuned", theirs, "tuned", near_tie=0.1, count=len(REQUESTS))
        assert tuned.positions > 2000
        assert tuned.clearly_same >= 0.97
        assert tuned.same >= 0.95, tuned
        assert tuned.kl_nats <= 0.01
        # A control: the adapter matters here, so that a tuned side without it would fail.
        assert compare(ours, "base", theirs, "tuned", near_tie=0.1, count=4).kl_nats > 2 * tuned.kl_nats
    finally:
        ours.close()
        theirs.close()


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_an_f32_model_with_an_adapter_equals_peft(request, kind, tmp_path):
    folder, adapter, gguf = (request.getfixturevalue(f"tiny_{kind}{end}") for end in ("", "_adapter", "_gguf"))
    template = tiny_models.LLAMA_TEMPLATE if kind == "llama" else tiny_models.PHI_TEMPLATE
    lora: Path = write.lora(AdapterSpec("tiny", adapter, ""), gguf, tmp_path / "lora.gguf")
    ours = open_llamacpp(gguf, template, lora, tiny_models.CONTEXT_LENGTH, threads=1, kv_cache="f32")
    theirs = open_transformers(folder, template, adapter, tiny_models.CONTEXT_LENGTH, device="cpu", threads=1)
    try:
        for side in ("base", "tuned"):
            # ggml's GELU goes through F16, so near ties may fall either way.
            agreement = compare(ours, side, theirs, side, near_tie=0.02, count=8)
            assert agreement.clearly_same == 1.0
            assert agreement.kl_nats <= 1e-5
        assert compare(ours, "base", theirs, "tuned", near_tie=0.0, count=8).kl_nats > 0.1
    finally:
        ours.close()
        theirs.close()
