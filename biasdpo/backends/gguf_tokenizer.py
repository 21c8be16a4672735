"""Writes a GGUF's tokenizer as Hugging Face's files: byte-level BPE with the pre-tokenizer that `tokenizer.ggml.pre` names.

transformers' own conversion loses that name, and with it where digits and line breaks are split.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biasdpo.errors import ModelError
from biasdpo.gguf_names import END_TOKENS, TokenType, pre_tokenizer_of
from biasdpo.modelfile import gguf_value
from biasdpo.workspace import write_json


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
