"""ggml's weight types: decoding, encoding, and llama.cpp's own quantizer with its recipes."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biasdpo.errors import ExportError, ModelError

# Quantizations and their recipes

KEEP = "keep"  # for a base GGUF: each tensor keeps its type
UNQUANTIZED = ("F32", "F16", "BF16")  # written without llama.cpp's quantizer


# What each quantization costs, for people.
COSTS = {
    "F32": "exact, for proofs and further conversion",
    "F16": "half of F32, no visible loss",
    "BF16": "half of F32, the type of Phi-2's own weights; slow on some CPUs",
    "Q8_0": "a quarter of F32, almost no loss",
    "Q6_K": "small loss",
    "Q5_K_M": "some loss",
    "Q4_K_M": "the usual choice for a laptop, some loss",
    "Q4_1": "older and fast, more loss; for widths that 256 does not divide",
    "Q4_0": "the smallest and fastest, most loss",
    KEEP: "each tensor keeps the base GGUF's type",
}

# llama.cpp's number of a file's quantization: enum llama_ftype in llama.h.
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18, "BF16": 32}
# The type of most tensors (src/llama-quant.cpp, llama_ftype_get_default_type), where it has another name.
_DEFAULT_TYPES = {"Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K"}
# The type of a tensor whose width is no multiple of 256 (src/llama-quant.cpp, tensor_type_fallback).
_FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_ALIGNMENT = 32  # bytes


def is_weight(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is quantized: matrices are, vectors (norms, biases) are not."""
    return len(shape) >= 2 and name.endswith("weight") and not name.endswith("_norm.weight")


def planned_types(quantization: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, str]]:
    """{matrix: (type of the quantization's recipe, type that its width allows)}, as llama.cpp 0.3.36 chooses them.

    shapes   {tensor: (out, in)} of a whole model. Raises ExportError if a width allows no type.
    Source: src/llama-quant.cpp, llama_tensor_get_type_impl and tensor_type_fallback.
    """
    default = _DEFAULT_TYPES.get(quantization, quantization)
    weights = {name: shape for name, shape in shapes.items() if is_weight(name, shape)}
    if default in UNQUANTIZED:
        return dict.fromkeys(weights, (default, default))
    more_bits = _more_bits(weights) if quantization in _DEFAULT_TYPES else set()
    head = "output.weight" if "output.weight" in weights else "token_embd.weight"  # tied embeddings
    planned = {}
    for name, shape in weights.items():
        width = shape[-1]
        wanted = "Q6_K" if name in more_bits or (name == head and default != "Q8_0") else default
        got = "Q8_0" if name == head and width % block_of(default)[0] else wanted
        if width % block_of(got)[0]:
            if got not in _FALLBACKS:
                raise ExportError(
                    f"{quantization} needs widths that are multiples of {block_of(got)[0]}, {name} is {width} wide: "
                    "choose F16, BF16 or F32"
                )
            got = _FALLBACKS[got]
            got = "F16" if width % block_of(got)[0] else got
        planned[name] = (wanted, got)
    return planned


def _more_bits(names: Iterable[str]) -> set[str]:
    """The attn_v (or attn_qkv) and ffn_down tensors to which the _M recipes give Q6_K."""
    found = set()
    for pattern in (r"blk\.(\d+)\.attn_(?:v|qkv)\.weight", r"blk\.(\d+)\.ffn_down\.weight"):
        layers = sorted((int(match[1]), name) for name in names if (match := re.fullmatch(pattern, name)))
        n = len(layers)
        found |= {name for i, (_, name) in enumerate(layers) if i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2}
    return found


def fallbacks(quantization: str, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str]) -> list[dict[str, str]]:
    """The tensors of a written file whose width allowed another type than planned. `types`: {tensor: its type in the file}."""
    return [
        {"tensor": name, "wanted": wanted, "got": types[name]}
        for name, (wanted, _) in planned_types(quantization, shapes).items()
        if types[name] != wanted and shapes[name][-1] % block_of(wanted)[0]
    ]


def bytes_of(type_name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor's data."""
    elements, size = block_of(type_name)
    return prod(shape) // elements * size


def padded_bytes(type_name: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor takes in a GGUF."""
    return -(-bytes_of(type_name, shape) // _ALIGNMENT) * _ALIGNMENT


@cache
def block_of(type_name: str) -> tuple[int, int]:
    """(elements, bytes) of one block."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    return int(elements), int(size)


# Decoding (the gguf package) and encoding (llama.cpp's library for what the package can't), row by row

_F16_MAX = 65504.0


def decode(stored: NDArray[Any], kind: str, name: str) -> NDArray[np.float32]:
    """Stored rows -> float32 (rows, in). `kind`: ggml's name of their type."""
    from gguf import GGMLQuantizationType, dequantize

    try:
        return np.asarray(dequantize(stored, GGMLQuantizationType[kind]), np.float32)
    except NotImplementedError as exc:  # raised by the gguf package for a type that it has no decoder for
        raise ModelError(f"{name} is stored as {kind}, which can't be decoded: use another quantization") from exc


def encode(values: NDArray[np.float32], kind: str, name: str) -> NDArray[Any]:
    """float32 (rows, in) -> rows as they are stored. NaN and infinity are a ModelError."""
    from gguf import GGMLQuantizationType, quantize

    if not np.isfinite(values).all():
        raise ModelError(f"{name} holds NaN or infinite weights: the model or the adapter is damaged; fetch it again")
    if kind == "F32":
        return values
    if kind == "F16":
        if np.abs(values).max(initial=0.0) > _F16_MAX:
            raise ExportError(f"{name} holds weights outside F16's range ({_F16_MAX:g}): choose F32 or BF16")
        return values.astype(np.float16)
    if kind == "BF16":
        return np.asarray(quantize(values, GGMLQuantizationType.BF16))
    library, number = _ggml(), int(GGMLQuantizationType[kind])
    rows, width = values.reshape(-1, values.shape[-1]).shape
    out = np.empty((rows, bytes_of(kind, (width,))), np.uint8)
    written = 0
    if not library.ggml_quantize_requires_imatrix(number):
        flat = np.ascontiguousarray(values)
        written = library.ggml_quantize_chunk(number, flat.ctypes.data, out.ctypes.data, 0, rows, width, None)
    if written != out.nbytes:
        raise ModelError(f"{name} is stored as {kind}, which can't be written: use another quantization of the base model")
    return out


@cache
def _ggml() -> Any:
    """llama.cpp's libggml-base, which llama-cpp-python ships but does not wrap (ggml.h: ggml_quantize_chunk)."""
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    files = [*folder.glob("*ggml-base.so"), *folder.glob("*ggml-base.dylib"), *folder.glob("*ggml-base.dll")]
    if not files:
        raise ExportError(f"llama-cpp-python has no libggml-base in {folder}: install the version of requirements.txt")
    library = ctypes.CDLL(str(files[0]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    # type, source, target, first element, rows, width, importance matrix
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    return library


# llama.cpp's quantizer

_BUFFER_BYTES = 2**28  # of a tensor's rows in llama.cpp's memory at a time; its default is 8 GiB
_PROGRESS = re.compile(r"\[\s*(\d+)/\s*(\d+)\] (\S+)")
_FAILURE = re.compile(r"failed to quantize: (.+)")


def quantize_file(source: Path, target: Path, quantization: str, *, threads: int, on_progress: Callable[[float], None]) -> None:
    """Write `source` as `target` in another quantization; quantized tensors are requantized.

    Raises ExportError with llama.cpp's reason, OSError for a failed write. The caller removes an incomplete `target`.
    """
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[quantization]
    params.nthread = threads
    params.allow_requantize = True
    params.max_buf_size = _BUFFER_BYTES
    failures: list[BaseException] = []

    def read_progress(line: str) -> None:
        match = _PROGRESS.search(line)
        if match is not None and not failures:
            try:
                on_progress((int(match[1]) - 1) / int(match[2]))
            except BaseException as exc:  # must not propagate through llama.cpp: raised after it returns
                failures.append(exc)

    llama_cpp.llama_backend_init()
    with _captured_log(read_progress) as lines:
        status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if failures:
        raise failures[0]
    if status != 0:
        log = "".join(lines)
        reasons = _FAILURE.findall(log) or [line for line in log.splitlines() if line.strip()] or ["it gave no reason"]
        reason = reasons[-1].strip()
        if "iostream" in reason:  # all that a C++ stream says about a failed write
            raise OSError(f"a write failed ({reason})")
        raise ExportError(f"llama.cpp could not quantize the model to {quantization} ({reason}): choose another quantization")


@contextmanager
def _captured_log(on_text: Callable[[str], None]) -> Iterator[list[str]]:
    """Collect llama.cpp's log during the block, then restore its former callback."""
    import llama_cpp

    pieces: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def collect(_level: int, text: bytes, _data: Any) -> None:
        pieces.append(text.decode("utf-8", "replace"))
        on_text(pieces[-1])

    former, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(former), ctypes.byref(data))
    llama_cpp.llama_log_set(collect, None)
    try:
        yield pieces
    finally:
        llama_cpp.llama_log_set(former, data)
