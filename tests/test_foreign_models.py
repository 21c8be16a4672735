"""Model folders as other people have them: with an adapter inside, odd files beside the weights, configs with lists and nulls."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from biasdpo import chat, models
from biasdpo.backends import hf_loading
from biasdpo.backends.base import CANARY
from biasdpo.backends.hf import open_transformers
from biasdpo.config import TrainConfig
from biasdpo.engines import EngineKey, EnginePool
from biasdpo.errors import ModelError, ProofError
from biasdpo.gguf import write
from biasdpo.gguf.proof import prove
from biasdpo.model_files import read_header, weight_files
from biasdpo.workspace import Workspace
from tests import tiny_models
from tests.commands import run
from training.dpo import load_policy

TEMPLATE = tiny_models.LLAMA_TEMPLATE


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "mine")


# An adapter in the model's folder


@pytest.fixture
def with_adapter(folder: Path) -> Path:
    return tiny_models.write_adapter(folder, folder)


def logits(folder: Path, **options: Any) -> Any:
    with closing(open_transformers(folder, TEMPLATE, None, 512, device="cpu", **options)) as backend:
        return backend.logits(CANARY, "base")


def test_base_is_the_folders_model_without_the_adapter_in_the_folder(tiny_llama: Path, with_adapter: Path) -> None:
    assert np.array_equal(logits(with_adapter), logits(tiny_llama))
    policy = load_policy(with_adapter, TrainConfig(model="m", datasets=("d",)), use_cpu=True)
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        clean = AutoModelForCausalLM.from_pretrained(tiny_llama)(ids).logits
        assert torch.equal(policy(ids).logits, clean)


def test_a_base_that_was_loaded_with_an_adapter_fails_the_proof(with_adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    polluted = AutoModelForCausalLM.from_pretrained(with_adapter)
    monkeypatch.setattr(hf_loading, "load_base", lambda *_args, **_options: polluted)
    with pytest.raises(ProofError, match="The base side is not the base model"):
        logits(with_adapter)


def test_the_adapter_in_a_models_folder_is_offered(with_adapter: Path, workspace: Workspace) -> None:
    spec = models.find(str(with_adapter))
    [offered] = models.adapters_for(spec, workspace)
    assert offered == models.find_adapter("mine-adapter", spec, workspace)
    assert models.find_adapter("", spec, workspace) is None
    with closing(open_transformers(with_adapter, TEMPLATE, offered.folder, 512, device="cpu")) as backend:
        assert (backend.proof.kl_nats or 0.0) > 0.0


def test_only_the_weights_that_transformers_loads_count(folder: Path) -> None:
    parameters = models.find(str(folder)).parameters
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert weight_files(folder) == [folder / "model.safetensors"]
    assert models.find(str(folder)).parameters == parameters
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        weight_files(folder)


def test_a_suffix_in_upper_case_is_a_gguf(tiny_llama_gguf: Path, tmp_path: Path) -> None:
    upper = tmp_path / "MODEL.GGUF"
    upper.symlink_to(tiny_llama_gguf)
    spec = models.find(str(upper))
    assert spec.gguf_path is not None
    assert models.absolute_name(str(upper)) == str(upper.resolve())


def test_a_padding_token_without_embeddings_is_left_out_of_a_gguf(folder: Path, tmp_path: Path) -> None:
    """As after `add_special_tokens({"pad_token": "[PAD]"})` without resizing."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    write.merged(models.find(str(folder)), None, "F32", tmp_path / "out.gguf")
    values = read_header(tmp_path / "out.gguf").values
    assert len(values["tokenizer.ggml.tokens"]) == rows
    assert values["tokenizer.ggml.padding_token_id"] < rows


def test_the_proof_of_an_export_fits_a_short_context(tmp_path: Path, workspace: Workspace) -> None:
    folder = tiny_models.save_tiny_llama(tmp_path / "short", max_position_embeddings=96)
    spec = models.find(str(folder))
    write.merged(spec, None, "F32", tmp_path / "out.gguf")
    assert prove(tmp_path / "out.gguf", None, spec, None, workspace, threads=1).verdict == "equal"


# Chat templates


def test_named_templates_without_a_default_are_listed(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": name, "template": "{{ messages }}"} for name in ("rag", "tools")]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named}))
    with pytest.raises(ModelError, match="has the chat templates rag, tools and none named default"):
        models.find(str(folder))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", r"it took longer than 0\.1 s"),
        ("{{ messages.__class__.__mro__ }}", "it leaves out the user's message|unsafe"),
        ("{{ raise_exception('Never') }}", "Never"),
    ],
)
def test_a_template_that_does_not_render_is_one_line(source: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_SECONDS", 0.1)
    with pytest.raises((ValueError, ModelError), match=reason):
        chat.verified(chat.chat_template(source, (), {}))


def test_compare_reports_the_prompts_tokens_and_refuses_a_system_prompt_that_it_would_drop(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}<{{ m.content }}>{% endif %}{% endfor %}"
    )
    arguments = ("compare", "--model", folder, "--prompt", "Hi", "--max-new-tokens", 1, "--json", "--workspace", tmp_path / "w")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], return_dict=False)
    assert json.loads(run(*arguments).stdout)["prompt_token_ids"] == expected
    refused = run(*arguments, "--system", "Be kind")
    assert "no system role: leave the system prompt empty" in refused.error


# Loading again


def test_a_model_that_failed_to_load_is_loaded_again(folder: Path, workspace: Workspace) -> None:
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text("{")
    pool, key = EnginePool(workspace), EngineKey(str(folder), "none")
    with pytest.raises(ModelError, match="can't be used"), pool.lease(key):
        pass
    (folder / "config.json").write_text(config)
    with pool.lease(key) as engine:
        assert engine.backend.proof.kl_nats is None
    pool.close()


@pytest.fixture
def parts(tiny_llama_gguf: Path, tmp_path: Path) -> list[Path]:
    """The model split in two, as llama-gguf-split does it."""
    reader = gguf.GGUFReader(tiny_llama_gguf)
    half = len(reader.tensors) // 2
    files = [tmp_path / f"tiny-{i}-of-00002.gguf" for i in ("00001", "00002")]
    for number, (file, tensors) in enumerate(zip(files, (reader.tensors[:half], reader.tensors[half:]), strict=True)):
        writer = gguf.GGUFWriter(file, "llama")
        for name, value in reader.fields.items():
            if number == 0 and not name.startswith(("GGUF.", "general.architecture")):
                kinds = [*value.types, None]
                writer.add_key_value(name, value.contents(), kinds[0], kinds[1] if kinds[0] == gguf.GGUFValueType.ARRAY else None)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return files


def test_a_model_in_several_ggufs_takes_an_adapter_and_is_joined_where_one_file_is_needed(
    parts: list[Path], tiny_llama_gguf: Path, tiny_llama_adapter: Path, tmp_path: Path
) -> None:
    asked = ("--adapter", tiny_llama_adapter, "--prompt", "Who cooks?", "--max-new-tokens", 8, "--json", "--backend", "llamacpp")
    split = run("compare", "--model", parts[0], *asked, "--workspace", tmp_path / "w")
    whole = run("compare", "--model", tiny_llama_gguf, *asked, "--workspace", tmp_path / "w")
    answers = [json.loads(one.stdout) for one in (split, whole)]
    assert answers[0]["tuned"]["text"] == answers[1]["tuned"]["text"]
    assert models.find(str(parts[0])).parameters == models.find(str(tiny_llama_gguf)).parameters
    again = ("export", "--model", parts[0], "--adapter", tiny_llama_adapter, "--format", "merged", "--out", tmp_path / "out.gguf")
    assert "llama-gguf-split --merge" in run(*again, "--workspace", tmp_path / "w").error
    assert f"name the first part, {parts[0].name}" in run("compare", "--model", parts[1], *asked).error
    parts[1].unlink()
    assert f"lacks 1 of its 2 parts ({parts[1].name})" in run("compare", "--model", parts[0], *asked).error
