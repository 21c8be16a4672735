"""Where a model's weights go: what it takes, and what is decided if a GPU has too little room. No GPU is needed."""

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
from biasdpo.backends.hf_loading import check_bits, choose_placement, divide, end_tokens, load_skeleton, weight_bytes, work_bytes
from biasdpo.errors import BackendError, ModelError
from biasdpo.workspace import Workspace
from tests import tiny_models

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
STEP = 2**30


def test_what_a_tiny_phi_takes(tiny_phi: Path) -> None:
    skeleton = load_skeleton(tiny_phi)
    vocabulary = skeleton.config.vocab_size
    matrices = 2 * (4 * 64 * 64 + 2 * 64 * 128)  # two layers: q, k, v, dense; fc1, fc2
    vectors = 2 * (4 * 64 + 128 + 64 + 2 * 64)  # their biases; the norms' weights and biases
    rest = 2 * vocabulary * 64 + vocabulary + 2 * 64  # embeddings, head and its bias; the last norm
    for value_bytes in (2, 4):
        assert weight_bytes(skeleton, value_bytes) == value_bytes * (matrices + vectors + rest)
    assert weight_bytes(skeleton, 2, 8) == matrices + 2 * (vectors + rest)
    assert weight_bytes(skeleton, 2, 4) == int(matrices * (0.5 + 4 / 64)) + 2 * (vectors + rest)
    kv = 2 * 2 * 4 * 16 * 512  # keys and values, 2 layers, 4 heads of 16, 512 positions, the model's maximum
    assert work_bytes(skeleton, 10_000, 2) == 2 * 2 * kv + STEP
    assert work_bytes(skeleton, 100, 2) == 2 * 2 * kv * 100 // 512 + STEP


def test_grouped_queries_and_a_tied_head_count_once(tiny_llama: Path) -> None:
    file = tiny_llama / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert weight_bytes(load_skeleton(tiny_llama), 4) == file.stat().st_size - header
    assert work_bytes(load_skeleton(tiny_llama), 512, 4) == 2 * 4 * (2 * 3 * 2 * 16 * 512) + STEP  # 3 layers, 2 KV heads of 16


def test_phi_2_is_divided_within_the_room() -> None:
    """Shapes of microsoft/phi-2: 2.78 billion parameters, 0.157 GB a layer, 0.262 GB for embeddings and for the head."""
    config = PhiConfig(
        vocab_size=51200, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=2048,
    )  # fmt: skip
    with torch.device("meta"):
        phi = PhiForCausalLM(config)
    assert weight_bytes(phi, 2) == 2 * 2_779_683_840
    work = work_bytes(phi, 2048, 2)
    assert work == 2 * (2 * 32 * 2560 * 2048 * 2) + STEP  # 671 MB of KV cache a side
    sizes = {name: sum(p.numel() for p in module.parameters()) * 2 for name, module in phi.named_modules()}
    for gigabytes, least in ((6, 18), (4, 5)):
        room = gigabytes * 10**9 - work
        places = divide(phi, GPU, room)
        kept = [name for name, place in places.items() if place == GPU]
        layers = [name for name in kept if name.startswith("model.layers.")]
        assert layers == [f"model.layers.{i}" for i in range(len(layers))]
        assert len(layers) >= least
        largest = max(sizes[name] for name, place in places.items() if place == "cpu")
        assert sum(sizes[name] for name in kept) + largest <= room  # one that passes through has room
    assert GPU not in divide(phi, GPU, 100).values()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU with as many free bytes as the test says, as far as the decision goes."""
    seen = SimpleNamespace(free=0)
    monkeypatch.setattr(hf_loading, "choose_device", lambda _name: GPU)
    monkeypatch.setattr(hf_loading, "free_bytes", lambda _device: seen.free)
    monkeypatch.setattr(hf_loading, "find_spec", lambda _name: object())  # bitsandbytes is installed
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA T4")
    return seen


def test_the_decision(gpu: Any, tmp_path: Path) -> None:
    """Layers of 2.1 MB, embeddings and head of 0.5 MB each, that little beside the step's GB."""
    folder = tiny_models.save_tiny_llama(tmp_path / "m", hidden_size=256, num_hidden_layers=5, intermediate_size=512)
    skeleton = load_skeleton(folder)
    needed = weight_bytes(skeleton, 2) + work_bytes(skeleton, 512, 2)
    layer = sum(p.numel() for p in skeleton.model.layers[0].parameters()) * 2
    gpu.free = needed
    placement = choose_placement(folder, "auto", 512, None)
    assert (placement.device, placement.whole, placement.describe()) == (GPU, True, "cuda:0 (NVIDIA T4)")
    gpu.free -= layer  # one passes through, one has no room beside it
    divided = choose_placement(folder, "auto", 512, None)
    assert divided.describe().startswith("cuda:0 (NVIDIA T4), 3 of 5 layers: it has 1.1 GB free of the 1.1 needed, so the rest ")
    assert {divided.device_map[f"model.layers.{i}"] for i in (3, 4)} == {"cpu"}
    assert choose_placement(folder, "auto", 16, None).whole  # a smaller KV cache
    gpu.free = 100
    placement = choose_placement(folder, "auto", 512, None)
    assert (placement.device, placement.whole) == (CPU, True)
    assert ": not cuda:0, it has 0.0 GB free of the 1.1 needed; --backend llamacpp takes less" in placement.describe()
    gpu.free = weight_bytes(skeleton, 2, 4) + work_bytes(skeleton, 512, 2)
    assert choose_placement(folder, "auto", 512, 4).device == GPU
    with pytest.raises(BackendError, match=r"^In 8 bits the model needs .* GB of cuda:0, .*use transformers-4bit or.*$"):
        choose_placement(folder, "auto", 512, 8)


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
    eight, four = hf_loading.quantization(8, torch.bfloat16), hf_loading.quantization(4, torch.bfloat16)
    assert (eight.load_in_8bit, four.load_in_4bit, four.bnb_4bit_quant_type) == (True, True, "nf4")
    assert four.bnb_4bit_compute_dtype == torch.bfloat16


def test_a_model_larger_than_memory_is_refused(tiny_phi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weight_bytes(load_skeleton(tiny_phi), 4)  # float32 on a CPU
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=weights))
    choose_placement(tiny_phi, "cpu", 512, None)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=weights - 1))
    with pytest.raises(BackendError, match=r"^The model's weights take 0\.0 GB of memory, .*--backend llamacpp[^\n]*$"):
        choose_placement(tiny_phi, "cpu", 512, None)


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 9}')
    with pytest.raises(ModelError, match="is a gpt2 model: the transformers backend runs"):
        load_skeleton(tmp_path)


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [(2, 2, {0, 2}), ([2, 5], None, {0, 2, 5}), (None, [7, 8], {0, 2, 7, 8}), (3, [3], {0, 2, 3})],
)
def test_end_tokens_may_be_an_int_a_list_or_null(tiny_llama: Path, generation: Any, config: Any, ends: set[int]) -> None:
    """<|endoftext|> (0) and <|im_end|> (2) end a text whatever the configs say."""
    tokenizer = hf_loading.load_tokenizer(tiny_llama)
    model = SimpleNamespace(
        generation_config=SimpleNamespace(eos_token_id=generation), config=SimpleNamespace(eos_token_id=config)
    )
    assert end_tokens(model, tokenizer, tiny_models.LLAMA_TEMPLATE) == ends
