"""Each side of the transformers backend is what it claims to be: at every strength, in any order, from any thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from biasdpo import models
from biasdpo.backends.base import Cancellation, kl_divergence
from biasdpo.backends.hf import open_transformers
from biasdpo.compare import stream_pair
from biasdpo.engines import Engine
from biasdpo.errors import AdapterError, ProofError
from biasdpo.records import GenerationPair, Sampling, Side
from tests import tiny_models
from tests.hf.cases import GREEDY, PROMPTS, WARM, Case, adapter_is_off, hooks_on, plain_text, read, read_together, text_of

SETTINGS: list[tuple[Side, float]] = [("base", 1.0), ("tuned", 1.0), ("tuned", 0.3), ("tuned", 1.5), ("tuned", 0.0)]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_base_is_the_bare_model_and_tuned_is_peft(case: Case, bare: Any, peft: Any, prompt: str) -> None:
    base, tuned = (text_of(case.backend, prompt, side) for side in ("base", "tuned"))
    assert base == plain_text(bare, case, prompt)
    assert tuned == plain_text(peft, case, prompt)
    assert base != tuned
    assert len(base) > 10


@pytest.mark.parametrize("seed", [0, 1])
def test_draws_are_those_of_generate(case: Case, bare: Any, peft: Any, seed: int) -> None:
    """The same processors in the same order, the same random numbers: the same text."""
    sampling = replace(WARM, seed=seed)
    base, tuned = (text_of(case.backend, PROMPTS[0], side, sampling) for side in ("base", "tuned"))
    assert base == plain_text(bare, case, PROMPTS[0], sampling)
    assert tuned == plain_text(peft, case, PROMPTS[0], sampling)
    assert base != text_of(case.backend, PROMPTS[0], "base", replace(WARM, seed=seed + 2))


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
def test_strength_multiplies_the_update(tiny_llama: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Strength x is an adapter whose B is x times as large, whatever its own scale and dtype."""
    logits = []
    for name, factor in (("a", 1.0), ("b", 1.5)):
        adapter = tiny_models.write_adapter(tmp_path / name, tiny_llama, **settings)
        factors = load_file(adapter / "adapter_model.safetensors")
        larger = {n: t * factor if "lora_B" in n else t for n, t in factors.items()}
        save_file(larger, adapter / "adapter_model.safetensors")
        backend = open_transformers(tiny_llama, tiny_models.LLAMA_TEMPLATE, adapter, 512)
        logits.append(backend.canary_logits("tuned", 1.5 / factor))
        backend.close()
    assert np.allclose(*logits, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adapters_load(tiny_llama: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = tiny_models.write_adapter(tmp_path / "a", tiny_llama)
    weights = adapter / "adapter_model.safetensors"
    save_file({n: t.to(dtype) for n, t in load_file(weights).items()}, weights)
    backend = open_transformers(tiny_llama, tiny_models.LLAMA_TEMPLATE, adapter, 512)
    assert backend.proof.kl_nats is not None
    assert backend.proof.kl_nats > 0.01
    backend.close()


# What is refused (why an adapter does not fit: test_fitting.py)


@pytest.mark.parametrize(
    ("size", "settings", "error", "match"),
    [
        (0.0, {}, ProofError, "changes nothing"),
        (np.nan, {}, ProofError, "not numbers"),
        (0.2, {"target_modules": None}, AdapterError, "PEFT adapts 6 layers of .*, whose file holds 21"),  # by PEFT's own default
    ],
)
def test_an_adapter_is_refused_in_one_line(
    tiny_llama: Path, tmp_path: Path, size: float, settings: dict[str, Any], error: type[Exception], match: str
) -> None:
    adapter = tiny_models.write_adapter(tmp_path / "a", tiny_llama, size=size, **settings)
    with pytest.raises(error, match=match) as caught:
        open_transformers(tiny_llama, tiny_models.LLAMA_TEMPLATE, adapter, 512)
    assert "\n" not in str(caught.value)


# Order, threads, cancels


def test_streams_that_take_turns_are_as_if_alone(case: Case) -> None:
    """Five streams at four strengths, a token of each in turn."""
    alone = [read(case.backend.stream(PROMPTS[0], GREEDY, side, strength=x))[0] for side, x in SETTINGS]
    streams = [case.backend.stream(PROMPTS[0], GREEDY, side, strength=x) for side, x in SETTINGS]
    together: list[list[str]] = [[] for _ in streams]
    running = list(range(len(streams)))
    while running:
        for i in list(running):
            piece = next(streams[i], None)
            if piece is None:
                running.remove(i)
            else:
                together[i].append(piece)
    assert together == alone
    assert len({"".join(pieces) for pieces in together}) == 4  # base, 0.3, 1, 1.5


@pytest.mark.parametrize("sampling", [GREEDY, WARM])
def test_many_threads_write_what_one_writes(case: Case, sampling: Sampling) -> None:
    alone = [read(case.backend.stream(PROMPTS[0], sampling, side, strength=x)) for side, x in SETTINGS]
    assert read_together(*(case.backend.stream(PROMPTS[0], sampling, side, strength=x) for side, x in SETTINGS)) == alone


def test_a_pair_streams_both_sides_at_the_same_time(case: Case, smollm2: models.ModelSpec) -> None:
    order: list[Side] = []

    def write(side: Side) -> None:
        order.extend(side for _ in case.backend.stream(PROMPTS[0], GREEDY, side))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, ("base", "tuned")))
    assert sum(a != b for a, b in pairwise(order)) >= 5
    engine = Engine(smollm2, models.AdapterSpec("random", case.adapter, ""), case.backend)
    pair = list(stream_pair(engine, PROMPTS[0], WARM))[-1]
    assert isinstance(pair, GenerationPair)
    assert pair.right is not None
    assert pair.finished
    assert pair.left.text == text_of(case.backend, PROMPTS[0], "base", WARM)
    assert pair.right.text == text_of(case.backend, PROMPTS[0], "tuned", WARM)


def test_a_cancel_leaves_nothing_behind(case: Case) -> None:
    before = {side: read(case.backend.stream(PROMPTS[0], GREEDY, side)) for side in ("base", "tuned")}
    hooks = hooks_on(case.backend)
    for side in ("base", "tuned"):
        cancellation = Cancellation()
        stream = case.backend.stream(PROMPTS[0], GREEDY, side, strength=0.7, cancellation=cancellation)
        for _ in range(5):
            next(stream)
        assert adapter_is_off(case.backend)  # also between the steps of a tuned stream
        cancellation.set()
        assert read(stream) == ([], "cancelled")
        stream = case.backend.stream(PROMPTS[0], GREEDY, side)
        next(stream)
        stream.close()  # a reader that leaves
    # Set while the first layer computes: the second never does.
    cancellation = Cancellation()
    computed: list[int] = []
    layers = case.backend._shared.model.model.layers
    handles = [layers[0].register_forward_hook(lambda *_: cancellation.set())]
    handles += [layer.register_forward_hook(lambda *_, i=i: computed.append(i)) for i, layer in enumerate(layers)]
    assert read(case.backend.stream(PROMPTS[0], GREEDY, "tuned", cancellation=cancellation)) == ([], "cancelled")
    for handle in handles:
        handle.remove()
    assert computed == [0]
    assert adapter_is_off(case.backend)
    assert hooks_on(case.backend) == hooks
    assert {side: read(case.backend.stream(PROMPTS[0], GREEDY, side)) for side in ("base", "tuned")} == before
