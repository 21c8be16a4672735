"""llama.cpp's tokenizer of a GGUF against the Hugging Face tokenizer it was made of, on the strings of an export's proof."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from biasdpo.backends.hf_loading import encode_text, hf_copy, load_tokenizer
from biasdpo.backends.llamacpp import open_llamacpp
from biasdpo.chat import PromptTemplate
from biasdpo.gguf import proof, write
from biasdpo.gguf.proof import fixed_texts, tokenized
from biasdpo.models import ModelSpec
from biasdpo.records import LikelihoodRequest
from biasdpo.workspace import Workspace
from tests import phi_like as phi_like_files
from tests import tiny_models

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def phi_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer laid out like Phi-2's, rows without a token and all: a Hugging Face folder."""
    from transformers import PhiConfig, PhiForCausalLM

    folder = tmp_path_factory.mktemp("phi-like") / "model"
    end = phi_like_files.save_tokenizer(folder)
    config = PhiConfig(
        vocab_size=phi_like_files.ROWS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    PhiForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def phi_like_gguf(phi_like: Path) -> Path:
    """The same as an export writes it."""
    spec = ModelSpec("p", "p", "MIT", "phi2", "", 0, 512, tiny_models.PHI_TEMPLATE, hf_folder=phi_like)
    return write.merged(spec, None, "Q8_0", phi_like.parent / "phi-like.gguf", threads=1).path


def differences(gguf: Path, folder: Path, template: PromptTemplate) -> list[str]:
    """What the two tokenizers read differently."""
    backend = open_llamacpp(gguf, template, None, 512, threads=1)
    try:
        read = list(tokenized(backend, load_tokenizer(folder), template))
    finally:
        backend.close()
    assert len(read) == 2010
    return [f"{text!r}: {ours}, not {theirs}" for text, ours, theirs in read if ours != theirs]


def test_smollm2(smollm2: ModelSpec, session_workspace: Workspace) -> None:
    assert smollm2.gguf_path is not None
    assert differences(smollm2.gguf_path, hf_copy(smollm2, session_workspace), smollm2.template) == []


def test_a_tokenizer_laid_out_like_phi_2s(phi_like: Path, phi_like_gguf: Path) -> None:
    tokenizer = load_tokenizer(phi_like)
    assert len(encode_text(tokenizer, " " * 31)) == len(encode_text(tokenizer, "\t" * 9)) == 1
    assert len(encode_text(tokenizer, " " * 40)) == 2
    assert len(encode_text(tokenizer, "<|endoftext|>")) > 1
    assert differences(phi_like_gguf, phi_like, tiny_models.PHI_TEMPLATE) == []


def test_the_copy_of_such_a_gguf(phi_like_gguf: Path, workspace: Workspace) -> None:
    spec = ModelSpec("p", "p", "MIT", "phi2", "", 0, 512, tiny_models.PHI_TEMPLATE, gguf_path=phi_like_gguf)
    copy = hf_copy(spec, workspace)
    assert differences(phi_like_gguf, copy, spec.template) == []
    assert "[PAD" not in "".join(load_tokenizer(copy).get_vocab())  # rows without a token are no text


def test_a_tokenizer_laid_out_like_smollm2s(tiny_llama: Path, tmp_path: Path) -> None:
    spec = ModelSpec("l", "l", "MIT", "llama", "", 0, 512, tiny_models.LLAMA_TEMPLATE, hf_folder=tiny_llama)
    gguf = write.merged(spec, None, "F32", tmp_path / "llama.gguf").path
    assert differences(gguf, tiny_llama, spec.template) == []


# The strings


def test_the_strings_are_what_they_say() -> None:
    strings = proof.strings(["<|own|>"])
    assert len(strings) == len(set(strings)) == 2000
    assert proof.strings(["<|own|>"]) == strings
    assert {ord(c) >> 16 for text in strings for c in text} == set(range(17))  # all planes
    for pattern in (
        r" {70}x",
        r"\t{70}",
        r"x\n{70}",
        r"[ \t\n]{70}z",
        r"<\|own\|><\|own\|>",
        r"<\|o<\|own\|>wn\|>",
        "\u200d",
        "def f",
    ):
        assert any(re.search(pattern, text) for text in strings), pattern
    mixed = proof.strings(["<|own|>"], seed=1)
    assert len(set(mixed) - set(strings)) > 1000  # another seed, other mixtures


def test_the_fixed_texts_are_of_the_length_they_should_be(smollm2: ModelSpec, session_workspace: Workspace) -> None:
    tokenizer: Any = load_tokenizer(hf_copy(smollm2, session_workspace))
    texts = [text.continuation if isinstance(text, LikelihoodRequest) else text.text for text in fixed_texts()]
    lengths = [len(encode_text(tokenizer, text)) for text in texts]
    assert min(lengths) >= 40
    assert sorted(lengths)[15] <= 140  # other scripts take more
