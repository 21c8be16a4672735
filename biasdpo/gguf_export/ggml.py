"""Weights from and into ggml's types, row by row: decoded by the gguf package, encoded by llama.cpp's own library."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biasdpo.errors import ExportError, ModelError

_F16_LARGEST = 65504.0


def decode(stored: NDArray[Any], kind: Any, name: str) -> NDArray[np.float32]:
    """Rows as they lie in a file -> float32 (rows, in). `kind`: gguf.GGMLQuantizationType."""
    from gguf import dequantize

    try:
        values: NDArray[np.float32] = np.asarray(dequantize(stored, kind), np.float32)
    except NotImplementedError as exc:
        raise ModelError(
            f"{name} is kept as {kind.name}, which the gguf package can't decode: fetch another quantization"
        ) from exc
    return values


def encode(values: NDArray[np.float32], kind: Any, name: str) -> NDArray[Any]:
    """float32 (rows, in) -> rows as they lie in a file of that type; NaN and infinity are refused."""
    from gguf import GGMLQuantizationType, quantize

    if not np.isfinite(values).all():
        raise ModelError(f"{name} holds weights that are no finite numbers: the model or the adapter is damaged; fetch it again")
    if kind == GGMLQuantizationType.F32:
        return values
    if kind == GGMLQuantizationType.F16:
        if np.abs(values).max(initial=0.0) > _F16_LARGEST:
            raise ExportError(f"{name} holds weights beyond F16's range ({_F16_LARGEST:g}): choose F32 or BF16")
        return values.astype(np.float16)
    if kind == GGMLQuantizationType.BF16:
        return np.asarray(quantize(values, kind))
    return _quantized(values, kind, name)


def _quantized(values: NDArray[np.float32], kind: Any, name: str) -> NDArray[np.uint8]:
    from gguf import GGML_QUANT_SIZES

    library = _library()
    block, size = GGML_QUANT_SIZES[kind]
    rows, width = values.reshape(-1, values.shape[-1]).shape
    out = np.empty((rows, width // block * size), np.uint8)
    written = 0
    if not library.ggml_quantize_requires_imatrix(int(kind)):
        flat = np.ascontiguousarray(values)
        written = library.ggml_quantize_chunk(int(kind), flat.ctypes.data, out.ctypes.data, 0, rows, width, None)
    if written != out.nbytes:
        raise ModelError(f"{name} is kept as {kind.name}, which can't be written again: use a base of another quantization")
    return out


@cache
def _library() -> Any:
    """llama.cpp's libggml-base, which llama-cpp-python carries but does not wrap (ggml.h: ggml_quantize_chunk)."""
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    files = [folder / name for name in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll", "libggml-base.dll")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ExportError(f"llama-cpp-python has no libggml-base in {folder}: install the version of requirements.txt")
    library = ctypes.CDLL(str(file))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,  # type
        ctypes.c_void_p,  # float * src
        ctypes.c_void_p,  # void * dst
        ctypes.c_int64,  # start
        ctypes.c_int64,  # rows
        ctypes.c_int64,  # width
        ctypes.c_void_p,  # importance matrix
    ]
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    return library
