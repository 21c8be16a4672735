"""Which adapters fit a model, by the shapes in the files' headers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from biasdpo import engines, models
from biasdpo.cli import main
from biasdpo.engines import EngineKey, open_engine
from biasdpo.errors import AdapterError
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.workspace import Workspace, write_json
from tests import tiny_models
from tests.lora_factory import write_lora


def add_run(workspace: Workspace, run_id: str, adapter: Path, model: str = "") -> Path:
    """A finished run with this adapter, trained on `model`."""
    folder = workspace.runs / run_id / "adapter"
    shutil.copytree(adapter, folder)
    if model:
        write_json(folder / "provenance.json", {"model": model, "run_id": run_id})
    return folder


def offered(spec: ModelSpec, workspace: Workspace) -> list[str]:
    return [adapter.id for adapter in models.adapters_for(spec, workspace)]


@pytest.fixture
def models_by_kind(tiny_llama: Path, tiny_phi: Path, tiny_llama_gguf: Path, tiny_phi_gguf: Path) -> dict[str, list[ModelSpec]]:
    """Each kind of model as its Hugging Face folder and as its GGUF."""
    return {
        "llama": [models.find(str(tiny_llama)), models.find(str(tiny_llama_gguf))],
        "phi": [models.find(str(tiny_phi)), models.find(str(tiny_phi_gguf))],
    }


def test_an_adapter_is_offered_for_every_copy_of_its_model_and_for_no_other(
    models_by_kind: dict[str, list[ModelSpec]],
    workspace: Workspace,
    tiny_llama_adapter: Path,
    tiny_phi_adapter: Path,
    smollm2: ModelSpec,
) -> None:
    add_run(workspace, "for-llama", tiny_llama_adapter)
    add_run(workspace, "for-phi", tiny_phi_adapter)
    for kind, specs in models_by_kind.items():
        for spec in specs:
            assert offered(spec, workspace) == [f"for-{kind}"]
    assert offered(smollm2, workspace) == ["smollm2-biasdpo"]


def test_an_adapter_fits_a_gguf_with_fused_q_k_and_v(
    tiny_phi: Path, tiny_phi_adapter: Path, tmp_path: Path, workspace: Workspace
) -> None:
    add_run(workspace, "for-phi", tiny_phi_adapter)
    fused = tiny_models.write_phi_gguf(tiny_phi, tmp_path / "fused.gguf", fused=True)
    assert offered(models.find(str(fused)), workspace) == ["for-phi"]


def test_the_adapters_made_for_a_model_come_first(workspace: Workspace, tiny_phi_adapter: Path, tiny_phi_gguf: Path) -> None:
    add_run(workspace, "its-own", tiny_phi_adapter, str(tiny_phi_gguf))
    add_run(workspace, "newer", tiny_phi_adapter, "phi-2")
    spec = models.find(str(tiny_phi_gguf))
    assert offered(spec, workspace) == ["its-own", "newer"]
    assert [adapter.id for adapter in models.adapters_for(spec, workspace)] == ["its-own"]


def test_of_a_model_that_is_not_here_the_metadata_are_asked(workspace: Workspace, tiny_phi_adapter: Path) -> None:
    add_run(workspace, "mine", tiny_phi_adapter, "phi-2")
    add_run(workspace, "of-something-else", tiny_phi_adapter)
    assert offered(models.catalog()["phi-2"], workspace) == ["mine"]


def test_an_adapter_whose_file_changes_is_looked_at_again(
    workspace: Workspace, tiny_phi_adapter: Path, tiny_llama_adapter: Path, tiny_phi_gguf: Path
) -> None:
    folder = add_run(workspace, "mine", tiny_phi_adapter)
    spec = models.find(str(tiny_phi_gguf))
    assert offered(spec, workspace) == ["mine"]
    shutil.copy(tiny_llama_adapter / "adapter_model.safetensors", folder)
    assert offered(spec, workspace) == []


@pytest.mark.parametrize("damage", ["cut off", "no factors", "embeddings too", "half a pair", "foreign"])
def test_what_is_no_plain_adapter_is_not_offered(
    damage: str, workspace: Workspace, tiny_phi_adapter: Path, tiny_phi_gguf: Path
) -> None:
    from safetensors.numpy import load_file

    weights = add_run(workspace, "mine", tiny_phi_adapter) / "adapter_model.safetensors"
    tensors = load_file(weights)
    if damage == "cut off":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "foreign":
        weights.write_bytes(b"\xff" * 100)
    elif damage == "half a pair":
        tensors.pop(next(name for name in tensors if "lora_B" in name))
        save_file(tensors, weights)
    else:
        extra = {"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((4, 9), np.float32)}
        save_file(extra | (tensors if damage == "embeddings too" else {}), weights)
    assert offered(models.find(str(tiny_phi_gguf)), workspace) == []


def test_a_wrong_adapter_is_refused_before_the_model_is_loaded(
    workspace: Workspace, tiny_phi_gguf: Path, tiny_llama_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "open_backend", lambda *_args, **_more: pytest.fail("the model was loaded"))
    with pytest.raises(AdapterError) as caught:
        open_engine(EngineKey(str(tiny_phi_gguf), str(tiny_llama_adapter)), workspace)
    assert str(caught.value) == (
        "Adapter tiny-llama-lora was made for another base model: it adapts model.layers.0.mlp.down_proj, which "
        "tiny-phi.F32.gguf lacks; choose another adapter, or open the model that it was made for"
    )


def test_an_adapter_of_other_widths_is_refused_with_both(smollm2: ModelSpec, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "wide", shapes={"self_attn.q_proj": (960, 576)}, base_model="HuggingFaceTB/SmolLM2-360M")
    with pytest.raises(AdapterError) as caught:
        models.check_fits(AdapterSpec("wide", folder, "HuggingFaceTB/SmolLM2-360M"), smollm2)
    assert str(caught.value) == (
        "Adapter wide was made for another base model: its model.layers.0.self_attn.q_proj is 960 x 576, that of "
        "SmolLM2-135M-Instruct 576 x 576; choose another adapter, or open the model that it was made for "
        "(HuggingFaceTB/SmolLM2-360M)"
    )


def test_a_path_of_a_known_adapter_is_that_adapter(workspace: Workspace, tiny_phi_adapter: Path, tiny_phi_gguf: Path) -> None:
    folder = add_run(workspace, "mine", tiny_phi_adapter)
    spec = models.find(str(tiny_phi_gguf))
    found = models.find_adapter(str(folder), spec, workspace)
    assert found is not None
    assert found.id == "mine"
    elsewhere = models.find_adapter(str(tiny_phi_adapter), spec, workspace)
    assert elsewhere is not None
    assert elsewhere.id == "tiny-phi-lora"


# The command line


@pytest.mark.parametrize(
    ("model", "adapter", "line"),
    [
        ("phi", "tiny_llama_adapter", "made for another base model: it adapts model.layers.0.mlp.down_proj"),
        ("phi", "tiny_phi", "has no adapter_model.safetensors: name a folder that PEFT's save_pretrained wrote"),
        ("phi", "tiny_phi_gguf", "is a file, and an adapter is a folder: choose one of"),
        ("adapter", "none", "is an adapter, no model: name it as the adapter, and its base model here"),
        ("folder of ggufs", "none", "has no config.json, but GGUF files: name one of them, such as "),
    ],
)
def test_what_is_no_model_or_no_adapter_is_one_line(
    model: str, adapter: str, line: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    gguf: Path = request.getfixturevalue("tiny_phi_gguf")
    named = {"phi": gguf, "adapter": request.getfixturevalue("tiny_phi_adapter"), "folder of ggufs": gguf.parent}[model]
    picked = adapter if adapter == "none" else str(request.getfixturevalue(adapter))
    arguments = ["compare", "--prompt", "Hi", "--model", str(named), "--adapter", picked, "--workspace", str(tmp_path)]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert line in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_ones_own_model_and_adapter_are_compared(
    kind: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own: Path = request.getfixturevalue("tiny_phi" if kind == "folder" else "tiny_phi_gguf")
    adapter: Path = request.getfixturevalue("tiny_phi_adapter")
    arguments = ["compare", "--prompt", "Hi", "--model", str(own), "--adapter", str(adapter), "--workspace", str(tmp_path)]
    assert main([*arguments, "--max-new-tokens", "4", "--temperature", "0", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["model"], row["adapter"]) == (str(own), "tiny-phi-lora")
    assert row["backend"] == ("transformers" if kind == "folder" else "llamacpp")
    assert row["canary_kl_nats"] > 0


def test_models_lists_the_adapters_that_fit_ones_own(
    tiny_phi_gguf: Path,
    tiny_phi_adapter: Path,
    tiny_llama_adapter: Path,
    capsys: pytest.CaptureFixture[str],
    workspace: Workspace,
) -> None:
    add_run(workspace, "for-phi", tiny_phi_adapter)
    add_run(workspace, "for-llama", tiny_llama_adapter)
    assert main(["models", str(tiny_phi_gguf), "--workspace", str(workspace.root), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["id"], row["gguf"], row["adapters"]) == (str(tiny_phi_gguf), str(tiny_phi_gguf), ["for-phi"])
    assert main(["models", "nothing.gguf", "--workspace", str(workspace.root)]) == 2
    assert "No model file" in capsys.readouterr().err
