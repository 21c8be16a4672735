"""The metadata of model files, read without torch: headers of GGUF and safetensors files, a model folder's JSON files,
and the names that GGUF and Hugging Face use for the same tensors."""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from biasdpo import chat
from biasdpo.chat import PromptTemplate
from biasdpo.errors import BiasDPOError, ModelError
from biasdpo.workspace import MAX_JSON_BYTES

# GGUF's names of the Hugging Face architectures that this project trains and exports.
ARCHITECTURES = {"LlamaForCausalLM": "llama", "PhiForCausalLM": "phi2"}


@dataclass(frozen=True)
class Description:
    """A model's own description. Without a chat template, `template` is the prompt alone; one is not rendered yet."""

    architecture: str
    parameters: int
    bytes_of_weights: int
    context_length: int  # tokens
    template: PromptTemplate
    has_chat_template: bool


def is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})(\.gguf)", re.IGNORECASE)


def gguf_parts(path: Path) -> list[Path]:
    """The files of a GGUF model; most have one. ModelError where `path` is not the first of several, or one is missing."""
    if (match := _PART.fullmatch(path.name)) is None:
        return [path]
    name, number, count, suffix = match.groups()
    parts = [path.with_name(f"{name}-{i:05d}-of-{count}{suffix}") for i in range(1, int(count) + 1)]
    if int(number) != 1:
        raise ModelError(f"{path.name} is part {int(number)} of a model: name the first part, {parts[0].name}")
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ModelError(f"{path} lacks {len(missing)} of its {len(parts)} parts ({missing[0]}): fetch the model again")
    return parts


def refuse_parts(path: Path) -> None:
    """Raise ModelError for a model in several GGUF files where all its weights must be in one."""
    if len(gguf_parts(path)) > 1:
        raise ModelError(f"{path.name} is one of several files: join them with `llama-gguf-split --merge {path.name} OUT.gguf`")


_Value = TypeVar("_Value")


def _cached(read: Callable[[Path], _Value]) -> Callable[[Path], _Value]:
    """Cache what `read` says of a .gguf file or a Hugging Face folder until its files change."""

    @lru_cache(maxsize=32)
    def read_version(path: Path, _files: object) -> _Value:
        return read(path)

    @wraps(read)
    def cached(path: Path) -> _Value:
        files = [path] if is_gguf(path) else [*path.glob("*.json"), *path.glob("*.safetensors"), *path.glob("*.jinja")]
        try:
            return read_version(path, tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(files)))
        except OSError:
            return read(path)  # which reports it

    return cached


@_cached
def describe(path: Path) -> Description:
    """Describe a .gguf file or a Hugging Face folder; cached until its files change."""
    return _describe_gguf(path) if is_gguf(path) else _describe_hf_folder(path)


@_cached
def tensor_shapes(path: Path) -> tuple[str, Mapping[str, tuple[int, ...]]]:
    """(architecture, {tensor name in the file: shape}) of a .gguf file or a Hugging Face folder; a matrix is (out, in)."""
    if is_gguf(path):
        header = read_model_header(path)
        return header.architecture, {name: t.shape for name, t in header.tensors.items()}
    architecture = _hf_architecture(path, _hf_config(path))
    return architecture, {name: shape for file in weight_files(path) for name, shape in safetensors_shapes(file).items()}


def verified_template(path: Path) -> PromptTemplate:
    """The template of a model's files, rendered once. ModelError if it can't be."""
    try:
        return chat.verified(describe(path).template)
    except ValueError as exc:
        raise ModelError(f"{path}: its chat template can't be rendered ({exc}); use a model with a simpler one") from exc


# JSON

_Model = TypeVar("_Model", bound=BaseModel)


class ForeignJson(BaseModel):
    """Base of the JSON objects that other programs write: unknown keys are kept, known keys must have the right type."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


def read_json_as(file: Path, model: type[_Model], error: type[BiasDPOError] = ModelError) -> _Model:
    """Read a JSON object and check its types; raise `error` with one line if it is missing, damaged or of another form."""
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:
            raise error(f"{file} can't be used: it has more than {MAX_JSON_BYTES // 2**20} MiB; fetch it again")
        return model.model_validate_json(content)
    except OSError as exc:
        raise error(f"Can't read {file}: {exc.strerror or exc}; check the path, or restore the file from a copy") from exc
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        what = f"its {key!r} is wrong ({first['msg']})" if key else first["msg"]
        raise error(f"{file} can't be used: {what}; restore the file from a copy, or fetch it again") from exc


# Hugging Face folders


class _HfConfig(ForeignJson):
    architectures: list[str] | None = None
    max_position_embeddings: PositiveInt | None = None


class _Token(ForeignJson):
    content: str
    special: bool = False


class _NamedTemplate(ForeignJson):
    name: str
    template: str


class _TokenizerConfig(ForeignJson):
    chat_template: str | list[_NamedTemplate] | None = None
    added_tokens_decoder: dict[str, _Token] = {}


class _Tokenizer(ForeignJson):
    added_tokens: list[_Token] = []


class _ShardIndex(ForeignJson):
    weight_map: dict[str, str] = {}


def _describe_hf_folder(folder: Path) -> Description:
    config = _hf_config(folder)
    architecture = _hf_architecture(folder, config)
    weights = weight_files(folder)
    settings = _read_optional(folder / "tokenizer_config.json", _TokenizerConfig)
    tokenizer = _read_optional(folder / "tokenizer.json", _Tokenizer)
    special = {token.content for token in [*settings.added_tokens_decoder.values(), *tokenizer.added_tokens] if token.special}
    source = chat_template(folder)
    shapes = [shape for path in weights for shape in safetensors_shapes(path).values()]
    return Description(
        architecture=architecture,
        parameters=sum(map(math.prod, shapes)),
        bytes_of_weights=sum(path.stat().st_size for path in weights),
        context_length=config.max_position_embeddings or 2048,
        template=chat.chat_template(source, sorted(special), _named_tokens(folder, settings)),
        has_chat_template=bool(source),
    )


def _hf_config(folder: Path) -> _HfConfig:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(f"{folder} is an adapter, not a model: select it as the adapter, and its base model here")
        ggufs = sorted(folder.glob("*.gguf"))
        if ggufs:
            raise ModelError(f"{folder} has no config.json, but GGUF files: select one of them, such as {ggufs[0]}")
        raise ModelError(f"{folder} has no config.json: select a Hugging Face model folder or a .gguf file")
    return read_json_as(folder / "config.json", _HfConfig)


def eos_token_ids(folder: Path) -> list[Any]:
    """What a folder's configs say of EOS: an id, a list, or None each."""
    return [read_object(folder / name).get("eos_token_id") for name in ("generation_config.json", "config.json")]


def _hf_architecture(folder: Path, config: _HfConfig) -> str:
    name = (config.architectures or ["model of unknown architecture"])[0]
    if name not in ARCHITECTURES:
        raise ModelError(f"{folder} is a {name}: supported are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def _read_optional(file: Path, model: type[_Model]) -> _Model:
    return read_json_as(file, model) if file.is_file() else model()


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object of a model's folder; {} for a missing file."""
    return _read_optional(file, ForeignJson).model_extra or {}


def _named_tokens(folder: Path, settings: _TokenizerConfig) -> dict[str, str]:
    """{bos_token: its text, ...} as a folder's files name them. The loaded tokenizer has the last word (`hf_loading`)."""
    listed = read_object(folder / "special_tokens_map.json") | (settings.model_extra or {})
    named = {key: value for key, value in listed.items() if key.endswith("_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    # One that is named nowhere may come from the tokenizer's class.
    return dict.fromkeys(("bos_token", "eos_token"), "") | {key: text for key, text in texts.items() if isinstance(text, str)}


def chat_template(folder: Path) -> str:
    """A folder's chat template, "" without one; among several the one named "default", as in transformers."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise ModelError(f"Can't read {file} ({exc}): restore the file from a copy, or fetch it again") from exc
    sources = _read_optional(folder / "tokenizer_config.json", _TokenizerConfig).chat_template or ""
    if isinstance(sources, str):
        return sources
    return _default_template(folder, {entry.name: entry.template for entry in sources})


def _default_template(path: Path, by_name: Mapping[str, str]) -> str:
    if by_name and "default" not in by_name:
        raise ModelError(
            f"{path} has the chat templates {', '.join(by_name)} and none named default, so none can be chosen: name one default"
        )
    return by_name.get("default", "")


_WEIGHTS, _SHARD_INDEX = "model.safetensors", "model.safetensors.index.json"


def has_weights(folder: Path) -> bool:
    return (folder / _WEIGHTS).is_file() or (folder / _SHARD_INDEX).is_file()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads: not an adapter's, nor the authors' consolidated.safetensors. ModelError if
    there are none, or a shard that the index names is missing."""
    if not has_weights(folder):
        raise ModelError(f"{folder} has no {_WEIGHTS}: fetch the model's safetensors weights (pickles are not opened)")
    shards = _read_optional(folder / _SHARD_INDEX, _ShardIndex).weight_map
    names = sorted({Path(name).name for name in shards.values()})
    if _WEIGHTS not in names and (folder / _WEIGHTS).is_file():
        names = [_WEIGHTS]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ModelError(f"{folder} lacks {len(missing)} of {len(names)} shards ({missing[0]}): fetch the model again")
    return [folder / name for name in names]


# Weights: the headers of safetensors and GGUF files


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """{tensor: shape} of a safetensors file, from its header. ModelError if it is damaged or truncated."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as exc:
        raise ModelError(f"{path} is not a complete safetensors file ({exc}): fetch it again") from exc


_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a GGUF: its shape as in torch, (out, in) for a matrix; its bytes in the file; ggml's name of its type."""

    shape: tuple[int, ...]
    n_bytes: int
    kind: str
    start: int  # in the file

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The header of a GGUF. Bytes that are not UTF-8 become surrogate escapes."""

    path: Path
    values: dict[str, Any]  # metadata by key, arrays as lists
    types: dict[str, tuple[int, ...]]  # the values' types (gguf.GGUFValueType); of an array, its items' type follows
    tensors: dict[str, TensorInfo]  # in the file's order
    size: int  # bytes, up to the weights

    @property
    def architecture(self) -> str:
        return self.get("general.architecture", "")

    @property
    def pre_tokenizer(self) -> str:
        """llama.cpp's name of the pre-tokenizer; "" if it is unknown. GGUFs of Phi-2 older than April 2024 name none."""
        return self.get("tokenizer.ggml.pre", "phi-2" if self.architecture == "phi2" else "")

    def get(self, key: str, default: _Value) -> _Value:
        """A value, `default` where there is none. ModelError if it is not of the default's type."""
        found = self.values.get(key, default)
        if type(found) is type(default):
            return found
        if isinstance(default, float) and type(found) is int:
            return float(found)  # type: ignore[return-value]
        kinds = f"{type(found).__name__}, not {type(default).__name__}"
        raise ModelError(f"{self.path}: its {key} is of type {kinds}; fetch or export it again")


def read_header(path: Path) -> Header:
    """Read a GGUF's header, in a fraction of a second. ModelError if the file is missing, damaged or of a newer version."""
    if not path.is_file():
        raise ModelError(f"No model file {path}: check the path, or fetch the file again")
    try:
        size = path.stat().st_size
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _parse_header(path, _Cursor(data))
    # Random bytes can fail anywhere: lengths past the end, unknown types, nesting, alignment 0.
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError, MemoryError, struct.error) as exc:
        raise ModelError(f"{path} is not a complete GGUF file ({type(exc).__name__}: {exc}): fetch or export it again") from exc
    end = max((tensor.start + tensor.n_bytes for tensor in header.tensors.values()), default=header.size)
    if end > size:
        raise ModelError(f"{path} is truncated: {size:,} of {end:,} bytes; fetch or export it again")
    return header


def read_model_header(path: Path) -> Header:
    """The header of a model's GGUF, or of its first one with the tensors of all. Their starts are those in their own files."""
    first, *others = map(read_header, gguf_parts(path))
    return replace(first, tensors={name: tensor for header in (first, *others) for name, tensor in header.tensors.items()})


class _Cursor:
    """Reads values one after another."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.at = 0

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + form, self._data, self.at)
        self.at += struct.calcsize("<" + form)
        return values

    def string(self) -> str:
        (length,) = self.take("Q")
        if self.at + length > len(self._data):
            raise ValueError(f"a string of {length:,} bytes exceeds the file")
        self.at += length
        return self._data[self.at - length : self.at].decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> tuple[Any, tuple[int, ...]]:
        """A value and its types."""
        if kind == _STRING:
            return self.string(), (kind,)
        if kind != _ARRAY:
            return self.take(_SCALARS[kind])[0], (kind,)
        item, count = self.take("IQ")
        if item in _SCALARS:
            return list(self.take(f"{count}{_SCALARS[item]}")), (kind, item)
        return [self.value(item)[0] for _ in range(count)], (kind, item)


def _parse_header(path: Path, cursor: _Cursor) -> Header:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    magic, version = cursor.take("4sI")
    if magic != b"GGUF":
        raise ValueError(f"it begins with {magic!r}")
    if version not in _VERSIONS:
        found = "it is big-endian" if version >> 24 in _VERSIONS else f"GGUF version {version}"
        raise ValueError(f"{found}, supported are {', '.join(map(str, _VERSIONS))}, little-endian")
    tensor_count, value_count = cursor.take("QQ")
    values, types = {}, {}
    for _ in range(value_count):
        key = cursor.string()
        values[key], types[key] = cursor.value(cursor.take("I")[0])
    found_tensors: list[tuple[str, tuple[int, ...], int, str, int]] = []
    for _ in range(tensor_count):
        name = cursor.string()
        shape = cursor.take(f"{cursor.take('I')[0]}Q")[::-1]
        kind, offset = cursor.take("IQ")
        type_ = GGMLQuantizationType(kind)
        elements, size = GGML_QUANT_SIZES[type_]
        if shape[-1] % elements:
            raise ValueError(f"{name} is {shape[-1]} wide, no multiple of {elements}")
        found_tensors.append((name, shape, math.prod(shape) // elements * size, type_.name, offset))
    alignment = int(values.get("general.alignment", 32))
    start = -(-cursor.at // alignment) * alignment
    tensors = {name: TensorInfo(shape, n_bytes, kind, start + at) for name, shape, n_bytes, kind, at in found_tensors}
    return Header(path, values, types, tensors, start)


def _describe_gguf(path: Path) -> Description:
    header = read_model_header(path)
    if header.get("general.type", "model") != "model" or not header.architecture:
        raise ModelError(f"{path} is a GGUF of type {header.values.get('general.type')!r}, not a model: select a model's file")
    prefix = "tokenizer.chat_template"
    templates = {key.removeprefix(f"{prefix}."): str(text) for key, text in header.values.items() if key.startswith(f"{prefix}.")}
    source = _printable(header.get(prefix, "") or _default_template(path, templates))
    return Description(
        architecture=header.architecture,
        parameters=sum(tensor.elements for tensor in header.tensors.values()),
        bytes_of_weights=sum(tensor.n_bytes for tensor in header.tensors.values()),
        context_length=header.get(f"{header.architecture}.context_length", 2048),
        template=chat.chat_template(source, special_tokens(header), named_tokens(header)),
        has_chat_template=bool(source),
    )


def named_tokens(header: Header) -> dict[str, str]:
    """{bos_token: its text, ...} of a GGUF."""
    tokens: list[Any] = header.get("tokenizer.ggml.tokens", [])
    ids = {role: header.values.get(f"tokenizer.ggml.{key}_token_id") for role, key in GGUF_ROLES.items()}
    return {f"{role}_token": _printable(str(tokens[i])) for role, i in ids.items() if isinstance(i, int) and i < len(tokens)}


def adds_begin(header: Header) -> bool:
    """Whether llama.cpp puts BOS before every text (src/llama-vocab.cpp)."""
    default = header.get("tokenizer.ggml.model", "") == "llama" or header.pre_tokenizer in ("llama3", "llama-v3", "llama-bpe")
    return header.get("tokenizer.ggml.add_bos_token", default)


def special_tokens(header: Header) -> tuple[str, ...]:
    """The texts of a GGUF's tokens that no user's text may become."""
    tokens: list[Any] = header.get("tokenizer.ggml.tokens", [])
    kinds: list[Any] = header.get("tokenizer.ggml.token_type", [])
    parsed = (TokenType.CONTROL, TokenType.UNKNOWN)  # by llama.cpp, as are its own end tokens whatever their type
    special = (text for text, kind in zip(tokens, kinds, strict=False) if kind in parsed or text in END_TOKENS)
    return tuple(_printable(str(text)) for text in special)


def _printable(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


# Names of tensors and tokens

# GGUF's modules -> Hugging Face's, by GGUF's name of the architecture.
_LLAMA = {
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
}
_PHI = {"output_norm": "model.final_layernorm", "attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"}
MODULES = {
    "llama": _LLAMA,
    "phi2": {ours: _PHI.get(ours, its) for ours, its in _LLAMA.items() if ours not in ("ffn_norm", "ffn_gate")},
}
# Parts of a fused attn_qkv, in row order.
QKV = ("attn_q", "attn_k", "attn_v")

_GGUF_NAME = re.compile(r"(?:blk\.(?P<block>\d+)\.)?(?P<module>\w+)(?:\.(?P<kind>weight|bias))?")


def hf_name(name: str, architecture: str) -> str | None:
    """Hugging Face's name of a GGUF tensor (ends in `.weight` or `.bias`) or module; None if there is none."""
    match = _GGUF_NAME.fullmatch(name)
    module = None if match is None else MODULES[architecture].get(match["module"])
    if match is None or module is None:
        return None
    block = "" if match["block"] is None else f"model.layers.{match['block']}."
    return f"{block}{module}" + (f".{match['kind']}" if match["kind"] else "")


# transformers' names of the special tokens -> GGUF's.
GGUF_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type` (gguf.TokenType, without importing gguf)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


# Control tokens that end a completion in llama.cpp, whatever the file's EOS is (src/llama-vocab.cpp, special_eog_ids).
END_TOKENS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>",
    "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<reponame>", "<|repo_name|>", "<|file_sep|>",
}  # fmt: skip
