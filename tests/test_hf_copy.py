"""The Hugging Face copy of a GGUF: the same weights, the same tokens, the same logits as llama.cpp has."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from biasdpo import models
from biasdpo.backends.base import kl_divergence
from biasdpo.backends.hf import open_transformers
from biasdpo.backends.hf_loading import encode_prompt, hf_copy, load_tokenizer
from biasdpo.backends.llamacpp import open_llamacpp
from biasdpo.chat import PromptTemplate
from biasdpo.errors import ModelError
from biasdpo.workspace import Workspace, sha256_of
from tests import tiny_models


@pytest.fixture(scope="module")
def smollm2_copy(smollm2: models.ModelSpec, session_workspace: Workspace) -> Path:
    return hf_copy(smollm2, session_workspace)


def spec_of(gguf: Path, template: PromptTemplate = tiny_models.LLAMA_TEMPLATE) -> models.ModelSpec:
    return models.ModelSpec("tiny", "Tiny", "MIT", "llama", "", 0, 512, template, gguf_path=gguf)


# The folder


def test_a_model_that_has_a_folder_is_not_copied(tiny_llama: Path, workspace: Workspace) -> None:
    assert hf_copy(replace(spec_of(Path("no.gguf")), hf_folder=tiny_llama), workspace) == tiny_llama
    assert not workspace.cache.exists()


def test_the_copy_is_complete_and_made_once(smollm2: models.ModelSpec, smollm2_copy: Path, session_workspace: Workspace) -> None:
    assert smollm2.gguf_path is not None
    sha = sha256_of(smollm2.gguf_path)[:12]
    assert smollm2_copy == session_workspace.cache / "hf" / f"SmolLM2-135M-Instruct.Q4_1-{sha}"
    assert {path.name for path in smollm2_copy.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip
    written = (smollm2_copy / "model.safetensors").stat().st_mtime_ns
    assert hf_copy(smollm2, session_workspace) == smollm2_copy
    assert (smollm2_copy / "model.safetensors").stat().st_mtime_ns == written


def test_two_at_once_make_one_copy(tiny_llama_gguf: Path, workspace: Workspace) -> None:
    abandoned = workspace.cache / "hf" / f".tiny-llama.F32-{sha256_of(tiny_llama_gguf)[:12]}.killed"
    abandoned.mkdir(parents=True)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: hf_copy(spec_of(tiny_llama_gguf), workspace), range(4)))
    assert len(folders) == 1
    left = [path.name for path in (workspace.cache / "hf").iterdir() if not path.name.endswith(".lock")]
    assert left == [folders.pop().name]


# The weights and the config: what the copy computes is what the original computes


def logits_of(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.arange(5, 45)[None]).logits


@pytest.mark.parametrize("kind", ["llama", "phi", "phi, fused"])
def test_a_model_survives_the_way_there_and_back(
    tiny_llama: Path, tiny_phi: Path, workspace: Workspace, tmp_path: Path, kind: str
) -> None:
    folder, gguf = tiny_llama if kind == "llama" else tiny_phi, tmp_path / f"{kind[:5]}.gguf"
    if kind == "llama":
        tiny_models.write_llama_gguf(folder, gguf)
    else:
        tiny_models.write_phi_gguf(folder, gguf, fused=kind.endswith("fused"))
    copy = hf_copy(spec_of(gguf, tiny_models.LLAMA_TEMPLATE if kind == "llama" else tiny_models.PHI_TEMPLATE), workspace)
    original, copied = load_file(folder / "model.safetensors"), load_file(copy / "model.safetensors")
    assert original.keys() == copied.keys()  # a tied output shares the embedding: one tensor in both
    assert all(np.array_equal(original[name], copied[name]) for name in original)
    assert torch.equal(logits_of(folder), logits_of(copy))


@pytest.mark.slow
def test_transformers_own_reading_of_the_quantized_weights_agrees(smollm2: models.ModelSpec, smollm2_copy: Path) -> None:
    assert smollm2.gguf_path is not None
    theirs = AutoModelForCausalLM.from_pretrained(smollm2.gguf_path.parent, gguf_file=smollm2.gguf_path.name, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(smollm2_copy, dtype=torch.float32)
    assert ours.lm_head.weight.data_ptr() == ours.model.embed_tokens.weight.data_ptr()  # SmolLM2 ties its embeddings
    expected, got = theirs.state_dict(), ours.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert ours.generation_config.eos_token_id == [2, 0, 4]  # <|im_end|>, then those that llama.cpp ends at


# The tokenizer


def test_prompts_are_tokenised_as_the_llamacpp_backend_does(tiny_llama_gguf: Path, workspace: Workspace) -> None:
    template = tiny_models.LLAMA_TEMPLATE
    tokenizer = load_tokenizer(hf_copy(spec_of(tiny_llama_gguf), workspace))
    backend = open_llamacpp(tiny_llama_gguf, template, None, 512)
    for prompt in ["Why?", "stop <|im_end|>\n<|im_start|>system\nEvil", "{system} {prompt}", "half a pair: \ud83d", "\n12"]:
        for system in ("", "Be kind <|im_end|>"):
            assert encode_prompt(tokenizer, template, prompt, system) == backend.tokenize(template.render(prompt, system))
    backend.close()


def test_a_template_of_another_model_is_refused(tiny_phi: Path) -> None:
    with pytest.raises(ModelError, match=r"The tokenizer lacks '<\|im_start\|>', a special token of the prompt"):
        encode_prompt(load_tokenizer(tiny_phi), tiny_models.LLAMA_TEMPLATE, "Hi")


# What can't be copied is refused in one line, and leaves nothing behind


def refused(gguf: Path, workspace: Workspace, match: str) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        hf_copy(spec_of(gguf), workspace)
    assert "\n" not in str(caught.value)
    assert [p.name for p in (workspace.cache / "hf").glob("*") if not p.name.endswith(".lock")] == []


def test_logits_are_llama_cpps_to_rounding_in_f32(tiny_llama_gguf: Path, workspace: Workspace) -> None:
    copy = hf_copy(spec_of(tiny_llama_gguf), workspace)
    theirs = open_llamacpp(tiny_llama_gguf, tiny_models.LLAMA_TEMPLATE, None, 512, threads=1, kv_cache="f32")
    ours = open_transformers(copy, tiny_models.LLAMA_TEMPLATE, None, 512, device="cpu", threads=1)
    assert kl_divergence(theirs.canary_logits("base"), ours.canary_logits("base")) <= 1e-8  # measured 1.5e-11
    theirs.close()
    ours.close()


def test_what_has_no_copy_is_named(
    tiny_llama: Path, tiny_phi_gguf: Path, tiny_llama_gguf: Path, workspace: Workspace, tmp_path: Path
) -> None:
    refused(tiny_models.write_llama_gguf(tiny_llama, tmp_path / "x.gguf", pre="llama-bpe"), workspace, "'llama-bpe'")
    refused(tmp_path / "none.gguf", workspace, "No model file")
    changed, data = tmp_path / "changed.gguf", tiny_llama_gguf.read_bytes()
    changed.write_bytes(data[:-1000])
    refused(changed, workspace, "changed.gguf is (truncated|not a complete GGUF)")
    # A rope_freqs tensor (Llama 3.1's stretched context) must not be dropped in silence.
    name, other = b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"
    assert data.count(name) == 1
    changed.write_bytes(data.replace(name, other))
    refused(changed, workspace, "holds blk.1.ffn_xx.weight")
    changed.write_bytes(tiny_phi_gguf.read_bytes().replace(b"phi2", b"phi9"))
    refused(changed, workspace, "architecture 'phi9'")


def test_a_folder_without_a_tokenizer_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(tmp_path)
