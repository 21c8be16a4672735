"""Fixtures for all tests: nothing is fetched from the network, tiny models are made once a session."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # two torch processes with two threads each would slow each other down twentyfold
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from biasdpo import models
from biasdpo.migrations import open_workspace
from biasdpo.workspace import Workspace
from tests import byte_model, tiny_models
from tests.run_line import CommandLine


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """An empty workspace of this test's own."""
    return open_workspace(tmp_path / "workspace")


@pytest.fixture(scope="session")
def session_workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace for what is dear to make and never changed: `cache` alone."""
    return open_workspace(tmp_path_factory.mktemp("session") / "workspace")


@pytest.fixture(scope="session")
def smollm2() -> models.ModelSpec:
    """The embedded default model."""
    return models.find("smollm2")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LlamaForCausalLM: Hugging Face folder."""
    return tiny_models.save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random PhiForCausalLM: Hugging Face folder."""
    return tiny_models.save_tiny_phi(tmp_path_factory.mktemp("models") / "tiny-phi")


@pytest.fixture(scope="session")
def tiny_llama_adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoRA on all of tiny_llama's linear layers: PEFT folder."""
    return tiny_models.write_adapter(tmp_path_factory.mktemp("adapters") / "tiny-llama-lora", tiny_llama)


@pytest.fixture(scope="session")
def tiny_phi_adapter(tiny_phi: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoRA on all of tiny_phi's linear layers: PEFT folder."""
    return tiny_models.write_adapter(tmp_path_factory.mktemp("adapters") / "tiny-phi-lora", tiny_phi)


@pytest.fixture(scope="session")
def tiny_llama_gguf(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_llama as an F32 GGUF."""
    return tiny_models.write_llama_gguf(tiny_llama, tmp_path_factory.mktemp("gguf") / "tiny-llama.F32.gguf")


@pytest.fixture(scope="session")
def tiny_phi_gguf(tiny_phi: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_phi as an F32 GGUF."""
    return tiny_models.write_phi_gguf(tiny_phi, tmp_path_factory.mktemp("gguf") / "tiny-phi.F32.gguf")


@pytest.fixture(scope="session")
def tiny_bytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of bytes, the smallest and quickest to train: Hugging Face folder."""
    return byte_model.save_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pairs, no prompt nearly another (those would all be on one side of the split); a model of bytes learns at once that
    chosen ends otherwise than rejected."""
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    lines = [
        {"prompt": f"Is a{i} more b{i} than c{i}?", "chosen": f"Neither of the {i}.", "rejected": f"They are worse {i}!"}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def command_line(tmp_path: Path, tiny_bytes: Path, pairs_file: Path) -> Iterator[CommandLine]:
    """`python -m biasdpo` in an empty workspace, with a model and pairs that train in seconds."""
    line = CommandLine(Workspace(tmp_path / "workspace"), tiny_bytes, pairs_file)
    yield line
    line.kill_all()
