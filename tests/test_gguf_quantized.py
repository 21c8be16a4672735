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
from biasdpo.gguf.quantize import COSTS, KEEP, bytes_of, padded_bytes, planned_types
from biasdpo.model_files import read_header
from tests import tiny_models
from tests.gguf_files import IDS, merge, spec_of, tensors_of
from tests.logits import llamacpp_logits, transformers_logits

# KL to the unquantized model, nats, allowed on the random model below (measured: 0 to 0.25 of it).
MAX_KL = {
    "F32": 1e-5, "F16": 1e-3, "BF16": 0.05, "Q8_0": 0.05, "Q6_K": 0.2, "Q5_K_M": 0.5, "Q4_K_M": 1, "Q4_1": 1, "Q4_0": 1.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A Llama 256 wide, so that K-quants fit, and deep enough for their mixtures: 10 blocks. With an adapter."""
    folder = tmp_path_factory.mktemp("wide") / "llama"
    size = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 10, "initializer_range": 0.06}
    tiny_models.save_tiny_llama(folder, tie_word_embeddings=False, **size)
    return folder, tiny_models.write_adapter(folder.parent / "adapter", folder, size=0.05)


@pytest.fixture(scope="module")
def wide_logits(wide):
    return transformers_logits(wide[0], IDS, wide[1])


@pytest.mark.parametrize("name", [name for name in COSTS if name != KEEP])
def test_each_quantization_is_llama_cpps_own_recipe(wide, wide_logits, tmp_path, name):
    out = tmp_path / "out.gguf"
    assert merge(*wide, name, out).fallbacks == []
    tensors = tensors_of(out)
    planned = planned_types(name, {t.name: tuple(int(n) for n in reversed(t.shape)) for t in tensors.values()})
    assert {tensor: tensors[tensor].tensor_type.name for tensor in planned} == {t: got for t, (_, got) in planned.items()}
    assert all(wanted == got for wanted, got in planned.values())
    assert len(planned) == 10 * 7 + 2  # seven matrices a block, the embeddings, the head
    assert sizes(wide[0])[name] == pytest.approx(out.stat().st_size, rel=0.05)
    assert kl_divergence(wide_logits, llamacpp_logits(out, IDS)) <= MAX_KL[name]


def sizes(model, source="auto"):
    return write.expected_sizes(spec_of(model), None, "merged", source)


def test_the_mixtures_give_six_bits_where_llama_cpp_does():
    """10 blocks: the first (10 // 8 = 1), the last two (from 7 * 10 // 8 = 8 on), and every third from the fourth on."""
    shapes = {f"blk.{i}.{module}.weight": (256, 256) for i in range(10) for module in ("attn_q", "attn_v", "ffn_down")}
    planned = planned_types("Q4_K_M", shapes | {"token_embd.weight": (512, 256)})
    six = {int(name.split(".")[1]) for name, (wanted, _) in planned.items() if wanted == "Q6_K" and "attn_v" in name}
    assert six == {0, 3, 6, 8, 9}  # (i - 1) % 3 == 2: 3, 6, 9
    assert planned["blk.3.ffn_down.weight"] == ("Q6_K", "Q6_K")
    assert planned["blk.3.attn_q.weight"] == ("Q4_K", "Q4_K")
    assert planned["token_embd.weight"] == ("Q6_K", "Q6_K")  # the head, since there is no other
    assert bytes_of("Q4_K", (2, 512)) == 2 * 2 * 144
    assert padded_bytes("Q8_0", (3, 32)) == 128  # 3 * 34 = 102, padded to 32
    assert padded_bytes("F32", (5,)) == 32  # 20, padded


def test_fallbacks_are_reported(tiny_llama, tmp_path):
    out = tmp_path / "out.gguf"
    written = merge(tiny_llama, None, "Q4_K_M", out)
    types = {name: tensor.tensor_type.name for name, tensor in tensors_of(out).items() if len(tensor.shape) == 2}
    reported = {one["tensor"]: (one["wanted"], one["got"]) for one in written.fallbacks}
    assert {name: got for name, (_, got) in reported.items()} == types  # 64 and 128 wide: all of them
    assert set(types.values()) == {"Q5_0", "Q8_0"}
    assert reported["blk.0.attn_q.weight"] == ("Q4_K", "Q5_0")
    assert reported["blk.2.attn_v.weight"] == reported["token_embd.weight"] == ("Q6_K", "Q8_0")
    assert sizes(tiny_llama)["Q4_K_M"] == pytest.approx(out.stat().st_size, abs=10_000)  # the header, for a real vocabulary


def test_what_no_file_can_have_is_refused_before_anything_is_written(tiny_llama, tmp_path):
    folder, out = (
        tiny_models.save_tiny_llama(tmp_path / "llama", hidden_size=48, intermediate_size=80),
        tmp_path / "out" / "a.gguf",
    )
    with pytest.raises(ExportError, match=r"Q8_0 needs widths that are multiples of 32, .* is 48 wide: choose F16"):
        merge(folder, None, "Q8_0", out)
    assert sizes(folder).keys() == {"F32", "F16", "BF16"}
    with pytest.raises(ConfigError, match="'keep' needs a base GGUF"):
        merge(tiny_llama, None, "keep", out, source="hf")
    assert not list(out.parent.glob("*"))


def test_a_quantized_base_is_requantized(wide, wide_logits, tmp_path):
    base, kept, smaller = (tmp_path / f"{name}.gguf" for name in ("base", "kept", "smaller"))
    merge(wide[0], None, "Q6_K", base)
    merge(base, wide[1], "keep", kept)
    assert {t.tensor_type.name for t in tensors_of(kept).values()} == {"Q6_K", "F32"}
    assert kl_divergence(wide_logits, llamacpp_logits(kept, IDS)) <= 0.3  # rounded twice
    written = merge(base, wide[1], "Q4_K_M", smaller)
    assert (written.source, written.touched) == ("gguf", 70)
    assert read_header(smaller).values["general.file_type"] == 15  # LLAMA_FTYPE_MOSTLY_Q4_K_M
    assert tensors_of(smaller)["blk.1.attn_q.weight"].tensor_type.name == "Q4_K"
    assert sizes(base)["Q4_K_M"] == pytest.approx(smaller.stat().st_size, rel=0.05)
    assert sizes(base)[KEEP] == base.stat().st_size
    assert kl_divergence(wide_logits, llamacpp_logits(smaller, IDS)) <= 1


@pytest.mark.slow
def test_smollm2_with_its_shipped_adapter(smollm2, session_workspace, tmp_path):
    """576 wide: K-quants fall back. 8 bits stay nearer to the tuned model than the base model is."""
    adapter, out = models.find_adapter("", smollm2, session_workspace), tmp_path / "out.gguf"
    spec = models.find(str(hf_copy(smollm2, session_workspace)))
    base = read_header(smollm2.gguf_path)
    ids = [int(i) for i in np.random.default_rng(0).integers(1000, 40000, 24)]
    lora = write.cached_lora(adapter, smollm2.gguf_path, session_workspace)
    reference = llamacpp_logits(smollm2.gguf_path, ids, lora)
    untuned = kl_divergence(reference, llamacpp_logits(smollm2.gguf_path, ids))
    expected = write.expected_sizes(spec, adapter, "merged", "auto")
    for name, largest in (("Q4_K_M", 0.4), ("Q8_0", 0.5 * untuned)):
        written = write.merged(spec, adapter, name, out)
        header = read_header(out)
        assert written.touched == 30 * 4
        assert expected[name] == pytest.approx(out.stat().st_size, rel=0.05)
        # 1536 = 6 * 256, the width of ffn_down, is a multiple; 576 is not.
        narrow = {tensor for tensor, info in header.tensors.items() if len(info.shape) == 2 and info.shape[1] == 576}
        assert len(narrow) == 30 * 6 + 1
        assert {one["tensor"] for one in written.fallbacks} == (narrow if name == "Q4_K_M" else set())
        keys = [f"ggml.{key}" for key in ("tokens", "token_type", "merges", "pre", "eos_token_id", "bos_token_id")]
        for key in (*keys, "chat_template"):
            assert header.values[f"tokenizer.{key}"] == base.values[f"tokenizer.{key}"]
        assert kl_divergence(reference, llamacpp_logits(out, ids)) < largest


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
