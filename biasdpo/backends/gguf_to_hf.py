"""Writes a GGUF's model as a Hugging Face folder, in F32, so that it is what llama.cpp computes with.

Written here rather than with transformers' `gguf_file=`, which knows no phi2, holds the whole model in memory, and loses
the pre-tokenizer (see `gguf_tokenizer`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biasdpo.backends.gguf_tokenizer import Vocabulary, write_tokenizer
from biasdpo.errors import ModelError
from biasdpo.gguf_names import MODULES, QKV, hf_name, is_permuted, unpermute_rows
from biasdpo.modelfile import gguf_value, open_gguf
from biasdpo.workspace import write_json


def write_hf_folder(gguf_path: Path, folder: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer's files of a GGUF's model."""
    reader = open_gguf(gguf_path)
    architecture = str(gguf_value(reader, "general.architecture", ""))
    if architecture not in MODULES:
        raise ModelError(
            f"{gguf_path.name} is of the architecture {architecture!r}, of which no transformers copy can be made (only of "
            f"{', '.join(MODULES)}): use --backend llamacpp, or fetch the model's Hugging Face folder"
        )
    vocabulary = Vocabulary.of_gguf(reader, gguf_path)
    write_json(folder / "config.json", _config(reader, architecture, vocabulary))
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": vocabulary.bos, "eos_token_id": vocabulary.ends, "pad_token_id": vocabulary.pad},
    )
    write_tokenizer(folder, reader, vocabulary)
    _write_safetensors(folder / "model.safetensors", reader, architecture, gguf_path)


# Config


def _config(reader: Any, architecture: str, vocabulary: Vocabulary) -> dict[str, Any]:
    def value(key: str, default: Any = None) -> Any:
        found = gguf_value(reader, f"{architecture}.{key}", default)
        if found is None:
            raise ModelError(f"The GGUF has no {architecture}.{key}: it is damaged or of an unknown kind; fetch it again")
        return found

    scaling = gguf_value(reader, f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise ModelError(
            f"The GGUF stretches its context by {scaling!r} rope scaling, which a transformers copy made here can't: fetch the "
            "model's Hugging Face folder"
        )
    names = {tensor.name: tensor for tensor in reader.tensors}
    width, heads = int(value("embedding_length")), int(value("attention.head_count"))
    head_width = int(value("attention.key_length", width // heads))
    rotary = int(value("rope.dimension_count", head_width))
    common = {
        "vocab_size": int(names["token_embd.weight"].shape[1]) if "token_embd.weight" in names else len(vocabulary.tokens),
        "hidden_size": width,
        "intermediate_size": int(value("feed_forward_length")),
        "num_hidden_layers": int(value("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(value("attention.head_count_kv", heads)),
        "max_position_embeddings": int(value("context_length")),
        "rope_theta": float(value("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "pad_token_id": vocabulary.pad,
        "dtype": "float32",
    }
    if architecture == "phi2":
        return {
            "architectures": ["PhiForCausalLM"],
            "model_type": "phi",
            **common,
            "layer_norm_eps": float(value("attention.layer_norm_epsilon")),
            "partial_rotary_factor": rotary / head_width,
            "hidden_act": "gelu_new",
            "qk_layernorm": False,
        }
    if rotary != head_width:
        raise ModelError(f"The GGUF rotates {rotary} of {head_width} dimensions, which LlamaForCausalLM can't: use llamacpp")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **common,
        "rms_norm_eps": float(value("attention.layer_norm_rms_epsilon")),
        "head_dim": head_width,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


# Weights


def _write_safetensors(path: Path, reader: Any, architecture: str, gguf_path: Path) -> None:
    """Write all tensors in F32, one in memory at a time. Format: https://huggingface.co/docs/safetensors (8 bytes of header
    length, a JSON header, the data)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in reader.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        for name, part in _hf_names(tensor.name, architecture, gguf_path, shape):
            size = 4 * int(np.prod(part))
            header[name] = {"dtype": "F32", "shape": part, "data_offsets": [offset, offset + size]}
            offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    heads = int(gguf_value(reader, f"{architecture}.attention.head_count"))
    kv_heads = int(gguf_value(reader, f"{architecture}.attention.head_count_kv", heads))
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for tensor in reader.tensors:
            weights = _dequantized(tensor, gguf_path)
            if is_permuted(tensor.name, architecture):
                weights = unpermute_rows(weights, heads if ".attn_q." in tensor.name else kv_heads)
            file.write(np.ascontiguousarray(weights, dtype="<f4").data)  # a fused qkv is its three parts, one after the other
        file.flush()
        os.fsync(file.fileno())


def _hf_names(name: str, architecture: str, gguf_path: Path, shape: list[int]) -> Iterator[tuple[str, list[int]]]:
    """The Hugging Face tensor(s) that a GGUF tensor becomes, with their shapes."""
    block, fused, rest = name.rpartition("attn_qkv.")
    if fused and architecture == "phi2":
        for part in QKV:
            yield str(hf_name(f"{block}{part}.{rest}", architecture)), [shape[0] // 3, *shape[1:]]
        return
    theirs = hf_name(name, architecture)
    if theirs is not None and (theirs.endswith(".weight") or (theirs.endswith(".bias") and architecture == "phi2")):
        yield theirs, shape
        return
    raise ModelError(
        f"{gguf_path.name} holds {name}, which a transformers copy made here has no place for: use --backend llamacpp, or "
        "fetch the model's Hugging Face folder"
    )


def _dequantized(tensor: Any, gguf_path: Path) -> NDArray[np.float32]:
    from gguf import dequantize

    try:
        weights: NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as exc:
        raise ModelError(
            f"{gguf_path.name} holds {tensor.name} as {tensor.tensor_type.name}, which the gguf package can't decode: fetch "
            "another quantization"
        ) from exc
    return weights
