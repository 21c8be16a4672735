"""The command line as a subprocess: what is printed where, exit status, one line for bad input. (train: test_runs; export:
test_cli_export.)"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from biasdpo.__main__ import build_parser
from tests.lora_factory import write_lora

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: object, workspace: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("SPACE_ID", "BIASDPO_WORKSPACE")}
    command = [sys.executable, "-m", "biasdpo", *map(str, arguments), "--workspace", str(workspace)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=kept | {"HF_HUB_OFFLINE": "1"} | environment
    )


def test_models(tmp_path):
    rows = [json.loads(line) for line in run("models", "--json", workspace=tmp_path).stdout.splitlines()]
    assert [row["id"] for row in rows] == ["smollm2", "phi-2"]
    assert rows[0]["present"]
    assert rows[0]["license"] == "Apache-2.0"
    assert rows[1]["get"] == ("" if rows[1]["present"] else "hf download microsoft/phi-2")
    assert rows[1]["memory_gb"]["transformers"] > 5
    assert "smollm2: SmolLM2-135M-Instruct, Apache-2.0" in run("models", workspace=tmp_path).stdout


def test_compare_json(tmp_path):
    adapter = write_lora(tmp_path / "random")
    arguments = ("compare", "--prompt", "Why?", "--model", "smollm2", "--adapter", adapter, "--max-new-tokens", 12)
    done = run(*arguments, "--temperature", 0, "--seed", 0, "--json", workspace=tmp_path / "w")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["prompt"], row["model"], row["adapter"], row["backend"]) == ("Why?", "smollm2", "random", "llamacpp")
    assert (row["seed"], row["strength"]) == (0, 1.0)
    for side in ("base", "tuned"):
        assert set(row[side]) == {"text", "tokens", "finish_reason", "seconds_to_first_token", "tokens_per_second"}
        assert row[side]["text"]
        assert row[side]["finish_reason"] in ("limit", "end_of_text")
    assert row["base"]["text"] != row["tuned"]["text"]
    assert row["canary_kl_nats"] > 0
    at_zero = json.loads(run(*arguments, "--temperature", 0, "--strength", 0, "--json", workspace=tmp_path / "w").stdout)
    assert at_zero["tuned"]["text"] == at_zero["base"]["text"] == row["base"]["text"]


def test_compare_base_only(tmp_path):
    done = run("compare", "--prompt", "Hi", "--model", "smollm2", "--adapter", "none", "--max-new-tokens", 5, workspace=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("--- base (")
    assert "tuned" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("compare", "--prompt", " "), "prompt is empty"),
        (("compare", "--prompt", "word " * 20_000), r"20,\d{3} tokens long .* 4,096"),
        (("compare", "--prompt", "Hi", "--model", "gpt9"), "Unknown model 'gpt9': choose one of smollm2, phi-2"),
        (
            ("compare", "--prompt", "Hi", "--model", "phi-2"),
            "Phi-2 is not on this machine: get it with `hf download microsoft/phi-2`",
        ),
        (("compare", "--prompt", "Hi", "--model", "/no/such.gguf"), r"/no/such\.gguf"),
        (("compare", "--prompt", "Hi", "--adapter", "nope"), "Unknown adapter 'nope': choose one of .*none"),
        (("compare", "--prompt", "Hi", "--temperature", "9"), r"temperature must be a number from 0\.0 to 2\.0: got 9\.0"),
        (
            ("compare", "--prompt", "Hi", "--adapter", "none", "--strength", "2"),
            r"strength must be a number from 0\.0 to 1\.5: got 2",
        ),
        (("compare", "--prompt", "Hi", "--seed", "-1"), "seed must be a whole number from 0"),
        (("compare", "--prompt", "Hi", "--max-new-tokens", "0"), "max_new_tokens must be a whole number from 1"),
        (("compare", "--prompt", "Hi", "--backend", "gpu"), "Unknown backend 'gpu'"),
        (("evaluate", "--benchmark", "vibes", "--out", "x.json"), "Unknown benchmark 'vibes': choose of preference, crows_pairs"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, words, tmp_path):
    done = run(*arguments, workspace=tmp_path)
    lines = [line for line in done.stderr.splitlines() if line.startswith("biasdpo: ")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert re.search(words, lines[0])
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_phi_2_that_is_not_here_is_no_matter_of_auto(tmp_path):
    done = run("compare", "--prompt", "Hi", "--adapter", "none", "--max-new-tokens", 2, workspace=tmp_path)
    assert done.returncode == 0
    assert "hf download microsoft/phi-2" in done.stderr


def test_a_workspace_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    done = run("models", workspace=tmp_path / "file" / "w")
    assert done.returncode == 2
    assert "Can't write to the workspace" in done.stderr


def test_readme_lists_every_command_and_option():
    readme = (ROOT / "README.md").read_text(encoding="utf-8").split("## Command line", 1)[1].split("\n## ", 1)[0]
    actions = next(a for a in build_parser()._actions if a.choices)
    for name, command in actions.choices.items():
        assert f"python -m biasdpo {name}" in readme
        section = readme.split(f"python -m biasdpo {name}", 1)[1].split("python -m biasdpo", 1)[0]
        shown = [action for action in command._actions if action.help != argparse.SUPPRESS]
        for option in (name for action in shown for name in action.option_strings):
            if option not in ("-h", "--help", "--workspace", "--json", "--seed") or (option == "--seed" and name == "compare"):
                assert option in section, f"README's {name} lacks {option}"
