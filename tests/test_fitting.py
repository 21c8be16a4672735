"""Adapters: what is listed, what fits which model, and the reason where one does not. All from the files' headers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from biasdpo import engines, models
from biasdpo.cli import main
from biasdpo.engines import EngineKey, open_engine
from biasdpo.errors import AdapterError, ConfigError
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.workspace import Workspace, write_json
from tests import tiny_models
from tests.lora_factory import write_lora


def add_run(workspace: Workspace, run_id: str, adapter: Path, model: str = "") -> Path:
    """A finished run with this adapter, trained on `model`."""
    folder = workspace.runs / run_id / "adapter"
    shutil.copytree(adapter, folder)
    if model:
        write_json(folder / "provenance.json", {"model": model, "run_id": run_id, "dataset_sha256": "ab"})
    return folder


def offered(spec: ModelSpec, workspace: Workspace) -> list[str]:
    return [adapter.id for adapter in models.adapters_for(spec, workspace)]


def spec_of(folder: Path) -> AdapterSpec:
    return AdapterSpec("mine", folder, "")


# Lists


def test_an_adapter_is_offered_for_every_copy_of_its_model_and_for_no_other(
    request: pytest.FixtureRequest, workspace: Workspace, smollm2: ModelSpec, tmp_path: Path
) -> None:
    fused = tiny_models.write_phi_gguf(request.getfixturevalue("tiny_phi"), tmp_path / "fused.gguf", fused=True)
    for kind in ("llama", "phi"):
        add_run(workspace, f"for-{kind}", request.getfixturevalue(f"tiny_{kind}_adapter"))
    for kind in ("llama", "phi"):
        paths = [request.getfixturevalue(f"tiny_{kind}{form}") for form in ("", "_gguf")] + ([fused] if kind == "phi" else [])
        for path in paths:
            assert offered(models.find(str(path)), workspace) == [f"for-{kind}"]
    assert offered(smollm2, workspace) == ["smollm2-biasdpo"]


def test_the_adapters_made_for_a_model_come_first(workspace: Workspace, tiny_phi_adapter: Path, tiny_phi_gguf: Path) -> None:
    add_run(workspace, "its-own", tiny_phi_adapter, str(tiny_phi_gguf))
    add_run(workspace, "newer", tiny_phi_adapter, "phi-2")
    add_run(workspace, "of-something-else", tiny_phi_adapter)
    spec = models.find(str(tiny_phi_gguf))
    assert offered(spec, workspace)[0] == "its-own"
    assert set(offered(spec, workspace)) == {"its-own", "newer", "of-something-else"}
    assert [adapter.id for adapter in models.adapters_made_for(spec, workspace)] == ["its-own"]
    # Of a model that is not here, only metadata can be compared.
    assert offered(models.catalog()["phi-2"], workspace) == ["newer"]
    assert models.from_run(workspace, "newer").dataset_sha256 == "ab"
    with pytest.raises(AdapterError, match="'other' has no adapter"):
        models.from_run(workspace, "other")
    with pytest.raises(ConfigError, match="Run ids"):
        models.from_run(workspace, "../mine")


def test_a_changed_file_is_read_again(
    workspace: Workspace, tiny_phi_adapter: Path, tiny_llama_adapter: Path, tiny_phi_gguf: Path
) -> None:
    folder = add_run(workspace, "mine", tiny_phi_adapter)
    spec = models.find(str(tiny_phi_gguf))
    assert offered(spec, workspace) == ["mine"]
    shutil.copy(tiny_llama_adapter / "adapter_model.safetensors", folder)
    assert offered(spec, workspace) == []


def test_a_path_of_a_known_adapter_is_that_adapter(workspace: Workspace, tiny_phi_adapter: Path, tiny_phi_gguf: Path) -> None:
    folder = add_run(workspace, "mine", tiny_phi_adapter)
    spec = models.find(str(tiny_phi_gguf))
    found, elsewhere = (models.find_adapter(str(path), spec, workspace) for path in (folder, tiny_phi_adapter))
    assert found is not None
    assert elsewhere is not None
    assert (found.id, elsewhere.id) == ("mine", "tiny-phi-lora")


# Damaged metadata: one row with its reason, the others stay

CONFIG_KEYS = (
    "peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "bias", "init_lora_weights", "modules_to_save", "use_dora",
)  # fmt: skip
WRONG_VALUES: list[Any] = [None, True, -1, 0, 1.5, "x", [], [[]], ["x"], {}, {"a": {}}, {"(": 4}]
DAMAGED = ["", "{", "[]", "5", "{}", "\udcff", "[" * 100_000, '{"peft_type":' * 100_000, '{"peft_type": "LORA", "r": NaN}']


@pytest.mark.parametrize("file", ["adapter_config.json", "provenance.json"])
def test_a_damaged_adapter_is_one_row(file: str, workspace: Workspace, tiny_phi_adapter: Path, tiny_phi_gguf: Path) -> None:
    spec = models.find(str(tiny_phi_gguf))
    add_run(workspace, "whole", tiny_phi_adapter)
    folder = add_run(workspace, "damaged", tiny_phi_adapter, "phi-2")
    for content in DAMAGED:
        if file == "provenance.json" and content in ("{}", DAMAGED[-1]):
            continue  # nothing that it needs, nothing that it reads
        (folder / file).write_bytes(content.encode("utf-8", "surrogateescape"))
        rows = {row.id: row.problem for row in models.list_adapters(workspace)}
        assert set(rows) == {"smollm2-biasdpo", "whole", "damaged"}
        assert file in rows["damaged"]
        assert "\n" not in rows["damaged"]
        assert "delete" not in rows["damaged"]
        assert rows["whole"] == rows["smollm2-biasdpo"] == ""
        assert offered(spec, workspace) == ["whole"]
        with pytest.raises(AdapterError, match=file):
            models.find_adapter("damaged", spec, workspace)


@pytest.mark.parametrize("key", CONFIG_KEYS)
def test_a_wrong_type_at_any_key_is_a_reason_or_does_not_matter(
    key: str, tiny_phi: Path, tiny_phi_adapter: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_phi_adapter, tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    spec, reasons = models.find(str(tiny_phi)), []
    for value in WRONG_VALUES:
        write_json(folder / "adapter_config.json", config | {key: value})
        reasons.append(models.misfit(spec_of(folder), spec))
    assert any(reasons)
    assert not any("\n" in reason for reason in reasons)


def test_wrong_types_in_provenance_are_a_reason(workspace: Workspace, tiny_phi_adapter: Path) -> None:
    folder = add_run(workspace, "mine", tiny_phi_adapter)
    for key in ("model", "run_id", "dataset_sha256", "config"):
        write_json(folder / "provenance.json", {key: [5]})
        assert "provenance.json" in {row.id: row.problem for row in models.list_adapters(workspace)}["mine"]
    write_json(folder / "provenance.json", {"config": {"held_out_share": 0.2}, "of a newer version": {"a": 1}})
    assert models.from_run(workspace, "mine").held_out_share == 0.2


# Does it fit? One place, the true reason

Change = Callable[[dict[str, np.ndarray], dict[str, Any]], None]


def drop(part: str) -> Change:
    return lambda tensors, _config: [tensors.pop(name) for name in list(tensors) if part in name] and None


def settings(**changes: Any) -> Change:
    return lambda _tensors, config: config.update(changes)


def add(name: str, *shape: int) -> Change:
    return lambda tensors, _config: tensors.update({f"base_model.model.{name}": np.zeros(shape, np.float32)})


def add_pair(module: str, out: int, into: int) -> Change:
    def change(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        add(f"{module}.lora_A.weight", 4, into)(tensors, config)
        add(f"{module}.lora_B.weight", out, 4)(tensors, config)
        config["target_modules"].append(module.split(".")[-1])

    return change


def widen(tensors: dict[str, np.ndarray], _config: dict[str, Any]) -> None:
    tensors.update({name: np.zeros((4, 96), np.float32) for name in tensors if "q_proj.lora_A" in name})


REASONS: list[tuple[Change, str]] = [
    (widen, r"another base model: its model\.layers\.0\.self_attn\.q_proj is 64 x 96, that of .* 64 x 64"),
    (settings(r=6), r"layers\.0\.mlp\.down_proj has rank 4, its adapter_config\.json says 6"),
    (settings(rank_pattern={"up_proj": 2}), r"up_proj has rank 4, its adapter_config\.json says 2"),
    (settings(rank_pattern={"(": 2}), r"a pattern in adapter_config\.json is wrong"),
    (drop("layers.2"), r"is incomplete: its settings adapt 21 layers of .*, its file lacks 7 of them \(model\.layers\.2"),
    (drop("up_proj.lora_A"), r"up_proj has no matching pair of LoRA factors"),
    (drop(""), "holds no LoRA factors"),
    (settings(target_modules=["q_proj"]), r"holds .*down_proj, which its adapter_config\.json does not adapt"),
    (settings(exclude_modules=["q_proj"]), r"holds .*q_proj, which its adapter_config\.json does not adapt"),
    (settings(layers_to_transform=[0, 1]), r"holds model\.layers\.2\..*, which its adapter_config\.json does not adapt"),
    (settings(use_dora=True), "uses use_dora, and only plain LoRA .*merge_and_unload"),
    (settings(modules_to_save=["lm_head"]), "uses modules_to_save"),
    (settings(init_lora_weights="pissa_niter_4"), "uses init_lora_weights=pissa_niter_4"),
    (settings(bias="all", fan_in_fan_out=True), "uses fan_in_fan_out, bias=all"),
    (settings(peft_type="LOHA"), "is a 'LOHA' adapter: only LORA"),
    (settings(peft_type=None), r"adapter_config\.json can't be used: its 'peft_type' is wrong"),
    (add("lm_head.weight", 2, 2), "holds base_model.model.lm_head.weight, which is no LoRA factor"),
    (add("model.embed_tokens.lora_embedding_A", 4, 9), "adapts the embeddings: only plain LoRA"),
    (add_pair("model.embed_tokens", 9, 64), r"another base model: its model\.embed_tokens is 9 x 64"),
    (add_pair("model.layers.0.mlp.fc1", 128, 64), r"another base model: it adapts model\.layers\.0\.mlp\.fc1, which .* lacks"),
    (add_pair("model.layers.3.mlp.up_proj", 128, 64), r"it adapts model\.layers\.3\.mlp\.up_proj, which .* \(llama\) lacks"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), REASONS)
def test_the_reason_is_the_same_for_folder_and_gguf(
    change: Change, reason: str, tiny_llama: Path, tiny_llama_gguf: Path, tiny_llama_adapter: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_llama_adapter, tmp_path / "a")
    tensors, config = load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", config)
    for model in (tiny_llama, tiny_llama_gguf):
        with pytest.raises(AdapterError, match=reason) as caught:
            models.check_fits_file(spec_of(folder), model)
        assert "\n" not in str(caught.value)


FITS: list[tuple[dict[str, Any], float]] = [
    ({}, 8 / 4),
    ({"use_rslora": True}, 8 / 4**0.5),
    ({"alpha_pattern": {"q_proj": 32}}, 32 / 4),
    ({"target_modules": "all-linear"}, 8 / 4),
    ({"target_modules": r".*(_proj)"}, 8 / 4),
    ({"layers_to_transform": [0, 1, 2]}, 8 / 4),
    ({"target_modules": None}, 8 / 4),
]


@pytest.mark.parametrize(("changes", "scale"), FITS)
def test_a_plain_lora_fits(
    changes: dict[str, Any], scale: float, tiny_llama: Path, tiny_llama_gguf: Path, tmp_path: Path
) -> None:
    folder = tiny_models.write_adapter(tmp_path / "a", tiny_llama, ranks={"up_proj": 2}, **changes)
    for model in (tiny_llama, tiny_llama_gguf):
        lora = models.check_fits_file(spec_of(folder), model)
        assert len(lora) == 21
        q, up = lora["model.layers.1.self_attn.q_proj"], lora["model.layers.1.mlp.up_proj"]
        assert (q.out, q.into, q.rank, q.scale) == (64, 64, 4, pytest.approx(scale))
        assert (up.out, up.into, up.rank) == (128, 64, 2)
        assert q.alpha == pytest.approx(scale * 4)


@pytest.mark.parametrize("damage", [b"\xff" * 100, b"", b"cut"])
def test_damaged_weights_are_a_reason(damage: bytes, workspace: Workspace, tiny_phi_adapter: Path, tiny_phi_gguf: Path) -> None:
    weights = add_run(workspace, "mine", tiny_phi_adapter) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10] if damage == b"cut" else damage)
    reason = models.misfit(models.from_run(workspace, "mine"), models.find(str(tiny_phi_gguf)))
    assert "is not a complete safetensors file" in reason
    assert offered(models.find(str(tiny_phi_gguf)), workspace) == []


def test_a_wrong_adapter_is_refused_before_the_model_is_loaded(
    workspace: Workspace, tiny_phi_gguf: Path, tiny_llama_adapter: Path, smollm2: ModelSpec, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(engines, "open_backend", lambda *_args, **_more: pytest.fail("the model was loaded"))
    with pytest.raises(AdapterError) as caught:
        open_engine(EngineKey(str(tiny_phi_gguf), str(tiny_llama_adapter)), workspace)
    assert str(caught.value) == (
        "Adapter tiny-llama-lora was made for another base model: it adapts model.layers.0.mlp.down_proj, which "
        "tiny-phi.F32.gguf (phi2) lacks; choose another adapter, or open the model that it was made for"
    )
    folder = write_lora(tmp_path / "wide", shapes={"self_attn.q_proj": (960, 576)})
    with pytest.raises(AdapterError, match=r"q_proj is 960 x 576, that of SmolLM2-135M-Instruct 576 x 576; .*made for \(big\)$"):
        models.check_fits(AdapterSpec("wide", folder, "big"), smollm2)


# The command line


@pytest.mark.parametrize(
    ("model", "adapter", "line"),
    [
        ("phi", "tiny_phi", "has no adapter_model.safetensors: name a folder written by PEFT's save_pretrained"),
        ("phi", "pickle", "holds a pickle (adapter_model.bin), which can run code"),
        ("phi", "weights", "adapter_model.safetensors is a file, and an adapter is a folder: choose one of "),
        ("adapter", "none", "is an adapter, not a model: select it as the adapter"),
    ],
)
def test_what_is_no_model_or_no_adapter_is_one_line(
    model: str, adapter: str, line: str, tiny_phi: Path, tiny_phi_adapter: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "adapter_model.bin").touch()
    picked = {"tiny_phi": tiny_phi, "pickle": tmp_path / "pickle", "weights": tiny_phi_adapter / "adapter_model.safetensors"}
    named = tiny_phi_adapter if model == "adapter" else tiny_phi
    arguments = ["compare", "--prompt", "Hi", "--model", str(named), "--adapter", str(picked.get(adapter, adapter))]
    assert main([*arguments, "--workspace", str(tmp_path / "w")]) == 2
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
    tiny_phi_gguf: Path, tiny_phi_adapter: Path, tiny_llama_adapter: Path, capsys: Any, workspace: Workspace
) -> None:
    add_run(workspace, "for-phi", tiny_phi_adapter)
    add_run(workspace, "for-llama", tiny_llama_adapter)
    assert main(["models", str(tiny_phi_gguf), "--workspace", str(workspace.root), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["id"], row["gguf"], row["adapters"]) == (str(tiny_phi_gguf), str(tiny_phi_gguf), ["for-phi"])
    assert main(["models", "nothing.gguf", "--workspace", str(workspace.root)]) == 2
    assert "No model file" in capsys.readouterr().err
