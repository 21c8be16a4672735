"""Which adapter fits which model: the shapes of its LoRA factors against the model's matrices, from the files' headers alone.

That they fit does not say that the adapter was trained on this model, only that it can be put on it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from biasdpo import models
from biasdpo.errors import AdapterError, ModelError
from biasdpo.gguf_names import MODULES, QKV, hf_name
from biasdpo.modelfile import safetensors_shapes, tensor_shapes
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.workspace import Workspace

Shape = tuple[int, int]
"""(out, in) of a matrix."""

_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")


def adapters_for(spec: ModelSpec, workspace: Workspace) -> list[AdapterSpec]:
    """The adapters that fit a model: first those whose metadata name it, then those of other models that can be put on it.

    Of a model whose files are not here only the metadata can be asked.
    """
    made_for_it = models.adapters_for(spec, workspace)
    matrices = _matrices(spec)
    if matrices is None:
        return made_for_it
    others = [adapter for adapter in models.adapters(workspace) if adapter not in made_for_it]
    return [adapter for adapter in [*made_for_it, *others] if _fits(adapter, matrices)]


def check_fits(adapter: AdapterSpec, spec: ModelSpec) -> None:
    """Raise AdapterError where an adapter can't be put on a model, before the model is loaded. Other faults (a variant of LoRA, a
    damaged file) are left to whoever opens the two."""
    matrices, factors = _matrices(spec), _factors(adapter)
    if matrices is None or factors is None:
        return
    made = f"Adapter {adapter.id} was made for another base model: "
    remedy = f"choose another adapter, or open the model that it was made for{f' ({adapter.model})' if adapter.model else ''}"
    for module, (out, into) in factors.shapes.items():
        if module not in matrices:
            raise AdapterError(f"{made}it adapts {module}, which {spec.title} lacks; {remedy}")
        if matrices[module] != (out, into):
            rows, columns = matrices[module]
            raise AdapterError(f"{made}its {module} is {out} x {into}, that of {spec.title} {rows} x {columns}; {remedy}")


@dataclass(frozen=True)
class _Factors:
    """`shapes`: {module: (out, in)} of what an adapter is added to. `plain`: its file holds pairs of LoRA factors alone."""

    shapes: Mapping[str, Shape]
    plain: bool


def _fits(adapter: AdapterSpec, matrices: Mapping[str, Shape]) -> bool:
    """Whether every pair of factors finds its matrix. One that can't be read fits nothing: it has its own line."""
    factors = _factors(adapter)
    return factors is not None and factors.plain and all(matrices.get(m) == shape for m, shape in factors.shapes.items())


def _factors(adapter: AdapterSpec) -> _Factors | None:
    """None where the file is missing or damaged."""
    try:
        stat = adapter.weights.stat()
        return _read_factors(adapter.weights, stat.st_mtime_ns, stat.st_size)
    except (OSError, ModelError):
        return None


@lru_cache(maxsize=512)
def _read_factors(weights: Path, _mtime: int, _size: int) -> _Factors:
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    plain = True
    for name, shape in safetensors_shapes(weights).items():
        match = _FACTOR.fullmatch(name)
        if match is None or len(shape) != 2:
            plain = False
        else:
            pairs.setdefault(match["module"], {})[match["factor"]] = shape
    whole = {module: pair for module, pair in pairs.items() if set(pair) == {"A", "B"} and pair["A"][0] == pair["B"][1]}
    shapes = {module: (pair["B"][0], pair["A"][1]) for module, pair in whole.items()}
    return _Factors(shapes, plain and bool(whole) and len(whole) == len(pairs))


def _matrices(spec: ModelSpec) -> Mapping[str, Shape] | None:
    """{module: (out, in)} of a model's matrices by Hugging Face's names; None where they are not known here."""
    path = spec.hf_folder or spec.gguf_path
    if path is None:
        return None
    try:
        architecture, shapes = tensor_shapes(path)
    except ModelError:
        return None  # whoever opens it says what is wrong
    if path == spec.hf_folder:
        return {name.removesuffix(".weight"): (s[0], s[1]) for name, s in shapes.items() if len(s) == 2}
    if architecture not in MODULES:
        return None
    matrices: dict[str, Shape] = {}
    for name, shape in shapes.items():
        if len(shape) != 2 or not name.endswith(".weight"):
            continue
        parts = [name]
        if ".attn_qkv." in name and shape[0] % 3 == 0:  # q, k and v one below the other, as older converters wrote Phi-2
            parts = [name.replace("attn_qkv", part) for part in QKV]
        for part in parts:
            module = hf_name(part.removesuffix(".weight"), architecture)
            if module is not None:
                matrices[module] = (shape[0] // len(parts), shape[1])
    return matrices
