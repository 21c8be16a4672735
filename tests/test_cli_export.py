"""The command `export`: what it writes and prints, exit status, one line for bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from biasdpo.workspace import sha256_of
from tests.commands import run
from tests.gguf_files import metadata_of


def test_an_adapter_becomes_a_lora_gguf_that_is_proven(tiny_llama_gguf, tiny_llama_adapter, tmp_path):
    out = tmp_path / "out" / "lora.gguf"
    arguments = ("export", "--adapter", tiny_llama_adapter, "--model", tiny_llama_gguf, "--format", "lora", "--out", out)
    done = run(*arguments, "--threads", 1, "--json", "--workspace", tmp_path / "w")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["out"], row["bytes"], row["sha256"]) == (str(out), out.stat().st_size, sha256_of(out))
    assert (row["adapter"], row["model"], row["format"]) == (tiny_llama_adapter.name, str(tiny_llama_gguf), "lora")
    assert row["proof"]["passed"] is True
    assert metadata_of(out)["adapter.lora.alpha"] == 8.0
    assert json.loads((tmp_path / "out" / "lora.gguf.json").read_text()) == {**row, "out": "lora.gguf"}
    beside = ["lora.gguf", "lora.gguf.Modelfile", "lora.gguf.json", "lora.gguf.md"]
    assert sorted(path.name for path in out.parent.iterdir()) == beside


def test_without_a_proof_the_file_is_not_verified(tiny_llama_gguf, tiny_llama_adapter, tmp_path):
    out = tmp_path / "lora.gguf"
    arguments = ("export", "--adapter", tiny_llama_adapter, "--model", tiny_llama_gguf, "--format", "lora", "--out", out)
    done = run(*arguments, "--proof", "none", "--workspace", tmp_path / "w")
    assert done.stdout.splitlines()[1] == "Not verified: no verification was requested"
    assert json.loads((tmp_path / "lora.gguf.json").read_text())["proof"]["verdict"] == "not verified"


def test_a_model_alone_becomes_a_gguf(tiny_phi, tmp_path):
    out = tmp_path / "phi.gguf"
    arguments = ("export", "--adapter", "none", "--model", tiny_phi, "--format", "merged", "--quantization", "F32", "--out", out)
    done = run(*arguments, "--threads", 1, "--workspace", tmp_path / "w")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith(f"{out}: ")
    assert f"F32 GGUF of {tiny_phi.name}" in first
    assert second.startswith("Equal to the original, up to rounding: mean KL ")
    assert metadata_of(out)["general.architecture"] == "phi2"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "out is missing: give it with --out"),
        (("--run", "nope", "--format", "lora", "--out", "x.gguf"), "Run 'nope' has no adapter"),
        (("--adapter", "smollm2-biasdpo", "--model", "phi-2", "--format", "lora", "--out", "x.gguf"), "Phi-2 is not on this"),
        (("--adapter", "smollm2-biasdpo", "--format", "lora", "--out", "/proc/none/x.gguf"), "Can't write to /proc/none"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, words, tmp_path):
    done = run("export", *arguments, BIASDPO_WORKSPACE=str(tmp_path))
    assert re.search(words, done.error)
    assert done.stdout == ""
    assert not Path("x.gguf").exists()
