"""The header of a GGUF: its metadata and what tensors it holds, read in a fraction of a second.

The `gguf` package's reader makes several objects of each token and merge, which takes seconds for a vocabulary of 50,000; a page
that is asked which adapters fit can't wait for that. Format: ggml, docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biasdpo.errors import ModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its shape as numpy and torch have it, (out, in) for a matrix, the bytes that it takes in the file, and ggml's
    name for the type that its numbers have there."""

    shape: tuple[int, ...]
    n_bytes: int
    kind: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """`values`: the metadata by key, arrays as lists. `tensors`: by name, in the file's order."""

    values: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Read a GGUF's header. ModelError where the file is missing, foreign, of another version, or cut off."""
    if not path.is_file():
        raise ModelError(f"No model file {path}: check the path, or fetch the file again")
    try:
        size = path.stat().st_size
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header, end = _read(_Cursor(data))
    except (OSError, ValueError, KeyError, struct.error) as exc:  # what a foreign or torn file comes to, at whatever byte
        raise ModelError(f"{path} is no complete GGUF file ({type(exc).__name__}: {exc}): fetch or export it again") from exc
    if end > size:
        raise ModelError(f"{path} is cut off: {size:,} of {end:,} bytes; fetch or export it again")
    return header


class _Cursor:
    """Reads one value after another."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.at = 0

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + form, self._data, self.at)
        self.at += struct.calcsize("<" + form)
        return values

    def string(self) -> str:
        (length,) = self.take("Q")
        end = self.at + length
        if end > len(self._data):
            raise ValueError(f"a string of {length:,} bytes passes the end")
        text = self._data[self.at : end].decode("utf-8", "replace")
        self.at = end
        return text

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.take(_SCALARS[kind])[0]
        item, count = self.take("IQ")
        if item in _SCALARS:
            return list(self.take(f"{count}{_SCALARS[item]}"))
        return [self.value(item) for _ in range(count)]


def _read(cursor: _Cursor) -> tuple[Header, int]:
    """The header, and where the last tensor's data end."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    magic, version = cursor.take("4sI")
    if magic != b"GGUF":
        raise ValueError(f"it begins with {magic!r}")
    if version not in _VERSIONS:
        raise ValueError(f"GGUF version {version}, known are {', '.join(map(str, _VERSIONS))}")
    tensor_count, value_count = cursor.take("QQ")
    values = {}
    for _ in range(value_count):
        key = cursor.string()
        values[key] = cursor.value(cursor.take("I")[0])
    tensors: dict[str, TensorInfo] = {}
    last = 0
    for _ in range(tensor_count):
        name = cursor.string()
        shape = cursor.take(f"{cursor.take('I')[0]}Q")[::-1]
        kind, offset = cursor.take("IQ")
        type_ = GGMLQuantizationType(kind)
        block_elements, block_bytes = GGML_QUANT_SIZES[type_]
        tensors[name] = TensorInfo(shape, math.prod(shape) // block_elements * block_bytes, type_.name)
        last = max(last, offset + tensors[name].n_bytes)
    alignment = int(values.get("general.alignment", 32))
    return Header(values, tensors), -(-cursor.at // alignment) * alignment + last
