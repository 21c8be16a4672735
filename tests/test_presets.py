"""The shipped run configs: read, explained, and each of them trained with for two steps on a tiny model of its architecture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from biasdpo import config as run_config
from biasdpo import models
from biasdpo.config import Preset, TrainConfig
from biasdpo.jobs import store
from biasdpo.workspace import Workspace

PRESETS = run_config.presets()


def test_three_are_shipped_for_each_model() -> None:
    assert [preset.id for preset in PRESETS] == [
        f"{model}-{pace}" for model in ("smollm2", "phi-2") for pace in ("quick", "standard", "thorough")
    ]
    assert [preset.title for preset in PRESETS] == ["Quick look", "Standard", "Thorough"] * 2
    assert {preset.model for preset in PRESETS} == set(models.catalog())
    assert not [preset.id for preset in PRESETS if "datasets" in preset.values]  # the user names the data


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.id)
def test_each_trains_two_steps(
    preset: Preset, tiny_llama: Path, tiny_phi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import callbacks, losses
    from training.__main__ import main

    for module in (callbacks, losses):
        monkeypatch.setattr(module, "MAX_NEW_TOKENS", 4)

    assert preset.description.endswith(".")
    folder = {"smollm2": tiny_llama, "phi-2": tiny_phi}[preset.model]
    tiny = replace(models.catalog()[preset.model], parameters=10_000, hf_folder=folder, gguf_path=None)
    monkeypatch.setattr(models, "find", lambda _name: tiny)  # its name, template and layers, with weights that are here
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(
            json.dumps({"prompt": f"Is a{i} more b{i} than c{i}?", "chosen": f"Neither {i}.", "rejected": f"They are {i}!"})
            + "\n"
            for i in range(24)
        )
    )
    data = {"datasets": [str(pairs)], "held_out_share": 0.3, "max_steps": 2, "threads": 1}
    config = TrainConfig(**preset.values | data)
    run = store.create_training(config, Workspace(tmp_path / "workspace"), "two-steps")
    main(run)
    status = run.read_status()
    assert (status.state, status.step, status.error) == ("finished", 2, "")
    adapter = json.loads((run.adapter / "adapter_config.json").read_text())
    assert set(adapter["target_modules"]) == set(config.target_modules)
    assert adapter["base_model_name_or_path"] == tiny.hub_id
    assert [row["step"] for row in run.read_metrics() if "eval_loss" in row] == ([2] if config.eval_every else [])
    assert {row["step"] for row in run.read_probes()} == {0, 2}
