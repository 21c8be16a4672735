"""LoRA GGUFs: scales, names and row order; what is refused. Equality with PEFT is in test_gguf_proof, too."""

from __future__ import annotations

import math

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from biasdpo.errors import AdapterError
from biasdpo.gguf import write
from tests import tiny_models
from tests.gguf_files import IDS, adapter_of, assert_equal_logits, metadata_of, tensors_of
from tests.logits import llamacpp_logits, transformers_logits


def test_tensors_alpha_and_permuted_rows(tiny_llama, tiny_llama_gguf, tmp_path):
    folder = tiny_models.write_adapter(tmp_path / "a", tiny_llama, rank=4, alpha=6.0)
    path = write.lora(adapter_of(folder), tiny_llama_gguf, tmp_path / "a.gguf")
    keys = metadata_of(path)
    assert (keys["general.type"], keys["adapter.type"], keys["adapter.lora.alpha"]) == ("adapter", "lora", 6.0)
    tensors = {name: tensor.data for name, tensor in tensors_of(path).items()}
    assert len(tensors) == 3 * 7 * 2  # blocks, matrices, factors
    peft = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.2.self_attn"
    np.testing.assert_array_equal(tensors["blk.2.attn_v.weight.lora_b"], peft[f"{prefix}.v_proj.lora_B.weight"])
    np.testing.assert_array_equal(tensors["blk.2.attn_q.weight.lora_a"], peft[f"{prefix}.q_proj.lora_A.weight"])
    q = peft[f"{prefix}.q_proj.lora_B.weight"]  # 4 heads of 16 rows; rows 0, 8, 1, 9, … of each
    np.testing.assert_array_equal(tensors["blk.2.attn_q.weight.lora_b"][:4], q[[0, 8, 1, 9]])
    np.testing.assert_array_equal(tensors["blk.2.attn_q.weight.lora_b"][16:18], q[[16, 24]])
    stabilized = tiny_models.write_adapter(tmp_path / "b", tiny_llama, rank=4, alpha=6.0, use_rslora=True)
    path = write.lora(adapter_of(stabilized), tiny_llama_gguf, tmp_path / "b.gguf")
    assert metadata_of(path)["adapter.lora.alpha"] == pytest.approx(6.0 * math.sqrt(4))


def test_own_ranks_and_alphas_go_into_b(tiny_phi, tiny_phi_gguf, tmp_path):
    """Scales: alpha / rank = 8 / 4 for most, 8 / 2 for v, 6 / 4 for fc1. The file says alpha 8, and llama.cpp divides by each
    tensor's own rank: v's B stays as it is, fc1's is 6 / 8 of itself."""
    folder = tiny_models.write_adapter(
        tmp_path / "a", tiny_phi, rank=4, alpha=8.0, ranks={"v_proj": 2}, alpha_pattern={"fc1": 6, "mlp.fc1": 99}
    )
    lora = write.lora(adapter_of(folder), tiny_phi_gguf, tmp_path / "a.gguf")
    assert metadata_of(lora)["adapter.lora.alpha"] == 8.0
    tensors = {name: tensor.data for name, tensor in tensors_of(lora).items()}
    peft = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0"
    np.testing.assert_array_equal(tensors["blk.0.attn_v.weight.lora_b"], peft[f"{prefix}.self_attn.v_proj.lora_B.weight"])
    np.testing.assert_array_equal(tensors["blk.0.ffn_up.weight.lora_b"], 0.75 * peft[f"{prefix}.mlp.fc1.lora_B.weight"])
    assert_equal_logits(llamacpp_logits(tiny_phi_gguf, IDS, lora), transformers_logits(tiny_phi, IDS, folder))


def test_the_cache_is_built_once_and_again_when_the_adapter_changes(tiny_llama, tiny_llama_gguf, workspace, tmp_path):
    folder = tiny_models.write_adapter(tmp_path / "a", tiny_llama)
    first = write.cached_lora(adapter_of(folder), tiny_llama_gguf, workspace)
    written = first.stat().st_mtime_ns
    assert write.cached_lora(adapter_of(folder), tiny_llama_gguf, workspace) == first
    assert first.stat().st_mtime_ns == written
    tiny_models.write_adapter(folder, tiny_llama, seed=1)
    assert write.cached_lora(adapter_of(folder), tiny_llama_gguf, workspace) != first


def test_what_does_not_fit_is_refused(tiny_phi, tiny_phi_gguf, tiny_llama_adapter, tmp_path):
    """`models.check_fits_file` decides; test_fitting has its reasons."""
    assert_refused(tiny_llama_adapter, tiny_phi_gguf, "was made for another base model: it adapts")
    assert_refused(tiny_models.write_adapter(tmp_path / "dora", tiny_phi, use_dora=True), tiny_phi_gguf, "uses use_dora")
    whole = tiny_models.write_adapter(tmp_path / "numbers", tiny_phi)
    file = whole / "adapter_model.safetensors"
    save_file({name: tensor.astype(np.int8) for name, tensor in load_file(file).items()}, file)
    assert_refused(whole, tiny_phi_gguf, "is I8, supported are F32, F16, BF16")


def test_a_gguf_of_another_architecture_is_checked_by_its_own_names(tiny_llama, tmp_path):
    adapter = tiny_models.write_adapter(tmp_path / "a", tiny_llama, modules="up_proj")
    for shape, message in (((128, 32), r"up_proj \(128 x 64\), this model has 128 x 32"), ((), "this model lacks it")):
        writer = gguf.GGUFWriter(tmp_path / "qwen2.gguf", "qwen2")
        writer.add_block_count(3)
        writer.add_head_count(4)
        for i in range(3):
            writer.add_tensor(f"blk.{i}.{'ffn_up' if shape else 'ffn_down'}.weight", np.zeros(shape or (1, 32), np.float32))
        tiny_models._finish(writer)
        assert_refused(adapter, tmp_path / "qwen2.gguf", message)


def assert_refused(folder, base, message):
    out = folder.parent / "out" / "a.gguf"
    with pytest.raises(AdapterError, match=message) as refused:
        write.lora(adapter_of(folder), base, out)
    assert "\n" not in str(refused.value)
    assert not out.parent.exists()
