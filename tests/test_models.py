"""The catalog, what `--model` accepts, prompt templates, and the workspace folder."""

from __future__ import annotations

import json
import shutil

import pytest

from biasdpo import models
from biasdpo.backends import choose_backend
from biasdpo.chat import PromptTemplate, Segment, chat_template
from biasdpo.errors import BackendError, ConfigError, ModelError, PromptError, WorkspaceError
from biasdpo.migrations import open_workspace
from biasdpo.ui.components import own_choices, pasted
from biasdpo.workspace import locked, read_json, replacing, write_json


def test_the_catalog(smollm2):
    assert smollm2.gguf_path.stat().st_size > 90e6
    assert (smollm2.license, smollm2.default_adapter) == ("Apache-2.0", "smollm2-biasdpo")
    for spec in models.catalog().values():
        assert spec.license
        assert spec.hub_id.count("/") == 1
        assert {"llamacpp", "transformers"} <= set(spec.memory_gb)
        assert "{prompt}" in spec.template.text


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("phi-2", r"Phi-2 is not on this machine: get it with `hf download microsoft/phi-2`"),
        ("microsoft/phi-2", r"Phi-2 is not on this machine"),
        ("gpt9", r"Unknown model 'gpt9': choose one of smollm2, phi-2, a Hub id"),
        ("someone/something", r"someone/something is not on this machine: get it with `hf download someone/something`"),
        ("missing.gguf", "missing"),
        ("missing/folder/of/mine", "missing"),
        ("./missing", "missing"),
    ],
)
def test_a_model_that_is_not_here(name, line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "_hub_cached", lambda *_: None)
    with pytest.raises(ModelError, match=line):
        models.find(name)


def test_a_folder_and_a_gguf_of_your_own(tiny_llama, tiny_phi_gguf, monkeypatch):
    folder = models.find(str(tiny_llama))
    assert (folder.architecture, folder.hf_folder, folder.gguf_path) == ("llama", tiny_llama, None)
    gguf = models.find(str(tiny_phi_gguf))
    assert (gguf.architecture, gguf.gguf_path) == ("phi2", tiny_phi_gguf)
    assert gguf.template == models.catalog()["phi-2"].template  # a user's own Phi-2 is prompted as the catalog says
    monkeypatch.chdir(tiny_llama.parent)
    assert models.absolute_name(tiny_llama.name) == str(tiny_llama)
    assert models.absolute_name("not-there.gguf") == str(tiny_llama.parent / "not-there.gguf")
    for name in ("smollm2", "someone/something", ""):
        assert models.absolute_name(name) == name


def test_a_folder_that_changes_is_read_again(tiny_phi, tmp_path):
    folder = shutil.copytree(tiny_phi, tmp_path / "mine")
    assert models.find(str(folder)).template.render_text("Hi") == "Instruct: Hi\nOutput:"
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"max_position_embeddings": 64})
    # A Phi that was tuned to chat is prompted as it says.
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>")
    found = models.find(str(folder))
    assert found.context_length == 64
    assert found.template.render_text("Hi", "Be kind") == "<system>Be kind\n<user>Hi\n<assistant>"


def test_auto(monkeypatch, tmp_path):
    spec, reason = models.choose_auto()
    assert spec.id == "smollm2"
    assert "`hf download microsoft/phi-2`" in reason
    with monkeypatch.context() as patch:
        patch.setattr(models, "free_gpu_memory_gb", lambda: 23.0)  # a GPU, but no network
        spec, reason = models.choose_auto()
        assert spec.id == "smollm2"
        assert "could not be downloaded" in reason
    cached = tmp_path / "phi-2.Q4_K_M.gguf"
    cached.touch()
    monkeypatch.setattr(models, "_hub_cached", lambda _id, file: cached if file.endswith(".gguf") else None)
    spec, _ = models.choose_auto()
    assert (spec.id, spec.gguf_path) == ("phi-2", cached)


def test_backend_choice(smollm2, tiny_llama):
    assert choose_backend(smollm2) == "llamacpp"
    assert choose_backend(smollm2, "transformers") == "transformers"
    with pytest.raises(ConfigError, match="Unknown backend 'gpu': choose one of auto, llamacpp, transformers"):
        choose_backend(smollm2, "gpu")
    with pytest.raises(BackendError, match="no GGUF file here"):
        choose_backend(models.find(str(tiny_llama)), "llamacpp")


def test_templates_separate_special_tokens_from_text():
    template = models.catalog()["smollm2"].template
    segments = template.render("Hi <|im_end|> {system}", "Be kind")
    assert segments[:3] == (Segment("<|im_start|>", True), Segment("system\nBe kind", False), Segment("<|im_end|>", True))
    assert Segment("user\nHi <|im_end|> {system}", False) in segments
    assert template.render_text("Hi").startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    phi = models.catalog()["phi-2"].template
    assert phi.render_text("Hi") == "Instruct: Hi\nOutput:"
    with pytest.raises(PromptError, match="has no system prompt: leave it empty"):
        phi.render("Hi", "Be kind")
    assert not phi.has_system
    assert PromptTemplate("{prompt}").render("x") == (Segment("x", False),)


SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_catalogs_templates_continue_as_they_were_trained():
    smollm2, phi = (models.catalog()[name].template for name in ("smollm2", "phi-2"))
    assert smollm2.render("And?", "S", [("Hi", "Hello")]) == chat_template(CHATML, SPECIAL, {}).render(
        "And?", "S", [("Hi", "Hello")]
    )
    assert phi.render_text("And?", "", [("Hi", "Hello")]) == "Instruct: Hi\nOutput: Hello\nInstruct: And?\nOutput:"


# Names of one's own models in the page's pickers


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("  /models/my phi.gguf\n", "/models/my phi.gguf"),
        ('"/models/my phi.gguf"', "/models/my phi.gguf"),
        ("'/models/my phi.gguf' ", "/models/my phi.gguf"),
        ("file:///models/my%20phi.gguf", "/models/my phi.gguf"),
        (None, ""),
    ],
)
def test_what_was_pasted_is_read_as_a_name(typed, name):
    assert pasted(typed) == name


def test_a_path_is_shown_by_its_last_two_parts():
    names = ["/models/phi.gguf", "smollm2", "", "auto", "someone/model", "/models/phi.gguf"]
    assert own_choices(names) == [("phi.gguf · in models", "/models/phi.gguf"), ("someone/model", "someone/model")]
    twins = ["/a/models/phi.gguf", "/b/models/phi.gguf"]
    assert own_choices(twins) == [(name, name) for name in twins]


# The workspace


def test_the_workspace_comes_from_the_flag_then_the_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_workspace().root == tmp_path / "workspace"
    monkeypatch.setenv("BIASDPO_WORKSPACE", str(tmp_path / "env"))
    assert open_workspace().root == tmp_path / "env"
    assert open_workspace(tmp_path / "flag").root == tmp_path / "flag"
    (tmp_path / "file").touch()
    with pytest.raises(WorkspaceError, match=r"Can't write to the workspace .*name a writable folder with --workspace"):
        open_workspace(tmp_path / "file" / "workspace")


def test_files_are_replaced_whole_and_damaged_ones_are_one_line(tmp_path):
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
    file.write_text("{")
    with pytest.raises(WorkspaceError, match=r"a\.json as JSON"):
        read_json(file)
    with pytest.raises(WorkspaceError, match=r"No file .*b\.json"):
        read_json(tmp_path / "b.json")


def test_a_lock_that_cannot_be_had_is_an_error(tmp_path):
    def second() -> None:
        with locked(tmp_path / "a", timeout_seconds=0.2):
            pass

    with locked(tmp_path / "a"), pytest.raises(WorkspaceError, match=r"locked by another process for 0\.2 s"):
        second()
    second()
