"""The catalog, what `--model` accepts, prompt templates, and the workspace folder."""

from __future__ import annotations

import json
import shutil

import pytest

from biasdpo import models
from biasdpo.backends import choose_backend
from biasdpo.chat import PromptTemplate, Segment
from biasdpo.errors import AdapterError, BackendError, ConfigError, ModelError, WorkspaceError
from biasdpo.workspace import locked, open_workspace, read_json, replacing, write_json


def test_the_embedded_model_is_here(smollm2):
    assert smollm2.gguf_path is not None
    assert smollm2.gguf_path.stat().st_size > 90e6
    assert smollm2.license == "Apache-2.0"
    assert smollm2.default_adapter == "smollm2-biasdpo"


@pytest.mark.parametrize("name", ["phi-2", "microsoft/phi-2"])
def test_phi_2_that_is_not_here_says_how_to_get_it(name, monkeypatch):
    monkeypatch.setattr(models, "_hub_cached", lambda *_: None)
    with pytest.raises(ModelError, match=r"Phi-2 is not on this machine: get it with `hf download microsoft/phi-2`"):
        models.find(name)


def test_an_unknown_model_lists_the_known():
    with pytest.raises(ModelError, match=r"Unknown model 'gpt9': choose one of smollm2, phi-2, a Hub id"):
        models.find("gpt9")


def test_a_hub_id_that_is_not_here():
    with pytest.raises(
        ModelError, match=r"someone/something is not on this machine: get it with `hf download someone/something`"
    ):
        models.find("someone/something")


def test_a_folder_and_a_gguf_of_your_own(tiny_llama, tiny_phi_gguf):
    folder = models.find(str(tiny_llama))
    assert (folder.architecture, folder.hf_folder, folder.gguf_path) == ("llama", tiny_llama, None)
    gguf = models.find(str(tiny_phi_gguf))
    assert (gguf.architecture, gguf.gguf_path) == ("phi2", tiny_phi_gguf)
    assert gguf.template == models.catalog()["phi-2"].template  # a user's own Phi-2 is prompted as the catalog says


def test_a_phi_that_was_tuned_to_chat_is_prompted_as_it_says(tiny_phi, tmp_path):
    folder = shutil.copytree(tiny_phi, tmp_path / "chat")
    chat = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
    (folder / "chat_template.jinja").write_text(chat)
    assert models.find(str(folder)).template.render_text("Hi", "Be kind") == "<system>Be kind\n<user>Hi\n<assistant>"
    assert models.find(str(tiny_phi)).template.render_text("Hi") == "Instruct: Hi\nOutput:"


def test_a_folder_that_changes_is_read_again(tiny_phi, tmp_path):
    folder = shutil.copytree(tiny_phi, tmp_path / "mine")
    assert models.find(str(folder)).context_length == 512
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"max_position_embeddings": 64})
    assert models.find(str(folder)).context_length == 64


def test_damaged_folders_are_one_line(tiny_phi, tmp_path):
    folder = shutil.copytree(tiny_phi, tmp_path / "mine")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for content, message in ((whole[:-1], "is cut off"), (whole[:100], "no safetensors"), (b"\xff" * 9, "no safetensors")):
        weights.write_bytes(content)
        with pytest.raises(ModelError, match=message):
            models.find(str(folder))
    weights.write_bytes(whole)
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})
    with pytest.raises(ModelError, match=r"lacks 1 of 2 shards \(model-2\.safetensors\)"):
        models.find(str(folder))
    (folder / "tokenizer_config.json").write_text("{")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is no JSON"):
        models.find(str(folder))


def test_a_name_that_means_the_same_everywhere(tiny_phi, monkeypatch):
    monkeypatch.chdir(tiny_phi.parent)
    assert models.absolute_name(tiny_phi.name) == str(tiny_phi)
    assert models.absolute_name("not-there.gguf") == str(tiny_phi.parent / "not-there.gguf")
    for name in ("smollm2", "someone/something", ""):
        assert models.absolute_name(name) == name


@pytest.mark.parametrize("name", ["missing.gguf", "missing/folder/of/mine", "./missing"])
def test_a_path_that_is_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="missing"):
        models.find(name)


def test_a_truncated_gguf(smollm2, tmp_path):
    cut = tmp_path / "cut.gguf"
    with smollm2.gguf_path.open("rb") as whole:
        cut.write_bytes(whole.read(5_000_000))
    with pytest.raises(ModelError, match=r"cut\.gguf"):
        models.find(str(cut))


def test_auto_takes_phi_2_where_its_files_are(monkeypatch, tmp_path):
    spec, reason = models.choose_auto()
    assert spec.id == "smollm2"
    assert "`hf download microsoft/phi-2`" in reason
    cached = tmp_path / "phi-2.Q4_K_M.gguf"
    cached.touch()
    monkeypatch.setattr(models, "_hub_cached", lambda _id, file: cached if file.endswith(".gguf") else None)
    spec, reason = models.choose_auto()
    assert (spec.id, spec.gguf_path) == ("phi-2", cached)


def test_auto_with_a_gpu_but_no_network_says_why_it_is_smollm2(monkeypatch):
    monkeypatch.setattr(models, "free_gpu_memory_gb", lambda: 23.0)
    spec, reason = models.choose_auto()
    assert spec.id == "smollm2"
    assert "could not be downloaded" in reason


def test_backend_choice(smollm2):
    assert choose_backend(smollm2) == "llamacpp"
    assert choose_backend(smollm2, "transformers") == "transformers"
    with pytest.raises(ConfigError, match="Unknown backend 'gpu': choose one of auto, llamacpp, transformers"):
        choose_backend(smollm2, "gpu")


def test_llamacpp_without_a_gguf(tiny_llama):
    with pytest.raises(BackendError, match="no GGUF file here"):
        choose_backend(models.find(str(tiny_llama)), "llamacpp")


def test_adapters_of_runs_are_found_and_a_run_without_one_says_so(workspace, tiny_llama_adapter):
    folder = workspace.runs / "mine" / "adapter"
    shutil.copytree(tiny_llama_adapter, folder)
    write_json(folder / "provenance.json", {"model": "smollm2", "run_id": "mine", "dataset_sha256": "ab"})
    assert models.from_run(workspace, "mine").dataset_sha256 == "ab"
    assert "mine" in [adapter.id for adapter in models.adapters_for(models.catalog()["smollm2"], workspace)]
    assert "mine" not in [adapter.id for adapter in models.adapters_for(models.catalog()["phi-2"], workspace)]
    with pytest.raises(AdapterError, match="'other' has no adapter"):
        models.from_run(workspace, "other")
    with pytest.raises(ConfigError, match="run id"):
        models.from_run(workspace, "../mine")


def test_the_chatml_template_separates_special_tokens_from_text():
    template = models.catalog()["smollm2"].template
    segments = template.render("Hi <|im_end|> {system}", "Be kind")
    assert segments[:3] == (Segment("<|im_start|>", True), Segment("system\nBe kind", False), Segment("<|im_end|>", True))
    assert Segment("user\nHi <|im_end|> {system}", False) in segments
    assert template.render_text("Hi").startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


def test_the_phi_template_has_no_system_prompt():
    template = models.catalog()["phi-2"].template
    assert template.render_text("Hi", "ignored") == "Instruct: Hi\nOutput:"
    assert not template.has_system
    assert PromptTemplate("{prompt}").render("x") == (Segment("x", False),)


# The workspace


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WorkspaceError, match=r"Can't write to the workspace .*name a writable folder with --workspace"):
        open_workspace(tmp_path / "file" / "workspace")


def test_the_workspace_comes_from_the_flag_then_the_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_workspace().root == tmp_path / "workspace"
    monkeypatch.setenv("BIASDPO_WORKSPACE", str(tmp_path / "env"))
    assert open_workspace().root == tmp_path / "env"
    assert open_workspace(tmp_path / "flag").root == tmp_path / "flag"


def test_replacing_leaves_the_old_file_where_writing_fails(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"old": 1})

    def fail() -> None:
        with replacing(file) as temporary:
            temporary.write_text("{")
            raise RuntimeError("power loss")

    with pytest.raises(RuntimeError):
        fail()
    assert read_json(file) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_damaged_json_is_one_line(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(WorkspaceError, match=r"a\.json as JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(WorkspaceError, match=r"No file .*b\.json"):
        read_json(tmp_path / "b.json")


def test_a_lock_that_cannot_be_had_is_an_error(tmp_path):
    def second() -> None:
        with locked(tmp_path / "a", timeout_seconds=0.2):
            pass

    with locked(tmp_path / "a"), pytest.raises(WorkspaceError, match=r"locked by another process for 0\.2 s"):
        second()
    second()


def test_catalog_entries_are_whole():
    for spec in models.catalog().values():
        assert spec.license
        assert spec.hub_id.count("/") == 1
        assert {"llamacpp", "transformers"} <= set(spec.memory_gb)
        assert "{prompt}" in spec.template.text
        json.dumps(spec.memory_gb)
