"""llama.cpp's own quantizer: one GGUF into another, with its reason where it fails."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from biasdpo.errors import ConfigError, ExportError, ModelError

# --- ggml: Weights from and into ggml's types, row by row: decoded by the gguf package, encoded by llama.c


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


# --- written: What an export wrote, and how far it is


Source = Literal["hf", "gguf"]

Progress = Callable[[float, str], None]
"""Called with the share done (0 to 1) and what is being done."""


@dataclass(frozen=True)
class Fallback:
    """A tensor that could not have the type that its quantization gives it, since the type's block does not divide its width."""

    tensor: str
    wanted: str
    got: str


@dataclass(frozen=True)
class Written:
    """A GGUF that was written.

    source      what the weights were read from: a Hugging Face folder, or the base GGUF
    touched     tensors that the adapter changed
    fallbacks   tensors of another type than the quantization's own
    """

    path: Path
    bytes: int
    architecture: str
    source: Source
    quantization: str
    tensors: int
    touched: int
    fallbacks: tuple[Fallback, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "fallbacks": [asdict(fallback) for fallback in self.fallbacks]}


# --- quantizations: The quantizations on offer, what each costs, and which type llama.cpp gives to each tensor


KEEP = "keep"  # onto a base GGUF: every tensor as it was


@dataclass(frozen=True)
class Quantization:
    """How weights are kept. `bits_per_weight`: of a model like Phi-2, on average; `cost`: one line for people."""

    name: str
    bits_per_weight: float
    cost: str


QUANTIZATIONS: tuple[Quantization, ...] = (
    Quantization("F32", 32.0, "Exact: every weight as it was merged. For proofs and further conversion."),
    Quantization("F16", 16.0, "Half the size; rounding that no text shows. Reads everywhere."),
    Quantization("BF16", 16.0, "Half the size; as Phi-2's own weights are kept. Slow on processors without BF16."),
    Quantization("Q8_0", 8.5, "A quarter of F32; next to no loss."),
    Quantization("Q6_K", 6.6, "Small loss; a good choice where memory allows it."),
    Quantization("Q5_K_M", 5.7, "Little loss that tests can measure."),
    Quantization("Q4_K_M", 5.0, "The usual choice for a laptop: a sixth of F32, some loss."),
    Quantization("Q4_1", 5.1, "Older format, fast on a CPU; more loss than Q4_K_M. For widths that 256 does not divide."),
    Quantization("Q4_0", 4.6, "The smallest and fastest here; the most loss."),
)

# Bits that llama.cpp calls the file's type: enum llama_ftype in llama.h.
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18, "BF16": 32}
# The tensor type that most tensors get (src/llama-quant.cpp, llama_ftype_get_default_type).
_DEFAULT_TYPES = {**{name: name for name in FILE_TYPES}, "Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K"}
# What a tensor gets where its width is no multiple of 256 (src/llama-quant.cpp, tensor_type_fallback).
_FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_BYTES = {  # elements and bytes of a block
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
_ALIGNMENT = 32  # bytes


def require_known(quantization: str, *, keep: bool) -> None:
    """Raise ConfigError where there is no such quantization. `keep`: whether tensors can stay as they were."""
    names = [known.name for known in QUANTIZATIONS]
    if quantization == KEEP and not keep:
        raise ConfigError(f"Quantization 'keep' needs a base GGUF whose types are kept: choose one of {', '.join(names)}")
    if quantization not in (*names, KEEP):
        raise ConfigError(f"Unknown quantization {quantization!r}: choose one of {', '.join([*names, KEEP])}")


def is_weight(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is quantized at all: matrices are, vectors (norms, biases) stay as they are."""
    return len(shape) >= 2 and name.endswith("weight") and not name.endswith("_norm.weight")


def planned_types(quantization: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, str]]:
    """{matrix: (type by the quantization's recipe, type that its width allows)}, as llama.cpp 0.3.36 chooses them.

    shapes   {tensor: (out, in)} of a whole model. Raises ExportError where a width allows no type.
    Source: src/llama-quant.cpp, llama_tensor_get_type_impl and tensor_type_fallback.
    """
    default = _DEFAULT_TYPES[quantization]
    weights = {name: shape for name, shape in shapes.items() if is_weight(name, shape)}
    if default in ("F32", "F16", "BF16"):
        return dict.fromkeys(weights, (default, default))
    more_bits = _more_bits(weights) if quantization in ("Q4_K_M", "Q5_K_M") else set()
    head = "output.weight" if "output.weight" in weights else "token_embd.weight"  # a tied head is the embeddings
    planned = {}
    for name, shape in weights.items():
        width = shape[-1]
        wanted = "Q6_K" if name in more_bits or (name == head and default != "Q8_0") else default
        got = "Q8_0" if name == head and width % _BYTES[default][0] else wanted
        if width % _BYTES[got][0]:
            if got not in _FALLBACKS:
                raise ExportError(
                    f"{quantization} needs widths that {_BYTES[got][0]} divides, {name} is {width} wide: choose F16, BF16 or F32"
                )
            got = _FALLBACKS[got]
            got = "F16" if width % _BYTES[got][0] else got
        planned[name] = (wanted, got)
    return planned


def _more_bits(names: Iterable[str]) -> set[str]:
    """Those attn_v (or attn_qkv) and ffn_down tensors to which the _M recipes give Q6_K."""
    found = set()
    for pattern in (r"blk\.(\d+)\.attn_(?:v|qkv)\.weight", r"blk\.(\d+)\.ffn_down\.weight"):
        layers = sorted((int(match[1]), name) for name in names if (match := re.fullmatch(pattern, name)))
        n = len(layers)
        found |= {name for i, (_, name) in enumerate(layers) if i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2}
    return found


def fallbacks(quantization: str, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str]) -> tuple[Fallback, ...]:
    """The tensors whose width denied them the quantization's type. `types`: those that a written file has."""
    return tuple(
        Fallback(name, wanted, types[name])
        for name, (wanted, _) in planned_types(quantization, shapes).items()
        if types[name] != wanted and shapes[name][-1] % _BYTES[wanted][0]
    )


def bytes_of(type_name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in a GGUF, padding included."""
    block, size = _BYTES[type_name]
    plain = prod(shape) // block * size
    return -(-plain // _ALIGNMENT) * _ALIGNMENT


# --- quantizer: llama.cpp's own quantizer: one GGUF into another, with its reason where it fails


_BUFFER = 2**28  # bytes of a tensor's rows in llama.cpp's memory at a time; its default is 8 GiB
_PROGRESS = re.compile(r"\[\s*(\d+)/\s*(\d+)\] (\S+)")
_FAILURE = re.compile(r"failed to quantize: (.+)")


def quantize_file(source: Path, target: Path, quantization: str, *, threads: int, on_progress: Callable[[float], None]) -> None:
    """Write `source` as `target` in another quantization; tensors that are quantized already are quantized again.

    Raises ExportError with llama.cpp's reason. What it may have begun to write is the caller's to remove.
    """
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[quantization]
    params.nthread = threads
    params.allow_requantize = True
    params.max_buf_size = _BUFFER
    failures: list[BaseException] = []

    def heard(line: str) -> None:
        match = _PROGRESS.search(line)
        if match is not None and not failures:
            try:
                on_progress((int(match[1]) - 1) / int(match[2]))
            except BaseException as exc:  # nothing may be raised through llama.cpp: kept until it returns
                failures.append(exc)

    llama_cpp.llama_backend_init()
    with _log(heard) as lines:
        status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if failures:
        raise failures[0]
    if status != 0:
        log = "".join(lines)
        reasons = _FAILURE.findall(log) or [line for line in log.splitlines() if line.strip()] or ["it gave no reason"]
        reason = reasons[-1].strip()
        if "iostream" in reason:  # all that a C++ stream says of a failed write
            raise OSError(f"a write failed ({reason})")
        raise ExportError(f"llama.cpp could not make {quantization} of the model ({reason}): choose another quantization")


@contextmanager
def _log(heard: Callable[[str], None]) -> Iterator[list[str]]:
    """llama.cpp's log while the block runs, piece by piece; afterwards it goes where it went before."""
    import llama_cpp

    pieces: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def keep(_level: int, text: bytes, _data: Any) -> None:
        pieces.append(text.decode("utf-8", "replace"))
        heard(pieces[-1])

    former, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(former), ctypes.byref(data))
    llama_cpp.llama_log_set(keep, None)
    try:
        yield pieces
    finally:
        llama_cpp.llama_log_set(former, data)
