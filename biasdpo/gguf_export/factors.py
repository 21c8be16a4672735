"""A PEFT LoRA adapter's factors, and where they belong among a GGUF's tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biasdpo.errors import AdapterError, ModelError
from biasdpo.gguf_header import read_header
from biasdpo.gguf_names import QKV, is_permuted, permute_rows
from biasdpo.models import AdapterSpec
from biasdpo.workspace import read_json

_PEFT_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")
# PEFT features that a plain pair (A, B) does not carry.
_UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "fan_in_fan_out",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
)


@dataclass(frozen=True)
class Factors:
    """One adapted matrix: W + alpha / rank * B @ A is the tuned one. A is (rank, in), B is (out, rank)."""

    a: NDArray[Any]
    b: NDArray[Any]
    alpha: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Part:
    """Factors in a GGUF tensor's row order, for its rows from `first_row` on (not 0 only in a fused attn_qkv)."""

    first_row: int
    factors: Factors


@dataclass(frozen=True)
class Layout:
    """What a GGUF's (or a model's future GGUF's) tensors look like. `shapes`: {tensor: (out, in)}, (n,) for vectors."""

    architecture: str
    blocks: int
    heads: int
    kv_heads: int
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of_gguf(cls, path: Path) -> Layout:
        """The layout of a GGUF. ModelError where it is damaged or does not say how many blocks and heads it has."""
        header = read_header(path)
        architecture = str(header.values.get("general.architecture"))
        blocks = header.values.get(f"{architecture}.block_count")
        heads = header.values.get(f"{architecture}.attention.head_count")
        if not isinstance(blocks, int) or not isinstance(heads, int):
            raise ModelError(f"{path} lacks {architecture}.block_count or its number of heads: fetch or export it again")
        return cls(
            architecture,
            blocks=blocks,
            heads=heads,
            kv_heads=int(header.values.get(f"{architecture}.attention.head_count_kv", heads)),
            shapes={name: tensor.shape for name, tensor in header.tensors.items()},
        )

    def heads_of(self, module: str) -> int:
        """How many heads the rows of attn_q or attn_k are."""
        return self.heads if module.removesuffix(".weight").removesuffix(".bias").endswith("attn_q") else self.kv_heads


def read_adapter(adapter: AdapterSpec) -> dict[str, Factors]:
    """An adapter's factors by Hugging Face module. AdapterError where it holds more than plain LoRA or is damaged."""
    config = read_json(adapter.folder / "adapter_config.json")
    used = [name for name in _UNSUPPORTED if config.get(name)]
    if used:
        raise AdapterError(f"Adapter {adapter.id} uses {', '.join(used)}, which a GGUF can't hold: use --backend transformers")
    pairs = load_factors(adapter.weights)
    return {module: Factors(pair["A"], pair["B"], _alpha(config, module, pair["A"].shape[0])) for module, pair in pairs.items()}


def load_factors(weights: Path) -> dict[str, dict[str, NDArray[Any]]]:
    """{module: {"A": (rank, in), "B": (out, rank)}} of a PEFT LoRA file."""
    from safetensors import SafetensorError, safe_open

    factors: dict[str, dict[str, NDArray[Any]]] = {}
    try:
        with safe_open(weights, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                match = _PEFT_NAME.fullmatch(name)
                if match is None:
                    what = "adapts the embeddings" if "lora_embedding" in name else "is no LoRA factor"
                    raise AdapterError(f"{weights} holds {name}, which {what}: only plain LoRA on linear layers can be used")
                factors.setdefault(match["module"], {})[match["factor"]] = _float_tensor(file, weights, name)
    except (OSError, SafetensorError) as exc:
        raise AdapterError(f"{weights} is no complete safetensors file ({exc}): train or fetch the adapter again") from exc
    for module, pair in factors.items():
        if set(pair) != {"A", "B"} or pair["A"].ndim != 2 or pair["B"].ndim != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise AdapterError(f"{weights}: {module} has no matching pair of LoRA factors; train or fetch the adapter again")
    if not factors:
        raise AdapterError(f"{weights} holds no LoRA factors: name an adapter that was trained")
    return factors


def _float_tensor(file: Any, weights: Path, name: str) -> NDArray[Any]:
    dtype = file.get_slice(name).get_dtype()
    if dtype in ("F16", "F32", "F64"):
        return np.asarray(file.get_tensor(name))
    if dtype != "BF16":
        raise AdapterError(f"{weights} holds {name} as {dtype}: save the adapter in F32, F16 or BF16")
    from safetensors import safe_open  # numpy has no bfloat16; torch has

    with safe_open(weights, framework="pt") as torch_file:
        return np.asarray(torch_file.get_tensor(name).float().numpy())


def _alpha(config: dict[str, Any], module: str, rank: int) -> float:
    """The numerator that makes alpha / rank PEFT's scaling (alpha / sqrt(rank) with rank-stabilised LoRA)."""
    alpha = float(config["lora_alpha"])
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):  # the first that fits, as PEFT's get_pattern_key chooses
            alpha = float(own)
            break
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def place(factors: Mapping[str, Factors], layout: Layout, adapter_id: str) -> dict[str, tuple[Part, ...]]:
    """The factors by GGUF tensor, their rows in its order.

    Raises AdapterError where the adapter was made for another base model.
    """
    names = _name_map(layout)
    placed: dict[str, tuple[Part, ...]] = {}
    for module, pair in sorted(factors.items()):
        name = names.get_name(module)
        if name is not None and f"{name}.weight" in layout.shapes:
            tensor, first, shape = f"{name}.weight", 0, layout.shapes[f"{name}.weight"]
        else:
            tensor, first, shape = _fused(name, module, layout, adapter_id)
        if (pair.b.shape[0], pair.a.shape[1]) != shape:
            raise AdapterError(
                f"Adapter {adapter_id} was made for another base model: its {module} is {pair.b.shape[0]} x {pair.a.shape[1]}, "
                f"this model's {' x '.join(map(str, shape))}"
            )
        b = permute_rows(pair.b, layout.heads_of(tensor)) if is_permuted(tensor, layout.architecture) else pair.b
        placed[tensor] = (*placed.get(tensor, ()), Part(first, Factors(pair.a, b, pair.alpha)))
    return {tensor: tuple(sorted(parts, key=lambda part: part.first_row)) for tensor, parts in placed.items()}


def _fused(name: str | None, module: str, layout: Layout, adapter_id: str) -> tuple[str, int, tuple[int, int]]:
    """(tensor, first row, shape) of q, k or v within attn_qkv, where the GGUF keeps them in one."""
    block, _, part = (name or "").rpartition(".")
    tensor = f"{block}.attn_qkv.weight"
    if part not in QKV or tensor not in layout.shapes:
        raise AdapterError(f"Adapter {adapter_id} was made for another base model: it adapts {module}, which this model lacks")
    if layout.architecture != "phi2":  # others may order or permute the rows in ways of their own
        raise AdapterError(
            f"The GGUF keeps q, k and v in one tensor (attn_qkv), {adapter_id} adapts {module}: convert the model "
            "again with a current convert_hf_to_gguf.py, which keeps them apart"
        )
    rows, width = layout.shapes[tensor]
    head = rows // (layout.heads + 2 * layout.kv_heads)
    sizes = {"attn_q": layout.heads * head, "attn_k": layout.kv_heads * head, "attn_v": layout.kv_heads * head}
    first = sum(sizes[before] for before in QKV[: QKV.index(part)])
    return tensor, first, (sizes[part], width)


def _name_map(layout: Layout) -> Any:
    import gguf

    for member, name in gguf.MODEL_ARCH_NAMES.items():
        if name == layout.architecture:
            return gguf.get_tensor_name_map(member, layout.blocks)
    raise AdapterError(f"llama.cpp's architecture {layout.architecture!r} is unknown to the gguf package: update gguf")
