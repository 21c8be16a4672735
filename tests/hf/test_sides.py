"""Each side of the transformers backend is what it claims to be, at every strength."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from biasdpo.backends.base import kl_divergence
from biasdpo.backends.hf import open_transformers
from tests import tiny_models
from tests.hf.cases import PROMPTS, WARM, Case, plain_text, text_of


@pytest.mark.parametrize("prompt", PROMPTS)
def test_base_is_the_bare_model(case: Case, bare: Any, prompt: str) -> None:
    text = text_of(case.backend, prompt, "base")
    assert text == plain_text(bare, case, prompt)
    assert len(text) > 20


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tuned_is_peft(case: Case, peft: Any, prompt: str) -> None:
    text = text_of(case.backend, prompt, "tuned")
    assert text == plain_text(peft, case, prompt)
    assert text != text_of(case.backend, prompt, "base")


@pytest.mark.parametrize("seed", [0, 1])
def test_draws_are_those_of_generate(case: Case, bare: Any, peft: Any, seed: int) -> None:
    """The same processors in the same order, the same random numbers: the same text."""
    sampling = replace(WARM, seed=seed)
    assert text_of(case.backend, PROMPTS[0], "base", sampling) == plain_text(bare, case, PROMPTS[0], sampling)
    assert text_of(case.backend, PROMPTS[0], "tuned", sampling) == plain_text(peft, case, PROMPTS[0], sampling)


def test_a_seed_gives_one_text(case: Case) -> None:
    first, again, other = (text_of(case.backend, PROMPTS[0], "tuned", replace(WARM, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_the_proof_has_figures(case: Case) -> None:
    proof = case.backend.proof
    assert proof.base_max_difference == proof.noise == 0.0
    assert proof.kl_nats is not None
    assert proof.kl_nats > 0.01
    expected = kl_divergence(case.backend.canary_logits("base"), case.backend.canary_logits("tuned"))
    assert proof.kl_nats == pytest.approx(expected)


def test_one_copy_of_the_weights(case: Case) -> None:
    stored = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in case.backend._shared.model.parameters()}
    files = (case.folder / "model.safetensors", case.adapter / "adapter_model.safetensors")
    assert sum(stored.values()) == sum(t.nbytes for file in files for t in load_file(file).values())


# Strength


def test_strength_0_is_base_exactly(case: Case) -> None:
    assert np.array_equal(case.backend.canary_logits("tuned", 0.0), case.backend.canary_logits("base"))
    assert text_of(case.backend, PROMPTS[0], "tuned", strength=0.0) == text_of(case.backend, PROMPTS[0], "base")


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 32}}])
def test_strength_multiplies_the_update(case: Case, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Strength x is an adapter whose B is x times as large."""
    adapter = tiny_models.write_adapter(tmp_path / "a", case.folder, **settings)
    larger = tiny_models.write_adapter(tmp_path / "b", case.folder, **settings)
    factors = load_file(larger / "adapter_model.safetensors")
    save_file({n: t * 1.5 if "lora_B" in n else t for n, t in factors.items()}, larger / "adapter_model.safetensors")
    one = open_transformers(case.folder, case.template, adapter, 512)
    two = open_transformers(case.folder, case.template, larger, 512)
    assert np.allclose(one.canary_logits("tuned", 1.5), two.canary_logits("tuned"), atol=1e-3)
    one.close()
    two.close()
