"""Opening and closing the transformers backend; divided models; memory that runs out and is given back; a GPU if there is one.

A model is divided without a GPU: the CPU plays one, on which a few layers lie. Accelerate still keeps the others aside and puts
their weights in place while they compute: to it torch.device("cpu") is a device that computes, "cpu" a store.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from biasdpo import models
from biasdpo.backends import hf, hf_loading
from biasdpo.backends.base import Cancellation
from biasdpo.backends.hf import TransformersBackend, open_transformers
from biasdpo.backends.hf_loading import Placement, foreign_errors, hf_copy, released_errors
from biasdpo.errors import BackendError, ModelError
from biasdpo.records import LikelihoodRequest, TextRequest
from biasdpo.workspace import Workspace
from tests import tiny_models
from tests.hf.cases import (
    GREEDY,
    PROMPTS,
    WARM,
    Case,
    adapter_is_off,
    read,
    read_together,
    rows_computed,
    seconds_to_cancel,
    text_of,
)

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")


def out_of_memory(*_args: Any, **_options: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")


def test_visitors_open_two_at_once(case: Case) -> None:
    with ThreadPoolExecutor(2) as both:
        opened = list(both.map(lambda adapter: open_transformers(case.folder, case.template, adapter, 512), (None, case.adapter)))
    texts = [text_of(backend, PROMPTS[0], "base") for backend in (*opened, case.backend)]
    assert texts == texts[:1] * 3
    for backend in opened:
        backend.close()


def test_base_only(case: Case) -> None:
    seen: list[tuple[float, str]] = []
    threads = torch.get_num_threads()
    options = {"device": "cpu", "threads": 1, "on_progress": lambda share, what: seen.append((share, what))}
    backend = open_transformers(case.folder, case.template, None, 10_000, **options)
    torch.set_num_threads(threads)
    assert backend.device == "CPU, 1 thread"
    assert backend.context_length == tiny_models.CONTEXT_LENGTH  # no more than the model was made for
    assert not backend.has_adapter
    assert backend.proof.kl_nats is None
    assert seen == sorted(seen)
    assert seen[-1] == (1.0, "ready")
    assert text_of(backend, PROMPTS[0], "base") == text_of(case.backend, PROMPTS[0], "base")
    with pytest.raises(BackendError, match="There is no tuned side"):
        text_of(backend, PROMPTS[0], "tuned")
    backend.close()


def test_what_can_not_be_opened_is_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    for device in ("abacus", "mps", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(BackendError, match=repr(device)):
            open_transformers(tiny_llama, tiny_models.LLAMA_TEMPLATE, None, 512, device=device)
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: -1000 if file.suffix == ".safetensors" else None])
    with pytest.raises(ModelError, match="transformers can't load"):
        open_transformers(tmp_path, tiny_models.LLAMA_TEMPLATE, None, 512)


def test_missing_torch_is_one_line() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from biasdpo.errors import BackendError\n"
        "try:\n    import biasdpo.backends.hf\nexcept BackendError as exc:\n    print(exc)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "The transformers backend needs torch: `pip install -r requirements.txt`\n"


# Divided models


@pytest.fixture
def divided(case: Case, monkeypatch: pytest.MonkeyPatch) -> Iterator[TransformersBackend]:
    model = case.backend._shared.model
    layers = len(model.model.layers)
    places: dict[str, Any] = {f"model.{name}": CPU for name, _ in model.model.named_children() if name != "layers"}
    places |= {"lm_head": CPU, "model.layers.0": CPU} | {f"model.layers.{i}": "cpu" for i in range(1, layers)}
    placement = Placement(CPU, places, f"1 of {layers} layers", "it has 0.1 GB free of the 0.2 needed")
    monkeypatch.setattr(hf_loading, "choose_placement", lambda *_args: placement)
    seen: list[str] = []
    backend = open_transformers(
        case.folder, case.template, case.adapter, 512, batch_sides=True, on_progress=lambda _share, what: seen.append(what)
    )
    assert any(what.startswith("reading the weights: CPU, ") and "0.1 GB free" in what for what in seen)
    yield backend
    backend.close()


def test_a_divided_model_computes_the_same(case: Case, divided: TransformersBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "PAIRING_SECONDS", 60.0)
    layers = divided._shared.model.model.layers
    lying = [{str(p.device) for p in layer.parameters()} for layer in layers]
    assert lying == [{"cpu"}] + [{"meta"}] * (len(lying) - 1)  # accelerate's mark of weights that lie elsewhere
    assert f", 1 of {len(lying)} layers: it has 0.1 GB free" in divided.device
    assert divided.proof.base_max_difference == divided.proof.noise == 0.0
    for sampling in (GREEDY, WARM):
        with rows_computed(divided) as rows:
            together = read_together(*(divided.stream(PROMPTS[0], sampling, side, strength=1.5) for side in ("base", "tuned")))
        assert rows[0] == 2
        assert together == [read(case.backend.stream(PROMPTS[0], sampling, side, strength=1.5)) for side in ("base", "tuned")]
    # A cancel within a step leaves it whole.
    cancellation = Cancellation()
    handle = layers[0].register_forward_hook(lambda *_: cancellation.set())
    streams = [divided.stream(PROMPTS[0], GREEDY, side, cancellation=cancellation) for side in ("base", "tuned")]
    assert read_together(*streams) == [([], "cancelled")] * 2
    handle.remove()
    assert {str(p.device) for p in layers[-1].parameters()} == {"meta"}
    monkeypatch.setattr(hf, "PAIRING_SECONDS", 0.0)  # now each side alone
    request = [LikelihoodRequest("Why?", "Because.")]
    for side in ("base", "tuned"):
        assert np.array_equal(divided.canary_logits(side), case.backend.canary_logits(side))
        assert divided.loglikelihood(request, side) == case.backend.loglikelihood(request, side)
        assert text_of(divided, PROMPTS[1], side) == text_of(case.backend, PROMPTS[1], side)


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
            out_of_memory()
        assert held[0]() is None  # what was read so far is gone before it is read again
        return load(folder, placement, bits)

    monkeypatch.setattr(hf_loading, "_load", fail_on_a_gpu)
    monkeypatch.setattr(hf_loading, "choose_placement", lambda *_args: Placement(GPU))
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


def test_an_error_that_is_stored_keeps_no_tensors() -> None:
    held: list[weakref.ref[Held]] = []

    def compute() -> None:
        activations = Held()
        held.append(weakref.ref(activations))
        out_of_memory()

    def fail() -> None:
        with released_errors(), foreign_errors():
            compute()

    with pytest.raises(BackendError) as kept:
        fail()
    assert str(kept.value).startswith("Out of memory: ")
    assert "\n" not in str(kept.value)
    assert held[0]() is None


@pytest.mark.parametrize("batch_sides", [False, True])
def test_closing_frees_the_weights(case: Case, batch_sides: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while a stream is running and an error of it is kept."""
    backend = open_transformers(case.folder, case.template, case.adapter, 512, device="cpu", batch_sides=batch_sides)
    read_together(*(backend.stream(PROMPTS[0], GREEDY, side) for side in ("base", "tuned")))
    with monkeypatch.context() as patch:
        patch.setattr(backend._shared.model, "forward", out_of_memory)
        with pytest.raises(BackendError, match=r"^Out of memory: .*$") as kept:
            text_of(backend, PROMPTS[0], "tuned")
    assert adapter_is_off(backend)
    running = backend.stream(PROMPTS[0], GREEDY, "tuned")
    next(running)
    tensors = [weakref.ref(p) for p in backend._shared.model.parameters()]
    backend.close()
    backend.close()
    gc.collect()
    assert [ref() for ref in tensors if ref() is not None] == []
    for call in (
        lambda: next(running),
        lambda: text_of(backend, PROMPTS[0], "base"),
        lambda: backend.loglikelihood([TextRequest("two tokens")], "base"),
    ):
        with pytest.raises(BackendError, match="The model was closed"):
            call()
    assert kept.value


# The embedded model


@pytest.mark.slow
def test_smollm2_cancels_within_a_second_of_prefill(smollm2: models.ModelSpec, session_workspace: Workspace) -> None:
    backend = open_transformers(hf_copy(smollm2, session_workspace), smollm2.template, None, smollm2.context_length)
    assert seconds_to_cancel(backend, "word " * 3500) < 1.0
    backend.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(smollm2: models.ModelSpec, session_workspace: Workspace, tmp_path: Path) -> None:
    folder = hf_copy(smollm2, session_workspace)
    adapter = tiny_models.write_adapter(tmp_path / "a", folder, size=0.03)
    held = torch.cuda.memory_allocated()
    backend = open_transformers(folder, smollm2.template, adapter, smollm2.context_length)
    assert backend.device.startswith("cuda:0 (")
    assert backend.proof.base_max_difference == 0.0
    assert backend.batches_sides
    with rows_computed(backend) as rows:
        base, tuned = read_together(*(backend.stream(PROMPTS[0], GREEDY, side) for side in ("base", "tuned")))
    assert rows[0] == 2
    assert base != tuned
    backend.close()
    assert torch.cuda.memory_allocated() == held
