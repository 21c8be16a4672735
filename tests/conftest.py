"""Fixtures for all tests: nothing is fetched from the network, tiny models are made once a session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

from biasdpo import models
from biasdpo.workspace import Workspace, open_workspace
from tests import tiny_models


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
