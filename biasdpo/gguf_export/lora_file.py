"""Adapter -> LoRA GGUF, for llama.cpp.

A LoRA GGUF holds, per adapted matrix of shape (out, in): `NAME.weight.lora_a` (rank, in) and `NAME.weight.lora_b` (out, rank),
and the scale numerator `adapter.lora.alpha`, so that W + strength * alpha / rank * B @ A is the tuned matrix.
Format: llama.cpp, src/llama-adapter.cpp and convert_lora_to_gguf.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biasdpo.errors import ExportError
from biasdpo.gguf_export.factors import Layout, Part, place, read_adapter
from biasdpo.models import AdapterSpec
from biasdpo.workspace import Workspace, locked, refuse_on_public_space, replacing, sha256_of


def lora(adapter: AdapterSpec, base_gguf: Path, out: Path) -> Path:
    """Write `adapter` as a LoRA GGUF for the base model in `base_gguf`; return `out`.

    Raises AdapterError where the adapter was made for another base model, or uses what a LoRA GGUF can't hold; ExportError where
    the file can't be written.
    """
    factors = read_adapter(adapter)
    layout = Layout.of_gguf(base_gguf)
    placed = place(factors, layout, adapter.id)
    # The file holds one alpha. Layers with another one, or another rank, carry the difference in their B.
    alpha = Counter(pair.alpha for pair in factors.values()).most_common(1)[0][0] or 1.0  # llama.cpp reads 0 as "none": rank
    tensors: dict[str, NDArray[Any]] = {}
    for name, parts in placed.items():
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = _joined(parts, layout.shapes[name][0], alpha)
    _write(out, layout.architecture, alpha, tensors, adapter)
    return out


def export_lora(adapter: AdapterSpec, base_gguf: Path, out: Path) -> Path:
    """`lora` on a user's request: refused on a public Space, where only the cache may be written."""
    refuse_on_public_space("Export")
    return lora(adapter, base_gguf, out)


def cached_lora(adapter: AdapterSpec, base_gguf: Path, workspace: Workspace) -> Path:
    """The LoRA GGUF of an adapter for a base model, built on first use into WORKSPACE/cache."""
    parents = (
        f"{sha256_of(adapter.weights)[:12]}-{sha256_of(adapter.folder / 'adapter_config.json')[:8]}-{sha256_of(base_gguf)[:12]}"
    )
    out = workspace.cache / "lora" / f"{adapter.id}-{parents}.gguf"
    with locked(out):
        return out if out.is_file() else lora(adapter, base_gguf, out)


def _joined(parts: Sequence[Part], rows: int, alpha: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """A (R, in) and B (rows, R) of one tensor, whose ranks sum to R: alpha / R * B @ A is the sum of its parts' changes.

    A fused attn_qkv has A's rows one under the other and B block-diagonal. A lone part with the file's alpha is as it was.
    """
    rank = sum(part.factors.rank for part in parts)
    wanted = [part.factors.scale * rank / alpha for part in parts]
    if len(parts) == 1 and parts[0].factors.b.shape[0] == rows:
        pair = parts[0].factors
        return pair.a, pair.b if pair.alpha == alpha else (pair.b.astype(np.float32) * np.float32(wanted[0]))
    b = np.zeros((rows, rank), np.float32)
    column = 0
    for part, scale in zip(parts, wanted, strict=True):
        into = b[part.first_row : part.first_row + part.factors.b.shape[0], column : column + part.factors.rank]
        into[:] = part.factors.b.astype(np.float32) * np.float32(scale)
        column += part.factors.rank
    return np.concatenate([part.factors.a for part in parts]), b


def _write(out: Path, architecture: str, alpha: float, tensors: dict[str, NDArray[Any]], adapter: AdapterSpec) -> None:
    import gguf

    try:
        with replacing(out) as temporary:
            writer = gguf.GGUFWriter(temporary, architecture)
            writer.add_type("adapter")
            writer.add_string("adapter.type", "lora")
            writer.add_float32("adapter.lora.alpha", alpha)
            writer.add_name(adapter.id)
            writer.add_string("biasdpo.adapter_sha256", sha256_of(adapter.weights))
            for name, tensor in tensors.items():
                writer.add_tensor(name, tensor if tensor.dtype == np.float16 else tensor.astype(np.float32))
            try:
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_tensors_to_file()
            finally:
                writer.close()
    except OSError as exc:
        raise ExportError(f"Can't write {out}: {exc.strerror or exc}; make room or choose another folder") from exc
