"""Training runs as a user has them: the command line, from the data to the adapter."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from biasdpo import backup, models
from biasdpo.data import splits
from biasdpo.jobs.job import JobFolder, read_job
from tests.commands import run
from tests.run_line import CommandLine


def test_a_run_from_the_data_to_the_adapter(command_line: CommandLine) -> None:
    result = command_line.train("first", "learning_rate=0.01", "max_steps=12", "eval_every=6", "probe_every=8")
    assert result.returncode == 0, result.stderr
    shown = json.loads(result.stdout)
    assert (shown["state"], shown["step"], shown["total_steps"], shown["error"]) == ("finished", 12, 12, "")

    # The folder holds what it should, and the data's hash leads back to the rows.
    folder = JobFolder(Path(shown["folder"]))
    assert hashlib.sha256(folder.snapshot.read_bytes()).hexdigest() == shown["dataset_sha256"]
    pairs = splits.load_file(folder.snapshot)
    parts = splits.split(pairs, 0.1)
    assert len(pairs) == 40
    lines = folder.read_metrics()
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "eval_loss" in line] == [6, 12]
    assert {"rewards/margins", "rewards/accuracies", "logps/chosen"} <= lines[0].keys()
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # policy = reference: -log(1/2)
    assert folder.log.stat().st_size > 0

    # Nothing in the metrics depends on the clock; how fast it was stands apart.
    assert not [key for line in lines for key in line if "runtime" in key or "per_second" in key]
    assert all(line["tokens_per_second"] > 0 for line in folder.read_speed())
    assert (shown["device"], shown["best_step"], shown["best_accuracy"]) == ("cpu", 12, 1.0)
    assert shown["tokens_per_second"] == folder.read_speed()[-1]["tokens_per_second"]

    # The probe: three prompts before the first step, every 8 and at the last, beside the base, which stays what it was.
    probes = folder.read_probes()
    assert [line["step"] for line in probes] == [0, 0, 0, 8, 8, 8, 12, 12, 12]
    assert [line["category"] for line in probes[:3]] == ["gender", "race", "religion"]
    assert (
        [line["base"] for line in probes[6:]] == [line["base"] for line in probes[:3]] == [line["tuned"] for line in probes[:3]]
    )

    # The adapter: weights and what they are, no pickle; its path of this machine is nowhere but in the model's id.
    assert sorted(p.name for p in folder.adapter.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "curves.png",
        "provenance.json",
    ]
    config = json.loads((folder.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "model"
    tensors = load_file(folder.adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float16)}
    assert any(np.abs(tensor).max() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    provenance = json.loads((folder.adapter / "provenance.json").read_text())
    weights = (folder.adapter / "adapter_model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == provenance["adapter_sha256"]
    assert [*backup.verify(command_line.workspace.root)] == []
    assert provenance["rows"] == {"train": len(parts.train), "seen": 24, "held_out": len(parts.held_out)}  # 12 steps of 2
    assert provenance["dataset_files"] == ["pairs.jsonl"]
    assert provenance["base_sha256"] == hashlib.sha256((command_line.model / "model.safetensors").read_bytes()).hexdigest()
    assert provenance["command"].startswith("python -m biasdpo train --model model --dataset pairs.jsonl --run-id first --set")

    assert provenance["kept"] == {
        "step": 12,
        "of": 12,
        "reason": "step 12, the last, held-out reward accuracy 1.00, the best of 2 evaluations",
    }
    assert provenance["confounds"]["chosen_longer_share"] == provenance["train_longer_baseline"] == 0.5
    for text in ((folder.adapter / name).read_text() for name in ("README.md", "adapter_config.json")):
        assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/", text)

    # It learned: on held-out pairs, rewards say so, and the model itself prefers what it did not before.
    scores = provenance["metrics"]["held_out"]
    assert scores["pairs"] == len(parts.held_out) > 0
    assert scores["reward_accuracy"] == 1.0
    assert scores["reward_margin_nats"] > 0.5
    assert scores["length_normalised_accuracy_tuned"] >= scores["length_normalised_accuracy_base"]
    assert scores["kl_base_to_tuned_nats_per_token"] > 0

    # The other commands see it too.
    assert json.loads(command_line("runs", "show", "first", "--json").stdout) == shown
    assert [json.loads(line)["id"] for line in command_line("runs", "list", "--json").stdout.splitlines()] == ["first"]
    assert models.from_run(command_line.workspace, "first").dataset_sha256 == shown["dataset_sha256"]
    again = command_line.train("first")
    assert again.returncode == 2
    assert "already exists" in again.stderr
    assert "nothing to stop" in command_line("runs", "stop", "first").stderr


def test_the_same_run_twice_gives_the_same_adapter(command_line: CommandLine) -> None:
    """Here, and in a process of its own."""
    here = command_line.train_here("here", learning_rate=0.01, beta=0.5)
    launched = json.loads(command_line.train("launched", "learning_rate=0.01").stdout)["adapter"]
    adapters = [(folder / "adapter_model.safetensors").read_bytes() for folder in (here.adapter, Path(launched))]
    assert adapters[0] == adapters[1]


def test_strength_is_baked_into_the_adapter(command_line: CommandLine) -> None:
    tensors = []
    for run_id, strength in (("whole", 1.0), ("half", 0.5)):
        folder = command_line.train_here(run_id, learning_rate=0.01, strength=strength, adapter_dtype="float32")
        tensors.append(load_file(folder.adapter / "adapter_model.safetensors"))
    whole, half = tensors
    for name in whole:
        np.testing.assert_array_equal(half[name], whole[name] * (0.5 if "lora_B" in name else 1.0))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--run-id", "x", "--dataset", "ROWS"), "No model to train"),
        (("--run-id", "x", "--model", "MODEL"), "No data to train on"),
        (("--run-id", "x", "--model", "gpt-7", "--dataset", "ROWS"), "Unknown model 'gpt-7': choose one of smollm2"),
        (("--run-id", "x", "--model", "MODEL", "--dataset", "none.jsonl"), "No dataset file"),
        (("--run-id", "../x", "--model", "MODEL", "--dataset", "ROWS"), "Run ids have 1 to 64 letters"),
        (("--run-id", "x", "--model", "MODEL", "--dataset", "ROWS", "--set", "beta=0"), "beta must be a number"),
        (("--run-id", "x", "--model", "MODEL", "--dataset", "ROWS", "--num-processes", "0"), "num_processes must be"),
        (("--run-id", "x", "--resume"), "No run 'x'"),
        (("--model", "MODEL", "--dataset", "ROWS"), "A run needs a name"),
        (
            ("--run-id", "x", "--model", "MODEL", "--dataset", "ROWS", "--set", "max_steps=1"),
            "The run's only step is warm-up (32 pairs, warmup_share 0.1), so the learning rate never reaches 3e-05 but stays 0",
        ),
        (("--run-id", "x", "--model", "MODEL", "--dataset", "ROWS", "--set", "warmup_share=1"), "All 4 steps are warm-up"),
        (("--run-id", "x", "--model", "MODEL", "--dataset", "ROWS", "--set", "dataset_weights=[1, 2]"), "one weight per dataset"),
    ],
)
def test_wrong_use_is_one_line_and_makes_no_run(command_line: CommandLine, arguments: tuple[str, ...], reason: str) -> None:
    names = {"ROWS": str(command_line.rows), "MODEL": str(command_line.model)}
    result = run("train", *(names.get(part, part) for part in arguments), "--workspace", command_line.workspace.root)
    assert reason in result.error
    assert len(result.stderr.splitlines()) == 1
    assert list(command_line.workspace.runs.glob("*")) == []


def test_over_long_rows_are_counted_and_said(command_line: CommandLine) -> None:
    # "Is a10 more b10 than c10?" has 25 bytes, "Neither of the 10." and "They are worse 10!" 18, and an end: 44 tokens, as
    # numbers 10 to 39 have; the ten with one digit less have 40.
    folder = command_line.train_here("long", max_length=43, max_steps=2, held_out_share=0.0)
    status = folder.read_status()
    assert (status.state, status.error) == ("finished", "")
    assert "max_length 43: 0 training pairs dropped (prompt too long), 30 with a completion cut" in status.notes
    assert read_job(folder).to_json()["metrics"] == {"held_out": None}


def test_pairs_that_teach_nothing_are_dropped_and_a_zero_adapter_is_said(command_line: CommandLine) -> None:
    rows = command_line.rows.read_text().splitlines()
    same = [("a" * 60 + "b", "a" * 60 + "c"), ("caf\u00e9", "cafe\u0301"), ("a b", "a\u200b  b")]
    rows += [
        json.dumps({"prompt": f"Which of {i} is it?", "chosen": one, "rejected": other}) for i, (one, other) in enumerate(same)
    ]
    path = command_line.workspace.root.parent / "more.jsonl"
    path.write_text("\n".join(rows))
    quiet = {"datasets": (str(path),), "max_length": 70, "max_steps": 2, "held_out_share": 0.0, "learning_rate": 1e-9}
    status = command_line.train_here("equal", **quiet).read_status()
    assert (status.state, status.error) == ("finished", "")
    assert "3 training pairs dropped: within max_length, both completions are the same" in status.notes
    assert any(note.startswith("The adapter changes nothing (all of lora_B is 0)") for note in status.notes)
    path.write_text("\n".join(rows[-3:]))
    failed = command_line.train_here("nothing", **quiet | {"warmup_share": 0.0}).read_status()
    assert failed.state == "failed"
    assert "0 dropped as too long, 3 with equal completions within max_length 70" in failed.error


@pytest.mark.parametrize("by", ["--model", "--set", "--config"])
def test_a_model_named_by_a_path_is_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    from biasdpo.cli import train_config

    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("run.toml").write_text('model = "mine"\ndatasets = ["pairs.jsonl"]\n')
    file = Path("run.toml") if by == "--config" else None
    options = {"datasets": ("pairs.jsonl",)} | ({"model": "mine"} if by == "--model" else {})
    config = train_config(file, options, ["model=./mine"] if by == "--set" else [])
    assert (config.model, config.datasets) == (str(tmp_path / "mine"), (str(tmp_path / "pairs.jsonl"),))
    for name in ("smollm2", "owner/name"):
        assert train_config(None, {"model": name}, []).model == name
