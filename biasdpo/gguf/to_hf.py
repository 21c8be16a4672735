"""GGUF -> Hugging Face folder in F32, so that transformers computes with exactly llama.cpp's weights and tokens.

Not done with transformers' `gguf_file=`, which does not support phi2, holds the whole model in memory, and loses the
pre-tokenizer.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from biasdpo.errors import ModelError
from biasdpo.gguf.quantize import decode
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

_REMEDY = "use --backend llamacpp, or fetch the model's Hugging Face folder"


def write_hf_folder(gguf_path: Path, folder: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer's files of a GGUF's model."""
    reader = open_gguf(gguf_path)
    architecture = str(gguf_value(reader, "general.architecture", ""))
    if architecture not in MODULES:
        known = " and ".join(MODULES)
        raise ModelError(f"{gguf_path.name} has the architecture {architecture!r}; only {known} can be converted: {_REMEDY}")
    try:
        vocabulary = _Vocabulary.of_gguf(reader, gguf_path)
        write_json(folder / "config.json", _config(reader, architecture, vocabulary))
        write_json(
            folder / "generation_config.json",
            {"bos_token_id": vocabulary.bos, "eos_token_id": vocabulary.ends, "pad_token_id": vocabulary.pad},
        )
        _write_tokenizer(folder, reader, vocabulary)
    except (ModelError, OSError):
        raise
    except Exception as exc:  # of damaged metadata; `tokenizers` raises bare Exceptions
        raise ModelError(f"{gguf_path.name} has damaged metadata ({type(exc).__name__}: {exc}): fetch it again") from exc
    _write_safetensors(folder / "model.safetensors", reader, architecture, gguf_path)


# Config

# GGUF's keys of an architecture -> config.json's.
CONFIG_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
}


def _config(reader: Any, architecture: str, vocabulary: _Vocabulary) -> dict[str, Any]:
    def value(key: str, default: Any = None) -> Any:
        found = gguf_value(reader, f"{architecture}.{key}", default)
        if found is None:
            raise ModelError(f"The GGUF has no {architecture}.{key}: it is damaged or of an unknown kind; fetch it again")
        return found

    scaling = gguf_value(reader, f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise ModelError(f"The GGUF uses {scaling!r} rope scaling, which can't be converted for transformers here: {_REMEDY}")
    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
    width, heads = int(value("embedding_length")), int(value("attention.head_count"))
    head_width = int(value("attention.key_length", width // heads))
    rotary = int(value("rope.dimension_count", head_width))
    common = {
        "vocab_size": int(shapes["token_embd.weight"][1]) if "token_embd.weight" in shapes else len(vocabulary.tokens),
        **{theirs: int(value(ours)) for ours, theirs in CONFIG_KEYS.items()},
        "num_key_value_heads": int(value("attention.head_count_kv", heads)),
        "rope_theta": float(value("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in shapes,
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
        raise ModelError(f"The GGUF rotates {rotary} of {head_width} dimensions, which LlamaForCausalLM can't: {_REMEDY}")
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


# Tokenizer: byte-level BPE with the pre-tokenizer that the GGUF names


@dataclass(frozen=True)
class _Vocabulary:
    """A GGUF's tokens by id, and its special ones. `ends`: all tokens that end a completion, `eos` first."""

    tokens: list[str]
    types: list[int]
    eos: int
    ends: list[int]
    bos: int | None
    pad: int
    unknown: int | None

    @classmethod
    def of_gguf(cls, reader: Any, gguf_path: Path) -> _Vocabulary:
        model = gguf_value(reader, "tokenizer.ggml.model")
        if model != "gpt2":
            raise ModelError(f"{gguf_path.name} has a {model!r} tokenizer, not byte-level BPE ('gpt2'): {_REMEDY}")
        tokens = gguf_value(reader, "tokenizer.ggml.tokens")
        types = gguf_value(reader, "tokenizer.ggml.token_type", [1] * len(tokens))
        roles = ("eos", "eot", "eom", "bos", "padding", "unknown")
        eos, eot, eom, bos, pad, unknown = (gguf_value(reader, f"tokenizer.ggml.{role}_token_id") for role in roles)
        if eos is None:
            raise ModelError(f"{gguf_path.name} names no end-of-text token: fetch or export it again")
        pairs = enumerate(zip(tokens, types, strict=True))
        well_known = (i for i, (token, kind) in pairs if kind == TokenType.CONTROL and token in END_TOKENS)
        ends = dict.fromkeys(int(i) for i in (eos, eot, eom, *well_known) if i is not None)
        return cls(tokens, types, int(eos), list(ends), bos, int(eos if pad is None else pad), unknown)


def _write_tokenizer(folder: Path, reader: Any, vocabulary: _Vocabulary) -> None:
    """Write tokenizer.json, tokenizer_config.json and, if the GGUF has a chat template, chat_template.jinja."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    tokens, types = vocabulary.tokens, vocabulary.types
    used = {token: i for i, token in enumerate(tokens) if types[i] != TokenType.UNUSED}  # [PAD51199] and the like are no text
    merges = gguf_value(reader, "tokenizer.ggml.merges", [])
    pairs = [(merge[0] + left, right) for merge in merges for left, right in [merge[1:].split(" ", 1)]]  # " " may be a token
    bpe = Tokenizer(models.BPE(vocab=used, merges=pairs, fuse_unk=False))
    pre = pre_tokenizer_of(reader)
    if pre not in ("smollm", "gpt-2", "phi-2"):
        raise ModelError(f"The GGUF's pre-tokenizer is {pre!r}; supported are smollm, gpt-2 and phi-2: {_REMEDY}")
    bpe.pre_tokenizer = build_pre_tokenizer(pre, used)
    bpe.decoder = decoders.ByteLevel()
    for kind, special, add in (
        (TokenType.CONTROL, True, bpe.add_special_tokens),
        (TokenType.USER_DEFINED, False, bpe.add_tokens),
    ):
        add([AddedToken(token, special=special, normalized=False) for token, i in used.items() if types[i] == kind])
    if gguf_value(reader, "tokenizer.ggml.add_bos_token", False) and vocabulary.bos is not None:
        begin = tokens[vocabulary.bos]
        bpe.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, vocabulary.bos)])
    bpe.save(str(folder / "tokenizer.json"))
    special_ids = {"bos": vocabulary.bos, "eos": vocabulary.eos, "pad": vocabulary.pad, "unk": vocabulary.unknown}
    write_json(
        folder / "tokenizer_config.json",
        {
            # Not the model's own class, for which transformers 5 would build its own pre-tokenizer.
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{role}_token": tokens[i] for role, i in special_ids.items() if i is not None},
            "model_max_length": int(gguf_value(reader, f"{gguf_value(reader, 'general.architecture')}.context_length", 2048)),
            "clean_up_tokenization_spaces": False,
        },
    )
    chat = gguf_value(reader, "tokenizer.chat_template")
    if chat:
        (folder / "chat_template.jinja").write_text(chat, encoding="utf-8")


def build_pre_tokenizer(name: str, vocabulary: Mapping[str, int] | None = None) -> Any:
    """How text is split before BPE, by llama.cpp's name for it (src/llama-vocab.cpp, regex_exprs)."""
    from tokenizers import Regex, pre_tokenizers

    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if name == "smollm" else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    # Both tokenizers drop a byte that the vocabulary lacks (SmolLM2: control characters), but `tokenizers` would then merge its
    # two neighbors, which llama.cpp does not: keep them apart.
    missing = "".join(sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(vocabulary))) if vocabulary is not None else ""
    if missing:
        steps.append(pre_tokenizers.Split(Regex(f"[{re.escape(missing)}]"), "isolated"))
    return pre_tokenizers.Sequence(steps)


# Weights


def _write_safetensors(path: Path, reader: Any, architecture: str, gguf_path: Path) -> None:
    """Write all tensors in F32, one in memory at a time. Format: https://huggingface.co/docs/safetensors (8 bytes of header
    length, a JSON header, the data)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in reader.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        for name, part in _hf_names(tensor.name, architecture, gguf_path, shape):
            end = offset + 4 * prod(part)
            header[name] = {"dtype": "F32", "shape": part, "data_offsets": [offset, end]}
            offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    heads = int(gguf_value(reader, f"{architecture}.attention.head_count"))
    kv_heads = int(gguf_value(reader, f"{architecture}.attention.head_count_kv", heads))
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in reader.tensors:
            weights = decode(tensor.data, tensor.tensor_type, f"{gguf_path.name}: {tensor.name}")
            if is_permuted(tensor.name, architecture):
                weights = unpermute_rows(weights, heads if ".attn_q." in tensor.name else kv_heads)
            file.write(np.ascontiguousarray(weights, dtype="<f4").data)  # a fused qkv is its three parts in order
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
    if theirs is None or not (theirs.endswith(".weight") or (theirs.endswith(".bias") and architecture == "phi2")):
        raise ModelError(f"{gguf_path.name} holds {name}, which has no place in a Hugging Face folder: {_REMEDY}")
    yield theirs, shape
