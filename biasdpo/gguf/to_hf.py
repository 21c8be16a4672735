"""GGUF -> Hugging Face folder in F32, so that transformers computes with exactly llama.cpp's weights and tokens.

Not done with transformers' `gguf_file=`, which does not support phi2, holds the whole model in memory, and loses the
pre-tokenizer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from biasdpo.errors import ModelError
from biasdpo.gguf.quantize import decode
from biasdpo.gguf.sources import CONFIG_KEYS, Layout, build_pre_tokenizer, map_tensors
from biasdpo.model_files import END_TOKENS, MODULES, QKV, Header, TokenType, hf_name, read_header, refuse_parts
from biasdpo.workspace import write_json

_REMEDY = "use --backend llamacpp, or fetch the model's Hugging Face folder"


def write_hf_folder(gguf_path: Path, folder: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer's files of a GGUF's model."""
    refuse_parts(gguf_path)
    header = read_header(gguf_path)
    if header.architecture not in MODULES:
        known = " and ".join(MODULES)
        raise ModelError(
            f"{gguf_path.name} has the architecture {header.architecture!r}; only {known} can be converted: {_REMEDY}"
        )
    try:
        vocabulary = _Vocabulary.of(header)
        ids = {"bos_token_id": vocabulary.bos, "pad_token_id": vocabulary.pad}
        write_json(folder / "config.json", _config(header) | ids | {"eos_token_id": vocabulary.ends[0]})
        write_json(folder / "generation_config.json", ids | {"eos_token_id": vocabulary.ends})
        _write_tokenizer(folder, header, vocabulary)
    except (ModelError, OSError):
        raise
    except Exception as exc:  # of damaged metadata; `tokenizers` raises bare Exceptions
        raise ModelError(f"{gguf_path.name} has damaged metadata ({type(exc).__name__}: {exc}): fetch it again") from exc
    _write_safetensors(folder / "model.safetensors", header)


def _config(header: Header) -> dict[str, Any]:
    def value(key: str, default: Any = None) -> Any:
        found = header.values.get(f"{header.architecture}.{key}", default)
        if found is None:
            raise ModelError(
                f"{header.path.name} has no {header.architecture}.{key}: it is damaged or of an unknown kind; fetch it again"
            )
        return found

    is_phi = header.architecture == "phi2"
    scaling = value("rope.scaling.type", "none")
    if scaling != "none":
        raise ModelError(f"{header.path.name} uses {scaling!r} rope scaling, which can't be converted: {_REMEDY}")
    heads = int(value("attention.head_count"))
    head = int(value("attention.key_length", int(value("embedding_length")) // heads))
    rotary = int(value("rope.dimension_count", head))
    if rotary != head and not is_phi:
        raise ModelError(f"{header.path.name} rotates {rotary} of {head} dimensions, which LlamaForCausalLM can't: {_REMEDY}")
    embeddings = header.tensors.get("token_embd.weight")
    common = {
        "architectures": ["PhiForCausalLM" if is_phi else "LlamaForCausalLM"],
        "model_type": "phi" if is_phi else "llama",
        "vocab_size": embeddings.shape[0] if embeddings is not None else len(header.values["tokenizer.ggml.tokens"]),
        **{theirs: int(value(ours)) for ours, theirs in CONFIG_KEYS.items()},
        "num_key_value_heads": int(value("attention.head_count_kv", heads)),
        "rope_theta": float(value("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "dtype": "float32",
    }
    if is_phi:
        epsilon, share = float(value("attention.layer_norm_epsilon")), rotary / head
        own = {"layer_norm_eps": epsilon, "partial_rotary_factor": share, "hidden_act": "gelu_new", "qk_layernorm": False}
        return common | own
    epsilon = float(value("attention.layer_norm_rms_epsilon"))
    return common | {
        "rms_norm_eps": epsilon, "head_dim": head, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False
    }  # fmt: skip


# Tokenizer: byte-level BPE with the pre-tokenizer that the GGUF names


@dataclass(frozen=True)
class _Vocabulary:
    """A GGUF's tokens by id, and its special ones. `ends`: all tokens that end a completion, the end-of-text token first."""

    tokens: list[str]
    types: list[int]
    ends: list[int]
    bos: int | None
    pad: int
    unknown: int | None

    @classmethod
    def of(cls, header: Header) -> _Vocabulary:
        values = {key.removeprefix("tokenizer.ggml."): value for key, value in header.values.items()}
        if values.get("model") != "gpt2":
            raise ModelError(
                f"{header.path.name} has a {values.get('model')!r} tokenizer, not byte-level BPE ('gpt2'): {_REMEDY}"
            )
        tokens = values["tokens"]
        types = values.get("token_type", [1] * len(tokens))
        roles = ("eos", "eot", "eom", "bos", "padding", "unknown")
        eos, eot, eom, bos, pad, unknown = (values.get(f"{role}_token_id") for role in roles)
        if eos is None:
            raise ModelError(f"{header.path.name} names no end-of-text token: fetch or export it again")
        pairs = enumerate(zip(tokens, types, strict=True))
        well_known = (i for i, (token, kind) in pairs if kind == TokenType.CONTROL and token in END_TOKENS)
        ends = dict.fromkeys(int(i) for i in (eos, eot, eom, *well_known) if i is not None)
        return cls(tokens, types, list(ends), bos, int(eos if pad is None else pad), unknown)


def _write_tokenizer(folder: Path, header: Header, vocabulary: _Vocabulary) -> None:
    """Write tokenizer.json, tokenizer_config.json and, if the GGUF has a chat template, chat_template.jinja."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    tokens, types, values = vocabulary.tokens, vocabulary.types, header.values
    used = {token: i for i, token in enumerate(tokens) if types[i] != TokenType.UNUSED}  # [PAD51199] and the like are no text
    merges = values.get("tokenizer.ggml.merges", [])
    pairs = [(merge[0] + left, right) for merge in merges for left, right in [merge[1:].split(" ", 1)]]  # " " may be a token
    bpe = Tokenizer(models.BPE(vocab=used, merges=pairs, fuse_unk=False))
    pre = header.pre_tokenizer
    if pre not in ("smollm", "gpt-2", "phi-2"):
        raise ModelError(
            f"{header.path.name}'s pre-tokenizer is {pre or None!r}; supported are smollm, gpt-2 and phi-2: {_REMEDY}"
        )
    bpe.pre_tokenizer = build_pre_tokenizer(pre, used)
    bpe.decoder = decoders.ByteLevel()
    for kind, special, add in (
        (TokenType.CONTROL, True, bpe.add_special_tokens),
        (TokenType.USER_DEFINED, False, bpe.add_tokens),
    ):
        add([AddedToken(token, special=special, normalized=False) for token, i in used.items() if types[i] == kind])
    if values.get("tokenizer.ggml.add_bos_token") and vocabulary.bos is not None:
        begin = tokens[vocabulary.bos]
        bpe.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, vocabulary.bos)])
    bpe.save(str(folder / "tokenizer.json"))
    special_ids = {"bos": vocabulary.bos, "eos": vocabulary.ends[0], "pad": vocabulary.pad, "unk": vocabulary.unknown}
    write_json(
        folder / "tokenizer_config.json",
        {
            # Not the model's own class, for which transformers 5 would build its own pre-tokenizer.
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{role}_token": tokens[i] for role, i in special_ids.items() if i is not None},
            "model_max_length": int(values.get(f"{header.architecture}.context_length", 2048)),
            "clean_up_tokenization_spaces": False,
        },
    )
    if chat := values.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(chat, encoding="utf-8")


# Weights


def _write_safetensors(path: Path, header: Header) -> None:
    """Write all tensors in F32, one in memory at a time. Format: https://huggingface.co/docs/safetensors (8 bytes of header
    length, a JSON header, the data)."""
    index: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor, info in header.tensors.items():
        for name, shape in _hf_names(tensor, header, info.shape):
            end = offset + 4 * prod(shape)
            index[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
    encoded = json.dumps(index).encode()
    encoded += b" " * (-len(encoded) % 8)
    layout = Layout.of(header)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for stored in map_tensors(header):
            weights = layout.permute(
                stored.name, decode(stored.data, stored.kind, f"{header.path.name}: {stored.name}"), back=True
            )
            file.write(np.ascontiguousarray(weights, dtype="<f4").data)  # a fused qkv is its three parts in order
        file.flush()
        os.fsync(file.fileno())


def _hf_names(name: str, header: Header, shape: Sequence[int]) -> Iterator[tuple[str, Sequence[int]]]:
    """The Hugging Face tensor(s) that a GGUF tensor becomes, with their shapes."""
    is_phi = header.architecture == "phi2"
    block, fused, rest = name.rpartition("attn_qkv.")
    parts = [f"{block}{part}.{rest}" for part in QKV] if fused and is_phi else [name]
    for part in parts:
        theirs = hf_name(part, header.architecture)
        if theirs is None or not (theirs.endswith(".weight") or (theirs.endswith(".bias") and is_phi)):
            raise ModelError(f"{header.path.name} holds {name}, which has no place in a Hugging Face folder: {_REMEDY}")
        yield theirs, (shape[0] // len(parts), *shape[1:])
