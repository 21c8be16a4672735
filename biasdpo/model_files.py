"""GGUF's names for the tensors and tokens of Hugging Face's models, both ways, and the order of a tensor's rows."""

from __future__ import annotations

import json
import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biasdpo.chat import PromptTemplate
from biasdpo.errors import ModelError

# --- gguf header: The header of a GGUF: its metadata and what tensors it holds, read in a fraction of a second


_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its shape as numpy and torch have it, (out, in) for a matrix, the bytes that it takes in the file, and ggml's
    name for the type that its numbers have there."""

    shape: tuple[int, ...]
    n_bytes: int
    kind: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """`values`: the metadata by key, arrays as lists. `tensors`: by name, in the file's order."""

    values: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Read a GGUF's header. ModelError where the file is missing, foreign, of another version, or cut off."""
    if not path.is_file():
        raise ModelError(f"No model file {path}: check the path, or fetch the file again")
    try:
        size = path.stat().st_size
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header, end = _read(_Cursor(data))
    except (OSError, ValueError, KeyError, struct.error) as exc:  # what a foreign or torn file comes to, at whatever byte
        raise ModelError(f"{path} is no complete GGUF file ({type(exc).__name__}: {exc}): fetch or export it again") from exc
    if end > size:
        raise ModelError(f"{path} is cut off: {size:,} of {end:,} bytes; fetch or export it again")
    return header


class _Cursor:
    """Reads one value after another."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.at = 0

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + form, self._data, self.at)
        self.at += struct.calcsize("<" + form)
        return values

    def string(self) -> str:
        (length,) = self.take("Q")
        end = self.at + length
        if end > len(self._data):
            raise ValueError(f"a string of {length:,} bytes passes the end")
        text = self._data[self.at : end].decode("utf-8", "replace")
        self.at = end
        return text

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.take(_SCALARS[kind])[0]
        item, count = self.take("IQ")
        if item in _SCALARS:
            return list(self.take(f"{count}{_SCALARS[item]}"))
        return [self.value(item) for _ in range(count)]


def _read(cursor: _Cursor) -> tuple[Header, int]:
    """The header, and where the last tensor's data end."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    magic, version = cursor.take("4sI")
    if magic != b"GGUF":
        raise ValueError(f"it begins with {magic!r}")
    if version not in _VERSIONS:
        raise ValueError(f"GGUF version {version}, known are {', '.join(map(str, _VERSIONS))}")
    tensor_count, value_count = cursor.take("QQ")
    values = {}
    for _ in range(value_count):
        key = cursor.string()
        values[key] = cursor.value(cursor.take("I")[0])
    tensors: dict[str, TensorInfo] = {}
    last = 0
    for _ in range(tensor_count):
        name = cursor.string()
        shape = cursor.take(f"{cursor.take('I')[0]}Q")[::-1]
        kind, offset = cursor.take("IQ")
        type_ = GGMLQuantizationType(kind)
        block_elements, block_bytes = GGML_QUANT_SIZES[type_]
        tensors[name] = TensorInfo(shape, math.prod(shape) // block_elements * block_bytes, type_.name)
        last = max(last, offset + tensors[name].n_bytes)
    alignment = int(values.get("general.alignment", 32))
    return Header(values, tensors), -(-cursor.at // alignment) * alignment + last


# --- modelfile: What a model file says of itself: architecture, size, context, chat template; read without torc


# GGUF's names for Hugging Face's architectures, for those that this project trains and exports.
ARCHITECTURES = {"LlamaForCausalLM": "llama", "PhiForCausalLM": "phi2"}
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL

_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit

_SYSTEM_MARK, _PROMPT_MARK = "\u0001system\u0001", "\u0001prompt\u0001"


@dataclass(frozen=True)
class Description:
    """What a model's file or folder says of it. `context_length` in tokens. Without a chat template of its own, `template` is the
    prompt alone."""

    architecture: str
    parameters: int
    bytes_of_weights: int
    context_length: int
    template: PromptTemplate
    has_chat_template: bool


def describe(path: Path) -> Description:
    """What a .gguf file or a Hugging Face folder says of itself, read again only where it has changed."""
    return _described(path, _stamp(path))


def tensor_shapes(path: Path) -> tuple[str, Mapping[str, tuple[int, ...]]]:
    """(architecture, shapes of the tensors by the file's own names) of a .gguf file or a Hugging Face folder, from headers alone;
    read again only where it has changed. A matrix is (out, in)."""
    return _shapes(path, _stamp(path))


_Stamp = tuple[tuple[str, int, int], ...]


def _stamp(path: Path) -> _Stamp:
    """What changes when a model's files do: names, times, sizes."""
    try:
        files = [path] if path.suffix == ".gguf" else [*path.glob("*.json"), *path.glob("*.safetensors"), *path.glob("*.jinja")]
        return tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(files))
    except OSError:
        return ()  # whoever reads it says what is wrong


@lru_cache(maxsize=32)
def _described(path: Path, _stamp: _Stamp) -> Description:
    return describe_gguf(path) if path.suffix == ".gguf" else describe_hf_folder(path)


@lru_cache(maxsize=32)
def _shapes(path: Path, _stamp: _Stamp) -> tuple[str, Mapping[str, tuple[int, ...]]]:
    if path.suffix == ".gguf":
        header = read_header(path)
        return str(header.values.get("general.architecture", "")), {name: t.shape for name, t in header.tensors.items()}
    shapes = {name: shape for file in sorted(path.glob("*.safetensors")) for name, shape in safetensors_shapes(file).items()}
    return _hf_architecture(path, _hf_config(path)), shapes


def open_gguf(path: Path) -> Any:
    """A `gguf.GGUFReader`; a missing, foreign or truncated file is a ModelError."""
    from gguf import GGUFReader

    if not path.is_file():
        raise ModelError(f"No model file {path}: check the path, or fetch the file again")
    try:
        reader = GGUFReader(path)
        end = max((int(t.data_offset + t.n_bytes) for t in reader.tensors), default=0)
    except Exception as exc:  # the reader has no errors of its own: ValueError, IndexError, OverflowError… all mean this
        raise ModelError(f"{path} is no complete GGUF file ({type(exc).__name__}: {exc}): fetch or export it again") from exc
    if end > path.stat().st_size:
        raise ModelError(f"{path} is cut off: {path.stat().st_size:,} of {end:,} bytes; fetch or export it again")
    return reader


def gguf_value(reader: Any, key: str, default: Any = None) -> Any:
    """A metadata value of an open GGUF, or `default` where the file has no such key."""
    field = reader.get_field(key)
    return default if field is None else field.contents()


def describe_gguf(path: Path) -> Description:
    """Read a GGUF's metadata."""
    header = read_header(path)
    values = header.values
    architecture = str(values.get("general.architecture", ""))
    if values.get("general.type", "model") != "model" or not architecture:
        raise ModelError(f"{path} is a GGUF, but no model (type {values.get('general.type')!r}): name a model's file")
    tokens, types = values.get("tokenizer.ggml.tokens", []), values.get("tokenizer.ggml.token_type", [])
    control = [token for token, kind in zip(tokens, types, strict=False) if kind == _CONTROL_TOKEN]
    chat = values.get("tokenizer.chat_template", "")
    return Description(
        architecture=architecture,
        parameters=sum(tensor.elements for tensor in header.tensors.values()),
        bytes_of_weights=sum(tensor.n_bytes for tensor in header.tensors.values()),
        context_length=int(values.get(f"{architecture}.context_length", 2048)),
        template=template_of_chat(chat, control),
        has_chat_template=bool(chat),
    )


def describe_hf_folder(folder: Path) -> Description:
    """Read a Hugging Face folder's config.json, tokenizer_config.json and the headers of its safetensors."""
    config = _hf_config(folder)
    architecture = _hf_architecture(folder, config)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"{folder} has no *.safetensors: fetch the model's safetensors weights (pickles are not opened)")
    _check_shards(folder)
    tokenizer_file = folder / "tokenizer_config.json"
    tokenizer = _json_object(tokenizer_file) if tokenizer_file.is_file() else {}
    chat_file = folder / "chat_template.jinja"
    chat = chat_file.read_text(encoding="utf-8") if chat_file.is_file() else tokenizer.get("chat_template") or ""
    added = tokenizer.get("added_tokens_decoder", {}).values()
    special = {t["content"] for t in added if t.get("special")}
    vocabulary_file = folder / "tokenizer.json"
    if vocabulary_file.is_file():
        vocabulary = _json_object(vocabulary_file)
        special |= {t["content"] for t in vocabulary.get("added_tokens", []) if t.get("special")}
    return Description(
        architecture=architecture,
        parameters=sum(math.prod(shape) for path in weights for shape in safetensors_shapes(path).values()),
        bytes_of_weights=sum(path.stat().st_size for path in weights),
        context_length=int(config.get("max_position_embeddings", 2048)),
        template=template_of_chat(chat if isinstance(chat, str) else "", sorted(special)),
        has_chat_template=isinstance(chat, str) and bool(chat),
    )


def _hf_config(folder: Path) -> dict[str, Any]:
    config_file = folder / "config.json"
    if not config_file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(f"{folder} is an adapter, no model: name it as the adapter, and its base model here")
        files = sorted(file.name for file in folder.glob("*.gguf"))
        if files:
            raise ModelError(f"{folder} has no config.json, but GGUF files: name one of them, such as {folder / files[0]}")
        raise ModelError(f"{folder} has no config.json: name a Hugging Face model folder or a .gguf file")
    return _json_object(config_file)


def _json_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ModelError(f"{file} is no JSON: {exc}; fetch the model again") from exc
    if not isinstance(value, dict):
        raise ModelError(f"{file} is no JSON object: fetch the model again")
    return value


def _hf_architecture(folder: Path, config: Mapping[str, Any]) -> str:
    name = (config.get("architectures") or ["?"])[0]
    if name not in ARCHITECTURES:
        raise ModelError(f"{folder} is a {name}: supported are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def _check_shards(folder: Path) -> None:
    """Raise ModelError where a shard that the index names is not there."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    named = sorted(set(_json_object(index).get("weight_map", {}).values()))
    missing = [name for name in named if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} of {len(named)} shards ({missing[0]}): fetch the model again")


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors by name, from its header. ModelError where it is foreign or cut off."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _LONGEST_HEADER:
                raise ValueError(f"a header of {length:,} bytes")
            header = json.loads(file.read(length))
        tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        shapes = {name: tuple(map(int, tensor["shape"])) for name, tensor in tensors.items()}
        end = 8 + length + max((int(tensor["data_offsets"][1]) for tensor in tensors.values()), default=0)
        size = path.stat().st_size
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as exc:
        raise ModelError(f"{path} is no safetensors file ({exc}): fetch it again") from exc
    if end > size:
        raise ModelError(f"{path} is cut off: {size:,} of {end:,} bytes; fetch it again")
    return shapes


def template_of_chat(chat_template: str, special_tokens: list[str]) -> PromptTemplate:
    """The PromptTemplate that a Jinja chat template amounts to for one system and one user message.

    The template is rendered once (sandboxed) with marks in place of the two texts. Without a chat template the model is a
    plain text completer: the prompt alone.
    """
    if not chat_template:
        return PromptTemplate("{prompt}")
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    system, user = {"role": "system", "content": _SYSTEM_MARK}, {"role": "user", "content": _PROMPT_MARK}
    failure: Exception | None = None
    for messages in ([system, user], [user]):
        try:
            text = environment.from_string(chat_template).render(
                messages=messages, add_generation_prompt=True, bos_token="", eos_token=""
            )
        except Exception as exc:  # a template may raise anything; one without a system role raises on purpose
            failure = exc
            continue
        if text.count(_PROMPT_MARK) == 1:
            used = tuple(sorted((t for t in special_tokens if t and t in text), key=len, reverse=True))
            default = re.search(r"You are [^<>'\"\\]+", chat_template)
            return PromptTemplate(
                text.replace(_SYSTEM_MARK, "{system}").replace(_PROMPT_MARK, "{prompt}"),
                special_tokens=used,
                default_system=default.group(0) if default and _SYSTEM_MARK in text else "",
            )
    raise ModelError(f"The model's chat template can't be rendered ({failure}): use a model with a plain chat template")


def check_gguf_complete(path: Path) -> None:
    """Raise ModelError where a GGUF is missing, foreign or cut off. Reads the magic bytes here, the rest in llama.cpp."""
    if not path.is_file():
        raise ModelError(f"No model file {path}: check the path, or fetch the file again")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{path} is no GGUF file (it begins with {magic!r}): fetch or export it again")


# --- gguf names: GGUF's names for the tensors and tokens of Hugging Face's models, both ways, and the order of a


# GGUF's modules -> Hugging Face's, for those architectures in modelfile.ARCHITECTURES.
MODULES = {
    "llama": {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
    "phi2": {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.final_layernorm",
        "output": "lm_head",
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.dense",
        "ffn_up": "mlp.fc1",
        "ffn_down": "mlp.fc2",
    },
}
# The parts of a fused attn_qkv, in the order of its rows.
QKV = ("attn_q", "attn_k", "attn_v")

_GGUF_NAME = re.compile(r"(?:blk\.(?P<block>\d+)\.)?(?P<module>\w+)(?:\.(?P<kind>weight|bias))?")
_HF_NAME = re.compile(r"(?:model\.layers\.(?P<block>\d+)\.)?(?P<module>.+?)(?:\.(?P<kind>weight|bias))?")


def hf_name(name: str, architecture: str) -> str | None:
    """Hugging Face's name of a GGUF tensor (with `.weight` or `.bias`) or module (without); None where it has none."""
    match = _GGUF_NAME.fullmatch(name)
    module = None if match is None else MODULES[architecture].get(match["module"])
    if match is None or module is None:
        return None
    block = "" if match["block"] is None else f"model.layers.{match['block']}."
    return f"{block}{module}" + (f".{match['kind']}" if match["kind"] else "")


def gguf_name(name: str, architecture: str) -> str | None:
    """GGUF's name of a Hugging Face tensor (with `.weight` or `.bias`) or module (without); None where it has none."""
    match = _HF_NAME.fullmatch(name)
    modules = {theirs: ours for ours, theirs in MODULES[architecture].items()}
    module = None if match is None else modules.get(match["module"])
    if match is None or module is None:
        return None
    block = "" if match["block"] is None else f"blk.{match['block']}."
    return f"{block}{module}" + (f".{match['kind']}" if match["kind"] else "")


def is_permuted(gguf_tensor: str, architecture: str) -> bool:
    """Whether a GGUF tensor's (or module's) rows are in another order than Hugging Face's: llama's q and k (`permute_rows`)."""
    return architecture == "llama" and re.search(r"\.attn_[qk](\.|$)", gguf_tensor) is not None


def permute_rows(matrix: NDArray[Any], heads: int) -> NDArray[Any]:
    """Reorder the output rows, (heads * d, ...), from Hugging Face's rotary layout (two halves) to GGUF's (pairs)."""
    rows = matrix.shape[0]
    halves = matrix.reshape(heads, 2, rows // heads // 2, *matrix.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(matrix.shape))


def unpermute_rows(matrix: NDArray[Any], heads: int) -> NDArray[Any]:
    """Reorder rows, (heads * d, ...), from GGUF's rotary layout (pairs) to Hugging Face's (two halves)."""
    rows = matrix.shape[0]
    pairs = matrix.reshape(heads, rows // heads // 2, 2, *matrix.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(matrix.shape))


# Tokens


class TokenType(IntEnum):
    """A token's kind in `tokenizer.ggml.token_type`; gguf.TokenType without the package."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


# Control tokens at which llama.cpp, too, ends a completion whatever the file's eos is (src/llama-vocab.cpp, special_eog_ids).
END_TOKENS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>",
    "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<reponame>", "<|repo_name|>", "<|file_sep|>",
}  # fmt: skip


def pre_tokenizer_of(reader: Any) -> str | None:
    """llama.cpp's name for where a GGUF's text is cut before BPE; None where the file names none and it can't be known."""
    pre = gguf_value(reader, "tokenizer.ggml.pre")
    if pre is None and gguf_value(reader, "general.architecture") == "phi2":
        return "phi-2"  # GGUFs older than April 2024 name none
    return None if pre is None else str(pre)
