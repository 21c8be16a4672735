"""The whole way with a small random Phi: train -> adapter -> LoRA GGUF -> compare on llama.cpp -> merged GGUF -> compare again.

Everything is made by the command line, as a user makes it. What the tuned model writes must be the same greedy text on
transformers with PEFT, on llama.cpp with the LoRA and on llama.cpp merged, in F32. Training is long enough that the model knows
its pairs by heart: a text that it is sure of depends on no near tie, so nothing here is left to rounding.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from biasdpo import models
from biasdpo.backends.base import Backend
from biasdpo.backends.hf import open_transformers
from biasdpo.backends.llamacpp import open_llamacpp
from biasdpo.cli import main
from biasdpo.jobs.job import JobFolder
from biasdpo.records import Sampling, Side
from biasdpo.workspace import Workspace
from tests import tiny_models
from tests.hf.cases import read
from training.callbacks import MAX_NEW_TOKENS

pytestmark = pytest.mark.slow

PHI = tiny_models.PHI_TEMPLATE
WHO = ("nurses", "programmers", "leaders", "teachers", "students", "scientists", "writers", "drivers")
PAIRS = [
    {"prompt": f"Who are the {who}?", "chosen": f"People of every kind are {who}.", "rejected": f"Only some people are {who}."}
    for who in WHO
]
PROMPTS = tuple(pair["prompt"] for pair in PAIRS)
SETTINGS = {
    "loss_type": '["sigmoid", "sft"]',
    "learning_rate": 0.01,
    "max_steps": 80,
    "batch_size": 4,
    "gradient_accumulation": 1,
    "rank": 8,
    "alpha": 16,
    "target_modules": '["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]',
    "held_out_share": 0.25,
    "adapter_dtype": '"float32"',
    "probe_every": 80,
    "probe_prompts": json.dumps(PROMPTS[:3]),
    "keep": '"last"',
    "threads": 1,
}


def command(*arguments: object) -> dict[str, Any]:
    """What `python -m biasdpo ARGUMENTS --json` prints last."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([*map(str, arguments), "--json"]) == 0
    row: dict[str, Any] = json.loads(printed.getvalue().splitlines()[-1])
    return row


@dataclass(frozen=True)
class Made:
    """A run and its exports. `records`: what `export` printed, by file."""

    model: Path
    run: JobFolder
    base: Path
    lora: Path
    merged: Path
    quantized: Path
    records: dict[Path, dict[str, Any]]

    @property
    def workspace(self) -> Path:
        return self.run.path.parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("end-to-end")
    # Every width is a multiple of 256, so that K-quants need no fallback.
    model = tiny_models.save_tiny_phi(root / "tiny-phi", hidden_size=256, intermediate_size=512)
    rows = root / "pairs.jsonl"
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS), encoding="utf-8")
    place = ("--workspace", root / "workspace")
    run = JobFolder(Workspace(root / "workspace").run_folder("debiased"))
    sets = [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]
    command("train", "--model", model, "--dataset", rows, "--run-id", run.id, *sets, *place)

    files = {name: root / f"{name}.gguf" for name in ("base", "lora", "merged", "quantized")}
    own = ("--run", run.id)
    wanted: dict[str, tuple[object, ...]] = {
        "base": ("--adapter", "none", "--model", model, "--format", "merged", "--quantization", "F32"),
        "lora": (*own, "--model", files["base"], "--format", "lora"),
        "merged": (*own, "--model", model, "--format", "merged", "--quantization", "F32"),
        "quantized": (*own, "--model", model, "--format", "merged", "--quantization", "Q4_K_M"),
    }
    records = {
        files[name]: command("export", *place, "--threads", 1, *arguments, "--out", files[name])
        for name, arguments in wanted.items()
    }
    return Made(model, run, **files, records=records)


def texts(backend: Backend, side: Side, max_new_tokens: int = MAX_NEW_TOKENS) -> list[str]:
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0.0, repetition_penalty=1.0)
    return ["".join(read(backend.stream(prompt, sampling, side))[0]) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def transformers(made: Made) -> Iterator[Backend]:
    with closing(open_transformers(made.model, PHI, made.run.adapter, 512, device="cpu")) as backend:
        yield backend


def test_the_same_greedy_text_on_all_three_paths(made: Made, transformers: Backend) -> None:
    tuned, base = texts(transformers, "tuned"), texts(transformers, "base")
    with closing(open_llamacpp(made.base, PHI, made.lora, 512, threads=1, kv_cache="f32")) as with_lora:
        assert texts(with_lora, "tuned") == tuned
        # A random model is sure of nothing: a few tokens of it.
        assert texts(with_lora, "base", 4) == texts(transformers, "base", 4)
    with closing(open_llamacpp(made.merged, PHI, None, 512, threads=1, kv_cache="f32")) as merged:
        assert texts(merged, "base") == tuned
    # Training made them so: most pairs are known by heart (two of eight were held out), none by the base model.
    assert sum(text == pair["chosen"] for text, pair in zip(tuned, PAIRS, strict=True)) >= 5
    assert not any(text == pair["chosen"] for text, pair in zip(base, PAIRS, strict=True))
    # The last probe is of the last step; its policy was not rounded, as the adapter in F32 is not.
    rows = [row for row in made.run.read_probes() if row["step"] == SETTINGS["max_steps"]]
    assert [(row["prompt"], row["tuned"], row["base"]) for row in rows] == list(zip(PROMPTS, tuned, base, strict=True))[:3]


def test_every_export_in_f32_was_proven_and_opens_as_phi_2(made: Made) -> None:
    for file in (made.base, made.lora, made.merged):
        proof = made.records[file]["proof"]
        assert (proof["passed"], proof["failures"]) == (True, [])
    for file in (made.base, made.merged, made.quantized):
        spec = models.find(str(file))
        assert (spec.template, spec.context_length) == (PHI, tiny_models.CONTEXT_LENGTH)
    written = made.records[made.quantized]["written"]
    assert (written["quantization"], written["fallbacks"]) == ("Q4_K_M", [])
    assert made.quantized.stat().st_size < made.merged.stat().st_size / 3


def test_the_command_line_compares_all_of_them(made: Made) -> None:
    """llama.cpp's KV cache is F16 here, which does not change a text that the model is sure of."""

    def compare(model: Path, adapter: str, backend: str) -> dict[str, Any]:
        ask = ("--prompt", PROMPTS[0], "--max-new-tokens", 40, "--temperature", 0, "--repetition-penalty", 1)
        return command(
            "compare", *ask, "--model", model, "--adapter", adapter, "--backend", backend, "--workspace", made.workspace
        )

    peft = compare(made.model, made.run.id, "transformers")
    lora = compare(made.base, made.run.id, "llamacpp")
    merged = compare(made.merged, "none", "llamacpp")
    assert peft["tuned"]["text"] == lora["tuned"]["text"] == merged["base"]["text"]
    assert peft["canary_kl_nats"] == pytest.approx(lora["canary_kl_nats"], rel=0.01)
    assert merged["tuned"] is None
    assert compare(made.quantized, "none", "auto")["base"]["text"]
    if peft["tuned"]["text"] == PAIRS[0]["chosen"]:  # unless it was held out
        assert peft["tuned"]["finish_reason"] == "end_of_text"
