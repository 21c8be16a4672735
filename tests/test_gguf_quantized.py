"""Quantized GGUFs: llama.cpp's recipes, what falls back, sizes known before, SmolLM2 for real."""

from __future__ import annotations

import ctypes

import llama_cpp
import numpy as np
import pytest

from biasdpo import models
from biasdpo.backends.base import kl_divergence
from biasdpo.backends.hf_loading import hf_copy
from biasdpo.errors import ConfigError, ExportError
from biasdpo.gguf import quantize, write
from biasdpo.gguf.quantize import bytes_of, planned_types
from biasdpo.model_files import read_header
from tests import tiny_models
from tests.logits import llamacpp_logits, transformers_logits
from tests.test_gguf_merged import IDS, adapter_of, tensors_of

NAMES = [quantization.name for quantization in quantize.QUANTIZATIONS]
# KL to the unquantized model, nats, that each may have on the random model below (measured: 0 to 0.25 of it).
LARGEST_KL = {
    "F32": 1e-5,
    "F16": 1e-3,
    "BF16": 0.05,
    "Q8_0": 0.05,
    "Q6_K": 0.2,
    "Q5_K_M": 0.5,
    "Q4_K_M": 1,
    "Q4_1": 1,
    "Q4_0": 1.5,
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A Llama 256 wide, so that K-quants fit, and deep enough for their mixtures: 10 blocks."""
    return tiny_models.save_tiny_llama(
        tmp_path_factory.mktemp("wide") / "model",
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=10,
        tie_word_embeddings=False,
        initializer_range=0.06,
    )


@pytest.fixture(scope="module")
def wide_adapter(wide, tmp_path_factory):
    return tiny_models.write_adapter(tmp_path_factory.mktemp("wide") / "adapter", wide, size=0.05)


@pytest.fixture(scope="module")
def wide_logits(wide, wide_adapter):
    return transformers_logits(wide, IDS, wide_adapter)


@pytest.mark.parametrize("name", NAMES)
def test_each_quantization_is_llama_cpps_own_recipe(wide, wide_adapter, wide_logits, tmp_path, name):
    written = write.merged(models.find(str(wide)), adapter_of(wide_adapter), name, tmp_path / "out.gguf")
    tensors = tensors_of(written.path)
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in tensors.values()}
    planned = planned_types(name, shapes)
    assert {tensor: tensors[tensor].tensor_type.name for tensor in planned} == {t: got for t, (_, got) in planned.items()}
    assert all(wanted == got for wanted, got in planned.values())
    assert written.fallbacks == ()
    assert len(planned) == 10 * 7 + 2  # seven matrices a block, the embeddings, the head
    expected = write.expected_bytes(models.find(str(wide)), name)
    assert expected == pytest.approx(written.bytes, rel=0.05)
    kl = kl_divergence(wide_logits, llamacpp_logits(written.path, IDS))
    print(f"{name}: {written.bytes:,} bytes, KL {kl:.5f} nats")
    assert kl <= LARGEST_KL[name]


def test_the_middle_mixtures_give_six_bits_where_llama_cpp_does():
    """10 blocks: the first (10 // 8 = 1), the last two (from 7 * 10 // 8 = 8 on), and every third from the fourth on."""
    shapes = {f"blk.{i}.{module}.weight": (256, 256) for i in range(10) for module in ("attn_q", "attn_v", "ffn_down")}
    shapes |= {"token_embd.weight": (512, 256)}
    planned = planned_types("Q4_K_M", shapes)
    six = {int(name.split(".")[1]) for name, (wanted, _) in planned.items() if wanted == "Q6_K" and "attn_v" in name}
    assert six == {0, 3, 6, 8, 9}  # (i - 1) % 3 == 2: 3, 6, 9
    assert planned["blk.3.ffn_down.weight"] == ("Q6_K", "Q6_K")
    assert planned["blk.3.attn_q.weight"] == ("Q4_K", "Q4_K")
    assert planned["token_embd.weight"] == ("Q6_K", "Q6_K")  # the head, since there is no other


def test_bytes_of_blocks():
    assert bytes_of("Q4_K", (2, 512)) == 2 * 2 * 144
    assert bytes_of("Q8_0", (3, 32)) == 128  # 3 * 34 = 102, padded to 32
    assert bytes_of("F32", (5,)) == 32  # 20, padded


def test_widths_that_256_does_not_divide_fall_back_and_it_is_said(tiny_llama, tmp_path):
    written = write.merged(models.find(str(tiny_llama)), None, "Q4_K_M", tmp_path / "out.gguf")
    types = {name: tensor.tensor_type.name for name, tensor in tensors_of(written.path).items() if len(tensor.shape) == 2}
    told = {fallback.tensor: (fallback.wanted, fallback.got) for fallback in written.fallbacks}
    assert set(told) == set(types)  # 64 and 128 wide
    assert {got for _, got in told.values()} == {"Q5_0", "Q8_0"}
    assert told["blk.0.attn_q.weight"] == ("Q4_K", "Q5_0")
    assert told["blk.2.attn_v.weight"] == ("Q6_K", "Q8_0")
    assert told["token_embd.weight"] == ("Q6_K", "Q8_0")
    assert all(types[name] == got for name, (_, got) in told.items())
    expected = write.expected_bytes(models.find(str(tiny_llama)), "Q4_K_M")
    assert expected == pytest.approx(written.bytes, abs=10_000)  # the header is guessed by the rule of a real vocabulary
    assert written.to_json()["fallbacks"][0] == {"tensor": "token_embd.weight", "wanted": "Q6_K", "got": "Q8_0"}


def test_a_width_that_allows_nothing_is_refused_before_anything_is_written(tmp_path):
    folder = tiny_models.save_tiny_llama(tmp_path / "model", hidden_size=48, intermediate_size=80)
    with pytest.raises(ExportError, match=r"Q8_0 needs widths that 32 divides, .* is 48 wide: choose F16"):
        write.merged(models.find(str(folder)), None, "Q8_0", tmp_path / "out" / "a.gguf")
    assert not list((tmp_path / "out").glob("*"))


def test_a_quantized_base_is_quantized_anew(wide, wide_adapter, wide_logits, tmp_path):
    base = write.merged(models.find(str(wide)), None, "Q6_K", tmp_path / "base.gguf").path
    spec = models.find(str(base))
    kept = write.merged(spec, adapter_of(wide_adapter), "keep", tmp_path / "kept.gguf")
    assert {t.tensor_type.name for t in tensors_of(kept.path).values()} == {"Q6_K", "F32"}
    assert kl_divergence(wide_logits, llamacpp_logits(kept.path, IDS)) <= 0.3  # rounded twice
    smaller = write.merged(spec, adapter_of(wide_adapter), "Q4_K_M", tmp_path / "smaller.gguf")
    assert (smaller.source, smaller.touched) == ("gguf", 70)
    assert read_header(smaller.path).values["general.file_type"] == 15  # LLAMA_FTYPE_MOSTLY_Q4_K_M
    assert tensors_of(smaller.path)["blk.1.attn_q.weight"].tensor_type.name == "Q4_K"
    assert write.expected_bytes(spec, "Q4_K_M") == pytest.approx(smaller.bytes, rel=0.05)
    assert write.expected_bytes(spec, "keep") == base.stat().st_size
    assert kl_divergence(wide_logits, llamacpp_logits(smaller.path, IDS)) <= 1


def test_smollm2_with_its_shipped_adapter(smollm2, session_workspace, tmp_path):
    """576 wide: K-quants fall back, and it is told."""
    adapter = models.find_adapter("", smollm2, session_workspace)
    folder = hf_copy(smollm2, session_workspace)
    spec = models.find(str(folder))
    base = read_header(smollm2.gguf_path)
    ids = [int(i) for i in np.random.default_rng(0).integers(1000, 40000, 24)]
    lora = write.cached_lora(adapter, smollm2.gguf_path, session_workspace)
    reference = llamacpp_logits(smollm2.gguf_path, ids, lora)
    untuned = kl_divergence(reference, llamacpp_logits(smollm2.gguf_path, ids))
    for name in ("Q4_K_M", "Q8_0"):
        written = write.merged(spec, adapter, name, tmp_path / "out.gguf")
        header = read_header(written.path)
        assert written.touched == 30 * 4
        assert write.expected_bytes(spec, name) == pytest.approx(written.bytes, rel=0.05)
        # 1536 = 6 * 256, the width of ffn_down, is divided; 576 is not.
        narrow = {name for name, tensor in header.tensors.items() if len(tensor.shape) == 2 and tensor.shape[1] == 576}
        assert len(narrow) == 30 * 6 + 1
        assert {fallback.tensor for fallback in written.fallbacks} == (narrow if name == "Q4_K_M" else set())
        for key in ("tokens", "token_type", "merges", "pre", "eos_token_id", "bos_token_id"):
            assert header.values[f"tokenizer.ggml.{key}"] == base.values[f"tokenizer.ggml.{key}"]
        assert header.values["tokenizer.chat_template"] == base.values["tokenizer.chat_template"]
        kl = kl_divergence(reference, llamacpp_logits(written.path, ids))
        print(
            f"{name}: {written.bytes:,} bytes, KL {kl:.4f} nats to the Q4_1 base with the LoRA beside it, untuned {untuned:.4f}"
        )
        assert kl < (0.5 * untuned if name == "Q8_0" else 0.4)  # of 8 bits: nearer than without the adapter


def test_unknown_quantizations_and_keep_without_a_base_are_refused(tiny_llama, tmp_path):
    spec = models.find(str(tiny_llama))
    with pytest.raises(ConfigError, match=r"Unknown quantization 'Q9': choose one of F32, .*keep"):
        write.merged(spec, None, "Q9", tmp_path / "out.gguf")
    with pytest.raises(ConfigError, match="'keep' needs a base GGUF"):
        write.merged(spec, None, "keep", tmp_path / "out.gguf", source="hf")
    assert not list(tmp_path.glob("*"))


# llama.cpp's quantizer


def test_a_torn_file_is_refused_with_llama_cpps_reason_and_the_log_goes_where_it_went(tiny_llama_gguf, tmp_path):
    heard = []

    @llama_cpp.llama_log_callback
    def listen(_level, text, _data):
        heard.append(text.decode())

    former, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(former), ctypes.byref(data))
    llama_cpp.llama_log_set(listen, None)
    try:
        torn = tmp_path / "torn.gguf"
        torn.write_bytes(tiny_llama_gguf.read_bytes()[:20_000])
        with pytest.raises(ExportError, match=r"^llama.cpp could not make Q8_0 of the model \(.+\): choose") as refused:
            quantize.quantize_file(torn, tmp_path / "out.gguf", "Q8_0", threads=1, on_progress=lambda _share: None)
        assert "\n" not in str(refused.value)
        assert heard == []
        llama_cpp.llama_model_load_from_file(str(torn).encode(), llama_cpp.llama_model_default_params())
        assert "".join(heard) != ""
    finally:
        llama_cpp.llama_log_set(former, data)


def test_what_progress_raises_reaches_the_caller(tiny_llama_gguf, tmp_path):
    def stop(_share):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize.quantize_file(tiny_llama_gguf, tmp_path / "out.gguf", "Q8_0", threads=1, on_progress=stop)
