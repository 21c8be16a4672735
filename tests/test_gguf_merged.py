"""Merged GGUFs: the logits of PEFT, from a Hugging Face folder and onto a base GGUF; what stays is left as it was."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from biasdpo import models
from biasdpo.backends.base import kl_divergence
from biasdpo.gguf import write
from biasdpo.model_files import gguf_value, open_gguf
from biasdpo.models import AdapterSpec
from tests import tiny_models
from tests.logits import llamacpp_logits, transformers_logits

IDS = [int(i) for i in np.random.default_rng(3).integers(5, 470, 40)]  # any tokens, of both tiny vocabularies

UNTIED = {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "head_dim": 32, "num_hidden_layers": 2}
FOLDERS = {
    "llama, tied": lambda folder: tiny_models.save_tiny_llama(folder),
    "llama, untied, biases, wide heads, shards": lambda folder: tiny_models.save_tiny_llama(
        folder, max_shard_size="100KB", **UNTIED
    ),
    "phi": lambda folder: tiny_models.save_tiny_phi(folder),
    "phi, bf16, shards": lambda folder: tiny_models.save_tiny_phi(folder, dtype="bfloat16", max_shard_size="100KB"),
    "phi, grouped queries": lambda folder: tiny_models.save_tiny_phi(folder, num_key_value_heads=2),
    "llama, f16": lambda folder: tiny_models.save_tiny_llama(folder, dtype="float16"),
}


def adapter_of(folder: Path) -> AdapterSpec:
    return AdapterSpec(folder.name, folder, "")


def tensors_of(path: Path) -> dict:
    return {tensor.name: tensor for tensor in open_gguf(path).tensors}


def assert_equal_logits(a: np.ndarray, reference: np.ndarray) -> None:
    assert a.shape == reference.shape
    assert kl_divergence(reference, a) <= 1e-5
    first, second = np.sort(reference, axis=-1)[:, -1], np.sort(reference, axis=-1)[:, -2]
    clear = first - second > 0.02
    assert clear.mean() > 0.8
    np.testing.assert_array_equal(a.argmax(-1)[clear], reference.argmax(-1)[clear])


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_merged_folder_has_pefts_logits(kind, tmp_path):
    folder = FOLDERS[kind](tmp_path / "model")
    adapter = tiny_models.write_adapter(tmp_path / "adapter", folder)
    written = write.merged(models.find(str(folder)), adapter_of(adapter), "F32", tmp_path / "out.gguf", threads=1)
    reference = transformers_logits(folder, IDS, adapter)
    assert_equal_logits(llamacpp_logits(written.path, IDS), reference)
    assert kl_divergence(transformers_logits(folder, IDS), reference) > 0.1  # a control: the adapter matters here
    assert written.source == "hf"
    assert written.touched == len(tiny_models._linear_shapes(folder))
    assert written.tensors == len(tensors_of(written.path))
    assert written.bytes == written.path.stat().st_size
    assert written.fallbacks == ()
    assert list(tmp_path.glob(".*")) == []  # nothing is left beside it


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_a_plain_conversion_is_what_llama_cpps_converter_writes(request, kind, tmp_path):
    """tests/tiny_models.py writes the same models by hand, as convert_hf_to_gguf.py does."""
    folder, by_hand = request.getfixturevalue(f"tiny_{kind}"), request.getfixturevalue(f"tiny_{kind}_gguf")
    written = write.merged(models.find(str(folder)), None, "F32", tmp_path / "out.gguf")
    ours, theirs = open_gguf(written.path), open_gguf(by_hand)
    assert {t.name for t in ours.tensors} == {t.name for t in theirs.tensors}
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(tensors_of(written.path)[tensor.name].data, tensor.data)
    keys = [key for key in theirs.fields if not key.startswith("GGUF.") and key != "general.name"]
    assert {key: gguf_value(ours, key) for key in keys} == {key: gguf_value(theirs, key) for key in keys}
    assert written.touched == 0


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_halves_are_rounded_once_and_vectors_stay_whole(tiny_phi, tiny_phi_adapter, tmp_path, name):
    spec = models.find(str(tiny_phi))
    whole = tensors_of(write.merged(spec, adapter_of(tiny_phi_adapter), "F32", tmp_path / "f32.gguf").path)
    half = tensors_of(write.merged(spec, adapter_of(tiny_phi_adapter), name, tmp_path / "half.gguf").path)
    for tensor in whole.values():
        if len(tensor.shape) == 1:
            assert half[tensor.name].tensor_type.name == "F32"
            np.testing.assert_array_equal(half[tensor.name].data, tensor.data)
        else:
            assert half[tensor.name].tensor_type.name == name
            exact = np.array(tensor.data)
            bits = {"F16": 11, "BF16": 8}[name]  # of the significand: the nearest is half a step away at most
            error = np.abs(gguf.dequantize(half[tensor.name].data, half[tensor.name].tensor_type) - exact)
            assert (error <= np.abs(exact) * 2.0**-bits + 1e-7).all()
            assert error.max() > 0


def test_bf16_weights_pass_untouched_bit_for_bit(tmp_path):
    folder = tiny_models.save_tiny_phi(tmp_path / "model", dtype="bfloat16")
    written = write.merged(models.find(str(folder)), None, "BF16", tmp_path / "out.gguf")
    data = (folder / "model.safetensors").read_bytes()
    for tensor in tensors_of(written.path).values():
        if len(tensor.shape) == 2:
            assert tensor.data.tobytes() in data


# Onto a base GGUF


def test_only_touched_tensors_change_and_metadata_stay(tiny_llama, tiny_llama_gguf, tmp_path):
    folder = tiny_models.write_adapter(
        tmp_path / "adapter", tiny_llama, rank=4, alpha=8.0, modules=r"layers\.1\..*(q_proj|up_proj)"
    )
    spec = models.find(str(tiny_llama_gguf))
    written = write.merged(spec, adapter_of(folder), "keep", tmp_path / "out.gguf")
    before, after = tensors_of(tiny_llama_gguf), tensors_of(written.path)
    changed = {name for name in before if before[name].data.tobytes() != after[name].data.tobytes()}
    assert changed == {"blk.1.attn_q.weight", "blk.1.ffn_up.weight"}
    assert (written.touched, written.source) == (2, "gguf")
    peft = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.mlp.up_proj"
    change = 8.0 / 4 * peft[f"{prefix}.lora_B.weight"] @ peft[f"{prefix}.lora_A.weight"]  # alpha / rank * B @ A
    np.testing.assert_allclose(after["blk.1.ffn_up.weight"].data - before["blk.1.ffn_up.weight"].data, change, atol=1e-5)
    ours, theirs = open_gguf(written.path), open_gguf(tiny_llama_gguf)
    keys = [key for key in theirs.fields if not key.startswith("GGUF.") and key != "general.name"]
    assert {key: gguf_value(ours, key) for key in keys} == {key: gguf_value(theirs, key) for key in keys}
    assert gguf_value(ours, "biasdpo.adapters") == ["adapter"]


def test_a_second_adapter_is_added_to_the_first(tiny_phi, tiny_phi_gguf, tmp_path):
    first = tiny_models.write_adapter(tmp_path / "first", tiny_phi, seed=1)
    second = tiny_models.write_adapter(tmp_path / "second", tiny_phi, seed=2)
    once = write.merged(models.find(str(tiny_phi_gguf)), adapter_of(first), "keep", tmp_path / "once.gguf")
    twice = write.merged(models.find(str(once.path)), adapter_of(second), "keep", tmp_path / "twice.gguf")
    assert gguf_value(open_gguf(twice.path), "biasdpo.adapters") == ["first", "second"]
    name = "blk.1.ffn_down.weight"
    a, b, c = (np.array(tensors_of(path)[name].data) for path in (tiny_phi_gguf, once.path, twice.path))
    alone = write.merged(models.find(str(tiny_phi_gguf)), adapter_of(second), "keep", tmp_path / "alone.gguf")
    np.testing.assert_allclose(c - b, np.array(tensors_of(alone.path)[name].data) - a, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_merged_onto_a_base_it_has_pefts_logits(request, kind, tmp_path):
    folder, base = request.getfixturevalue(f"tiny_{kind}"), request.getfixturevalue(f"tiny_{kind}_gguf")
    adapter = request.getfixturevalue(f"tiny_{kind}_adapter")
    written = write.merged(models.find(str(base)), adapter_of(adapter), "keep", tmp_path / "out.gguf")
    assert_equal_logits(llamacpp_logits(written.path, IDS), transformers_logits(folder, IDS, adapter))


def test_a_fused_qkv_takes_the_adapter_merged_and_beside_it(tmp_path):
    folder = tiny_models.save_tiny_phi(tmp_path / "model")
    base = tiny_models.write_phi_gguf(folder, tmp_path / "base.gguf", fused=True)
    assert "blk.0.attn_qkv.weight" in tensors_of(base)
    for modules in ("", "q_proj|v_proj", "k_proj"):
        adapter = tiny_models.write_adapter(tmp_path / f"adapter{len(modules)}", folder, modules=modules, ranks={"v_proj": 3})
        reference = transformers_logits(folder, IDS, adapter)
        written = write.merged(models.find(str(base)), adapter_of(adapter), "keep", tmp_path / "out.gguf")
        assert_equal_logits(llamacpp_logits(written.path, IDS), reference)
        lora = write.lora(adapter_of(adapter), base, tmp_path / "lora.gguf")
        assert_equal_logits(llamacpp_logits(base, IDS, lora), reference)
        assert kl_divergence(llamacpp_logits(base, IDS), reference) > 0.01


def test_a_quantized_base_keeps_its_types(tiny_phi, tmp_path):
    """What is touched: decoded, changed, and encoded as the gguf package's own encoder would."""
    base = write.merged(models.find(str(tiny_phi)), None, "Q8_0", tmp_path / "base.gguf").path
    folder = tiny_models.write_adapter(tmp_path / "adapter", tiny_phi, rank=4, alpha=8.0, modules="fc1")
    written = write.merged(models.find(str(base)), adapter_of(folder), "keep", tmp_path / "out.gguf")
    before, after = tensors_of(base), tensors_of(written.path)
    peft = load_file(folder / "adapter_model.safetensors")
    for name, tensor in before.items():
        assert after[name].tensor_type == tensor.tensor_type
        if "ffn_up.weight" not in name:
            assert after[name].data.tobytes() == tensor.data.tobytes()
            continue
        prefix = f"base_model.model.model.layers.{name.split('.')[1]}.mlp.fc1"
        change = np.float32(2.0) * (peft[f"{prefix}.lora_B.weight"] @ peft[f"{prefix}.lora_A.weight"])
        wanted = gguf.quantize(gguf.dequantize(tensor.data, tensor.tensor_type) + change, tensor.tensor_type)
        differing = (np.array(after[name].data) != wanted).mean()
        assert differing < 0.01  # a sum's last bit may round a number to its neighbour
        assert (np.array(after[name].data) != np.array(tensor.data)).mean() > 0.5
    assert gguf_value(open_gguf(written.path), "general.file_type") == gguf.LlamaFileType.MOSTLY_Q8_0


def test_a_phi_without_a_pre_tokenizer_gets_its_own(tiny_phi, tmp_path):
    base = tiny_models.write_phi_gguf(tiny_phi, tmp_path / "old.gguf", pre="")
    assert gguf_value(open_gguf(base), "tokenizer.ggml.pre") is None
    written = write.merged(models.find(str(base)), None, "keep", tmp_path / "new.gguf")
    assert gguf_value(open_gguf(written.path), "tokenizer.ggml.pre") == "phi-2"


def test_progress_rises_to_its_end(tiny_phi, tmp_path):
    shares = []
    write.merged(
        models.find(str(tiny_phi)), None, "Q8_0", tmp_path / "out.gguf", on_progress=lambda share, _what: shares.append(share)
    )
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(set(shares)) > 10
