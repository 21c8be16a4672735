"""A model that a GPU has no room for is divided, or goes to the CPU; memory is given back when it fails, and when it is closed.

No GPU is needed: the CPU plays one, on which a few layers lie. Accelerate keeps the others aside all the same, and puts their
weights in place for the time of their computation: to it torch.device("cpu") is a device that computes, "cpu" a store.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from biasdpo.backends import hf, hf_loading
from biasdpo.backends.base import Cancellation
from biasdpo.backends.hf import TransformersBackend, open_transformers
from biasdpo.backends.hf_loading import Placement, foreign_errors, released_errors
from biasdpo.errors import BackendError
from biasdpo.records import LikelihoodRequest
from tests import tiny_models
from tests.hf.cases import GREEDY, PROMPTS, WARM, Case, read, read_together, rows_computed, text_of

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")


@pytest.fixture
def divided(case: Case, monkeypatch: pytest.MonkeyPatch) -> Iterator[TransformersBackend]:
    model = case.backend._shared.model
    layers = len(model.model.layers)
    places: dict[str, Any] = {f"model.{name}": CPU for name, _ in model.model.named_children() if name != "layers"}
    places |= {"lm_head": CPU, "model.layers.0": CPU} | {f"model.layers.{i}": "cpu" for i in range(1, layers)}
    placement = Placement(CPU, places, f"1 of {layers} layers", "it has 0.1 GB free of the 0.2 needed")
    monkeypatch.setattr(hf, "choose_placement", lambda *_args: placement)
    seen: list[str] = []
    backend = open_transformers(
        case.folder, case.template, case.adapter, 512, batch_sides=True, on_progress=lambda _share, what: seen.append(what)
    )
    assert any(what.startswith("reading the weights: CPU, ") and "0.1 GB free" in what for what in seen)
    yield backend
    backend.close()


def test_a_divided_model_computes_the_same(case: Case, divided: TransformersBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "PAIRING_SECONDS", 60.0)
    lying = [{str(p.device) for p in layer.parameters()} for layer in divided._shared.model.model.layers]
    assert lying == [{"cpu"}] + [{"meta"}] * (len(lying) - 1)  # accelerate's mark of weights that lie elsewhere
    assert f", 1 of {len(lying)} layers: it has 0.1 GB free" in divided.device
    assert divided.proof.base_max_difference == divided.proof.noise == 0.0
    for sampling in (GREEDY, WARM):
        with rows_computed(divided) as rows:
            together = read_together(*(divided.stream(PROMPTS[0], sampling, side, strength=1.5) for side in ("base", "tuned")))
        assert rows[0] == 2
        assert together == [read(case.backend.stream(PROMPTS[0], sampling, side, strength=1.5)) for side in ("base", "tuned")]
    monkeypatch.setattr(hf, "PAIRING_SECONDS", 0.0)  # now each side alone
    request = [LikelihoodRequest("Why?", "Because.")]
    for side in ("base", "tuned"):
        assert np.array_equal(divided.canary_logits(side), case.backend.canary_logits(side))
        assert divided.loglikelihood(request, side) == case.backend.loglikelihood(request, side)
        assert text_of(divided, PROMPTS[1], side) == text_of(case.backend, PROMPTS[1], side)


def test_a_cancel_of_a_divided_model_leaves_it_whole(case: Case, divided: TransformersBackend) -> None:
    cancellation = Cancellation()
    layers = divided._shared.model.model.layers
    handle = layers[0].register_forward_hook(lambda *_: cancellation.set())
    streams = [divided.stream(PROMPTS[0], GREEDY, side, cancellation=cancellation) for side in ("base", "tuned")]
    assert read_together(*streams) == [([], "cancelled")] * 2
    handle.remove()
    assert {str(p.device) for p in layers[-1].parameters()} == {"meta"}
    assert text_of(divided, PROMPTS[0], "tuned") == text_of(case.backend, PROMPTS[0], "tuned")


def test_memory_that_runs_out_while_loading_sends_the_model_to_the_cpu(
    tiny_phi: Path, tiny_phi_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program took what was free when the placement was chosen."""
    load = hf_loading._load
    tried: list[Placement] = []
    held: list[Any] = []

    def fail_on_a_gpu(folder: Path, placement: Placement, bits: Any) -> Any:
        tried.append(placement)
        weights = torch.zeros(1000)
        held.append(weakref.ref(weights))
        if placement.device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")
        assert held[0]() is None  # what was read so far is gone before it is read again
        return load(folder, placement, bits)

    monkeypatch.setattr(hf_loading, "_load", fail_on_a_gpu)
    monkeypatch.setattr(hf, "choose_placement", lambda *_args: Placement(GPU))
    seen: list[str] = []
    backend = open_transformers(
        tiny_phi, tiny_models.PHI_TEMPLATE, tiny_phi_adapter, 512, on_progress=lambda _share, what: seen.append(what)
    )
    assert [placement.device for placement in tried] == [GPU, CPU]
    assert backend.device.startswith("CPU, ")
    assert backend.device.endswith(": not cuda:0, whose memory ran out while loading")
    assert f"reading the weights: {backend.device}" in seen
    assert not backend.batches_sides
    assert text_of(backend, PROMPTS[0], "tuned")
    backend.close()


# Memory given back


class Held:
    """Stands for a tensor on a GPU."""


def test_an_error_that_is_kept_keeps_no_tensors() -> None:
    held: list[weakref.ref[Held]] = []

    def compute() -> None:
        activations = Held()
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def fail() -> None:
        with released_errors(), foreign_errors():
            compute()

    with pytest.raises(BackendError) as kept:
        fail()
    assert str(kept.value).startswith("Out of memory: ")
    assert held[0]() is None


@pytest.mark.parametrize("batch_sides", [False, True])
def test_closing_frees_the_weights(case: Case, batch_sides: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while a stream is under way and an error of it is kept."""
    backend = open_transformers(case.folder, case.template, case.adapter, 512, device="cpu", batch_sides=batch_sides)
    read_together(*(backend.stream(PROMPTS[0], GREEDY, side) for side in ("base", "tuned")))
    with monkeypatch.context() as patch:
        patch.setattr(backend._shared.model.model.norm if hasattr(backend._shared.model.model, "norm")
                      else backend._shared.model.model.final_layernorm, "forward", _out_of_memory)  # fmt: skip
        with pytest.raises(BackendError, match="Out of memory") as kept:
            text_of(backend, PROMPTS[0], "tuned")
    under_way = backend.stream(PROMPTS[0], GREEDY, "tuned")
    next(under_way)
    tensors = [weakref.ref(p) for p in backend._shared.model.parameters()]
    assert all(ref() is not None for ref in tensors)
    backend.close()
    gc.collect()
    assert [ref() for ref in tensors if ref() is not None] == []
    with pytest.raises(BackendError, match="The model was closed"):
        next(under_way)
    assert kept.value


def _out_of_memory(*_args: Any, **_options: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")
