"""A run's card: the Hub reads its front matter, people its numbers, and nothing in it names a folder of somebody's machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from biasdpo import model_card, models
from biasdpo.jobs.job import JobFolder
from tests.run_line import CommandLine


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_bytes: Path, pairs_file: Path) -> JobFolder:
    from biasdpo.workspace import Workspace

    line = CommandLine(Workspace(tmp_path_factory.mktemp("card")), tiny_bytes, pairs_file)
    settings: dict[str, Any] = {"learning_rate": 0.01, "eval_every": 2, "held_out_share": 0.3}
    return line.train_here("carded", **settings)


def front_matter(card: str) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    return ModelCard(card, ignore_metadata_errors=False).data.to_dict()


def test_a_run_of_somebodys_own_model(finished: JobFolder) -> None:
    card = (finished.adapter / "README.md").read_text(encoding="utf-8")
    data = front_matter(card)
    assert (data["library_name"], data["license"], data["pipeline_tag"]) == ("peft", "other", "text-generation")
    assert {"dpo", "lora"} <= set(data["tags"])
    assert "base_model" not in data  # a folder has no name on the Hub
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/", card)
    provenance = json.loads((finished.adapter / "provenance.json").read_text())
    held_out = provenance["metrics"]["held_out"]
    for words in (
        f"| Reward accuracy (pairs: {held_out['pairs']}) | | {held_out['reward_accuracy']:.3f} |",
        "| Picking the longer completion, same pairs | | 0.500 |",
        provenance["dataset_sha256"],
        provenance["base_sha256"],
        f"The adapter is from {provenance['kept']['reason']}.",
        "![Loss, reward accuracy and reward margin by step](curves.png)",
        "The chosen completion is the longer one in 50.0 %",
        "| `learning_rate` | 0.01 |",
        "## Limitations",
        "PeftModel.from_pretrained",
    ):
        assert words in card
    picture = (finished.adapter / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 200_000


def test_a_catalog_model_with_a_hub_data_set(finished: JobFolder) -> None:
    provenance = json.loads((finished.adapter / "provenance.json").read_text())
    provenance |= {
        "dataset_files": ["hub:ahmedallam/BiasDPO", "evil | name`\n# heading.jsonl"],
        "command": "python -m biasdpo train",
    }
    provenance["config"] |= {"dataset_weights": [2.0, 0.5]}
    provenance["kept"] = {"step": 4, "of": 6, "reason": "step 4 of 6"}
    card = model_card.build_card(models.catalog()["smollm2"], provenance)
    data = front_matter(card)
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (data["license"], data["datasets"]) == ("apache-2.0", ["ahmedallam/BiasDPO"])
    assert "`hub:ahmedallam/BiasDPO` (weight 2), `evil \\| name' # heading.jsonl` (weight 0.5)" in card
    assert "The step was chosen on the held-out pairs" in card
    assert 'from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")' in card


def test_a_run_without_held_out_pairs(finished: JobFolder) -> None:
    provenance = json.loads((finished.adapter / "provenance.json").read_text())
    provenance |= {"metrics": {"held_out": None}, "held_out_longer_baseline": None}
    assert "No scores: no pairs were held out" in model_card.build_card(models.catalog()["phi-2"], provenance)


def test_curves_of_any_metrics(tmp_path: Path) -> None:
    for i, metrics in enumerate(
        [[], [{"step": 1, "loss": 0.7}], [{"step": 2, "eval_loss": 0.6, "eval_rewards/accuracies": 1.0}]]
    ):
        path = tmp_path / f"{i}.png"
        model_card.plot_training_curves(metrics, path, longer_baseline=None, kept_step=1)
        assert path.stat().st_size > 1000
    again = tmp_path / "again.png"
    model_card.plot_training_curves([], again, longer_baseline=None, kept_step=1)
    assert again.read_bytes() == (tmp_path / "0.png").read_bytes()  # the same metrics, the same file
