"""Adapter -> LoRA GGUF, for llama.cpp. (A merged, quantized GGUF is not written here yet.)

A LoRA GGUF holds, per adapted matrix of shape (out, in): `NAME.weight.lora_a` (rank, in) and `NAME.weight.lora_b` (out, rank),
and the scale numerator `adapter.lora.alpha`, so that W + strength * alpha / rank * B @ A is the tuned matrix.
Format: llama.cpp, src/llama-adapter.cpp and convert_lora_to_gguf.py.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biasdpo.errors import AdapterError
from biasdpo.modelfile import gguf_value, open_gguf
from biasdpo.models import AdapterSpec
from biasdpo.workspace import Workspace, locked, read_json, refuse_on_public_space, replacing, sha256_of

_PEFT_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")
# PEFT features that a plain pair (A, B) does not carry.
_UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "layer_replication",
)


def lora(adapter: AdapterSpec, base_gguf: Path, out: Path) -> Path:
    """Write `adapter` as a LoRA GGUF for the base model in `base_gguf`; return `out`.

    Raises AdapterError where the adapter was made for another base model, or uses what a LoRA GGUF can't hold.
    """
    config = read_json(adapter.folder / "adapter_config.json")
    used = [name for name in _UNSUPPORTED if config.get(name)]
    if used:
        raise AdapterError(
            f"Adapter {adapter.id} uses {', '.join(used)}, which a LoRA GGUF can't hold: use --backend transformers"
        )
    factors = load_factors(adapter.weights)
    base = open_gguf(base_gguf)
    tensors, rank = _renamed(factors, base, adapter.id)
    alphas = {_alpha(config, module, rank) for module in factors}
    if len(alphas) > 1:
        raise AdapterError(
            f"Adapter {adapter.id} has an alpha of its own per layer: a LoRA GGUF holds one; use --backend transformers"
        )
    _write(out, str(gguf_value(base, "general.architecture")), alphas.pop(), tensors, adapter)
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


def load_factors(weights: Path) -> dict[str, dict[str, NDArray[Any]]]:
    """{module: {"A": (rank, in), "B": (out, rank)}} of a PEFT LoRA file."""
    from safetensors import SafetensorError, safe_open

    factors: dict[str, dict[str, NDArray[Any]]] = {}
    try:
        with safe_open(weights, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                match = _PEFT_NAME.fullmatch(name)
                if match is None:
                    raise AdapterError(f"{weights} holds {name}, which is no LoRA factor: only plain LoRA adapters can be used")
                factors.setdefault(match["module"], {})[match["factor"]] = _float_tensor(file, weights, name)
    except (OSError, SafetensorError) as exc:
        raise AdapterError(f"{weights} is no complete safetensors file ({exc}): train or fetch the adapter again") from exc
    for module, pair in factors.items():
        if set(pair) != {"A", "B"} or pair["A"].ndim != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise AdapterError(f"{weights}: {module} has no matching pair of LoRA factors; train or fetch the adapter again")
    if not factors:
        raise AdapterError(f"{weights} holds no LoRA factors: name an adapter that was trained")
    return factors


def _float_tensor(file: Any, weights: Path, name: str) -> NDArray[Any]:
    if file.get_slice(name).get_dtype() != "BF16":
        return np.asarray(file.get_tensor(name))
    from safetensors import safe_open  # numpy has no bfloat16; torch has

    with safe_open(weights, framework="pt") as torch_file:
        return np.asarray(torch_file.get_tensor(name).float().numpy())


def _renamed(factors: dict[str, dict[str, NDArray[Any]]], base: Any, adapter_id: str) -> tuple[dict[str, NDArray[Any]], int]:
    """PEFT's modules under GGUF's names, rows permuted where the architecture asks for it; and their common rank."""
    architecture = str(gguf_value(base, "general.architecture"))
    blocks = int(gguf_value(base, f"{architecture}.block_count"))
    names = _name_map(architecture, blocks)
    shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in base.tensors}
    heads = int(gguf_value(base, f"{architecture}.attention.head_count"))
    kv_heads = int(gguf_value(base, f"{architecture}.attention.head_count_kv", heads))
    tensors: dict[str, NDArray[Any]] = {}
    ranks = set()
    for module, pair in sorted(factors.items()):
        name = names.get_name(module)
        if name is None or f"{name}.weight" not in shapes:
            if name is not None and re.sub(r"attn_[qkv]$", "attn_qkv", name) + ".weight" in shapes:
                raise AdapterError(
                    f"The GGUF keeps q, k and v in one tensor (attn_qkv), {adapter_id} adapts {module}: convert the model "
                    "again with a current convert_hf_to_gguf.py, which keeps them apart"
                )
            raise AdapterError(
                f"Adapter {adapter_id} was made for another base model: it adapts {module}, which this model lacks"
            )
        a, b = pair["A"], pair["B"]
        if (b.shape[0], a.shape[1]) != shapes[f"{name}.weight"]:
            raise AdapterError(
                f"Adapter {adapter_id} was made for another base model: its {module} is {b.shape[0]} x {a.shape[1]}, "
                f"this model's {' x '.join(map(str, shapes[f'{name}.weight']))}"
            )
        if architecture == "llama" and name.endswith(("attn_q", "attn_k")):
            b = permute_rows(b, heads if name.endswith("attn_q") else kv_heads)
        tensors[f"{name}.weight.lora_a"] = a
        tensors[f"{name}.weight.lora_b"] = b
        ranks.add(a.shape[0])
    if len(ranks) > 1:
        raise AdapterError(
            f"Adapter {adapter_id} has ranks {sorted(ranks)}: a LoRA GGUF holds one alpha; use --backend transformers"
        )
    return tensors, ranks.pop()


def _name_map(architecture: str, blocks: int) -> Any:
    import gguf

    for member, name in gguf.MODEL_ARCH_NAMES.items():
        if name == architecture:
            return gguf.get_tensor_name_map(member, blocks)
    raise AdapterError(f"llama.cpp's architecture {architecture!r} is unknown to the gguf package: update gguf")


def permute_rows(matrix: NDArray[Any], heads: int) -> NDArray[Any]:
    """Reorder the output rows, (heads * d, ...), from Hugging Face's rotary layout (two halves) to GGUF's (pairs)."""
    rows = matrix.shape[0]
    halves = matrix.reshape(heads, 2, rows // heads // 2, *matrix.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(matrix.shape))


def _alpha(config: dict[str, Any], module: str, rank: int) -> float:
    """The numerator that makes GGUF's alpha / rank PEFT's scaling (alpha / sqrt(rank) with rank-stabilised LoRA)."""
    alpha = float(config["lora_alpha"])
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if re.search(rf"(^|\.){pattern}$", module):
            alpha = float(own)
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _write(out: Path, architecture: str, alpha: float, tensors: dict[str, NDArray[Any]], adapter: AdapterSpec) -> None:
    import gguf

    with replacing(out) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        writer.add_name(adapter.id)
        writer.add_string("biasdpo.adapter_sha256", sha256_of(adapter.weights))
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor if tensor.dtype == np.float16 else tensor.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
