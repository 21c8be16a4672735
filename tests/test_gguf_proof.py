"""The proof of an export: it passes what equals its model, fails what does not, and measures what can't be equal."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest

from biasdpo import models
from biasdpo.backends.base import kl_by_position
from biasdpo.backends.hf import open_transformers
from biasdpo.backends.hf_loading import encode_text, hf_copy, load_tokenizer
from biasdpo.backends.llamacpp import open_llamacpp
from biasdpo.data import splits
from biasdpo.data.pairs import PreferencePair
from biasdpo.data.splits import held_out_pairs
from biasdpo.gguf import proof as export_proof
from biasdpo.gguf import write
from biasdpo.gguf.proof import (
    Equality,
    ExportProof,
    Survival,
    TokenizerCheck,
    compare_logits,
    fixed_texts,
    judge,
    prove,
    strings,
    tokenize_both,
)
from biasdpo.gguf.quantize import quantize_file
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.records import LikelihoodRequest
from biasdpo.workspace import Workspace, sha256_of, write_json
from tests import phi_like, tiny_models
from tests.gguf_files import adapter_of, merge, spec_of

PAIRS = [PreferencePair(f"Are they {i}?", f"No, people differ, all {i} of them.", f"Yes, all {i} are.") for i in range(4)]

Tiny = tuple[ModelSpec, AdapterSpec]


@pytest.fixture(scope="module")
def llama(tiny_llama: Path, tiny_llama_gguf: Path, tiny_llama_adapter: Path) -> Tiny:
    return spec_of(tiny_llama, tiny_llama_gguf), adapter_of(tiny_llama_adapter)


@pytest.fixture(scope="module")
def phi(tiny_phi: Path, tiny_phi_gguf: Path, tiny_phi_adapter: Path) -> Tiny:
    return spec_of(tiny_phi, tiny_phi_gguf), adapter_of(tiny_phi_adapter)


def merged(tiny: Tiny, folder: Path, tensor: str = "", change: Callable[[np.ndarray], np.ndarray] = np.copy) -> Path:
    """The model with its adapter as an F32 GGUF; `change` spoils one tensor of it."""
    merge(tiny[0].hf_folder, tiny[1].folder, "F32", folder / "merged.gguf")
    for found in gguf.GGUFReader(folder / "merged.gguf", "r+").tensors if tensor else ():
        if found.name == tensor:
            found.data[:] = change(np.array(found.data))
    return folder / "merged.gguf"


def quantized(gguf: Path, folder: Path) -> Path:
    quantize_file(gguf, folder / "q8_0.gguf", "Q8_0", threads=1, on_progress=lambda _share: None)
    return folder / "q8_0.gguf"


# What equals its model


@pytest.mark.parametrize(("kind", "as_lora"), [("llama", True), ("llama", False), ("phi", True), ("phi", False)])
def test_f32_passes_as_lora_and_merged(request, kind: str, as_lora: bool, workspace: Workspace, tmp_path: Path) -> None:
    spec, adapter = tiny = request.getfixturevalue(kind)
    file = spec.gguf_path if as_lora else merged(tiny, tmp_path)
    lora = write.lora(adapter, spec.gguf_path, tmp_path / "lora.gguf") if as_lora else None
    shares: list[float] = []
    proof = prove(file, lora, spec, adapter, workspace, pairs=PAIRS, threads=1, on_progress=lambda s, _: shares.append(s))
    assert proof.passed is True, proof.sentence()
    assert (proof.quantization, proof.lossless, proof.failures, proof.warnings, proof.skipped) == ("F32", True, (), (), "")
    e, s, t = proof.equality, proof.survival, proof.tokenizer
    assert e.mean_kl <= 1e-5
    assert (e.texts, e.clear_agreement) == (20, 1.0)
    assert e.clear_positions > 0.9 * e.positions > 2000
    assert e.adapter_kl > 0.1
    assert (s.pairs, s.left_out, s.after) == (4, 0, s.before)
    assert s.margin_after == pytest.approx(s.margin_before, abs=0.05)
    assert abs(s.margin_before) > 0.5  # nats: the adapter makes a difference
    assert (t.strings, t.different, t.first) == (2000 + 9 + 1, 0, "")  # nine of the fixed texts have a prompt
    assert proof.sentence().startswith("Equal to the original, up to rounding: mean KL")
    assert [row[0].split(",")[0].split(" on ")[0] for row in proof.rows()][::6] == ["Tokens of 2", "Reward accuracy"]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1] <= 1.0) == (0.0, True)
    assert ExportProof.from_json(json.loads(json.dumps(proof.to_json()))) == proof


def test_a_quick_proof_of_a_plain_conversion_and_none(phi: Tiny, workspace: Workspace) -> None:
    proof = prove(phi[0].gguf_path, None, phi[0], None, workspace, depth="quick", pairs=PAIRS, threads=1)
    assert (proof.verdict, proof.survival, proof.warnings, proof.equality.adapter_kl) == ("equal", None, (), None)
    assert (proof.equality.texts, proof.tokenizer.strings) == (4, 410)
    assert "(quick verification)" in proof.sentence()
    none = prove(phi[0].gguf_path, None, phi[0], None, workspace, depth="none")
    assert (none.verdict, none.passed, none.sentence()) == ("not verified", None, "Not verified: no verification was requested")
    assert ExportProof.from_json(json.loads(json.dumps(none.to_json()))) == none


@pytest.mark.slow
def test_a_quantized_base_with_the_shipped_adapter_is_pefts(smollm2: ModelSpec, session_workspace: Workspace) -> None:
    """The base's weights are the same on both engines; llama.cpp rounds activations to 8 bits, which PEFT does not."""
    adapter = models.find_adapter("", smollm2, session_workspace)
    lora = write.cached_lora(adapter, smollm2.gguf_path, session_workspace)
    folder = hf_copy(smollm2, session_workspace)
    with (
        closing(open_llamacpp(smollm2.gguf_path, smollm2.template, lora, 512, threads=1, kv_cache="f32")) as ours,
        closing(open_transformers(folder, smollm2.template, adapter.folder, 512, device="cpu", threads=1)) as theirs,
    ):
        found = compare_logits(theirs, ours, "tuned", lambda _done, _total: None)
        assert found.positions > 1000
        assert found.clear_agreement >= found.agreement >= 0.93
        assert found.mean_kl <= 0.01
        assert found.adapter_kl > 10 * found.mean_kl  # a tuned side without the adapter would fail


# What does not


def assert_fails(proof: ExportProof, pattern: str) -> None:
    assert proof.passed is False
    assert re.match(pattern, proof.failures[0]), proof.failures[0]
    assert proof.sentence() == f"Not equal to the original: {proof.failures[0]}"
    assert "\n" not in proof.sentence()


def test_an_adapter_left_out_fails(llama: Tiny, workspace: Workspace, tmp_path: Path) -> None:
    spec, adapter = llama
    assert_fails(prove(spec.gguf_path, None, spec, adapter, workspace, threads=1), "in F32, mean KL is ")
    proof = prove(quantized(spec.gguf_path, tmp_path), None, spec, adapter, workspace, threads=1)
    assert_fails(proof, "it is the base model rather than the tuned one: KL ")


FAULTS = {
    # One of 27 tensors off by a hundredth of its spread.
    "blk.1.ffn_up.weight": lambda w: w + np.random.default_rng(0).standard_normal(w.shape).astype("f4") * 0.01 * w.std(),
    "blk.0.attn_q.weight": lambda w: w.reshape(4, 8, 2, -1).swapaxes(1, 2).reshape(w.shape),  # Hugging Face's rotary rows
}


@pytest.mark.parametrize("tensor", FAULTS)
def test_wrong_weights_fail(llama: Tiny, workspace: Workspace, tmp_path: Path, tensor: str) -> None:
    wrong = merged(llama, tmp_path, tensor, FAULTS[tensor])
    assert_fails(prove(wrong, None, *llama, workspace, depth="quick", threads=1), "in F32, mean KL is ")


def test_another_tokenizer_fails_with_the_first_text(llama: Tiny, workspace: Workspace, tmp_path: Path) -> None:
    file = tiny_models.write_llama_gguf(llama[0].hf_folder, tmp_path / "gpt2.gguf", pre="gpt-2")  # digits in runs, not one by one
    proof = prove(file, None, llama[0], None, workspace, threads=1)
    assert_fails(proof, r"\d\d of 2,010 texts tokenize differently, first '\\n  7': \[.*\] in llama.cpp, .*")
    assert proof.equality is None


# What is measured


def test_a_quantized_file_is_measured_not_proven(phi: Tiny, workspace: Workspace, tmp_path: Path) -> None:
    file = quantized(merged(phi, tmp_path), tmp_path)
    proof = prove(file, None, *phi, workspace, pairs=[*PAIRS, PreferencePair("Long?", "no " * 600, "yes")], threads=1)
    assert (proof.passed, proof.quantization, proof.lossless, proof.failures) == (None, "Q8_0", False, ())
    assert 1e-5 < proof.equality.mean_kl < 0.1
    assert 0.8 < proof.equality.agreement < 1.0
    assert (proof.survival.pairs, proof.survival.left_out) == (4, 1)
    assert "Left out, longer than 512 tokens: 1 held-out pair" in proof.warnings
    assert proof.sentence().startswith("Q8_0, compared with the original: mean KL ")


def test_without_memory_for_transformers_it_says_so(phi: Tiny, workspace: Workspace, monkeypatch) -> None:
    monkeypatch.setattr(export_proof.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9))
    proof = prove(phi[0].gguf_path, None, *phi, workspace, threads=1)
    assert (proof.verdict, proof.equality, proof.tokenizer.different) == ("not verified", None, 0)
    assert proof.skipped.startswith("transformers in F32 needs 1.0 GB of memory, 1.0 GB are free")
    assert proof.sentence().startswith(f"Not verified: {proof.skipped}")


def test_a_base_without_a_transformers_copy_says_so(llama: Tiny, workspace: Workspace, tmp_path: Path) -> None:
    file = tiny_models.write_llama_gguf(llama[0].hf_folder, tmp_path / "other.gguf", pre="llama-bpe")
    proof = prove(file, None, replace(llama[0], gguf_path=file, hf_folder=None), None, workspace, threads=1)
    assert proof.verdict == "not verified"
    assert "pre-tokenizer is 'llama-bpe'" in proof.skipped


def test_a_drop_in_reward_accuracy_names_a_better_quantization() -> None:
    equality = Equality(20, 2000, 0.01, 0.4, 0.95, 1900, 0.97, adapter_kl=0.4, to_base_kl=0.5)
    proof = ExportProof("Q4_K_M", False, tokenizer=TokenizerCheck(2010, 0), equality=equality)

    def warnings(before: float, after: float) -> tuple[str, ...]:
        return judge(replace(proof, survival=Survival(64, 0, before, after, 20.0, 15.0))).warnings

    assert warnings(62 / 64, 60 / 64) == (  # 96.9 % - 93.8 % = 3.1 points
        "The debiasing suffers: reward accuracy fell from 96.9% to 93.8%, by 2 of 64 held-out pairs; use Q5_K_M or better",
    )
    assert warnings(62 / 64, 61 / 64) == ()  # 1.6 points
    assert warnings(60 / 64, 64 / 64) == ()
    assert "not measured: no pairs are known that adapter a never saw" in judge(proof, "a").warnings[0]
    assert judge(replace(proof, lossless=True, equality=replace(equality, mean_kl=0.0, clear_agreement=1.0)), "a").warnings == ()
    weak = replace(proof, quantization="Q4_0", equality=replace(equality, adapter_kl=0.009))
    assert judge(weak).warnings[0] == (
        "Q4_0 changes the model more (mean KL 0.01 nats) than the adapter does (0.009): use Q4_K_M or better"
    )
    damaged = judge(replace(proof, equality=replace(equality, not_numbers=3)))
    assert damaged.failures[0].startswith("its logits are NaN or infinite at 3 positions")


def test_kl_by_hand() -> None:
    even, skewed = np.log([[0.5, 0.5]], dtype=np.float32), np.log([[0.9, 0.1]], dtype=np.float32)
    one_way = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)  # 0.511 nats
    assert kl_by_position(np.repeat(even, 70, 0), np.repeat(skewed + 3, 70, 0)) == pytest.approx(np.full(70, one_way), abs=1e-6)
    other_way = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)  # 0.368 nats
    assert kl_by_position(skewed, even) == pytest.approx([other_way], abs=1e-6)


# The texts


def test_the_fixed_texts(smollm2: ModelSpec, session_workspace: Workspace) -> None:
    texts = fixed_texts()
    assert len(texts) == len({str(text) for text in texts}) == 20
    assert sum(isinstance(text, LikelihoodRequest) for text in texts) == 9
    tokenizer = load_tokenizer(hf_copy(smollm2, session_workspace))
    lengths = [len(encode_text(tokenizer, getattr(text, "continuation", None) or text.text)) for text in texts]
    assert min(lengths) >= 40
    assert sorted(lengths)[15] <= 140  # other scripts take more


def test_the_strings_cover_what_they_should() -> None:
    made = strings(["<|own|>"])
    assert len(made) == len(set(made)) == 2000
    assert strings(["<|own|>"]) == made
    assert {ord(c) >> 16 for text in made for c in text} == set(range(17))  # all planes
    own = (r"<\|own\|><\|own\|>", r"<\|o<\|own\|>wn\|>")
    for pattern in (r" {70}x", r"\t{70}", r"x\n{70}", r"[ \t\n]{70}z", *own, "\u200d", "\ud83d", "def f"):
        assert any(re.search(pattern, text) for text in made), pattern
    assert len(set(strings(["<|own|>"], seed=1)) - set(made)) > 1000  # another seed, other mixtures


# Tokenizers: llama.cpp's of a GGUF against the Hugging Face one that it was made from


def assert_same_tokens(gguf: Path, folder: Path, spec: ModelSpec) -> None:
    backend = open_llamacpp(gguf, spec.template, None, 512, threads=1)
    try:
        read = list(tokenize_both(backend, load_tokenizer(folder), spec.template))
    finally:
        backend.close()
    assert len(read) == 2010
    assert [f"{text!r}: {ours}, not {theirs}" for text, ours, theirs in read if ours != theirs] == []


def test_smollm2s_tokenizer_and_one_like_it(
    smollm2: ModelSpec, session_workspace: Workspace, llama: Tiny, tmp_path: Path
) -> None:
    assert_same_tokens(smollm2.gguf_path, hf_copy(smollm2, session_workspace), smollm2)
    merge(llama[0].hf_folder, None, "F32", tmp_path / "llama.gguf")
    assert_same_tokens(tmp_path / "llama.gguf", llama[0].hf_folder, llama[0])


def test_a_tokenizer_like_phi_2s_there_and_back(workspace: Workspace, tmp_path: Path) -> None:
    from transformers import PhiConfig, PhiForCausalLM

    folder = tmp_path / "phi"
    end = phi_like.save_tokenizer(folder)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    ids = {f"{role}_token_id": end for role in ("bos", "eos", "pad")}
    config = PhiConfig(vocab_size=phi_like.ROWS, max_position_embeddings=512, rope_parameters=rope, **size, **ids)
    PhiForCausalLM(config).save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    assert len(encode_text(tokenizer, " " * 31)) == len(encode_text(tokenizer, "\t" * 9)) == 1
    assert len(encode_text(tokenizer, " " * 40)) == 2
    assert len(encode_text(tokenizer, "<|endoftext|>")) > 1
    file = tmp_path / "phi.gguf"
    merge(folder, None, "Q8_0", file)
    assert_same_tokens(file, folder, spec_of(folder))
    copy = hf_copy(spec_of(file), workspace)
    assert_same_tokens(file, copy, spec_of(file))
    assert "[PAD" not in "".join(load_tokenizer(copy).get_vocab())  # rows without a token are no text


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
