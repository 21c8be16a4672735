"""A Hugging Face folder's tokenizer as GGUF metadata: byte-level BPE, with the name of its pre-tokenizer.

Fields: llama.cpp, convert_hf_to_gguf.py (set_vocab_gpt2) and docs of GGUF; what can't be carried over is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biasdpo.errors import ModelError, WorkspaceError
from biasdpo.gguf_names import END_TOKENS, TokenType
from biasdpo.workspace import read_json


@dataclass(frozen=True)
class GgufTokenizer:
    """What GGUF holds of a tokenizer. `special`: {role: id} (bos, eos, eot, eom, padding, unknown)."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    add_bos: bool
    chat_template: str

    @property
    def bytes(self) -> int:
        """About what it takes in a file: a string is its bytes and 8 of length."""
        return (
            sum(8 + len(text.encode()) for text in (*self.tokens, *self.merges)) + 4 * len(self.types) + len(self.chat_template)
        )

    def add_to(self, writer: Any) -> None:
        """Add the tokenizer's keys to a gguf.GGUFWriter."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for role, token in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{role}_token_id", token)
        writer.add_add_bos_token(self.add_bos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_tokenizer(folder: Path, config: dict[str, Any], architecture: str) -> GgufTokenizer:
    """The tokenizer of a Hugging Face folder. ModelError where a GGUF can't hold it.

    config   the model's config.json: its rows of embeddings past the last token become unused tokens
    """
    tokenizer = _json(folder / "tokenizer.json", required=True)
    settings = _json(folder / "tokenizer_config.json")
    generation = _json(folder / "generation_config.json")
    model = tokenizer.get("model") or {}
    odd = [key for key in ("byte_fallback", "ignore_merges", "fuse_unk", "dropout") if model.get(key)]
    odd += [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if model.get("type") != "BPE" or odd:
        what = f"{model.get('type')}" + (f" with {', '.join(odd)}" if odd else "")
        raise _refused(folder, f"is {what}, no plain byte-level BPE")
    if tokenizer.get("normalizer") is not None:
        raise _refused(folder, f"normalizes text ({tokenizer['normalizer'].get('type')}), which llama.cpp does not")
    pre = _pre(tokenizer.get("pre_tokenizer"), model["vocab"], architecture, folder)
    ids = {**model["vocab"], **{entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", ())}}
    tokens, types = _tokens(model["vocab"], tokenizer.get("added_tokens", ()), int(config["vocab_size"]), folder)
    special = _special(ids, settings, generation, config, folder)
    begins = _begins_with_bos(tokenizer.get("post_processor"), folder)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    add_bos = bool(settings.get("add_bos_token")) if begins is None else begins
    return GgufTokenizer(pre, tokens, types, merges, special, add_bos, _chat_template(folder, settings))


def _json(path: Path, *, required: bool = False) -> dict[str, Any]:
    if not path.is_file():
        if required:
            raise ModelError(f"{path.parent} has no {path.name}, from which the GGUF's tokenizer is made: fetch the model again")
        return {}
    try:
        value = read_json(path)
    except WorkspaceError as exc:
        raise ModelError(str(exc)) from exc
    return value if isinstance(value, dict) else {}


def _refused(folder: Path, what: str) -> ModelError:
    return ModelError(
        f"The tokenizer of {folder} {what}: export it as a LoRA GGUF, or merge onto a GGUF of the model with --source gguf"
    )


def _pre(step: Any, vocabulary: dict[str, int], architecture: str, folder: Path) -> str:
    """llama.cpp's name of where text is cut before BPE (src/llama-vocab.cpp, regex_exprs)."""
    steps = [] if step is None else step["pretokenizers"] if step.get("type") == "Sequence" else [step]
    if steps and _splits_missing_bytes(steps[-1], vocabulary):
        steps = steps[:-1]  # as backends/gguf_tokenizer writes it: what llama.cpp does anyway
    kinds = [step.get("type") for step in steps]
    last = steps[-1] if steps else {}
    byte_level = last.get("type") == "ByteLevel" and not last.get("add_prefix_space") and last.get("use_regex", True)
    if byte_level and kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if byte_level and kinds == ["ByteLevel"]:
        return "phi-2" if architecture == "phi2" else "gpt-2"
    raise _refused(folder, f"cuts text in a way ({', '.join(map(str, kinds)) or 'none'}) that has no known name in llama.cpp")


def _splits_missing_bytes(step: dict[str, Any], vocabulary: dict[str, int]) -> bool:
    pattern = (step.get("pattern") or {}).get("Regex", "") if step.get("type") == "Split" else ""
    match = re.fullmatch(r"\[(.+)\]", pattern)
    return match is not None and step.get("behavior") == "Isolated" and not set(match[1].replace("\\", "")) & set(vocabulary)


def _tokens(vocabulary: dict[str, int], added: Any, rows: int, folder: Path) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types: list[int] = [TokenType.UNUSED] * rows
    entries = [(token, i, TokenType.NORMAL) for token, i in vocabulary.items()]
    for entry in added:
        kind = TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED
        if kind == TokenType.USER_DEFINED and (entry.get("lstrip") or entry.get("rstrip") or entry.get("single_word")):
            raise _refused(folder, f"has the token {entry['content']!r} that swallows what is around it")
        entries.append((entry["content"], entry["id"], kind))
    for token, i, kind in entries:
        if i >= rows:
            raise ModelError(f"{folder}: token {i} ({token!r}) has no row in the {rows:,} embeddings; fetch the model again")
        tokens[i], types[i] = token, kind
    return tokens, types


def _special(
    ids: dict[str, int], settings: dict[str, Any], generation: dict[str, Any], config: dict[str, Any], folder: Path
) -> dict[str, int]:
    """{GGUF's role: id}: by name in tokenizer_config.json, else by id in the configs."""
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
    # Further ends of text: llama.cpp finds those with a well-known name itself; two more can be named.
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    known = {special["eos"], *(i for text, i in ids.items() if text in END_TOKENS)}
    further = [i for i in (ends if isinstance(ends, list) else []) if i not in known]
    if len(further) > 2:
        raise _refused(folder, f"has {len(further)} more tokens that end a text than a GGUF can name")
    return special | dict(zip(("eot", "eom"), further, strict=False))


def _begins_with_bos(step: Any, folder: Path) -> bool | None:
    """Whether every text gets a begin-of-text token; None where the post-processor does not say."""
    steps = [] if step is None else step["processors"] if step.get("type") == "Sequence" else [step]
    begins: bool | None = None
    for one in steps:
        if one.get("type") == "ByteLevel":
            continue
        single = [next(iter(piece)) for piece in one.get("single", ())] if one.get("type") == "TemplateProcessing" else []
        if single not in (["Sequence"], ["SpecialToken", "Sequence"]):
            raise _refused(folder, f"adds tokens to a text ({one.get('type')}) other than one at its beginning")
        begins = len(single) == 2
    return begins


def _chat_template(folder: Path, settings: dict[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template") or ""
    if isinstance(template, list):  # several by name
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), "")
    return str(template)
