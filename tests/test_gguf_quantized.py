"""Quantized GGUFs: llama.cpp's recipes, fallbacks, sizes known in advance, the real SmolLM2."""

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
from tests.gguf_files import IDS, adapter_of, spec_of, tensors_of
from tests.logits import llamacpp_logits, transformers_logits

# KL to the unquantized model, nats, allowed on the random model below (measured: 0 to 0.25 of it).
MAX_KL = {
    "F32": 1e-5, "F16": 1e-3, "BF16": 0.05, "Q8_0": 0.05, "Q6_K": 0.2, "Q5_K_M": 0.5, "Q4_K_M": 1, "Q4_1": 1, "Q4_0": 1.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A Llama 256 wide, so that K-quants fit, and deep enough for their mixtures: 10 blocks."""
    folder = tmp_path_factory.mktemp("wide") / "llama"
    size = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 10, "initializer_range": 0.06}
    return tiny_models.save_tiny_llama(folder, tie_word_embeddings=False, **size)


@pytest.fixture(scope="module")
def wide_adapter(wide):
    return adapter_of(tiny_models.write_adapter(wide.parent / "adapter", wide, size=0.05))


@pytest.fixture(scope="module")
def wide_logits(wide, wide_adapter):
    return transformers_logits(wide, IDS, wide_adapter.folder)


def test_every_quantization_has_a_bound():
    assert {known.name for known in quantize.QUANTIZATIONS} == MAX_KL.keys()


@pytest.mark.parametrize("name", MAX_KL)
def test_each_quantization_is_llama_cpps_own_recipe(wide, wide_adapter, wide_logits, tmp_path, name):
    written = write.merged(spec_of(wide), wide_adapter, name, tmp_path / "out.gguf")
    tensors = tensors_of(written.path)
    planned = planned_types(name, {t.name: tuple(int(n) for n in reversed(t.shape)) for t in tensors.values()})
    assert {tensor: tensors[tensor].tensor_type.name for tensor in planned} == {t: got for t, (_, got) in planned.items()}
    assert all(wanted == got for wanted, got in planned.values())
    assert written.fallbacks == ()
    assert len(planned) == 10 * 7 + 2  # seven matrices a block, the embeddings, the head
    assert write.expected_bytes(spec_of(wide), name) == pytest.approx(written.bytes, rel=0.05)
    assert kl_divergence(wide_logits, llamacpp_logits(written.path, IDS)) <= MAX_KL[name]


def test_the_mixtures_give_six_bits_where_llama_cpp_does():
    """10 blocks: the first (10 // 8 = 1), the last two (from 7 * 10 // 8 = 8 on), and every third from the fourth on."""
    shapes = {f"blk.{i}.{module}.weight": (256, 256) for i in range(10) for module in ("attn_q", "attn_v", "ffn_down")}
    planned = planned_types("Q4_K_M", shapes | {"token_embd.weight": (512, 256)})
    six = {int(name.split(".")[1]) for name, (wanted, _) in planned.items() if wanted == "Q6_K" and "attn_v" in name}
    assert six == {0, 3, 6, 8, 9}  # (i - 1) % 3 == 2: 3, 6, 9
    assert planned["blk.3.ffn_down.weight"] == ("Q6_K", "Q6_K")
    assert planned["blk.3.attn_q.weight"] == ("Q4_K", "Q4_K")
    assert planned["token_embd.weight"] == ("Q6_K", "Q6_K")  # the head, since there is no other


def test_bytes_of_blocks():
    assert bytes_of("Q4_K", (2, 512)) == 2 * 2 * 144
    assert bytes_of("Q8_0", (3, 32)) == 128  # 3 * 34 = 102, padded to 32
    assert bytes_of("F32", (5,)) == 32  # 20, padded


def test_fallbacks_are_reported(tiny_llama, tmp_path):
    written = write.merged(spec_of(tiny_llama), None, "Q4_K_M", tmp_path / "out.gguf")
    types = {name: tensor.tensor_type.name for name, tensor in tensors_of(written.path).items() if len(tensor.shape) == 2}
    reported = {fallback.tensor: (fallback.wanted, fallback.got) for fallback in written.fallbacks}
    assert {name: got for name, (_, got) in reported.items()} == types  # 64 and 128 wide: all of them
    assert set(types.values()) == {"Q5_0", "Q8_0"}
    assert reported["blk.0.attn_q.weight"] == ("Q4_K", "Q5_0")
    assert reported["blk.2.attn_v.weight"] == ("Q6_K", "Q8_0")
    assert reported["token_embd.weight"] == ("Q6_K", "Q8_0")
    expected = write.expected_bytes(spec_of(tiny_llama), "Q4_K_M")
    assert expected == pytest.approx(written.bytes, abs=10_000)  # the header is estimated for a real vocabulary
    assert written.to_json()["fallbacks"][0] == {"tensor": "token_embd.weight", "wanted": "Q6_K", "got": "Q8_0"}


def test_a_width_that_allows_no_type_is_refused_before_anything_is_written(tmp_path):
    folder = tiny_models.save_tiny_llama(tmp_path / "llama", hidden_size=48, intermediate_size=80)
    with pytest.raises(ExportError, match=r"Q8_0 needs widths that are multiples of 32, .* is 48 wide: choose F16"):
        write.merged(spec_of(folder), None, "Q8_0", tmp_path / "out" / "a.gguf")
    assert not list((tmp_path / "out").glob("*"))


def test_a_quantized_base_is_requantized(wide, wide_adapter, wide_logits, tmp_path):
    base = write.merged(spec_of(wide), None, "Q6_K", tmp_path / "base.gguf").path
    spec = spec_of(base)
    kept = write.merged(spec, wide_adapter, "keep", tmp_path / "kept.gguf")
    assert {t.tensor_type.name for t in tensors_of(kept.path).values()} == {"Q6_K", "F32"}
    assert kl_divergence(wide_logits, llamacpp_logits(kept.path, IDS)) <= 0.3  # rounded twice
    smaller = write.merged(spec, wide_adapter, "Q4_K_M", tmp_path / "smaller.gguf")
    assert (smaller.source, smaller.touched) == ("gguf", 70)
    assert read_header(smaller.path).values["general.file_type"] == 15  # LLAMA_FTYPE_MOSTLY_Q4_K_M
    assert tensors_of(smaller.path)["blk.1.attn_q.weight"].tensor_type.name == "Q4_K"
    assert write.expected_bytes(spec, "Q4_K_M") == pytest.approx(smaller.bytes, rel=0.05)
    assert write.expected_bytes(spec, "keep") == base.stat().st_size
    assert kl_divergence(wide_logits, llamacpp_logits(smaller.path, IDS)) <= 1


@pytest.mark.slow
def test_smollm2_with_its_shipped_adapter(smollm2, session_workspace, tmp_path):
    """576 wide: K-quants fall back. 8 bits stay nearer to the tuned model than the base model is."""
    adapter = models.find_adapter("", smollm2, session_workspace)
    spec = models.find(str(hf_copy(smollm2, session_workspace)))
    base = read_header(smollm2.gguf_path)
    ids = [int(i) for i in np.random.default_rng(0).integers(1000, 40000, 24)]
    lora = write.cached_lora(adapter, smollm2.gguf_path, session_workspace)
    reference = llamacpp_logits(smollm2.gguf_path, ids, lora)
    untuned = kl_divergence(reference, llamacpp_logits(smollm2.gguf_path, ids))
    for name, largest in (("Q4_K_M", 0.4), ("Q8_0", 0.5 * untuned)):
        written = write.merged(spec, adapter, name, tmp_path / "out.gguf")
        header = read_header(written.path)
        assert written.touched == 30 * 4
        assert write.expected_bytes(spec, name) == pytest.approx(written.bytes, rel=0.05)
        # 1536 = 6 * 256, the width of ffn_down, is a multiple; 576 is not.
        narrow = {tensor for tensor, info in header.tensors.items() if len(info.shape) == 2 and info.shape[1] == 576}
        assert len(narrow) == 30 * 6 + 1
        assert {fallback.tensor for fallback in written.fallbacks} == (narrow if name == "Q4_K_M" else set())
        keys = [f"ggml.{key}" for key in ("tokens", "token_type", "merges", "pre", "eos_token_id", "bos_token_id")]
        for key in (*keys, "chat_template"):
            assert header.values[f"tokenizer.{key}"] == base.values[f"tokenizer.{key}"]
        assert kl_divergence(reference, llamacpp_logits(written.path, ids)) < largest


def test_unknown_quantizations_and_keep_without_a_base_are_refused(tiny_llama, tmp_path):
    with pytest.raises(ConfigError, match=r"Unknown quantization 'Q9': choose one of F32, .*keep"):
        write.merged(spec_of(tiny_llama), None, "Q9", tmp_path / "out.gguf")
    with pytest.raises(ConfigError, match="'keep' needs a base GGUF"):
        write.merged(spec_of(tiny_llama), None, "keep", tmp_path / "out.gguf", source="hf")
    assert not list(tmp_path.glob("*"))


# llama.cpp's quantizer


def test_a_truncated_file_is_refused_with_llama_cpps_reason_and_its_log_is_restored(tiny_llama_gguf, tmp_path):
    heard = []

    @llama_cpp.llama_log_callback
    def listen(_level, text, _data):
        heard.append(text.decode())

    former, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(former), ctypes.byref(data))
    llama_cpp.llama_log_set(listen, None)
    try:
        truncated = tmp_path / "truncated.gguf"
        truncated.write_bytes(tiny_llama_gguf.read_bytes()[:20_000])
        with pytest.raises(ExportError, match=r"^llama.cpp could not quantize the model to Q8_0 \(.+\): choose") as refused:
            quantize.quantize_file(truncated, tmp_path / "out.gguf", "Q8_0", threads=1, on_progress=lambda _share: None)
        assert "\n" not in str(refused.value)
        assert heard == []
        llama_cpp.llama_model_load_from_file(str(truncated).encode(), llama_cpp.llama_model_default_params())
        assert "".join(heard) != ""
    finally:
        llama_cpp.llama_log_set(former, data)


def test_an_error_of_the_progress_callback_reaches_the_caller(tiny_llama_gguf, tmp_path):
    def stop(_share):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize.quantize_file(tiny_llama_gguf, tmp_path / "out.gguf", "Q8_0", threads=1, on_progress=stop)
