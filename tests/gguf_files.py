"""Short ways to name models and adapters by their files, and to write, read and compare GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from biasdpo.backends.base import kl_divergence
from biasdpo.gguf import write
from biasdpo.models import AdapterSpec, ModelSpec
from tests import tiny_models

IDS = [int(i) for i in np.random.default_rng(3).integers(5, 470, 40)]  # tokens of both tiny vocabularies


def spec_of(*paths: Path) -> ModelSpec:
    """A model by its files alone: a Hugging Face folder, a GGUF, or both."""
    files: dict[str, Any] = {"gguf_path" if path.suffix == ".gguf" else "hf_folder": path for path in paths}
    is_llama = "llama" in paths[0].name
    template = tiny_models.LLAMA_TEMPLATE if is_llama else tiny_models.PHI_TEMPLATE
    return ModelSpec("tiny", "Tiny", "MIT", "llama" if is_llama else "phi2", "", 0, 512, template, **files)


def adapter_of(folder: Path) -> AdapterSpec:
    return AdapterSpec(folder.name, folder, "")


def merge(model: Path, adapter: Path | None, quantization: str, out: Path, **options: Any) -> write.Written:
    return write.merged(spec_of(model), None if adapter is None else adapter_of(adapter), quantization, out, threads=1, **options)


def tensors_of(path: Path) -> dict[str, Any]:
    """By the gguf package's own reader."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def metadata_of(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    return {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}


def assert_equal_logits(logits: np.ndarray, reference: np.ndarray) -> None:
    """Within rounding: mean KL of 1e-5 nats, and the same top token wherever the top two are more than 0.02 apart."""
    assert logits.shape == reference.shape
    assert kl_divergence(reference, logits) <= 1e-5
    second, first = np.sort(reference, axis=-1)[:, -2:].T
    clear = first - second > 0.02
    assert clear.mean() > 0.8
    np.testing.assert_array_equal(logits.argmax(-1)[clear], reference.argmax(-1)[clear])
