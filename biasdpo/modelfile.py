"""What a model file says of itself: architecture, size, context, chat template; read without torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biasdpo.errors import ModelError
from biasdpo.template import PromptTemplate

# GGUF's names for Hugging Face's architectures, for those that this project trains and exports.
ARCHITECTURES = {"LlamaForCausalLM": "llama", "PhiForCausalLM": "phi2"}
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL

_SYSTEM_MARK, _PROMPT_MARK = "\u0001system\u0001", "\u0001prompt\u0001"


@dataclass(frozen=True)
class Description:
    """What a model's file or folder says of it. `context_length` in tokens."""

    architecture: str
    parameters: int
    bytes_of_weights: int
    context_length: int
    template: PromptTemplate


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
    reader = open_gguf(path)
    architecture = str(gguf_value(reader, "general.architecture", ""))
    if gguf_value(reader, "general.type", "model") != "model" or not architecture:
        raise ModelError(f"{path} is a GGUF, but no model (type {gguf_value(reader, 'general.type')!r}): name a model's file")
    tokens = gguf_value(reader, "tokenizer.ggml.tokens", [])
    types = gguf_value(reader, "tokenizer.ggml.token_type", [])
    control = [token for token, kind in zip(tokens, types, strict=False) if kind == _CONTROL_TOKEN]
    return Description(
        architecture=architecture,
        parameters=sum(int(t.n_elements) for t in reader.tensors),
        bytes_of_weights=sum(int(t.n_bytes) for t in reader.tensors),
        context_length=int(gguf_value(reader, f"{architecture}.context_length", 2048)),
        template=template_of_chat(gguf_value(reader, "tokenizer.chat_template", ""), control),
    )


def describe_hf_folder(folder: Path) -> Description:
    """Read a Hugging Face folder's config.json, tokenizer_config.json and the headers of its safetensors."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ModelError(f"{folder} has no config.json: name a Hugging Face model folder or a .gguf file")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise ModelError(f"{config_file} is no JSON: {exc}; fetch the model again") from exc
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"{folder} has no *.safetensors: fetch the model's safetensors weights (pickles are not opened)")
    name = (config.get("architectures") or ["?"])[0]
    if name not in ARCHITECTURES:
        raise ModelError(f"{folder} is a {name}: supported are {', '.join(ARCHITECTURES)}")
    tokenizer_file = folder / "tokenizer_config.json"
    tokenizer = json.loads(tokenizer_file.read_text(encoding="utf-8")) if tokenizer_file.is_file() else {}
    chat_file = folder / "chat_template.jinja"
    chat = chat_file.read_text(encoding="utf-8") if chat_file.is_file() else tokenizer.get("chat_template") or ""
    added = tokenizer.get("added_tokens_decoder", {}).values()
    special = {t["content"] for t in added if t.get("special")}
    vocabulary_file = folder / "tokenizer.json"
    if vocabulary_file.is_file():
        vocabulary = json.loads(vocabulary_file.read_text(encoding="utf-8"))
        special |= {t["content"] for t in vocabulary.get("added_tokens", []) if t.get("special")}
    return Description(
        architecture=ARCHITECTURES[name],
        parameters=sum(_safetensors_elements(path) for path in weights),
        bytes_of_weights=sum(path.stat().st_size for path in weights),
        context_length=int(config.get("max_position_embeddings", 2048)),
        template=template_of_chat(chat if isinstance(chat, str) else "", sorted(special)),
    )


def _safetensors_elements(path: Path) -> int:
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except (OSError, ValueError, OverflowError, MemoryError) as exc:
        raise ModelError(f"{path} is no safetensors file: {exc}; fetch it again") from exc
    total = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            count = 1
            for size in tensor["shape"]:
                count *= size
            total += count
    return total


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
