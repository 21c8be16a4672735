"""The command line: what is printed where, exit status, one line for bad input, and docs/cli.md. (train: test_runs.)"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from biasdpo import cli
from biasdpo.config import BENCHMARKS
from scripts import cli_docs
from tests.commands import run
from tests.lora_factory import write_lora

ROOT = Path(__file__).resolve().parent.parent

# The options that scripts rely on: a removed one is an error that names its replacement.
OPTIONS = {
    "models": "",
    "compare": "--prompt --model --adapter --backend --max-new-tokens --temperature --top-p --top-k --repetition-penalty "
    "--system --seed --strength",
    "lens": "--prompts --model --arms --max-new-tokens --system --backend --max-cells",
    "dataset": "",
    "dataset stats": "--data-dir",
    "dataset validate": "",
    "dataset import": "--name --map --dry-run",
    "dataset export": "",
    "dataset retract": "",
    "dataset erase": "--annotator --browser --yes",
    "train": "--model --dataset --run-id --config --set --resume --num-processes --estimate",
    "jobs": "--kind --lines",
    "runs": "--lines",
    "export": "--run --adapter --model --format --quantization --source --pairs --threads --out",
    "evaluate": "--model --adapter --backend --benchmark --dataset --data-dir --limit --seed --strength --strengths --samples "
    "--max-new-tokens --toxicity-scorer --out",
}


@pytest.mark.parametrize("command", OPTIONS)
def test_every_command_keeps_its_options(command):
    found = typer.main.get_command(cli.app)
    for name in command.split():
        found = found.commands[name]
    names = {name for parameter in found.params for name in parameter.opts}
    assert names >= {"--workspace", "--json", *OPTIONS[command].split()}
    assert run(*command.split(), "--help").stdout.startswith(f"Usage: python -m biasdpo {command} [OPTIONS]")


def test_help_as_a_process_is_quick_and_options_may_stand_before_an_action(tmp_path):
    started = time.process_time(), time.monotonic()
    done = subprocess.run([sys.executable, "-m", "biasdpo", "-h"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "evaluate   Score base and tuned on benchmarks" in done.stdout
    assert time.monotonic() - started[1] < 5  # a loaded machine; what it may not import: test_architecture
    before = run("dataset", "--json", "--workspace", tmp_path / "w", "stats")
    assert json.loads(before.stdout)["rows"] == 0
    assert (tmp_path / "w").is_dir()
    assert run("runs", "--workspace", tmp_path / "w").stderr == "No runs yet: start one with `python -m biasdpo train`\n"


def test_models(tmp_path):
    rows = [json.loads(line) for line in run("models", "--json", "--workspace", tmp_path).stdout.splitlines()]
    assert [row["id"] for row in rows] == ["smollm2", "phi-2"]
    assert rows[0]["present"]
    assert rows[0]["license"] == "Apache-2.0"
    assert rows[1]["get"] == ("" if rows[1]["present"] else "hf download microsoft/phi-2")
    assert rows[1]["memory_gb"]["transformers"] > 5
    assert "smollm2: SmolLM2-135M-Instruct, Apache-2.0" in run("models", "--workspace", tmp_path).stdout


def test_models_shows_what_is_damaged_and_all_the_rest(tmp_path, tiny_llama):
    adapter = tmp_path / "runs" / "torn" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").touch()
    done = run("models", "--json", "--workspace", tmp_path)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["id"], bool(row["problem"])) for row in rows] == [("smollm2", False), ("phi-2", False), ("torn", True)]
    assert "has no adapter_config.json" in rows[-1]["problem"]
    assert (done.returncode, done.stderr) == (0, "")
    assert "\nadapter torn: can't be used: " in run("models", "--workspace", tmp_path).stdout
    noise = tmp_path / "noise.gguf"
    noise.write_bytes(b"GGUF")
    done = run("models", noise, tiny_llama, "--json", "--workspace", tmp_path)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["id"], bool(row["problem"])) for row in rows] == [(str(noise), True), (str(tiny_llama), False)]
    assert done.error == f"biasdpo: {rows[0]['problem']}"


def test_compare_as_a_process(tmp_path):
    adapter = write_lora(tmp_path / "random")
    given = ("--prompt", "Why?", "--model", "smollm2", "--adapter", str(adapter), "--max-new-tokens", "12", "--temperature", "0")
    arguments = ("compare", *given, "--json", "--workspace", str(tmp_path / "w"))
    command = [sys.executable, "-m", "biasdpo", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    row = json.loads(done.stdout)
    assert (row["prompt"], row["model"], row["adapter"], row["backend"]) == ("Why?", "smollm2", "random", "llamacpp")
    assert (row["seed"], row["strength"]) == (0, 1.0)
    for side in ("base", "tuned"):
        assert set(row[side]) == {"text", "tokens", "finish_reason", "seconds_to_first_token", "tokens_per_second"}
        assert row[side]["text"]
        assert row[side]["finish_reason"] in ("limit", "end_of_text")
    assert row["base"]["text"] != row["tuned"]["text"]
    assert row["canary_kl_nats"] > 0
    at_zero = json.loads(run(*arguments, "--strength", 0).stdout)
    assert at_zero["tuned"]["text"] == at_zero["base"]["text"] == row["base"]["text"]


def test_compare_without_an_adapter_on_whatever_model_is_here(tmp_path):
    done = run("compare", "--prompt", "Hi", "--adapter", "none", "--max-new-tokens", 2, "--workspace", tmp_path)
    assert done.returncode == 0
    assert "hf download microsoft/phi-2" in done.stderr  # auto says why it was not taken
    assert done.stdout.startswith("--- base (")
    assert "tuned" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("compare", "--prompt", " "), "prompt is empty"),
        (("compare", "--prompt", "word " * 20_000), r"20,\d{3} tokens long .* 4,096"),
        (("compare", "--prompt", "Hi", "--model", "gpt9"), "Unknown model 'gpt9': choose one of smollm2, phi-2"),
        (("compare", "--prompt", "Hi", "--model", "phi-2"), "not on this machine: get it with `hf download microsoft/phi-2`"),
        (("compare", "--prompt", "Hi", "--model", "/no/such.gguf"), r"/no/such\.gguf"),
        (("compare", "--prompt", "Hi", "--adapter", "nope"), "Unknown adapter 'nope': choose one of .*none"),
        (("compare", "--prompt", "Hi", "--temperature", "9"), r"temperature must be a number from 0\.0 to 2\.0: got 9\.0"),
        (("compare", "--prompt", "Hi", "--temperature", "hot"), "Invalid value for '--temperature'.*compare --help"),
        (("compare", "--prompt", "Hi", "--adapter", "none", "--strength", "2"), r"strength must be .* from 0\.0 to 1\.5: got 2"),
        (("compare", "--prompt", "Hi", "--seed", "-1"), "seed must be a whole number from 0"),
        (("compare", "--prompt", "Hi", "--max-new-tokens", "0"), "max_new_tokens must be a whole number from 1"),
        (("compare", "--prompt", "Hi", "--backend", "gpu"), "Unknown backend 'gpu'"),
        (("compare",), "Missing option '--prompt': see python -m biasdpo compare --help"),
        (("evaluate", "--benchmark", "vibes", "--out", "x.json"), "benchmarks must be one of preference, .*: got 'vibes'"),
        (("evaluate", "--out", "x.json", "--data-dir", "nowhere"), "No folder .*nowhere: name with --data-dir"),
        (("evaluate", "--benchmark", "bbq", "--out", "x.json", "--strengths", "0,much"), "strengths must be a number .*'much'"),
        (("train", "--run-id", "a", "--beta", "-1"), "beta must be a number from 0.0001 to 1000: got -1.0"),
        (("train", "--run-id", "a", "--set", "betta=1"), "Unknown setting 'betta': choose one of model, datasets"),
        (("train", "--run-id", "a", "--resume", "--set", "beta=1", "--rank", "2"), "--resume uses .* got --rank, --set, too"),
        (("train", "--run-id", "a", "--bogus"), "No such option: --bogus: see python -m biasdpo train --help"),
        (("runs", "show", "none", "--json"), "No run 'none'"),
        (("bogus",), "No such command 'bogus'"),
        ((), "Missing command"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, words, tmp_path):
    done = run(*arguments, BIASDPO_WORKSPACE=str(tmp_path))
    assert re.search(words, done.error)
    assert done.stdout == ""


def test_a_workspace_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    assert "Can't write to the workspace" in run("models", "--workspace", tmp_path / "file" / "w").error


def test_an_interrupt_is_one_line_and_status_130(monkeypatch, tmp_path):
    from biasdpo import models

    monkeypatch.setattr(models, "catalog", lambda: signal.raise_signal(signal.SIGINT))
    done = run("models", "--workspace", tmp_path)
    assert (done.returncode, done.stderr) == (130, "biasdpo: interrupted\n")


def test_docs_are_up_to_date():
    """After a change of a command or a setting: python -m scripts.cli_docs."""
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == cli_docs.text()


def test_every_benchmark_that_the_config_names_exists():
    from biasdpo import benchmarks
    from biasdpo.config import ExportConfig
    from biasdpo.gguf.quantize import COSTS

    assert set(BENCHMARKS) == set(benchmarks.NAMES)
    assert ExportConfig.settings()["quantization"].choices == tuple(COSTS)
