"""LoRA GGUF: numbers, names, rows, and what is refused. More equality with bare llama.cpp and with PEFT is in test_equality."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from biasdpo import models
from biasdpo.backends.base import kl_divergence
from biasdpo.errors import AdapterError, RefusedError
from biasdpo.gguf import write
from biasdpo.model_files import gguf_value, open_gguf
from biasdpo.models import AdapterSpec
from tests import tiny_models
from tests.logits import llamacpp_logits, transformers_logits
from tests.lora_factory import SMOLLM2, write_lora


def spec_of(folder) -> AdapterSpec:
    return AdapterSpec(folder.name, folder, "smollm2")


def test_tensors_alpha_and_permuted_rows(smollm2, tmp_path):
    folder = write_lora(tmp_path / "a", rank=4, alpha=6.0)
    reader = open_gguf(write.lora(spec_of(folder), smollm2.gguf_path, tmp_path / "a.gguf"))
    assert gguf_value(reader, "general.type") == "adapter"
    assert gguf_value(reader, "adapter.type") == "lora"
    assert gguf_value(reader, "adapter.lora.alpha") == 6.0
    tensors = {t.name: t.data for t in reader.tensors}
    assert len(tensors) == 30 * len(SMOLLM2) * 2
    peft = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.3.self_attn"
    np.testing.assert_array_equal(tensors["blk.3.attn_v.weight.lora_b"], peft[f"{prefix}.v_proj.lora_B.weight"])
    np.testing.assert_array_equal(tensors["blk.3.attn_q.weight.lora_a"], peft[f"{prefix}.q_proj.lora_A.weight"])
    q = peft[f"{prefix}.q_proj.lora_B.weight"]  # 9 heads of 64 rows; rows 0, 32, 1, 33, … of each
    np.testing.assert_array_equal(tensors["blk.3.attn_q.weight.lora_b"][:4], q[[0, 32, 1, 33]])
    np.testing.assert_array_equal(tensors["blk.3.attn_q.weight.lora_b"][64:66], q[[64, 96]])


def test_rank_stabilised_scaling(smollm2, tmp_path):
    folder = write_lora(tmp_path / "a", rank=4, alpha=6.0, use_rslora=True)
    reader = open_gguf(write.lora(spec_of(folder), smollm2.gguf_path, tmp_path / "a.gguf"))
    assert gguf_value(reader, "adapter.lora.alpha") == pytest.approx(6.0 * math.sqrt(4))


def test_the_cache_is_built_once_and_again_when_the_adapter_changes(smollm2, workspace, tmp_path):
    folder = write_lora(tmp_path / "a")
    first = write.cached_lora(spec_of(folder), smollm2.gguf_path, workspace)
    written = first.stat().st_mtime_ns
    assert write.cached_lora(spec_of(folder), smollm2.gguf_path, workspace) == first
    assert first.stat().st_mtime_ns == written
    write_lora(folder, seed=1)
    assert write.cached_lora(spec_of(folder), smollm2.gguf_path, workspace) != first


def test_ranks_and_alphas_of_their_own_are_in_b(tiny_phi, tiny_phi_gguf, tmp_path):
    """Scales: alpha / rank = 8 / 4 for most, 8 / 2 for v, 6 / 4 for fc1. The file says alpha 8, and llama.cpp divides by each
    tensor's own rank: v's B stays as it is, fc1's is 6 / 8 of itself."""
    folder = tiny_models.write_adapter(
        tmp_path / "a", tiny_phi, rank=4, alpha=8.0, ranks={"v_proj": 2}, alpha_pattern={"fc1": 6, "mlp.fc1": 99}
    )
    lora = write.lora(spec_of(folder), tiny_phi_gguf, tmp_path / "a.gguf")
    reader = open_gguf(lora)
    assert gguf_value(reader, "adapter.lora.alpha") == 8.0
    tensors = {t.name: t.data for t in reader.tensors}
    peft = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0"
    np.testing.assert_array_equal(tensors["blk.0.attn_v.weight.lora_b"], peft[f"{prefix}.self_attn.v_proj.lora_B.weight"])
    np.testing.assert_array_equal(tensors["blk.0.ffn_up.weight.lora_b"], 0.75 * peft[f"{prefix}.mlp.fc1.lora_B.weight"])
    ids = list(range(20, 60))
    assert kl_divergence(transformers_logits(tiny_phi, ids, folder), llamacpp_logits(tiny_phi_gguf, ids, lora)) <= 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shapes": {"self_attn.q_proj": (512, 512)}}, "another base model: .* 512 x 512, this model's 576 x 576"),
        ({"layers": 31}, "another base model: it adapts model.layers.30"),
        ({"shapes": {"mlp.unknown": (1536, 576)}}, "another base model: it adapts model.layers.0.mlp.unknown"),
        ({"use_dora": True}, "use_dora"),
    ],
)
def test_foreign_adapters_are_refused(smollm2, tmp_path, options, message):
    folder = write_lora(tmp_path / "a", **options)
    with pytest.raises(AdapterError, match=message):
        write.lora(spec_of(folder), smollm2.gguf_path, tmp_path / "a.gguf")
    assert not list(tmp_path.glob("*.gguf"))


def test_damaged_weights_are_refused(smollm2, tmp_path):
    folder = write_lora(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:5000])
    with pytest.raises(AdapterError, match="no complete safetensors"):
        write.lora(spec_of(folder), smollm2.gguf_path, tmp_path / "a.gguf")
    save_file({"something": np.zeros(3, np.float32)}, weights)
    with pytest.raises(AdapterError, match="no LoRA factor"):
        write.lora(spec_of(folder), smollm2.gguf_path, tmp_path / "a.gguf")


def test_a_pickle_is_refused(tmp_path, workspace, smollm2):
    folder = write_lora(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickle"):
        models.find_adapter(str(folder), smollm2, workspace)


def test_an_unknown_adapter_lists_the_known(workspace, smollm2):
    with pytest.raises(AdapterError, match=r"Unknown adapter 'nope': choose one of .*none"):
        models.find_adapter("nope", smollm2, workspace)


def test_export_on_request_is_refused_on_a_public_space(smollm2, tmp_path, monkeypatch):
    monkeypatch.setenv("SPACE_ID", "someone/space")
    with pytest.raises(RefusedError, match="Export is switched off"):
        write.export_lora(spec_of(write_lora(tmp_path / "a")), smollm2.gguf_path, tmp_path / "a.gguf")


def test_other_peft_types_are_refused(tmp_path, workspace, smollm2):
    folder = write_lora(tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(AdapterError, match="IA3"):
        models.find_adapter(str(folder), smollm2, workspace)
