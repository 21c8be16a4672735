"""The quantizations on offer, what each costs, and which type llama.cpp gives to each tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from biasdpo.errors import ConfigError, ExportError
from biasdpo.gguf_export.written import Fallback

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
