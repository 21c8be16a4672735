"""Adapters that the transformers backend refuses, each in one line, and those of half precision that it takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from biasdpo.backends.hf import TransformersBackend, open_transformers
from biasdpo.errors import AdapterError, ProofError
from tests import tiny_models


@pytest.fixture
def open_with(tiny_llama: Path) -> Callable[[Path], TransformersBackend]:
    return lambda adapter: open_transformers(tiny_llama, tiny_models.LLAMA_TEMPLATE, adapter, 512)


def change_factors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    save_file(change(load_file(adapter / "adapter_model.safetensors")), adapter / "adapter_model.safetensors")
    return adapter


def refused(open_with: Callable[[Path], Any], adapter: Path, match: str, error: type[Exception] = AdapterError) -> None:
    with pytest.raises(error, match=match) as caught:
        open_with(adapter)
    assert "\n" not in str(caught.value)


def test_an_adapter_for_another_base_is_refused(open_with: Any, tiny_llama: Path, tiny_phi_adapter: Path, tmp_path: Path) -> None:
    refused(open_with, tiny_phi_adapter, r"made for another base model: it adapts model\.layers\.0\.mlp\.fc1, which")
    wider = tiny_models.write_adapter(tmp_path / "wide", tiny_llama)
    change_factors(wider, lambda f: {n: torch.zeros(t.shape[0], 96) if "q_proj.lora_A" in n else t for n, t in f.items()})
    refused(open_with, wider, r"its model\.layers\.0\.self_attn\.q_proj is 64 x 96, this model's 64 x 64")


def test_an_adapter_that_changes_nothing_fails_the_proof(open_with: Any, tiny_llama: Path, tmp_path: Path) -> None:
    refused(open_with, tiny_models.write_adapter(tmp_path / "zero", tiny_llama, size=0.0), "changes nothing", ProofError)


def test_an_adapter_of_nans_fails_the_proof(open_with: Any, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = tiny_models.write_adapter(tmp_path / "nan", tiny_llama)
    change_factors(adapter, lambda f: {n: t * torch.nan for n, t in f.items()})
    refused(open_with, adapter, "not numbers", ProofError)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"use_dora": True}, "uses use_dora"),
        ({"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "uses init_lora_weights=pissa_niter_4"),
        ({"bias": "all"}, "uses bias=all"),
        ({"peft_type": "LOHA"}, "is a 'LOHA' adapter"),
    ],
)
def test_what_is_no_plain_lora_is_refused(
    open_with: Any, tiny_llama: Path, tmp_path: Path, settings: dict[str, Any], match: str
) -> None:
    refused(open_with, tiny_models.write_adapter(tmp_path / "a", tiny_llama, **settings), match)


def test_a_damaged_adapter_is_refused(open_with: Any, tiny_llama: Path, tmp_path: Path) -> None:
    whole = tiny_models.write_adapter(tmp_path / "whole", tiny_llama)
    weights = whole / "adapter_model.safetensors"
    factors = load_file(weights)

    weights.write_bytes(weights.read_bytes()[:-10])
    refused(open_with, whole, "no complete safetensors file")
    save_file({n: t for n, t in factors.items() if "layers.2.mlp.up_proj.lora_A" not in n}, weights)
    refused(open_with, whole, "up_proj has no matching pair")
    save_file({n: t for n, t in factors.items() if "layers.2" not in n}, weights)
    refused(open_with, whole, "is incomplete: its settings adapt 21 layers, its file holds 14")
    save_file({"base_model.model.lm_head.weight": torch.zeros(2, 2)}, weights)
    refused(open_with, whole, "is no LoRA factor")
    save_file({}, weights)
    refused(open_with, whole, "holds no LoRA factors")
    weights.rename(whole / "adapter_model.bin")  # a pickle's name
    refused(open_with, whole, "has no adapter_model.safetensors")


def test_a_wrong_rank_is_refused(open_with: Any, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = tiny_models.write_adapter(tmp_path / "a", tiny_llama)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 6}))
    refused(open_with, adapter, "PEFT can't load the adapter")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adapters_load(open_with: Any, tiny_llama: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = change_factors(
        tiny_models.write_adapter(tmp_path / "a", tiny_llama), lambda f: {n: t.to(dtype) for n, t in f.items()}
    )
    backend = open_with(adapter)
    assert backend.proof.kl_nats > 0.01
    backend.close()
