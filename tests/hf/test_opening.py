"""Opening and closing the transformers backend; faults of the machine; the embedded model, and a GPU where there is one."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from biasdpo import models
from biasdpo.backends.base import Cancellation
from biasdpo.backends.hf import open_transformers
from biasdpo.backends.hf_loading import hf_copy
from biasdpo.errors import BackendError, ModelError
from biasdpo.records import TextRequest
from biasdpo.workspace import Workspace
from tests import tiny_models
from tests.hf.cases import GREEDY, PROMPTS, Case, adapter_is_off, read, read_together, rows_computed, text_of


def test_base_only(case: Case) -> None:
    seen: list[tuple[float, str]] = []
    backend = open_transformers(
        case.folder, case.template, None, 10_000, device="cpu", on_progress=lambda share, what: seen.append((share, what))
    )
    assert backend.context_length == tiny_models.CONTEXT_LENGTH  # no more than the model was made for
    assert not backend.has_adapter
    assert backend.proof.kl_nats is None
    assert backend.device.startswith("CPU, ")
    assert seen == sorted(seen)
    assert seen[-1] == (1.0, "ready")
    assert text_of(backend, PROMPTS[0], "base") == text_of(case.backend, PROMPTS[0], "base")
    with pytest.raises(BackendError, match="There is no tuned side"):
        text_of(backend, PROMPTS[0], "tuned")
    backend.close()


def test_closed_is_closed(case: Case) -> None:
    backend = open_transformers(case.folder, case.template, case.adapter, 512)
    stream = backend.stream(PROMPTS[0], GREEDY, "tuned")
    next(stream)
    backend.close()
    backend.close()
    for call in (
        lambda: next(stream),
        lambda: text_of(backend, PROMPTS[0], "base"),
        lambda: backend.loglikelihood([TextRequest("two tokens")], "base"),
    ):
        with pytest.raises(BackendError, match="The model was closed"):
            call()


def test_threads_are_set_and_named(tiny_llama: Path) -> None:
    before = torch.get_num_threads()
    try:
        backend = open_transformers(tiny_llama, tiny_models.LLAMA_TEMPLATE, None, 512, threads=1)
        assert backend.device == "CPU, 1 thread"
        backend.close()
    finally:
        torch.set_num_threads(before)


def test_an_unusable_device_is_refused(tiny_llama: Path) -> None:
    for device in ("abacus", "mps", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(BackendError, match=repr(device)):
            open_transformers(tiny_llama, tiny_models.LLAMA_TEMPLATE, None, 512, device=device)


def test_damaged_weights_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: -1000 if file.suffix == ".safetensors" else None])
    with pytest.raises(ModelError, match="transformers can't load"):
        open_transformers(tmp_path, tiny_models.LLAMA_TEMPLATE, None, 512)


def test_out_of_memory_is_one_line(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(case.backend._shared.model, "forward", fail)
        with pytest.raises(BackendError, match=r"^Out of memory: .*$"):
            text_of(case.backend, PROMPTS[0], "tuned")
    assert adapter_is_off(case.backend)
    assert text_of(case.backend, PROMPTS[0], "tuned")


def test_missing_torch_is_one_line() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from biasdpo.errors import BackendError\n"
        "try:\n    import biasdpo.backends.hf\nexcept BackendError as exc:\n    print(exc)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "The transformers backend needs torch: `pip install -r requirements.txt`\n"


# The embedded model


def test_smollm2_cancels_within_a_second_of_prefill(smollm2: models.ModelSpec, session_workspace: Workspace) -> None:
    backend = open_transformers(hf_copy(smollm2, session_workspace), smollm2.template, None, smollm2.context_length)
    cancellation = Cancellation()
    set_at: list[float] = []

    def cancel() -> None:
        set_at.append(time.perf_counter())
        cancellation.set()

    timer = threading.Timer(0.5, cancel)
    timer.start()
    result = read(backend.stream("word " * 3500, GREEDY, "base", cancellation=cancellation))
    seconds = time.perf_counter() - set_at[0]
    timer.join()
    backend.close()
    assert result == ([], "cancelled")
    assert seconds < 1.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(smollm2: models.ModelSpec, session_workspace: Workspace, tmp_path: Path) -> None:
    folder = hf_copy(smollm2, session_workspace)
    adapter = tiny_models.write_adapter(tmp_path / "a", folder, size=0.03)
    backend = open_transformers(folder, smollm2.template, adapter, smollm2.context_length)
    assert backend.device.startswith("cuda:0 (")
    assert backend.proof.base_max_difference == 0.0
    alone = {side: read(backend.stream(PROMPTS[0], GREEDY, side)) for side in ("base", "tuned")}
    streams = {side: backend.stream(PROMPTS[0], GREEDY, side) for side in ("base", "tuned")}
    pairs = zip(*streams.values(), strict=False)
    together = list(pairs)
    for i, side in enumerate(streams):
        assert [pair[i] for pair in together] == alone[side][0][: len(together)]
    backend.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_pair_on_a_gpu_is_one_batch_and_closing_frees_it(
    smollm2: models.ModelSpec, session_workspace: Workspace, tmp_path: Path
) -> None:
    folder = hf_copy(smollm2, session_workspace)
    adapter = tiny_models.write_adapter(tmp_path / "a", folder, size=0.03)
    held = torch.cuda.memory_allocated()
    backend = open_transformers(folder, smollm2.template, adapter, smollm2.context_length)
    assert backend.batches_sides
    with rows_computed(backend) as rows:
        base, tuned = read_together(*(backend.stream(PROMPTS[0], GREEDY, side) for side in ("base", "tuned")))
    assert rows[0] == 2
    assert base != tuned
    backend.close()
    assert torch.cuda.memory_allocated() == held
