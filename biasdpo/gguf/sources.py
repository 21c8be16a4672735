"""Sources of a GGUF: a Hugging Face folder or another GGUF, checked and with its weights mapped, not loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from biasdpo.errors import ModelError, plural
from biasdpo.gguf.quantize import KEEP, block_of, decode, padded_bytes, planned_types
from biasdpo.model_files import (
    ARCHITECTURES,
    END_TOKENS,
    MODULES,
    ForeignJson,
    Header,
    TokenType,
    chat_template,
    hf_name,
    read_header,
    read_json_as,
    read_object,
    refuse_parts,
    safetensors_shapes,
    weight_files,
)

_DTYPES = {"F32": "<f4", "F16": "<f2"}  # of mapped tensors; those of other types are bytes, as the gguf package has them


@dataclass(frozen=True)
class Layout:
    """The tensors of a GGUF, existing or to be written. `shapes`: {tensor: (out, in)}, (n,) for vectors."""

    architecture: str
    blocks: int
    heads: int
    kv_heads: int
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, header: Header) -> Layout:
        """A GGUF's layout. ModelError if it has no count of blocks or heads."""
        prefix = header.architecture
        blocks, heads = header.get(f"{prefix}.block_count", 0), header.get(f"{prefix}.attention.head_count", 0)
        kv_heads = header.get(f"{prefix}.attention.head_count_kv", heads)
        if min(blocks, heads, kv_heads) <= 0 or blocks > len(header.tensors):
            raise ModelError(
                f"{header.path} lacks {prefix}.block_count or the number of heads, or they are wrong: fetch it again"
            )
        return cls(prefix, blocks, heads, kv_heads, {name: tensor.shape for name, tensor in header.tensors.items()})

    def is_permuted(self, tensor: str) -> bool:
        """Whether GGUF's order of a tensor's rows differs from Hugging Face's: llama's q and k."""
        return self.architecture == "llama" and re.search(r"\.attn_[qk]\.", tensor) is not None

    def permute(self, tensor: str, rows: NDArray[Any], *, back: bool = False) -> NDArray[Any]:
        """A tensor's rows, (heads * d, ...), from Hugging Face's rotary layout (two halves) to GGUF's (pairs); or `back`."""
        if not self.is_permuted(tensor):
            return rows
        heads = self.heads if ".attn_q." in tensor else self.kv_heads
        half = rows.shape[0] // heads // 2
        split = rows.reshape(heads, *((half, 2) if back else (2, half)), *rows.shape[1:])
        return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows.shape))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a mapped file."""

    name: str
    shape: tuple[int, ...]  # (out, in) or (n,)
    kind: str  # ggml's name of the type of `data`
    data: NDArray[Any] = field(repr=False)  # (out, bytes or numbers of a row)
    order: NDArray[np.int64] | None = field(default=None, repr=False)  # rows of `data` in the GGUF's order; None: in order

    @classmethod
    def mapped(cls, name: str, shape: tuple[int, ...], kind: str, data: NDArray[np.uint8]) -> StoredTensor:
        """`data`: its bytes in the file."""
        elements, size = block_of(kind)
        if kind in _DTYPES:
            return cls(name, shape, kind, data.view(_DTYPES[kind]).reshape(shape))
        return cls(name, shape, kind, data.reshape(*shape[:-1], shape[-1] // elements * size if shape else size))

    def rows(self, first: int, last: int) -> NDArray[Any]:
        """Rows as they are stored; vectors always whole."""
        if len(self.shape) == 1:
            return self.data
        return self.data[first:last] if self.order is None else self.data[self.order[first:last]]


Entry = tuple[str, Any, int, int | None]
"""Key, value, type and item type (gguf.GGUFValueType) of a GGUF's metadata."""


@dataclass(frozen=True)
class Source:
    """An opened model. Its tensors have GGUF's names."""

    kind: Literal["hf", "gguf"]
    layout: Layout
    tensors: tuple[StoredTensor, ...]
    header_bytes: int  # of a GGUF's header for this model, about
    metadata: tuple[Entry, ...]  # all but architecture, name, file type and adapters
    file_type: int | None = None  # llama.cpp's number of the file's quantization; None if unknown, or a folder
    adapters: tuple[tuple[str, str], ...] = ()  # (id, SHA-256 of the weights) of those that were merged into the file before

    def bytes_as(self, quantization: str) -> int:
        """About the size of a GGUF of this model. ExportError if a width does not fit the quantization."""
        planned = {} if quantization == KEEP else planned_types(quantization, self.layout.shapes)
        kinds = {tensor.name: tensor.kind for tensor in self.tensors} | {name: got for name, (_, got) in planned.items()}
        return self.header_bytes + sum(padded_bytes(kinds[tensor.name], tensor.shape) for tensor in self.tensors)


def open_source(path: Path) -> Source:
    """Open a Hugging Face folder or a GGUF. ModelError if it is damaged, incomplete or unsupported."""
    return _open_hf(path) if path.is_dir() else _open_gguf(path)


# A GGUF: its metadata, tokenizer and untouched tensors are kept as they are

_REWRITTEN = {
    *(f"general.{key}" for key in ("architecture", "file_type", "alignment", "name")),
    *("biasdpo.adapters", "biasdpo.adapters_sha256"),
}


def _open_gguf(path: Path) -> Source:
    refuse_parts(path)
    header = read_header(path)
    if header.get("general.type", "model") != "model":
        raise ModelError(f"{path} is a GGUF, but no model (type {header.get('general.type', '')!r}): choose a model's file")
    if header.architecture not in MODULES:
        known = " and ".join(MODULES)
        raise ModelError(
            f"{path.name} has the architecture {header.architecture!r}; adapters can be merged into {known} only: export a LoRA"
        )
    if header.get("split.count", 1) > 1:
        raise ModelError(f"{path.name} is one part of several: join them with llama.cpp's llama-gguf-split --merge first")
    if header.get("tokenizer.ggml.model", "") == "gpt2" and not header.pre_tokenizer:
        raise ModelError(
            f"{path.name} names no pre-tokenizer (tokenizer.ggml.pre), so llama.cpp would tokenize text wrongly: convert the "
            "model again with a current convert_hf_to_gguf.py"
        )
    metadata = [
        (key, _as_bytes(value), types[0], types[1] if len(types) > 1 else None)
        for key, types in header.types.items()
        if key not in _REWRITTEN and (value := header.values[key]) != []  # the gguf package can't write an empty list
    ]
    if header.pre_tokenizer and "tokenizer.ggml.pre" not in header.values:
        metadata.append(_entry("tokenizer.ggml.pre", header.pre_tokenizer))
    adapters: Any = (header.get(key, []) for key in ("biasdpo.adapters", "biasdpo.adapters_sha256"))
    return Source(
        kind="gguf",
        layout=Layout.of(header),
        tensors=tuple(map_tensors(header)),
        header_bytes=header.size,
        metadata=tuple(metadata),
        file_type=header.get("general.file_type", 0) if "general.file_type" in header.values else None,
        adapters=tuple(zip(*adapters, strict=False)),
    )


def map_tensors(header: Header) -> Iterable[StoredTensor]:
    """A GGUF's tensors in the file's order, mapped."""
    data = np.memmap(header.path, np.uint8, "r")
    for name, info in header.tensors.items():
        yield StoredTensor.mapped(name, info.shape, info.kind, data[info.start : info.start + info.n_bytes])


def _as_bytes(value: Any) -> Any:
    """Texts as the file had them, UTF-8 or not."""
    if isinstance(value, list):
        return [_as_bytes(item) for item in value]
    return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value


def _entry(key: str, value: Any) -> Entry:
    from gguf import GGUFValueType as Type

    types = {bool: Type.BOOL, int: Type.UINT32, float: Type.FLOAT32, str: Type.STRING}
    if isinstance(value, list):
        return key, value, Type.ARRAY, Type.STRING if isinstance(value[0], str) else Type.INT32
    return key, value, types[type(value)], None


# A Hugging Face folder

# GGUF's keys of an architecture -> config.json's.
CONFIG_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
}
_DERIVED = re.compile(r".*\.(rotary_emb\.inv_freq|self_attn\.(bias|masked_bias))")  # in old checkpoints; follow from the config
_MOST_BLOCKS = 1000  # a wrong number must not fill the memory with names


def _open_hf(folder: Path) -> Source:
    config = read_json_as(folder / "config.json", ForeignJson).model_extra or {}
    try:
        keys, layout = _read_config(config, folder)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as exc:
        raise ModelError(f"{folder / 'config.json'} is incomplete ({type(exc).__name__}: {exc}): fetch the model again") from exc
    stored = {name: tensor for file in weight_files(folder) for name, tensor in read_safetensors(file).items()}
    names = {ours: str(hf_name(ours, layout.architecture)) for ours in layout.shapes}
    _check_tensors(stored, {names[ours]: shape for ours, shape in layout.shapes.items()}, folder)
    keys |= _tokenizer_keys(folder, config, layout) | {"general.type": "model"}
    return Source(
        kind="hf",
        layout=layout,
        tensors=tuple(_in_gguf(ours, stored[theirs], layout) for ours, theirs in names.items()),
        # About, from what a token takes with its merge, a tensor, and all other keys.
        header_bytes=36 * layout.shapes["token_embd.weight"][0] + 60 * len(layout.shapes) + 1500,
        metadata=tuple(_entry(key, value) for key, value in keys.items()),
    )


def _read_config(config: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Layout]:
    """GGUF's metadata of the architecture, and every tensor that such a model has."""
    name = (config.get("architectures") or ["?"])[0]
    if name not in ARCHITECTURES:
        raise ModelError(f"{folder} is a {name}, which can't be written as a GGUF: supported are {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]
    phi = architecture == "phi2"
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
    sizes = {ours: int(config[theirs]) for ours, theirs in CONFIG_KEYS.items()}
    width, inner, blocks, heads = (sizes[key] for key in list(CONFIG_KEYS)[1:])
    kv_heads, vocabulary = int(config.get("num_key_value_heads") or heads), int(config["vocab_size"])
    if not 0 < blocks <= _MOST_BLOCKS:
        raise ValueError(f"num_hidden_layers {blocks}")
    head = width // heads if phi else int(config.get("head_dim") or width // heads)
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.5)) if phi else 1.0
    epsilon = ("layer_norm_epsilon", "layer_norm_eps") if phi else ("layer_norm_rms_epsilon", "rms_norm_eps")
    keys: dict[str, int | float] = {
        **sizes,
        "vocab_size": vocabulary,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.freq_base": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        "rope.dimension_count": int(head * float(share)),
        f"attention.{epsilon[0]}": float(config[epsilon[1]]),
    }
    rows, kv_rows = heads * head, kv_heads * head
    modules: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("token_embd", "output"), (vocabulary, width)),
        **dict.fromkeys(("attn_norm", "ffn_norm", "output_norm"), (width,)),
        "attn_q": (rows, width),
        **dict.fromkeys(("attn_k", "attn_v"), (kv_rows, width)),
        "attn_output": (width, rows),
        **dict.fromkeys(("ffn_gate", "ffn_up"), (inner, width)),
        "ffn_down": (width, inner),
    }
    tied = bool(config.get("tie_word_embeddings", False))
    shapes: dict[str, tuple[int, ...]] = {}
    for i, module in [(i, module) for i in range(-1, blocks) for module in MODULES[architecture]]:
        is_outside = module in ("token_embd", "output_norm", "output")
        if is_outside != (i < 0) or (module == "output" and tied):
            continue
        tensor = module if is_outside else f"blk.{i}.{module}"
        shapes[f"{tensor}.weight"] = modules[module]
        biased = config.get("attention_bias" if module.startswith("attn") else "mlp_bias") and not is_outside
        if module != "token_embd" if phi else biased and not module.endswith("_norm"):
            shapes[f"{tensor}.bias"] = modules[module][:1]
    return {f"{architecture}.{key}": value for key, value in keys.items()}, Layout(architecture, blocks, heads, kv_heads, shapes)


# Its weights


def read_safetensors(file: Path) -> dict[str, StoredTensor]:
    """A safetensors file's tensors, mapped, by name. ModelError if it is damaged, or holds another dtype than F32, F16, BF16."""
    safetensors_shapes(file)  # checks the header, and the size of the file
    data = np.memmap(file, np.uint8, "r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        kind, (begin, end) = entry["dtype"], entry["data_offsets"]
        if kind not in ("F32", "F16", "BF16"):
            raise ModelError(f"{file}: {name} is {kind}, supported are F32, F16, BF16: fetch it in one of them")
        tensors[name] = StoredTensor.mapped(name, tuple(entry["shape"]), kind, data[start + begin : start + end])
    return tensors


def _check_tensors(stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    if missing := [name for name in expected if name not in stored]:
        others = f" and {len(missing) - 1} more of {len(expected)} tensors" if len(missing) > 1 else ""
        raise ModelError(f"{folder} lacks {missing[0]}{others}: fetch all of the model's files")
    for name, tensor in stored.items():
        if name in expected and tensor.shape != expected[name]:
            raise ModelError(f"{folder}: {name} is {list(tensor.shape)}, by config.json {list(expected[name])}; fetch it again")
        # A tied head is the embeddings once more.
        if name not in expected and name != "lm_head.weight" and not _DERIVED.fullmatch(name):
            raise ModelError(f"{folder} holds {name}, which has no place in the GGUF: convert it with convert_hf_to_gguf.py")


def _in_gguf(name: str, tensor: StoredTensor, layout: Layout) -> StoredTensor:
    """A folder's tensor as the GGUF has it: llama.cpp wants vectors in F32 (they are small), and llama's q and k permuted."""
    if len(tensor.shape) == 1:
        values = layout.permute(name, decode(tensor.data, tensor.kind, name))
        return StoredTensor(name, tensor.shape, "F32", values)
    order = layout.permute(name, np.arange(tensor.shape[0])) if layout.is_permuted(name) else None
    return replace(tensor, name=name, order=order)


# Its tokenizer: byte-level BPE, with llama.cpp's name of its pre-tokenizer


def _tokenizer_keys(folder: Path, config: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """GGUF's metadata of a folder's tokenizer. ModelError if a GGUF can't hold it."""
    tokenizer = read_json_as(folder / "tokenizer.json", ForeignJson).model_extra or {}
    settings, generation = (read_object(folder / name) for name in ("tokenizer_config.json", "generation_config.json"))
    try:
        model = tokenizer["model"]
        options = ("byte_fallback", "ignore_merges", "fuse_unk", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
        used = " with " + ", ".join(filter(model.get, options)) if any(map(model.get, options)) else ""
        if model.get("type") != "BPE" or used:
            raise _unsupported(folder, f"is {model.get('type')}{used}, not plain byte-level BPE")
        if tokenizer.get("normalizer") is not None:
            raise _unsupported(folder, f"normalizes text ({tokenizer['normalizer'].get('type')}), which llama.cpp does not do")
        added = tokenizer.get("added_tokens") or []
        tokens, types = _tokens(model["vocab"], added, layout.shapes["token_embd.weight"][0], folder)
        ids = {**model["vocab"], **{entry["content"]: entry["id"] for entry in added}}
        special = _special_tokens(ids, layout.shapes["token_embd.weight"][0], settings, generation, config, folder)
        probe = _probe_tokenizer(tokenizer)
        keys = {
            "ggml.model": "gpt2",
            "ggml.pre": _pre_tokenizer(probe, layout.architecture, folder),
            "ggml.tokens": tokens,
            "ggml.token_type": types,
            "ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
            **{f"ggml.{role}_token_id": token for role, token in special.items()},
            "ggml.add_bos_token": _adds_bos(probe, settings, folder),
            "chat_template": chat_template(folder),
        }
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as exc:
        raise ModelError(f"{folder / 'tokenizer.json'} is damaged ({type(exc).__name__}: {exc}): fetch the model again") from exc
    return {f"tokenizer.{key}": value for key, value in keys.items() if value not in ("", [])}


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
        # A special token without embeddings, such as a [PAD] that was added without resizing, is in no text.
        if entry["id"] < rows or not entry.get("special"):
            entries.append((entry["content"], entry["id"], kind))
    for token, i, kind in entries:
        if not 0 <= i < rows:
            raise ModelError(f"{folder}: token {i} ({token!r}) has no row in the {rows:,} embeddings; fetch the model again")
        tokens[i], types[i] = token, int(kind)
    return tokens, types


def _special_tokens(
    ids: Mapping[str, int], rows: int, settings: dict[str, Any], generation: dict[str, Any], config: dict[str, Any], folder: Path
) -> dict[str, int]:
    """{GGUF's role: id}: by text in tokenizer_config.json, else by id in the configs."""
    special = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk")):
        named = settings.get(f"{key}_token")
        text = named.get("content") if isinstance(named, dict) else named
        listed = [generation.get(f"{key}_token_id"), config.get(f"{key}_token_id")]
        by_id = [i[0] if isinstance(i, list) and i else i for i in listed]
        found = [i for i in (ids.get(text) if text else None, *by_id) if isinstance(i, int) and 0 <= i < rows]
        if found:
            special[role] = found[0]
    if "eos" not in special:
        raise ModelError(f"{folder} names no end-of-text token: fetch the model again")
    # llama.cpp recognizes further end tokens by their well-known texts; two more can be named.
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    known = {special["eos"], *(i for text, i in ids.items() if text in END_TOKENS)}
    further = [i for i in (ends if isinstance(ends, list) else []) if i not in known]
    if len(further) > 2:
        raise _unsupported(folder, f"has {plural(len(further), 'more end-of-text token')} than a GGUF can name")
    return special | dict(zip(("eot", "eom"), further, strict=False))


def _adds_bos(probe: Any, settings: Mapping[str, Any], folder: Path) -> bool:
    """Whether every text gets a begin-of-text token."""
    *added, last = probe.encode("a").ids
    if len(added) > 1 or last != 0:
        raise _unsupported(folder, "adds tokens to a text other than one at its beginning")
    return bool(added or settings.get("add_bos_token"))
