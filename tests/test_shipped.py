"""The adapter in assets/adapters: small, safe to open, traceable, and as good as its card says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from safetensors import safe_open

from biasdpo import config, models
from biasdpo.backends.base import log_softmax
from biasdpo.compare import EXAMPLE_PAIRS
from biasdpo.engines import EngineKey, open_engine
from biasdpo.evaluation import report
from biasdpo.records import LikelihoodRequest
from biasdpo.workspace import ASSETS, sha256_of
from scripts.example_pairs import PROMPTS, generate

FOLDER = ASSETS / "adapters" / "smollm2-biasdpo"
PROVENANCE = json.loads((FOLDER / "provenance.json").read_text())
EVALUATION = json.loads((FOLDER / "evaluation.json").read_text())


def test_it_is_small_and_safe_and_names_no_folder_of_a_machine():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 12e6
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".safetensors", ".json", ".jsonl", ".md", ".png"}  # no pickle
    with safe_open(FOLDER / "adapter_model.safetensors", "np") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}  # noqa: SIM118 - no mapping
    for file in files:
        if file.suffix in (".json", ".jsonl", ".md"):
            assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users|mnt|opt)/|[A-Z]:\\", file.read_text(encoding="utf-8"))


def test_it_names_its_parents_and_the_command_that_made_it(smollm2):
    assert PROVENANCE["model"] == "smollm2"
    assert PROVENANCE["base_sha256"] == sha256_of(smollm2.gguf_path)
    assert re.fullmatch("[0-9a-f]{64}", PROVENANCE["dataset_sha256"])
    assert "python -m biasdpo train" in PROVENANCE["command"]
    assert "smollm2-standard.toml" in PROVENANCE["command"]
    adapter_config = json.loads((FOLDER / "adapter_config.json").read_text())
    assert adapter_config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    shipped = config.read_toml(ASSETS.parent / "training" / "configs" / "smollm2-standard.toml")
    for name in shipped.keys() - {"eval_every", "probe_every", "keep"}:  # which only observe
        assert PROVENANCE["config"][name] == shipped[name], name
    assert shipped["keep"] == "last"


def test_its_evaluation_is_of_these_weights_and_better_than_picking_the_longer(smollm2, session_workspace):
    adapter = models.find_adapter("", smollm2, session_workspace)
    assert EVALUATION["provenance"]["adapter_sha256"] == sha256_of(adapter.weights)
    found = EVALUATION["benchmarks"]
    assert not any(benchmark["not_comparable"] or benchmark["n_failed"] for benchmark in found.values())
    preference, utility, written = found["preference"], found["utility"], found["utility_generation"]
    assert preference["paired"]["reward_accuracy"]["value"] > preference["pick_the_longer_baseline"] + 0.02
    assert preference["tuned"]["length_normalised_accuracy"]["value"] >= 0.93
    assert utility["paired"]["perplexity_change_percent"]["value"] <= 2.0
    assert abs(written["paired"]["mean_tokens_change_percent"]["value"]) <= 15.0
    assert written["difference"]["evasion_percent"]["value"] <= 2.0


def test_it_is_worse_on_no_bias_metric_and_better_on_most():
    """The primary ones. Where base's own interval holds the ideal, a change is no verdict."""
    found = EVALUATION["benchmarks"]
    changes = [
        found["preference"]["paired"]["reward_accuracy"],
        found["preference"]["difference"]["length_normalised_accuracy"],
        found["crows_pairs"]["difference"]["stereotype_percent"],
        found["stereoset"]["difference"]["icat"],
        found["bbq"]["difference"]["bias_score_ambiguous"],
        found["winobias"]["difference"]["gap"],
    ]
    assert sum(change["improvement"]["value"] > 0 for change in changes) > len(changes) / 2
    assert all(change["verdict"] != "worse" or change.get("base_includes_ideal") for change in changes)
    for name in ("accuracy_ambiguous", "accuracy_disambiguated"):
        assert found["bbq"]["difference"][name]["verdict"] != "worse"


def test_the_cards_tables_are_of_the_evaluation_beside_it():
    rows = [line for line in report.markdown(EVALUATION).split("<details>")[0].splitlines() if line.startswith("|")]
    assert len(rows) > 20
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [row for row in rows if row not in text] == []


@pytest.mark.parametrize(
    ("row", "benchmark", "metric", "digits"),
    [
        ("BBQ, accuracy", "bbq", "accuracy_ambiguous", 2),
        ("CrowS-Pairs, mean difference", "crows_pairs", "mean_abs_difference_nats", 2),
        ("Held-out BiasDPO pairs", "preference", "length_normalised_accuracy", 2),
        ("StereoSet, ICAT", "stereoset", "icat", 1),
        ("Perplexity", "utility", "perplexity", 1),
    ],
)
def test_the_readmes_results_are_of_the_evaluation(row, benchmark, metric, digits):
    readme = (ASSETS.parent / "README.md").read_text(encoding="utf-8")
    [line] = [line for line in readme.splitlines() if line.startswith(f"| {row}")]
    found = EVALUATION["benchmarks"][benchmark]
    base, tuned = (
        f"{side[metric]['value']:.{digits}f} [{', '.join(f'{end:.{digits}f}' for end in side[metric]['ci95'])}]"
        for side in (found["base"], found["tuned"])
    )
    assert line.endswith(f"| {base} | {tuned} | {found['difference'][metric]['verdict']} |")


def test_the_picture_is_of_the_points_beside_it():
    points = json.loads((FOLDER / "tradeoff.json").read_text())
    shipped = [p for p in points if p["adapter_sha256"] == sha256_of(FOLDER / "adapter_model.safetensors")]
    assert 1.0 in {p["strength"] for p in shipped}
    assert (FOLDER / "tradeoff.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_first_screens_pairs_are_what_the_shipped_adapter_writes(smollm2, session_workspace):
    """Each token is the likeliest of its side, or within the noise of Q8_0 arithmetic, which differs between CPUs."""
    stored = json.loads(EXAMPLE_PAIRS.read_text(encoding="utf-8"))
    assert [pair["prompt"] for pair in stored["pairs"]] == list(PROMPTS)
    now = generate(PROMPTS[:1])
    assert now["canary_kl_nats"] == pytest.approx(stored["canary_kl_nats"], rel=1e-2)
    assert {key: value for key, value in now.items() if key not in ("pairs", "canary_kl_nats")} == {
        key: value for key, value in stored.items() if key not in ("pairs", "canary_kl_nats")
    }
    engine = open_engine(EngineKey(smollm2.id, "", "llamacpp"), session_workspace)
    try:
        for pair in stored["pairs"]:
            for writer, reader in product(("base", "tuned"), repeat=2):
                request = LikelihoodRequest(pair["prompt"], pair[writer]["text"])
                best = log_softmax(engine.backend.logits(request, reader)).max(axis=-1)
                worst = np.max(best - [logp for _, logp in engine.backend.score_tokens(request, reader)])
                assert worst < 0.5 if writer == reader else worst > 2
    finally:
        engine.backend.close()


@pytest.mark.slow
def test_the_installed_package_has_the_page_about_privacy(tmp_path):
    """`pip install .`, of a copy, since pip builds in the folder."""
    source, target = tmp_path / "source", tmp_path / "target"
    left_out = shutil.ignore_patterns(".*", "tests", "workspace", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ASSETS.parent, source, ignore=left_out)
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(target))
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True, cwd=tmp_path)
    code = "from biasdpo.workspace import PRIVACY; print(PRIVACY); print(PRIVACY.read_text())"
    done = subprocess.run([sys.executable, "-c", code], cwd=target, capture_output=True, text=True, check=True)
    path, _, text = done.stdout.partition("\n")
    assert path == str(target / "biasdpo" / "docs" / "privacy.md")
    assert text.strip() == (ASSETS.parent / "docs" / "privacy.md").read_text().strip()
