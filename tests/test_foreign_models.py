"""Model folders as other people have them: with an adapter inside, odd files beside the weights, configs with lists and nulls."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from biasdpo import models
from biasdpo.backends import hf_loading
from biasdpo.backends.base import CANARY
from biasdpo.backends.hf import open_transformers
from biasdpo.config import TrainConfig
from biasdpo.errors import ModelError, ProofError
from biasdpo.model_files import weight_files
from biasdpo.workspace import Workspace
from tests import tiny_models
from training.dpo import load_policy

TEMPLATE = tiny_models.LLAMA_TEMPLATE


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "mine")


# An adapter in the model's folder


@pytest.fixture
def with_adapter(folder: Path) -> Path:
    return tiny_models.write_adapter(folder, folder)


def logits(folder: Path, **options: Any) -> Any:
    with closing(open_transformers(folder, TEMPLATE, None, 512, device="cpu", **options)) as backend:
        return backend.logits(CANARY, "base")


def test_base_is_the_folders_model_without_the_adapter_in_the_folder(tiny_llama: Path, with_adapter: Path) -> None:
    assert np.array_equal(logits(with_adapter), logits(tiny_llama))
    policy = load_policy(with_adapter, TrainConfig(model="m", datasets=("d",)), use_cpu=True)
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        clean = AutoModelForCausalLM.from_pretrained(tiny_llama)(ids).logits
        assert torch.equal(policy(ids).logits, clean)


def test_a_base_that_was_loaded_with_an_adapter_fails_the_proof(with_adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    polluted = AutoModelForCausalLM.from_pretrained(with_adapter)
    monkeypatch.setattr(hf_loading, "load_base", lambda *_args, **_options: polluted)
    with pytest.raises(ProofError, match="The base side is not the base model"):
        logits(with_adapter)


def test_the_adapter_in_a_models_folder_is_offered(with_adapter: Path, workspace: Workspace) -> None:
    spec = models.find(str(with_adapter))
    [offered] = models.adapters_for(spec, workspace)
    assert offered == models.find_adapter("mine-adapter", spec, workspace)
    assert models.find_adapter("", spec, workspace) is None
    with closing(open_transformers(with_adapter, TEMPLATE, offered.folder, 512, device="cpu")) as backend:
        assert (backend.proof.kl_nats or 0.0) > 0.0


def test_only_the_weights_that_transformers_loads_count(folder: Path) -> None:
    parameters = models.find(str(folder)).parameters
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert weight_files(folder) == [folder / "model.safetensors"]
    assert models.find(str(folder)).parameters == parameters
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        weight_files(folder)
