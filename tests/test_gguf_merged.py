"""Merged GGUFs: PEFT's logits, from a Hugging Face folder and into a base GGUF; what is untouched stays as it was."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from biasdpo.backends.base import kl_divergence
from biasdpo.gguf import write
from biasdpo.model_files import gguf_value, open_gguf
from tests import tiny_models
from tests.gguf_files import IDS, adapter_of, assert_equal_logits, metadata_of, spec_of, tensors_of
from tests.logits import llamacpp_logits, transformers_logits

UNTIED = {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "head_dim": 32, "num_hidden_layers": 2}
FOLDERS = {
    "llama, tied": {},
    "llama, untied, biases, wide heads, shards": {"max_shard_size": "100KB", **UNTIED},
    "llama, f16": {"dtype": "float16"},
    "phi": {},
    "phi, bf16, shards": {"dtype": "bfloat16", "max_shard_size": "100KB"},
    "phi, grouped queries": {"num_key_value_heads": 2},
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_merged_folder_has_pefts_logits(kind, tmp_path):
    save = tiny_models.save_tiny_llama if kind.startswith("llama") else tiny_models.save_tiny_phi
    folder = save(tmp_path / kind[:5], **FOLDERS[kind])
    adapter = tiny_models.write_adapter(tmp_path / "adapter", folder)
    written = write.merged(spec_of(folder), adapter_of(adapter), "F32", tmp_path / "out.gguf", threads=1)
    reference = transformers_logits(folder, IDS, adapter)
    assert_equal_logits(llamacpp_logits(written.path, IDS), reference)
    assert kl_divergence(transformers_logits(folder, IDS), reference) > 0.1  # a control: the adapter matters
    assert (written.source, written.fallbacks) == ("hf", ())
    assert written.touched == len(tiny_models._linear_shapes(folder))
    assert written.tensors == len(tensors_of(written.path))
    assert written.bytes == written.path.stat().st_size
    assert list(tmp_path.glob(".*")) == []  # nothing is left beside it


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_a_plain_conversion_is_what_llama_cpps_converter_writes(request, kind, tmp_path):
    """tests/tiny_models.py writes the same models by hand, as convert_hf_to_gguf.py does."""
    folder, by_hand = request.getfixturevalue(f"tiny_{kind}"), request.getfixturevalue(f"tiny_{kind}_gguf")
    written = write.merged(spec_of(folder), None, "F32", tmp_path / "out.gguf")
    ours, theirs = tensors_of(written.path), tensors_of(by_hand)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name].data, tensor.data)
    assert metadata_of(written.path).items() >= metadata_of(by_hand).items()
    assert written.touched == 0


@pytest.mark.parametrize(("name", "bits"), [("F16", 11), ("BF16", 8)])  # of the significand
def test_halves_are_rounded_once_and_vectors_stay_whole(tiny_phi, tiny_phi_adapter, tmp_path, name, bits):
    whole, half = (
        tensors_of(write.merged(spec_of(tiny_phi), adapter_of(tiny_phi_adapter), kind, tmp_path / f"{kind}.gguf").path)
        for kind in ("F32", name)
    )
    for tensor in whole.values():
        stored, exact = half[tensor.name], np.array(tensor.data)
        if len(tensor.shape) == 1:
            assert stored.tensor_type.name == "F32"
            np.testing.assert_array_equal(stored.data, exact)
        else:
            assert stored.tensor_type.name == name
            error = np.abs(gguf.dequantize(stored.data, stored.tensor_type) - exact)
            assert (error <= np.abs(exact) * 2.0**-bits + 1e-7).all()  # the nearest is half a step away at most
            assert error.max() > 0


def test_bf16_weights_pass_bit_for_bit(tmp_path):
    folder = tiny_models.save_tiny_phi(tmp_path / "model", dtype="bfloat16")
    written = write.merged(spec_of(folder), None, "BF16", tmp_path / "out.gguf")
    data = (folder / "model.safetensors").read_bytes()
    assert all(tensor.data.tobytes() in data for tensor in tensors_of(written.path).values() if len(tensor.shape) == 2)


# Into a base GGUF


def test_only_touched_tensors_change_and_metadata_stay(tiny_llama, tiny_llama_gguf, tmp_path):
    folder = tiny_models.write_adapter(
        tmp_path / "adapter", tiny_llama, alpha=8.0, modules=r"layers\.1\..*(q_proj|up_proj)", layers_to_transform=[1]
    )
    written = write.merged(spec_of(tiny_llama_gguf), adapter_of(folder), "keep", tmp_path / "out.gguf")
    before, after = tensors_of(tiny_llama_gguf), tensors_of(written.path)
    changed = {name for name in before if before[name].data.tobytes() != after[name].data.tobytes()}
    assert changed == {"blk.1.attn_q.weight", "blk.1.ffn_up.weight"}
    assert (written.touched, written.source) == (2, "gguf")
    peft = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.mlp.up_proj"
    change = 8.0 / 4 * peft[f"{prefix}.lora_B.weight"] @ peft[f"{prefix}.lora_A.weight"]  # alpha / rank * B @ A
    np.testing.assert_allclose(after["blk.1.ffn_up.weight"].data - before["blk.1.ffn_up.weight"].data, change, atol=1e-5)
    assert metadata_of(written.path) == metadata_of(tiny_llama_gguf)
    assert gguf_value(open_gguf(written.path), "biasdpo.adapters") == ["adapter"]


def test_a_second_adapter_is_added_to_the_first(tiny_phi, tiny_phi_gguf, tmp_path):
    first, second = (tiny_models.write_adapter(tmp_path / f"a{seed}", tiny_phi, seed=seed) for seed in (1, 2))
    once = write.merged(spec_of(tiny_phi_gguf), adapter_of(first), "keep", tmp_path / "once.gguf").path
    twice = write.merged(spec_of(once), adapter_of(second), "keep", tmp_path / "twice.gguf").path
    alone = write.merged(spec_of(tiny_phi_gguf), adapter_of(second), "keep", tmp_path / "alone.gguf").path
    assert gguf_value(open_gguf(twice), "biasdpo.adapters") == ["a1", "a2"]
    base, b, c, d = (np.array(tensors_of(p)["blk.1.ffn_down.weight"].data) for p in (tiny_phi_gguf, once, twice, alone))
    np.testing.assert_allclose(c - b, d - base, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_merged_into_a_base_it_has_pefts_logits(request, kind, tmp_path):
    folder, base, adapter = (request.getfixturevalue(f"tiny_{kind}{end}") for end in ("", "_gguf", "_adapter"))
    written = write.merged(spec_of(base), adapter_of(adapter), "keep", tmp_path / "out.gguf")
    assert_equal_logits(llamacpp_logits(written.path, IDS), transformers_logits(folder, IDS, adapter))


@pytest.mark.parametrize("modules", ["", "q_proj|v_proj", "k_proj"])
def test_a_fused_qkv_takes_the_adapter_merged_and_beside_it(tiny_phi, tmp_path, modules):
    base = tiny_models.write_phi_gguf(tiny_phi, tmp_path / "base.gguf", fused=True)
    assert "blk.0.attn_qkv.weight" in tensors_of(base)
    adapter = tiny_models.write_adapter(tmp_path / "adapter", tiny_phi, modules=modules, ranks={"v_proj": 3})
    reference = transformers_logits(tiny_phi, IDS, adapter)
    written = write.merged(spec_of(base), adapter_of(adapter), "keep", tmp_path / "out.gguf")
    assert_equal_logits(llamacpp_logits(written.path, IDS), reference)
    lora = write.lora(adapter_of(adapter), base, tmp_path / "lora.gguf")
    assert_equal_logits(llamacpp_logits(base, IDS, lora), reference)
    assert kl_divergence(llamacpp_logits(base, IDS), reference) > 0.01


def test_a_quantized_base_keeps_its_types(tiny_phi, tmp_path):
    """What is touched: decoded, changed, and encoded as the gguf package's own encoder would."""
    base = write.merged(spec_of(tiny_phi), None, "Q8_0", tmp_path / "base.gguf").path
    folder = tiny_models.write_adapter(tmp_path / "adapter", tiny_phi, rank=4, alpha=8.0, modules="fc1")
    written = write.merged(spec_of(base), adapter_of(folder), "keep", tmp_path / "out.gguf")
    before, after = tensors_of(base), tensors_of(written.path)
    peft = load_file(folder / "adapter_model.safetensors")
    for name, tensor in before.items():
        assert after[name].tensor_type == tensor.tensor_type
        if "ffn_up.weight" not in name:
            assert after[name].data.tobytes() == tensor.data.tobytes()
            continue
        prefix = f"base_model.model.model.layers.{name.split('.')[1]}.mlp.fc1"
        change = np.float32(2.0) * (peft[f"{prefix}.lora_B.weight"] @ peft[f"{prefix}.lora_A.weight"])
        expected = gguf.quantize(gguf.dequantize(tensor.data, tensor.tensor_type) + change, tensor.tensor_type)
        assert (np.array(after[name].data) != expected).mean() < 0.01  # a sum's last bit may round to the neighbor
        assert (np.array(after[name].data) != np.array(tensor.data)).mean() > 0.5
    assert gguf_value(open_gguf(written.path), "general.file_type") == gguf.LlamaFileType.MOSTLY_Q8_0


def test_a_phi_without_a_pre_tokenizer_gets_its_own(tiny_phi, tmp_path):
    base = tiny_models.write_phi_gguf(tiny_phi, tmp_path / "old.gguf", pre="")
    assert gguf_value(open_gguf(base), "tokenizer.ggml.pre") is None
    written = write.merged(spec_of(base), None, "keep", tmp_path / "new.gguf")
    assert gguf_value(open_gguf(written.path), "tokenizer.ggml.pre") == "phi-2"


def test_progress_rises_to_its_end_and_an_old_file_stays_until_then(tiny_phi, tmp_path):
    out = tmp_path / "out.gguf"
    out.write_bytes(b"old")
    shares = []

    def on_progress(share, _what):
        shares.append(share)
        assert (out.read_bytes() == b"old") == (share < 1.0)

    write.merged(spec_of(tiny_phi), None, "Q8_0", out, on_progress=on_progress)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(set(shares)) > 10
