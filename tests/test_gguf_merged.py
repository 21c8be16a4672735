"""Merged GGUFs: PEFT's logits, from a Hugging Face folder and into a base GGUF; what is untouched stays as it was."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from biasdpo.backends.base import kl_divergence
from biasdpo.gguf import write
from tests import tiny_models
from tests.gguf_files import IDS, adapter_of, assert_equal_logits, merge, metadata_of, tensors_of
from tests.logits import llamacpp_logits, transformers_logits

OWN = {"general.name", "biasdpo.adapters", "biasdpo.adapters_sha256"}  # the keys that an export writes anew
UNTIED = {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "head_dim": 32, "num_hidden_layers": 2}
FOLDERS = {
    "llama, tied, f16": {"dtype": "float16"},
    "llama, untied, biases, wide heads, shards": {"max_shard_size": "100KB", **UNTIED},
    "phi": {},
    "phi, bf16, grouped queries, shards": {"dtype": "bfloat16", "max_shard_size": "100KB", "num_key_value_heads": 2},
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_merged_folder_has_pefts_logits(kind, tmp_path):
    save = tiny_models.save_tiny_llama if kind.startswith("llama") else tiny_models.save_tiny_phi
    folder, out = save(tmp_path / kind[:5], **FOLDERS[kind]), tmp_path / "out.gguf"
    adapter = tiny_models.write_adapter(tmp_path / "adapter", folder)
    written = merge(folder, adapter, "F32", out)
    reference = transformers_logits(folder, IDS, adapter)
    assert_equal_logits(llamacpp_logits(out, IDS), reference)
    assert kl_divergence(transformers_logits(folder, IDS), reference) > 0.1  # a control: the adapter matters
    assert (written.source, written.fallbacks, written.tensors) == ("hf", [], len(tensors_of(out)))
    assert written.touched == len(tiny_models._linear_shapes(folder))
    assert list(tmp_path.glob(".*")) == []  # nothing is left beside it


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_a_plain_conversion_is_what_llama_cpps_converter_writes(request, kind, tmp_path):
    """tests/tiny_models.py writes the same models by hand, as convert_hf_to_gguf.py does."""
    by_hand, out = request.getfixturevalue(f"tiny_{kind}_gguf"), tmp_path / "out.gguf"
    assert merge(request.getfixturevalue(f"tiny_{kind}"), None, "F32", out).touched == 0
    ours, theirs = tensors_of(out), tensors_of(by_hand)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name].data, tensor.data)
    found, expected = metadata_of(out), metadata_of(by_hand)
    assert {key: found[key] for key in expected.keys() - OWN} == {key: expected[key] for key in expected.keys() - OWN}


@pytest.mark.parametrize(("name", "bits"), [("F16", 11), ("BF16", 8)])  # of the significand
def test_halves_are_rounded_once_and_vectors_stay_whole(tiny_phi, tiny_phi_adapter, tmp_path, name, bits):
    for kind in ("F32", name):
        merge(tiny_phi, tiny_phi_adapter, kind, tmp_path / f"{kind}.gguf")
    half = tensors_of(tmp_path / f"{name}.gguf")
    for tensor in tensors_of(tmp_path / "F32.gguf").values():
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
    folder, out = tiny_models.save_tiny_phi(tmp_path / "model", dtype="bfloat16"), tmp_path / "out.gguf"
    merge(folder, None, "BF16", out)
    data = (folder / "model.safetensors").read_bytes()
    assert all(tensor.data.tobytes() in data for tensor in tensors_of(out).values() if len(tensor.shape) == 2)


# Into a base GGUF


def test_only_touched_tensors_change_and_metadata_stay(tiny_llama, tmp_path):
    base, out = tiny_models.write_llama_gguf(tiny_llama, tmp_path / "llama.gguf"), tmp_path / "out.gguf"
    folder = tiny_models.write_adapter(
        tmp_path / "adapter", tiny_llama, alpha=8.0, modules=r"layers\.1\..*(q_proj|up_proj)", layers_to_transform=[1]
    )
    written = merge(base, folder, "keep", out)
    before, after = tensors_of(base), tensors_of(out)
    changed = {name for name in before if before[name].data.tobytes() != after[name].data.tobytes()}
    assert changed == {"blk.1.attn_q.weight", "blk.1.ffn_up.weight"}
    assert (written.touched, written.source) == (2, "gguf")
    change = delta(folder, "model.layers.1.mlp.up_proj")
    np.testing.assert_allclose(after["blk.1.ffn_up.weight"].data - before["blk.1.ffn_up.weight"].data, change, atol=1e-5)
    found, expected = metadata_of(out), metadata_of(base)
    assert {key: found.get(key) for key in expected.keys() - OWN} == {key: expected[key] for key in expected.keys() - OWN}
    assert found["biasdpo.adapters"] == ["adapter"]


def delta(adapter, module):
    """alpha / rank * B @ A, of alpha 8 and rank 4."""
    peft = load_file(adapter / "adapter_model.safetensors")
    prefix = f"base_model.model.{module}"
    return np.float32(2.0) * (peft[f"{prefix}.lora_B.weight"] @ peft[f"{prefix}.lora_A.weight"])


def test_a_second_adapter_is_added_to_the_first(tiny_phi, tiny_phi_gguf, tmp_path):
    first, second = (tiny_models.write_adapter(tmp_path / f"a{seed}", tiny_phi, seed=seed) for seed in (1, 2))
    once, twice, alone = (tmp_path / f"{name}.gguf" for name in ("once", "twice", "alone"))
    for base, adapter, out in ((tiny_phi_gguf, first, once), (once, second, twice), (tiny_phi_gguf, second, alone)):
        merge(base, adapter, "keep", out)
    assert metadata_of(twice)["biasdpo.adapters"] == ["a1", "a2"]
    base, b, c, d = (np.array(tensors_of(p)["blk.1.ffn_down.weight"].data) for p in (tiny_phi_gguf, once, twice, alone))
    np.testing.assert_allclose(c - b, d - base, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_merged_into_a_base_it_has_pefts_logits(request, kind, tmp_path):
    folder, base, adapter = (request.getfixturevalue(f"tiny_{kind}{end}") for end in ("", "_gguf", "_adapter"))
    merge(base, adapter, "keep", tmp_path / "out.gguf")
    assert_equal_logits(llamacpp_logits(tmp_path / "out.gguf", IDS), transformers_logits(folder, IDS, adapter))


@pytest.mark.parametrize("modules", ["", "q_proj|v_proj", "k_proj"])
def test_a_fused_qkv_takes_the_adapter_merged_and_beside_it(tiny_phi, tmp_path, modules):
    base = tiny_models.write_phi_gguf(tiny_phi, tmp_path / "base.gguf", fused=True)
    assert "blk.0.attn_qkv.weight" in tensors_of(base)
    adapter = tiny_models.write_adapter(tmp_path / "adapter", tiny_phi, modules=modules, ranks={"v_proj": 3})
    reference = transformers_logits(tiny_phi, IDS, adapter)
    merge(base, adapter, "keep", tmp_path / "out.gguf")
    assert_equal_logits(llamacpp_logits(tmp_path / "out.gguf", IDS), reference)
    lora = write.lora(adapter_of(adapter), base, tmp_path / "lora.gguf")
    assert_equal_logits(llamacpp_logits(base, IDS, lora), reference)
    assert kl_divergence(llamacpp_logits(base, IDS), reference) > 0.01


def test_a_quantized_base_keeps_its_types(tiny_phi, tmp_path):
    """What is touched: decoded, changed, and encoded as the gguf package's own encoder would."""
    base, out = tmp_path / "base.gguf", tmp_path / "out.gguf"
    merge(tiny_phi, None, "Q8_0", base)
    folder = tiny_models.write_adapter(tmp_path / "adapter", tiny_phi, rank=4, alpha=8.0, modules="fc1")
    merge(base, folder, "keep", out)
    before, after = tensors_of(base), tensors_of(out)
    for name, tensor in before.items():
        assert after[name].tensor_type == tensor.tensor_type
        if "ffn_up.weight" not in name:
            assert after[name].data.tobytes() == tensor.data.tobytes()
            continue
        change = delta(folder, f"model.layers.{name.split('.')[1]}.mlp.fc1")
        expected = gguf.quantize(gguf.dequantize(tensor.data, tensor.tensor_type) + change, tensor.tensor_type)
        assert (np.array(after[name].data) != expected).mean() < 0.01  # a sum's last bit may round to the neighbor
        assert (np.array(after[name].data) != np.array(tensor.data)).mean() > 0.5
    assert metadata_of(out)["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0


def test_a_phi_without_a_pre_tokenizer_gets_its_own(tiny_phi, tmp_path):
    base = tiny_models.write_phi_gguf(tiny_phi, tmp_path / "old.gguf", pre="")
    assert "tokenizer.ggml.pre" not in metadata_of(base)
    merge(base, None, "keep", tmp_path / "new.gguf")
    assert metadata_of(tmp_path / "new.gguf")["tokenizer.ggml.pre"] == "phi-2"


def test_progress_rises_to_its_end_and_an_old_file_stays_until_then(tiny_phi, tmp_path):
    out = tmp_path / "out.gguf"
    out.write_bytes(b"old")
    shares = []

    def on_progress(share, _what):
        shares.append(share)
        assert (out.read_bytes() == b"old") == (share < 1.0)

    merge(tiny_phi, None, "Q8_0", out, on_progress=on_progress)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(set(shares)) > 10
