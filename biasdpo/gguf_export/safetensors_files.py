"""The tensors of a Hugging Face folder's safetensors, sharded or not, as mapped files: nothing is read before it is used.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the data).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biasdpo.errors import ModelError, WorkspaceError
from biasdpo.workspace import read_json

_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}  # bytes of a number


@dataclass(frozen=True)
class HfTensor:
    """A tensor in a file: `dtype` F32, F16 or BF16; `offset` of its first byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def mapped(self) -> NDArray[Any]:
        """The tensor as the gguf package has it: numbers for F32 and F16, bytes (…, 2 * in) for BF16."""
        count = prod(self.shape)
        data = np.memmap(self.file, np.uint8, "r", self.offset, (count * _WIDTHS[self.dtype],))
        if self.dtype == "BF16":
            return data.reshape(*self.shape[:-1], 2 * self.shape[-1])
        return data.view("<f4" if self.dtype == "F32" else "<f2").reshape(self.shape)


def read_headers(folder: Path) -> dict[str, HfTensor]:
    """{name: tensor} of a folder's weights. ModelError where a shard is missing or cut off, or of another dtype."""
    tensors: dict[str, HfTensor] = {}
    for file in _files(folder):
        for name, entry in _header(file).items():
            tensors[name] = entry
    return tensors


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{folder} has no *.safetensors: fetch the model's safetensors weights (pickles are not opened)")
        return files
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError, WorkspaceError) as exc:
        raise ModelError(f"{index} is no index of safetensors ({exc}): fetch the model again") from exc
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {', '.join(missing)} of {len(names)} files of weights: fetch the model again")
    return [folder / name for name in names]


def _header(file: Path) -> Mapping[str, HfTensor]:
    size = file.stat().st_size
    tensors = {}
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > size - 8:
                raise ValueError(f"its header should be {length:,} bytes long")
            header = json.loads(opened.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            shape = tuple(int(n) for n in entry["shape"])
            begin, end = entry["data_offsets"]
            if 8 + length + end > size:
                raise ValueError(f"{size:,} of {8 + length + end:,} bytes are there")
            if entry["dtype"] in _WIDTHS and end - begin != prod(shape) * _WIDTHS[entry["dtype"]]:
                raise ValueError(f"{name} has {end - begin:,} bytes for the shape {list(shape)}")
            tensors[name] = HfTensor(file, str(entry["dtype"]), shape, 8 + length + begin)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ModelError(f"{file} is no complete safetensors file ({exc}): fetch the model again") from exc
    odd = next((f"{name} is {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in _WIDTHS), "")
    if odd:
        raise ModelError(f"{file}: {odd}, of {', '.join(_WIDTHS)} one is needed: fetch the model in one of these")
    return tensors
