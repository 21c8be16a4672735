"""How large a GGUF will be, from the headers of the model's files alone: for the page before an export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from biasdpo.errors import ConfigError, ModelError
from biasdpo.gguf_export.hf_source import expected_shapes
from biasdpo.gguf_export.quantizations import KEEP, bytes_of, planned_types, require_known
from biasdpo.gguf_header import read_header
from biasdpo.models import ModelSpec

# About what a GGUF's header takes for a token with its merge, for a tensor, and for all other keys.
_TOKEN_BYTES, _TENSOR_BYTES, _KEYS_BYTES = 36, 60, 1500


def expected_bytes(spec: ModelSpec, quantization: str, *, source: Literal["auto", "hf", "gguf"] = "auto") -> int:
    """About how large the file of `merged` will be. Raises ModelError and ConfigError as `merged` does."""
    path = source_path(spec, quantization, source)
    if quantization == KEEP:
        return path.stat().st_size
    if path.is_dir():
        shapes = expected_shapes(path)
        stored = {name: bytes_of("F32", shape) for name, shape in shapes.items()}
        header = _TOKEN_BYTES * shapes["token_embd.weight"][0] + _TENSOR_BYTES * len(shapes) + _KEYS_BYTES
        return header + tensor_bytes(quantization, shapes, stored)
    tensors = read_header(path).tensors
    stored = {name: tensor.n_bytes for name, tensor in tensors.items()}
    header = path.stat().st_size - sum(stored.values())
    return header + tensor_bytes(quantization, {name: tensor.shape for name, tensor in tensors.items()}, stored)


def tensor_bytes(quantization: str, shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, int]) -> int:
    """Bytes of all tensors by a quantization's recipe. `stored`: bytes as they are, for those that stay so."""
    planned = {} if quantization == KEEP else planned_types(quantization, shapes)
    return sum(bytes_of(planned[name][1], shapes[name]) if name in planned else stored[name] for name in shapes)


def source_path(spec: ModelSpec, quantization: str, source: str) -> Path:
    """The Hugging Face folder or the GGUF that `source` ("auto", "hf", "gguf") means.

    Raises ConfigError where there is no such source or quantization, ModelError where the model has no such files here.
    """
    if source not in ("auto", "hf", "gguf"):
        raise ConfigError(f"Unknown source {source!r}: choose one of auto, hf, gguf")
    spec.require_files()
    if source == "auto":
        source = "hf" if spec.hf_folder is not None and quantization != KEEP else "gguf"
    require_known(quantization, keep=source == "gguf")
    path = spec.hf_folder if source == "hf" else spec.gguf_path
    if path is None and source == "hf":
        raise ModelError(f"{spec.title} has no Hugging Face folder here: get it with `hf download`, or use --source gguf")
    if path is None:
        raise ModelError(f"{spec.title} has no GGUF file here: name a .gguf with --model, or use --source hf")
    return path
