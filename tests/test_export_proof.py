"""The proof of an export: it passes what equals its model, fails what does not, and measures what can't be equal."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import llama_cpp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from biasdpo import models
from biasdpo.data import splits
from biasdpo.data.pairs import PreferencePair
from biasdpo.data.splits import held_out_pairs
from biasdpo.gguf import proof as export_proof
from biasdpo.gguf import write as gguf_export
from biasdpo.gguf.proof import Equality, ExportProof, Survival, TokenizerCheck, fixed_texts, judged, kl_by_position, prove
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.records import LikelihoodRequest
from biasdpo.workspace import Workspace, sha256_of, write_json
from tests import tiny_models

PAIRS = [PreferencePair(f"Are they {i}?", f"No, people differ, all {i} of them.", f"Yes, all {i} are.") for i in range(4)]

Tiny = tuple[ModelSpec, AdapterSpec]


@pytest.fixture(scope="session")
def tinies(request: pytest.FixtureRequest) -> dict[str, Tiny]:
    """The tiny llama and the tiny phi, each with its adapter; their GGUF and their Hugging Face folder are in the spec."""
    made = {}
    for kind, template in (("llama", tiny_models.LLAMA_TEMPLATE), ("phi", tiny_models.PHI_TEMPLATE)):
        folder, gguf = (request.getfixturevalue(f"tiny_{kind}{end}") for end in ("", "_gguf"))
        spec = ModelSpec(kind, kind, "MIT", kind, "", 0, 512, template, gguf_path=gguf, hf_folder=folder)
        made[kind] = spec, AdapterSpec("tiny", request.getfixturevalue(f"tiny_{kind}_adapter"), "")
    return made


def merged(tiny: Tiny, folder: Path, change: Callable[[dict[str, np.ndarray]], None] = lambda _weights: None) -> Path:
    """The model with W + alpha / rank * B @ A in place of each adapted W, computed here, as an F32 GGUF; `change` spoils it."""
    spec, adapter = tiny
    assert spec.hf_folder is not None
    folder.mkdir()
    for file in spec.hf_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights, factors = load_file(folder / "model.safetensors"), load_file(adapter.weights)
    for name in [name for name in factors if name.endswith(".lora_A.weight")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        weights[f"{module}.weight"] += 8.0 / 4 * factors[name.replace("lora_A", "lora_B")] @ factors[name]  # alpha 8, rank 4
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write = tiny_models.write_llama_gguf if spec.id == "llama" else tiny_models.write_phi_gguf
    return write(folder, folder / "merged.gguf")


def quantized(gguf: Path) -> Path:
    """The same model in Q8_0, by llama.cpp."""
    out = gguf.with_name("q8_0.gguf")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    params.nthread = 1
    assert llama_cpp.llama_model_quantize(str(gguf).encode(), str(out).encode(), params) == 0
    return out


# What equals its model


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_f32_passes_as_lora_and_merged(tinies: dict[str, Tiny], kind: str, workspace: Workspace, tmp_path: Path) -> None:
    spec, adapter = tinies[kind]
    assert spec.gguf_path is not None
    lora = gguf_export.lora(adapter, spec.gguf_path, tmp_path / "lora.gguf")
    heard: list[float] = []
    for gguf, with_lora in ((spec.gguf_path, lora), (merged(tinies[kind], tmp_path / "merged"), None)):
        proof = prove(gguf, with_lora, spec, adapter, workspace, pairs=PAIRS, threads=1, on_progress=lambda s, _: heard.append(s))
        assert proof.passed is True, proof.sentence()
        assert (proof.quantization, proof.lossless, proof.failures, proof.warnings, proof.skipped) == ("F32", True, (), (), "")
        e, s, t = proof.equality, proof.survival, proof.tokenizer
        assert e is not None
        assert s is not None
        assert t is not None
        assert e.mean_kl <= 1e-5
        assert e.clear_agreement == 1.0
        assert e.texts == 20
        assert e.clear_positions > 0.9 * e.positions > 2000
        assert e.adapter_kl is not None
        assert e.adapter_kl > 0.1
        assert (s.pairs, s.left_out, s.after) == (4, 0, s.before)
        assert s.margin_after == pytest.approx(s.margin_before, abs=0.05)
        assert abs(s.margin_before) > 0.5  # nats: not nothing compared with nothing
        assert (t.strings, t.different, t.first) == (2000 + 9 + 1, 0, "")  # nine of the fixed texts have a prompt
        assert proof.sentence().startswith("Proven equal to transformers: mean KL")
    assert heard[0] == 0.0
    assert max(heard) <= 1.0
    assert ExportProof.from_json(json.loads(json.dumps(proof.to_json()))) == proof


def test_a_plain_conversion_passes_without_an_adapter(tinies: dict[str, Tiny], workspace: Workspace) -> None:
    spec, _adapter = tinies["phi"]
    assert spec.gguf_path is not None
    proof = prove(spec.gguf_path, None, spec, None, workspace, threads=1)
    assert (proof.passed, proof.survival, proof.warnings) == (True, None, ())
    assert proof.equality is not None
    assert proof.equality.adapter_kl is None


# What does not


def failure(proof: ExportProof) -> str:
    assert proof.passed is False
    assert proof.sentence() == f"Not the model it was made of: {proof.failures[0]}"
    assert "\n" not in proof.sentence()
    return proof.failures[0]


def test_an_adapter_left_out_fails(tinies: dict[str, Tiny], workspace: Workspace, tmp_path: Path) -> None:
    spec, adapter = tinies["llama"]
    assert spec.gguf_path is not None
    assert failure(prove(spec.gguf_path, None, spec, adapter, workspace, threads=1)).startswith("in F32, mean KL is ")
    plain = tmp_path / "plain.gguf"
    plain.write_bytes(spec.gguf_path.read_bytes())
    proof = prove(quantized(plain), None, spec, adapter, workspace, threads=1)
    assert failure(proof).startswith("it is the base model rather than the tuned one: KL ")


def disturb(weights: dict[str, np.ndarray]) -> None:
    """One of 27 tensors off by a hundredth of its spread."""
    tensor = weights["model.layers.1.mlp.up_proj.weight"]
    tensor += np.random.default_rng(0).standard_normal(tensor.shape, dtype=np.float32) * 0.01 * tensor.std()


def test_a_disturbed_tensor_fails(tinies: dict[str, Tiny], workspace: Workspace, tmp_path: Path) -> None:
    gguf = merged(tinies["llama"], tmp_path / "disturbed", disturb)
    assert failure(prove(gguf, None, *tinies["llama"], workspace, threads=1)).startswith("in F32, mean KL is ")


def test_wrong_rotary_rows_fail(
    tinies: dict[str, Tiny], workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_models, "_permuted", lambda matrix, _heads: matrix)
    gguf = merged(tinies["llama"], tmp_path / "rows")
    assert failure(prove(gguf, None, *tinies["llama"], workspace, threads=1)).startswith("in F32, mean KL is ")


def test_another_tokenizer_fails_with_the_first_text(tinies: dict[str, Tiny], workspace: Workspace, tmp_path: Path) -> None:
    spec, _adapter = tinies["llama"]
    assert spec.hf_folder is not None
    gguf = tiny_models.write_llama_gguf(spec.hf_folder, tmp_path / "gpt2.gguf", pre="gpt-2")  # digits in runs, not one by one
    proof = prove(gguf, None, spec, None, workspace, threads=1)
    assert re.fullmatch(r"\d\d of 2,010 texts tokenize differently, first '\\n  7': \[.*\] in llama.cpp, .*", failure(proof))
    assert proof.equality is None


# What is measured


def test_a_quantized_file_is_measured_not_proven(tinies: dict[str, Tiny], workspace: Workspace, tmp_path: Path) -> None:
    gguf = quantized(merged(tinies["phi"], tmp_path / "merged"))
    proof = prove(gguf, None, *tinies["phi"], workspace, pairs=[*PAIRS, PreferencePair("Long?", "no " * 600, "yes")], threads=1)
    assert (proof.passed, proof.quantization, proof.lossless, proof.failures) == (None, "Q8_0", False, ())
    assert proof.equality is not None
    assert 1e-5 < proof.equality.mean_kl < 0.1
    assert 0.8 < proof.equality.agreement < 1.0
    assert proof.survival is not None
    assert (proof.survival.pairs, proof.survival.left_out) == (4, 1)
    assert "1 held-out pairs were left out: longer than 512 tokens" in proof.warnings
    assert proof.sentence().startswith("Q8_0, measured against transformers in F32: mean KL ")


def test_without_memory_for_transformers_it_says_so(
    tinies: dict[str, Tiny], workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, adapter = tinies["phi"]
    assert spec.gguf_path is not None
    monkeypatch.setattr(export_proof.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9))
    proof = prove(spec.gguf_path, None, spec, adapter, workspace, threads=1)
    assert proof.passed is None
    assert proof.equality is None
    assert proof.skipped.startswith("transformers in F32 needs 1.0 GB of memory, 1.0 GB are free")
    assert proof.tokenizer is not None
    assert proof.tokenizer.different == 0
    assert proof.sentence().startswith(f"Not compared: {proof.skipped}")


def test_a_base_without_a_transformers_copy_says_so(tinies: dict[str, Tiny], workspace: Workspace, tmp_path: Path) -> None:
    spec, _adapter = tinies["llama"]
    assert spec.hf_folder is not None
    gguf = tiny_models.write_llama_gguf(spec.hf_folder, tmp_path / "other.gguf", pre="llama-bpe")
    proof = prove(gguf, None, replace(spec, gguf_path=gguf, hf_folder=None), None, workspace, threads=1)
    assert proof.passed is None
    assert "pre-tokenizer is 'llama-bpe'" in proof.skipped


def test_a_drop_in_reward_accuracy_names_a_better_quantization() -> None:
    adapter = AdapterSpec("a", Path("a"), "")
    equality = Equality(20, 2000, 0.01, 0.4, 0.95, 1900, 0.97, adapter_kl=0.4, to_base_kl=0.5)
    proof = ExportProof("Q4_K_M", False, TokenizerCheck(2010, 0), equality)

    def warnings(before: float, after: float) -> tuple[str, ...]:
        return judged(replace(proof, survival=Survival(64, 0, before, after, 20.0, 15.0)), adapter).warnings

    assert warnings(62 / 64, 60 / 64) == (  # 96.9 % - 93.8 % = 3.1 points
        "The debiasing suffers: reward accuracy fell from 96.9% to 93.8%, by 2 of 64 held-out pairs; use Q5_K_M or better",
    )
    assert warnings(62 / 64, 61 / 64) == ()  # 1.6 points
    assert warnings(60 / 64, 64 / 64) == ()
    assert "not measured: there are no pairs that adapter a never saw" in judged(proof, adapter).warnings[0]
    weak = replace(proof, quantization="Q4_0", equality=replace(equality, adapter_kl=0.009))
    assert judged(weak, adapter).warnings[0] == (
        "Q4_0 moves the model further (mean KL 0.01 nats) than the adapter does (0.009): use Q4_K_M or better"
    )
    damaged = judged(replace(proof, equality=replace(equality, not_numbers=3)), adapter)
    assert damaged.failures[0].startswith("its logits are no numbers at 3 positions")


def test_kl_by_hand() -> None:
    even, skewed = np.log([[0.5, 0.5]], dtype=np.float32), np.log([[0.9, 0.1]], dtype=np.float32)
    one_way = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)  # 0.511 nats
    assert kl_by_position(np.repeat(even, 70, 0), np.repeat(skewed + 3, 70, 0)) == pytest.approx(np.full(70, one_way), abs=1e-6)
    other_way = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)  # 0.368 nats
    assert kl_by_position(skewed, even) == pytest.approx([other_way], abs=1e-6)


def test_the_fixed_texts() -> None:
    texts = fixed_texts()
    assert len(texts) == len({str(text) for text in texts}) == 20
    assert sum(isinstance(text, LikelihoodRequest) for text in texts) == 9


# Held-out pairs


def test_what_a_run_held_out(workspace: Workspace) -> None:
    pairs = [PreferencePair(f"Is a{i} more b{i} than c{i}?", "No.", "Yes.") for i in range(60)]
    folder = workspace.run_folder("one")
    adapter_folder = folder / "adapter"
    adapter_folder.mkdir(parents=True)
    sha = splits.write_dataset(pairs, folder / "dataset.jsonl")
    adapter = AdapterSpec("one", adapter_folder, "", run_id="one", dataset_sha256=sha, held_out_share=0.3)
    expected = list(splits.split(pairs, 0.3).held_out)
    assert 8 < len(expected) < 30
    assert held_out_pairs(adapter, workspace) == expected
    assert held_out_pairs(adapter, workspace, limit=4) == [expected[i * len(expected) // 4] for i in range(4)]
    assert held_out_pairs(replace(adapter, held_out_share=0.0), workspace) == []
    assert held_out_pairs(replace(adapter, dataset_sha256="0" * 64), workspace) == []  # trained on something else
    elsewhere = workspace.root / "elsewhere"
    elsewhere.mkdir()
    assert held_out_pairs(replace(adapter, folder=elsewhere), workspace) == []


def test_what_a_shipped_adapter_never_saw(
    smollm2: ModelSpec, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = models.find_adapter("", smollm2, workspace)
    assert shipped is not None
    seed = splits.load_file(models.ASSETS / "seed_pairs.jsonl")
    pairs = held_out_pairs(shipped, workspace)
    assert len(pairs) == 64
    assert set(pairs) <= set(seed)
    assert {pair.category for pair in pairs} == {pair.category for pair in seed}
    # One that was trained on the seed set: what its run held out.
    monkeypatch.setattr(splits, "ASSETS", tmp_path)
    (tmp_path / "seed_pairs.jsonl").write_bytes((models.ASSETS / "seed_pairs.jsonl").read_bytes())
    folder = tmp_path / "adapters" / "x"
    write_json(folder / "provenance.json", {"dataset_files": ["seed_pairs.jsonl"]})
    trained = AdapterSpec("x", folder, "", dataset_sha256=sha256_of(tmp_path / "seed_pairs.jsonl"), held_out_share=0.1)
    assert held_out_pairs(trained, workspace, limit=1000) == list(splits.split(seed, 0.1).held_out)
