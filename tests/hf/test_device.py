"""Where a model's weights are to lie when a GPU has too little room: what a model takes, and what is decided by that."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from transformers import PhiConfig, PhiForCausalLM

from biasdpo import models
from biasdpo.backends import choose_backend, hf_loading, open_backend
from biasdpo.backends.hf_loading import Need, Placement, check_bits, choose_placement, load_skeleton, need_of, place
from biasdpo.errors import BackendError, ModelError
from biasdpo.workspace import Workspace

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
STEP = 2**30


# What a model takes


def test_what_a_tiny_phi_takes(tiny_phi: Path) -> None:
    skeleton = load_skeleton(tiny_phi)
    vocabulary = skeleton.config.vocab_size
    matrices = 4 * 64 * 64 + 2 * 64 * 128  # q, k, v, dense; fc1, fc2
    vectors = 4 * 64 + 128 + 64 + 2 * 64  # their biases; the norm's weight and bias
    rest = 2 * vocabulary * 64 + vocabulary + 2 * 64  # embeddings, head and its bias; the last norm
    kv = 2 * 2 * 4 * 16 * 512  # keys and values, 2 layers, 4 heads of 16, 512 positions: as many as it was made for
    for value_bytes in (2, 4):
        need = need_of(skeleton, 10_000, value_bytes)
        layer = value_bytes * (matrices + vectors)
        assert need == Need((layer, layer), value_bytes * rest, 2 * value_bytes * kv + STEP)
    assert need_of(skeleton, 100, 2).work == 2 * 2 * kv * 100 // 512 + STEP
    for bits, matrix_bytes in ((8, 1.0), (4, 0.5 + 4 / 64)):
        quantized = need_of(skeleton, 512, 2, bits)  # type: ignore[arg-type]
        assert quantized.layers == (matrices * matrix_bytes + 2 * vectors,) * 2
        assert quantized.rest == 2 * rest


def test_grouped_queries_and_a_tied_head_are_counted_once(tiny_llama: Path) -> None:
    need = need_of(load_skeleton(tiny_llama), 512, 4)
    assert need.weights == (tiny_llama / "model.safetensors").stat().st_size - _header_bytes(tiny_llama / "model.safetensors")
    assert need.work == 2 * 4 * (2 * 3 * 2 * 16 * 512) + STEP  # 3 layers, 2 key-value heads of 16


def _header_bytes(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def test_what_phi_2_takes() -> None:
    """Its shapes are PhiConfig's own, but for the sizes below (microsoft/phi-2, config.json)."""
    config = PhiConfig(
        vocab_size=51200, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=2048,
    )  # fmt: skip
    with torch.device("meta"):
        need = need_of(PhiForCausalLM(config), 2048, 2)
    assert need.weights == 2 * 2_779_683_840
    assert need.work == 2 * (2 * 32 * 2560 * 2048 * 2) + STEP  # 671 MB of KV cache a side
    assert need.total / 1e9 == pytest.approx(7.98, abs=0.01)
    assert place(need, 8 * 10**9, GPU).whole  # a card of 8 GB that nothing else uses
    # 6 GB: 6.00 - 2.42 (work) - 0.53 (embeddings, head) - 0.16 (one layer passes) = 2.90, 18 layers of 0.157
    assert place(need, 6 * 10**9, GPU).layers_on_device == 18
    assert place(need, 3 * 10**9, GPU).device == CPU


# The decision


@pytest.mark.parametrize(
    ("free", "kept"),
    [
        (48, 4),  # 4 * 10 + 5 + 3
        (47, 2),  # 47 - 3 (work) - 5 (rest) - 10 (one passes through) = 29: two of 10
        (38, 2),
        (37, 1),
        (28, 1),  # 28 - 18 = 10
        (27, 0),
        (0, 0),
    ],
)
def test_as_many_layers_as_fit_beside_one_that_passes_through(free: int, kept: int) -> None:
    placement = place(Need((10, 10, 10, 10), rest=5, work=3), free, GPU)
    if kept == 0:
        assert (placement.device, placement.whole) == (CPU, True)
        assert placement.note.startswith("not cuda:0, it has 0.0 GB free")
    else:
        assert (placement.device, placement.layers_on_device, placement.layers) == (GPU, kept, 4)
        assert placement.whole == (placement.note == "") == (kept == 4)


def test_layers_of_unlike_size_are_kept_from_the_first_on() -> None:
    need = Need((1, 20, 1, 1), rest=0, work=0)
    assert place(need, 22, GPU).layers_on_device == 1  # 22 - 20 (the largest passes) = 2: 1 fits, 1 + 20 does not
    assert place(need, 23, GPU).whole


def test_the_page_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA T4")
    need = Need((10**9,) * 4, rest=10**9, work=10**9)
    assert place(need, 6 * 10**9, GPU).describe() == "cuda:0 (NVIDIA T4)"
    assert place(need, 5 * 10**9, GPU).describe() == (
        "cuda:0 (NVIDIA T4), 2 of 4 layers: it has 5.0 GB free of the 6.0 needed, so the others pass through it at every token, "
        "which is slow"
    )
    threads = torch.get_num_threads()
    assert place(need, 10**9, GPU).describe() == (
        f"CPU, {threads} thread{'s' if threads > 1 else ''}: not cuda:0, it has 1.0 GB free of the 6.0 needed; "
        "--backend llamacpp takes less"
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU with so many free bytes as the test says, as far as the decision goes."""
    seen = SimpleNamespace(free=0)
    monkeypatch.setattr(hf_loading, "choose_device", lambda _name: GPU)
    monkeypatch.setattr(hf_loading, "free_bytes", lambda _device: seen.free)
    monkeypatch.setattr(hf_loading, "find_spec", lambda _name: object())  # bitsandbytes is installed
    return seen


def test_the_figures_are_the_gpus(gpu: Any, tiny_phi: Path) -> None:
    need = need_of(load_skeleton(tiny_phi), 512, 2)
    gpu.free = need.total
    assert choose_placement(tiny_phi, "auto", 512, None) == Placement(GPU, 2, 2)
    gpu.free -= 1
    assert choose_placement(tiny_phi, "auto", 512, None).device == CPU  # no room for one of two layers beside the other
    assert choose_placement(tiny_phi, "auto", 256, None).whole  # half the KV cache


def test_quantized_weights_that_do_not_fit_are_refused(gpu: Any, tiny_phi: Path) -> None:
    gpu.free = need_of(load_skeleton(tiny_phi), 512, 2, 8).total
    assert choose_placement(tiny_phi, "auto", 512, 8).device == GPU
    gpu.free = need_of(load_skeleton(tiny_phi), 512, 2, 4).total
    assert choose_placement(tiny_phi, "auto", 512, 4).device == GPU
    with pytest.raises(
        BackendError, match=r"^In 8 bits the model needs 1\.1 GB of cuda:0, which has .*use transformers-4bit or.*$"
    ):
        choose_placement(tiny_phi, "auto", 512, 8)


def test_quantizing_needs_bitsandbytes_and_a_gpu(
    monkeypatch: pytest.MonkeyPatch, smollm2: models.ModelSpec, tiny_llama: Path, workspace: Workspace
) -> None:
    monkeypatch.setattr(hf_loading, "find_spec", lambda _name: object())
    check_bits(8, GPU)
    monkeypatch.setattr(hf_loading, "find_spec", lambda _name: None)
    with pytest.raises(BackendError, match=r"^transformers-8bit needs bitsandbytes: `pip install bitsandbytes`, or use [^\n]*$"):
        check_bits(8, GPU)
    assert choose_backend(smollm2, "transformers-8bit") == "transformers-8bit"
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match=r"^transformers-4bit needs an NVIDIA GPU, none is here: use [^\n]*$"):
            open_backend(models.find(str(tiny_llama)), None, name="transformers-4bit", workspace=workspace)


def test_the_settings_of_bitsandbytes() -> None:
    eight, four = hf_loading.quantization(8, torch.bfloat16), hf_loading.quantization(4, torch.bfloat16)
    assert (eight.load_in_8bit, eight.load_in_4bit) == (True, False)
    assert (four.load_in_8bit, four.load_in_4bit, four.bnb_4bit_quant_type) == (False, True, "nf4")
    assert four.bnb_4bit_compute_dtype == torch.bfloat16


def test_a_model_larger_than_memory_is_refused(tiny_phi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = need_of(load_skeleton(tiny_phi), 512, 4).weights  # float32 on a CPU
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=weights))
    choose_placement(tiny_phi, "cpu", 512, None)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=weights - 1))
    with pytest.raises(BackendError, match=r"^The model's weights take 0\.0 GB of memory, .*--backend llamacpp[^\n]*$"):
        choose_placement(tiny_phi, "cpu", 512, None)


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 9}')
    with pytest.raises(ModelError, match="is a gpt2 model: the transformers backend runs"):
        load_skeleton(tmp_path)
