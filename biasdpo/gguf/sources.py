"""What a GGUF is made from: a Hugging Face folder or another GGUF, checked and with its weights mapped, not loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from biasdpo.errors import ModelError, WorkspaceError
from biasdpo.gguf.quantize import decode
from biasdpo.gguf.to_hf import CONFIG_KEYS, build_pre_tokenizer
from biasdpo.model_files import (
    ARCHITECTURES,
    END_TOKENS,
    MODULES,
    TokenType,
    chat_template,
    gguf_value,
    hf_name,
    is_permuted,
    open_gguf,
    permute_rows,
    pre_tokenizer_of,
    read_header,
    safetensors_shapes,
    weight_files,
)
from biasdpo.workspace import read_json


@dataclass(frozen=True)
class Layout:
    """The tensors of a GGUF, existing or to be written. `shapes`: {tensor: (out, in)}, (n,) for vectors."""

    architecture: str
    blocks: int
    heads: int
    kv_heads: int
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of_gguf(cls, path: Path) -> Layout:
        """Read a GGUF's layout. ModelError if the file is damaged or has no count of blocks or heads."""
        header = read_header(path)
        architecture = str(header.values.get("general.architecture"))
        blocks: Any = header.values.get(f"{architecture}.block_count")
        heads: Any = header.values.get(f"{architecture}.attention.head_count")
        kv_heads: Any = header.values.get(f"{architecture}.attention.head_count_kv", heads)
        counts = (blocks, heads, kv_heads)
        if not all(isinstance(count, int) and count > 0 for count in counts) or blocks > len(header.tensors):
            raise ModelError(f"{path} lacks {architecture}.block_count or the number of heads, or they are wrong: fetch it again")
        return cls(architecture, blocks, heads, kv_heads, {name: tensor.shape for name, tensor in header.tensors.items()})

    def permute(self, tensor: str, rows: NDArray[Any]) -> NDArray[Any]:
        """A tensor's rows in GGUF's order, from Hugging Face's: they differ for llama's q and k."""
        if not is_permuted(tensor, self.architecture):
            return rows
        return permute_rows(rows, self.heads if ".attn_q." in tensor else self.kv_heads)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a mapped file."""

    name: str
    shape: tuple[int, ...]  # (out, in) or (n,)
    kind: Any  # gguf.GGMLQuantizationType of `data`
    data: NDArray[Any] = field(repr=False)  # (out, bytes or numbers of a row)
    order: NDArray[np.int64] | None = field(default=None, repr=False)  # rows of `data` in the GGUF's order; None: in order

    def rows(self, first: int, last: int) -> NDArray[Any]:
        """Rows as they are stored; vectors always whole."""
        if len(self.shape) == 1:
            return self.data
        return self.data[first:last] if self.order is None else self.data[self.order[first:last]]


@dataclass(frozen=True)
class Source:
    """An opened model. Its tensors have GGUF's names."""

    kind: Literal["hf", "gguf"]
    layout: Layout
    tensors: tuple[StoredTensor, ...]
    header_bytes: int  # of a GGUF's header for this model, about
    add_metadata: Callable[
        [Any, str], None
    ]  # adds all keys but file type and adapters; called with a gguf.GGUFWriter and a title
    file_type: int | None = None  # llama.cpp's number of the file's quantization; None if unknown, or a folder
    adapters: tuple[tuple[str, str], ...] = ()  # (id, SHA-256 of the weights) of those that were merged into the file before


def open_source(path: Path) -> Source:
    """Open a Hugging Face folder or a GGUF. ModelError if it is damaged, incomplete or unsupported."""
    return _open_hf(path) if path.is_dir() else _open_gguf(path)


# A GGUF: its metadata, tokenizer and untouched tensors are kept as they are

_REWRITTEN = {
    *(f"general.{key}" for key in ("architecture", "file_type", "alignment", "name")),
    *("biasdpo.adapters", "biasdpo.adapters_sha256"),
}


def _open_gguf(path: Path) -> Source:
    reader = open_gguf(path)
    architecture = str(gguf_value(reader, "general.architecture", ""))
    if gguf_value(reader, "general.type", "model") != "model":
        raise ModelError(f"{path} is a GGUF, but no model (type {gguf_value(reader, 'general.type')!r}): choose a model's file")
    if architecture not in MODULES:
        known = " and ".join(MODULES)
        raise ModelError(
            f"{path.name} has the architecture {architecture!r}; adapters can be merged into {known} only: export a LoRA"
        )
    if int(gguf_value(reader, "split.count", 1)) > 1:
        raise ModelError(f"{path.name} is one part of several: join them with llama.cpp's llama-gguf-split --merge first")
    if reader.byte_order != "I":
        raise ModelError(f"{path.name} is big-endian: fetch the model's little-endian GGUF")
    if gguf_value(reader, "tokenizer.ggml.model") == "gpt2" and pre_tokenizer_of(reader) is None:
        raise ModelError(
            f"{path.name} names no pre-tokenizer (tokenizer.ggml.pre), so llama.cpp would tokenize text wrongly: convert the "
            "model again with a current convert_hf_to_gguf.py"
        )
    layout = Layout.of_gguf(path)
    names, hashes = (gguf_value(reader, key, []) for key in ("biasdpo.adapters", "biasdpo.adapters_sha256"))
    file_type = gguf_value(reader, "general.file_type")
    return Source(
        kind="gguf",
        layout=layout,
        tensors=tuple(StoredTensor(t.name, layout.shapes[t.name], t.tensor_type, t.data) for t in reader.tensors),
        header_bytes=int(reader.data_offset),
        add_metadata=partial(_copy_metadata, reader),
        file_type=None if file_type is None else int(file_type),
        adapters=tuple(zip(names, hashes, strict=False)),
    )


def _copy_metadata(reader: Any, writer: Any, title: str) -> None:
    from gguf import GGUFValueType

    for entry in reader.fields.values():
        if entry.name.startswith("GGUF.") or entry.name in _REWRITTEN:
            continue
        is_array = entry.types[0] == GGUFValueType.ARRAY
        if is_array and len(entry.types) == 1:
            continue  # an empty list, which the gguf package can't write; a missing key means the same
        writer.add_key_value(entry.name, entry.contents(), entry.types[0], sub_type=entry.types[-1] if is_array else None)
    writer.add_name(title)
    pre = pre_tokenizer_of(reader)
    if pre is not None and gguf_value(reader, "tokenizer.ggml.pre") is None:
        writer.add_tokenizer_pre(pre)


# A Hugging Face folder

_DERIVED = re.compile(r".*\.(rotary_emb\.inv_freq|self_attn\.(bias|masked_bias))")  # in old checkpoints; follow from the config


def _open_hf(folder: Path) -> Source:
    config = _read_config(folder)
    layout = config.layout()
    stored = {name: tensor for file in weight_files(folder) for name, tensor in read_safetensors(file).items()}
    names = {ours: str(hf_name(ours, layout.architecture)) for ours in layout.shapes}
    _check_tensors(stored, {names[ours]: shape for ours, shape in layout.shapes.items()}, config.tied, folder)
    keys = {f"{config.architecture}.{key}": value for key, value in config.keys.items()} | _tokenizer_keys(folder, config)
    tensors = tuple(_in_gguf(ours, stored[theirs], layout) for ours, theirs in names.items())
    header_bytes = (folder / "tokenizer.json").stat().st_size + 100 * len(tensors) + 2000  # JSON is longer than GGUF
    return Source("hf", layout, tensors, header_bytes, partial(_add_metadata, keys))


def hf_layout(folder: Path) -> Layout:
    """The layout of a folder's GGUF, from its config.json alone."""
    return _read_config(folder).layout()


@dataclass(frozen=True)
class _HfConfig:
    """What config.json says of a model."""

    architecture: str
    vocabulary: int
    keys: dict[str, int | float]  # GGUF's metadata of the architecture
    tied: bool
    biased: dict[str, bool]  # {"attn": ..., "ffn": ...}
    values: dict[str, Any] = field(repr=False)  # config.json itself

    def layout(self) -> Layout:
        """The layout of the model's GGUF: every tensor that such a model has."""
        names = ("embedding_length", "feed_forward_length", "block_count", "attention.head_count", "attention.head_count_kv")
        width, inner, blocks, heads, kv_heads = (int(self.keys[name]) for name in names)
        rows, kv_rows = (count * int(self.keys["attention.key_length"]) for count in (heads, kv_heads))
        sizes: dict[str, tuple[int, ...]] = {
            **dict.fromkeys(("token_embd", "output"), (self.vocabulary, width)),
            **dict.fromkeys(("attn_norm", "ffn_norm", "output_norm"), (width,)),
            "attn_q": (rows, width),
            **dict.fromkeys(("attn_k", "attn_v"), (kv_rows, width)),
            "attn_output": (width, rows),
            **dict.fromkeys(("ffn_gate", "ffn_up"), (inner, width)),
            "ffn_down": (width, inner),
        }
        outside = ("token_embd", "output_norm", *(() if self.tied else ("output",)))
        inside = [module for module in MODULES[self.architecture] if module not in ("token_embd", "output_norm", "output")]
        shapes: dict[str, tuple[int, ...]] = {}
        for name in (*outside, *(f"blk.{i}.{module}" for i in range(blocks) for module in inside)):
            module = name.rpartition(".")[2]
            shapes[f"{name}.weight"] = sizes[module]
            if self._has_bias(module):
                shapes[f"{name}.bias"] = sizes[module][:1]
        return Layout(self.architecture, blocks, heads, kv_heads, shapes)

    def _has_bias(self, module: str) -> bool:
        if self.architecture == "phi2":
            return module != "token_embd"
        return not module.endswith("_norm") and self.biased.get(module.partition("_")[0], False)


_MOST_BLOCKS = 1000  # a wrong number must not fill the memory with names


def _read_config(folder: Path) -> _HfConfig:
    config = _json(folder / "config.json", required=True)
    try:
        name = (config.get("architectures") or ["?"])[0]
        if name not in ARCHITECTURES:
            raise ModelError(f"{folder} is a {name}, which can't be written as a GGUF: supported are {', '.join(ARCHITECTURES)}")
        phi = ARCHITECTURES[name] == "phi2"
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        rope_kind = rope.get("rope_type", rope.get("type", "default"))
        activation = "gelu_new" if phi else "silu"
        quantized = config.get("quantization_config")
        unsupported = {
            f"rope scaling {rope_kind!r}": rope_kind != "default",
            f"activation {config.get('hidden_act')!r}": config.get("hidden_act", activation) != activation,
            "qk_layernorm": config.get("qk_layernorm"),
            "a tied head": phi and config.get("tie_word_embeddings"),
            f"quantized weights ({quantized and quantized.get('quant_method')})": quantized,
        }
        if any(unsupported.values()):
            what = ", ".join(name for name, present in unsupported.items() if present)
            raise ModelError(f"{folder} has {what}, which is not supported here: convert it with convert_hf_to_gguf.py")
        width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        if not 0 < int(config["num_hidden_layers"]) <= _MOST_BLOCKS:
            raise ValueError(f"num_hidden_layers {config['num_hidden_layers']}")
        head_width = width // heads if phi else int(config.get("head_dim") or width // heads)
        share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.5)) if phi else 1.0
        keys: dict[str, int | float] = {
            "vocab_size": int(config["vocab_size"]),
            **{ours: int(config[theirs]) for ours, theirs in CONFIG_KEYS.items()},
            "attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
            "attention.key_length": head_width,
            "attention.value_length": head_width,
            "rope.freq_base": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            "rope.dimension_count": int(head_width * float(share)),
        }
        ours, theirs = ("layer_norm_epsilon", "layer_norm_eps") if phi else ("layer_norm_rms_epsilon", "rms_norm_eps")
        keys[f"attention.{ours}"] = float(config[theirs])
        biased = {"attn": bool(config.get("attention_bias")), "ffn": bool(config.get("mlp_bias"))}
        tied = bool(config.get("tie_word_embeddings", False))
        return _HfConfig(ARCHITECTURES[name], int(config["vocab_size"]), keys, tied, biased, config)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as exc:
        raise ModelError(f"{folder / 'config.json'} is incomplete ({type(exc).__name__}: {exc}): fetch the model again") from exc


def _add_metadata(keys: Mapping[str, Any], writer: Any, title: str) -> None:
    add = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array
    }  # fmt: skip
    writer.add_type("model")
    writer.add_name(title)
    for key, value in keys.items():
        add[type(value)](key, value)


def _json(path: Path, *, required: bool = False) -> dict[str, Any]:
    """A JSON object of a model's folder; {} for a missing file that is not required."""
    if not required and not path.is_file():
        return {}
    try:
        value = read_json(path)
    except (WorkspaceError, RecursionError) as exc:
        raise ModelError(f"{path} is missing or not valid JSON: fetch the model again") from exc
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object: fetch the model again")
    return value


# Its weights

_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "u1"}  # as the gguf package has them: BF16 as two bytes a number


def read_safetensors(file: Path) -> dict[str, StoredTensor]:
    """A safetensors file's tensors, mapped, by name. ModelError if it is damaged, or holds another dtype than F32, F16, BF16."""
    from gguf import GGMLQuantizationType

    safetensors_shapes(file)  # checks the header, and the size of the file
    data = np.memmap(file, np.uint8, "r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if dtype not in _DTYPES:
            raise ModelError(f"{file}: {name} is {dtype}, supported are {', '.join(_DTYPES)}: fetch it in one of them")
        numbers = data[start + begin : start + end].view(_DTYPES[dtype])
        stored_shape = (*shape[:-1], 2 * prod(shape[-1:])) if dtype == "BF16" else shape
        tensors[name] = StoredTensor(name, shape, GGMLQuantizationType[dtype], numbers.reshape(stored_shape))
    return tensors


def _check_tensors(stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], tied: bool, folder: Path) -> None:
    if missing := [name for name in expected if name not in stored]:
        others = f" and {len(missing) - 1} more of {len(expected)} tensors" if len(missing) > 1 else ""
        raise ModelError(f"{folder} lacks {missing[0]}{others}: fetch all of the model's files")
    for name, tensor in stored.items():
        if name in expected and tensor.shape != expected[name]:
            raise ModelError(f"{folder}: {name} is {list(tensor.shape)}, by config.json {list(expected[name])}; fetch it again")
        is_tied_head = tied and name == "lm_head.weight"  # the embeddings once more
        if name not in expected and not is_tied_head and not _DERIVED.fullmatch(name):
            raise ModelError(f"{folder} holds {name}, which has no place in the GGUF: convert it with convert_hf_to_gguf.py")


def _in_gguf(name: str, tensor: StoredTensor, layout: Layout) -> StoredTensor:
    """A folder's tensor as the GGUF has it: llama.cpp wants vectors in F32 (they are small), and llama's q and k permuted."""
    from gguf import GGMLQuantizationType

    if len(tensor.shape) == 1:
        values = layout.permute(name, decode(tensor.data, tensor.kind, name))
        return StoredTensor(name, tensor.shape, GGMLQuantizationType.F32, values)
    order = layout.permute(name, np.arange(tensor.shape[0])) if is_permuted(name, layout.architecture) else None
    return replace(tensor, name=name, order=order)


# Its tokenizer: byte-level BPE, with llama.cpp's name of its pre-tokenizer


def _tokenizer_keys(folder: Path, config: _HfConfig) -> dict[str, Any]:
    """GGUF's metadata of a folder's tokenizer. ModelError if a GGUF can't hold it."""
    tokenizer = _json(folder / "tokenizer.json", required=True)
    settings, generation = _json(folder / "tokenizer_config.json"), _json(folder / "generation_config.json")
    try:
        model = tokenizer["model"]
        options = ("byte_fallback", "ignore_merges", "fuse_unk", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
        used = " with " + ", ".join(filter(model.get, options)) if any(map(model.get, options)) else ""
        if model.get("type") != "BPE" or used:
            raise _unsupported(folder, f"is {model.get('type')}{used}, not plain byte-level BPE")
        if tokenizer.get("normalizer") is not None:
            raise _unsupported(folder, f"normalizes text ({tokenizer['normalizer'].get('type')}), which llama.cpp does not do")
        added = tokenizer.get("added_tokens") or []
        tokens, types = _tokens(model["vocab"], added, config.vocabulary, folder)
        ids = {**model["vocab"], **{entry["content"]: entry["id"] for entry in added}}
        special = _special_tokens(ids, settings, generation, config.values, folder)
        probe = _probe_tokenizer(tokenizer)
        keys = {
            "ggml.model": "gpt2",
            "ggml.pre": _pre_tokenizer(probe, config.architecture, folder),
            "ggml.tokens": tokens,
            "ggml.token_type": types,
            "ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
            **{f"ggml.{role}_token_id": token for role, token in special.items()},
            "ggml.add_bos_token": _adds_bos(probe, settings, folder),
            "chat_template": chat_template(folder),
        }
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as exc:
        raise ModelError(f"{folder / 'tokenizer.json'} is damaged ({type(exc).__name__}: {exc}): fetch the model again") from exc
    return {f"tokenizer.{key}": value for key, value in keys.items() if value != ""}


def _unsupported(folder: Path, what: str) -> ModelError:
    return ModelError(f"The tokenizer of {folder} {what}: export a LoRA GGUF, or merge into a GGUF with --source gguf")


# Text that the known pre-tokenizers split differently from each other and from most others.
_PROBE = "It's 12 1234567\n\n  x_y--3.5e7 \tna\u00efve\u3000\u65e5\u672c\u8a9e\u0661\u0662 \U0001f600!? We'LL"


def _pre_tokenizer(probe: Any, architecture: str, folder: Path) -> str:
    """llama.cpp's name of how text is split before BPE."""
    theirs = probe.pre_tokenizer.pre_tokenize_str(_PROBE) if probe.pre_tokenizer is not None else None
    for name in ("phi-2" if architecture == "phi2" else "gpt-2", "smollm"):
        if build_pre_tokenizer(name).pre_tokenize_str(_PROBE) == theirs:
            return name
    raise _unsupported(folder, "splits text in a way without a name in llama.cpp")


def _probe_tokenizer(tokenizer: Mapping[str, Any]) -> Any:
    """A tokenizer of one token, "a", that splits and completes text as another does. ValueError if that is damaged."""
    from tokenizers import Tokenizer

    steps = {name: tokenizer.get(name) for name in ("pre_tokenizer", "post_processor")}
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    try:
        return Tokenizer.from_str(json.dumps({"version": "1.0", "model": model, "added_tokens": [], **steps}))
    except Exception as exc:  # `tokenizers` has no error class of its own
        raise ValueError(str(exc)) from exc


def _tokens(
    vocabulary: Mapping[str, int], added: Iterable[Mapping[str, Any]], rows: int, folder: Path
) -> tuple[list[str], list[int]]:
    """Texts and types of the tokens by id; embedding rows past the last token become unused tokens."""
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [int(TokenType.UNUSED)] * rows
    entries = [(token, i, TokenType.NORMAL) for token, i in vocabulary.items()]
    for entry in added:
        kind = TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED
        if kind == TokenType.USER_DEFINED and (entry.get("lstrip") or entry.get("rstrip") or entry.get("single_word")):
            raise _unsupported(folder, f"has the token {entry['content']!r}, which strips the text around it")
        entries.append((entry["content"], entry["id"], kind))
    for token, i, kind in entries:
        if not 0 <= i < rows:
            raise ModelError(f"{folder}: token {i} ({token!r}) has no row in the {rows:,} embeddings; fetch the model again")
        tokens[i], types[i] = token, kind
    return tokens, types


def _special_tokens(
    ids: Mapping[str, int], settings: dict[str, Any], generation: dict[str, Any], config: dict[str, Any], folder: Path
) -> dict[str, int]:
    """{GGUF's role: id}: by text in tokenizer_config.json, else by id in the configs."""
    special = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk")):
        named = settings.get(f"{key}_token")
        text = named.get("content") if isinstance(named, dict) else named
        listed = [generation.get(f"{key}_token_id"), config.get(f"{key}_token_id")]
        by_id = [i[0] if isinstance(i, list) and i else i for i in listed]
        found = [i for i in (ids.get(text) if text else None, *by_id) if isinstance(i, int)]
        if found:
            special[role] = found[0]
    if "eos" not in special:
        raise ModelError(f"{folder} names no end-of-text token: fetch the model again")
    # llama.cpp recognizes further end tokens by their well-known texts; two more can be named.
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    known = {special["eos"], *(i for text, i in ids.items() if text in END_TOKENS)}
    further = [i for i in (ends if isinstance(ends, list) else []) if i not in known]
    if len(further) > 2:
        raise _unsupported(folder, f"has {len(further)} more end-of-text tokens than a GGUF can name")
    return special | dict(zip(("eot", "eom"), further, strict=False))


def _adds_bos(probe: Any, settings: Mapping[str, Any], folder: Path) -> bool:
    """Whether every text gets a begin-of-text token."""
    *added, last = probe.encode("a").ids
    if len(added) > 1 or last != 0:
        raise _unsupported(folder, "adds tokens to a text other than one at its beginning")
    return bool(added or settings.get("add_bos_token"))
