"""Writes a GGUF's model as a Hugging Face folder, in F32, so that it is what llama.cpp computes with.

Written here rather than with transformers' `gguf_file=`, which knows no phi2, holds the whole model in memory, and loses
the pre-tokenizer (see `gguf_tokenizer`)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biasdpo.errors import ModelError
from biasdpo.model_files import (
    END_TOKENS,
    MODULES,
    QKV,
    TokenType,
    gguf_value,
    hf_name,
    is_permuted,
    open_gguf,
    pre_tokenizer_of,
    unpermute_rows,
)
from biasdpo.workspace import write_json

# --- gguf tokenizer: Writes a GGUF's tokenizer as Hugging Face's files: byte-level BPE with the pre-tokenizer that `


@dataclass(frozen=True)
class Vocabulary:
    """A GGUF's tokens by id, and those with a role."""

    tokens: list[str]
    types: list[int]
    eos: int
    ends: list[int]  # every token that ends a completion, eos first
    bos: int | None
    pad: int
    unknown: int | None

    @classmethod
    def of_gguf(cls, reader: Any, gguf_path: Path) -> Vocabulary:
        model = gguf_value(reader, "tokenizer.ggml.model")
        if model != "gpt2":
            raise ModelError(
                f"{gguf_path.name} has a {model!r} tokenizer; a transformers copy is made of byte-level BPE ('gpt2') alone: use "
                "--backend llamacpp, or fetch the model's Hugging Face folder"
            )
        tokens = gguf_value(reader, "tokenizer.ggml.tokens")
        types = gguf_value(reader, "tokenizer.ggml.token_type", [1] * len(tokens))
        eos = gguf_value(reader, "tokenizer.ggml.eos_token_id")
        if eos is None:
            raise ModelError(f"{gguf_path.name} names no end-of-text token: fetch or export it again")
        named = [gguf_value(reader, f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom")]
        by_text = [
            i
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind == TokenType.CONTROL and token in END_TOKENS
        ]
        ends = dict.fromkeys([eos, *(i for i in named if i is not None), *by_text])
        return cls(
            tokens,
            types,
            eos=int(eos),
            ends=[int(i) for i in ends],
            bos=gguf_value(reader, "tokenizer.ggml.bos_token_id"),
            pad=gguf_value(reader, "tokenizer.ggml.padding_token_id", int(eos)),
            unknown=gguf_value(reader, "tokenizer.ggml.unknown_token_id"),
        )


def write_tokenizer(folder: Path, reader: Any, vocabulary: Vocabulary) -> None:
    """tokenizer.json, tokenizer_config.json and, where the GGUF has a chat template, chat_template.jinja."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    tokens, types = vocabulary.tokens, vocabulary.types
    merges = gguf_value(reader, "tokenizer.ggml.merges", [])
    kept = {token: i for i, token in enumerate(tokens) if types[i] != TokenType.UNUSED}  # [PAD51199] and the like are no text
    pairs = []
    for merge in merges:
        left, right = merge[0] + merge[1:].split(" ", 1)[0], merge[1:].split(" ", 1)[1]
        pairs.append((left, right))
    bpe = Tokenizer(models.BPE(vocab=kept, merges=pairs, fuse_unk=False))
    bpe.pre_tokenizer = _pre_tokenizer(reader, kept)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, i in kept.items() if types[i] == TokenType.CONTROL]
    )
    bpe.add_tokens(
        [AddedToken(t, special=False, normalized=False) for t, i in kept.items() if types[i] == TokenType.USER_DEFINED]
    )
    if gguf_value(reader, "tokenizer.ggml.add_bos_token", False) and vocabulary.bos is not None:
        begin = tokens[vocabulary.bos]
        bpe.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, vocabulary.bos)])
    bpe.save(str(folder / "tokenizer.json"))
    special = {
        "bos_token": vocabulary.bos,
        "eos_token": vocabulary.eos,
        "pad_token": vocabulary.pad,
        "unk_token": vocabulary.unknown,
    }
    write_json(
        folder / "tokenizer_config.json",
        {
            # Not the model's own class: transformers 5 would build its own pre-tokenizer for that.
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{key: tokens[i] for key, i in special.items() if i is not None},
            "model_max_length": int(gguf_value(reader, f"{gguf_value(reader, 'general.architecture')}.context_length", 2048)),
            "clean_up_tokenization_spaces": False,
        },
    )
    chat = gguf_value(reader, "tokenizer.chat_template")
    if chat:
        (folder / "chat_template.jinja").write_text(chat, encoding="utf-8")


def _pre_tokenizer(reader: Any, vocabulary: dict[str, int]) -> Any:
    """Where text is cut before BPE, by the name that llama.cpp has for it (src/llama-vocab.cpp, regex_exprs)."""
    from tokenizers import Regex, pre_tokenizers

    pre = pre_tokenizer_of(reader)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), byte_level]
    elif pre in ("gpt-2", "phi-2"):
        steps = [byte_level]
    else:
        raise ModelError(
            f"The GGUF's pre-tokenizer is {pre!r}; known are smollm, gpt-2 and phi-2: use --backend llamacpp, or fetch the "
            "model's Hugging Face folder"
        )
    # A byte that the vocabulary lacks (SmolLM2: control characters) is dropped by both tokenizers, but `tokenizers` would
    # then merge its two neighbours, which llama.cpp does not: keep them apart.
    missing = "".join(sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(vocabulary)))
    if missing:
        steps.append(pre_tokenizers.Split(Regex(f"[{re.escape(missing)}]"), "isolated"))
    return pre_tokenizers.Sequence(steps)


# --- gguf to hf: Writes a GGUF's model as a Hugging Face folder, in F32, so that it is what llama.cpp computes w


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
