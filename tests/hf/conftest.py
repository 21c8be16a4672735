"""Both architectures, opened once a session: no test may leave a trace in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from biasdpo.backends import hf
from biasdpo.backends.hf import TransformersBackend, open_transformers
from tests import tiny_models
from tests.hf.cases import Case


@pytest.fixture(scope="session", params=["llama", "phi"])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    folder = request.getfixturevalue(f"tiny_{request.param}")
    adapter = request.getfixturevalue(f"tiny_{request.param}_adapter")
    template = tiny_models.LLAMA_TEMPLATE if request.param == "llama" else tiny_models.PHI_TEMPLATE
    backend = open_transformers(folder, template, adapter, tiny_models.CONTEXT_LENGTH)
    yield Case(folder, adapter, template, backend)
    backend.close()


@pytest.fixture(scope="session")
def bare(case: Case) -> Any:
    """The base model as its users load it, no adapter near it."""
    return AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def peft(case: Case) -> Any:
    """A second copy of the base model with the adapter, as PEFT's users load it."""
    model = AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(case.adapter)).eval()


@pytest.fixture(scope="session")
def batched(case: Case) -> Iterator[TransformersBackend]:
    backend = open_transformers(case.folder, case.template, case.adapter, 512, device="cpu", batch_sides=True)
    yield backend
    backend.close()


@pytest.fixture
def sides_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sides that come will be paired, however busy the machine is."""
    monkeypatch.setattr(hf, "PAIRING_SECONDS", 60.0)
