# ruff: noqa: E501 - templates
"""Tiny, random models, tokenizers, chat templates and adapters of the kinds that people bring, for tests/test_model_matrix.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests import tiny_models

# Chat templates, in the manner of well-known models

_CHATML_TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
_CHATML_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_CHATML = "{% for m in messages %}" + _CHATML_TURN + "{% endfor %}" + _CHATML_ASK

TEMPLATES: dict[str, str | list[dict[str, str]]] = {
    "ChatML": _CHATML,
    "ChatML, default system prompt": "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nA curious user and a helper."
    "<|im_end|>\n' }}{% endif %}" + _CHATML,
    "ChatML, several named templates": [{"name": "rag", "template": "{{ messages }}"}, {"name": "default", "template": _CHATML}],
    "ChatML, a comment": "{# You are a comment #}" + _CHATML,
    "Zephyr: eos after each turn": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "Llama 2: [INST], system in the first turn": "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set head = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% else %}{% set rest = messages %}"
    "{% set head = '' %}{% endif %}{% for m in rest %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' "
    "+ (head if loop.first else '') + m['content'] | trim + ' [/INST]' }}{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
    "{% endif %}{% endfor %}",
    "Llama 3: headers, trim": "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|tail|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|tail|>\n\n' }}"
    "{% endif %}",
    "Mistral: roles must alternate": "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}",
    "Gemma: no system role": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}{{ '<|head|>' "
    "+ ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + '<|tail|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>model\n' }}{% endif %}",
    "Bare roles after bos": "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
    "{% generation %}": "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}" + _CHATML_TURN + "{% endif %}{% endfor %}" + _CHATML_ASK,
    "{% continue %}, tools is not none": "{% if tools is not none %}{{ 'tools' }}{% endif %}{% for m in messages %}"
    "{% if not m['content'] %}{% continue %}{% endif %}" + _CHATML_TURN + "{% endfor %}" + _CHATML_ASK,
    "strftime_now": "{{ '<|im_start|>system\nIt is ' + strftime_now('%Y') + '.<|im_end|>\n' }}" + _CHATML,
    "tojson": "{% for m in messages %}{{ '<|im_start|>' + (m | tojson) + '<|im_end|>\n' }}{% endfor %}" + _CHATML_ASK,
    "A literal {prompt}": "{{ 'Fill in {prompt} and {system}.\n' }}" + _CHATML,
}
NO_SYSTEM = {"Mistral: roles must alternate", "Gemma: no system role"}
NOT_IN_OLLAMA = {"tojson"}

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|tail|>", "<|eot_id|>")

# Models


@dataclass(frozen=True)
class Kind:
    """A kind of model: how it is made, and what is expected of it."""

    name: str
    tokenizer: Callable[[], Any]  # -> tokenizers.Tokenizer
    architecture: str = "Llama"
    bos: str = "<s>"
    eos: str | None = "</s>"
    settings: dict[str, Any] = field(default_factory=dict)
    tokenizer_settings: dict[str, Any] = field(default_factory=dict)
    refused: str = ""  # what the transformers backend says


def byte_level(*, begin: bool = False) -> Any:
    from tokenizers import processors

    tokenizer = tiny_models._train_tokenizer(["<s>", "</s>", *SPECIAL], digits_apart=begin)
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def sentencepiece(space: str = "prepend", *, unigram: bool = False) -> Any:
    """BPE or Unigram with byte fallback in the manner of SentencePiece.

    space   "prepend": before every text between special tokens (Llama 2); "first": before the first only; "": never (Gemma)
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, min_frequency=1)
    words.train_from_iterator(tiny_models._TRAINING_TEXT, trainer)
    trained = json.loads(words.to_str())["model"]["vocab"]
    pieces = [*special, *bytes_, *(piece for piece in trained if piece not in bytes_)]
    if unigram:
        scores = [0.0] * 259 + [-2.0 - 0.01 * i for i in range(len(pieces) - 259)]
        tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=0, byte_fallback=True))
    else:
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        # SentencePiece joins any two pieces whose whole is one, the lowest id first.
        splits = [(piece[:i], piece[i:]) for piece in pieces[259:] for i in range(1, len(piece))]
        merges = [(left, right) for left, right in splits if left in vocabulary and right in vocabulary]
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if space == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=unigram)
    else:
        steps = [normalizers.Prepend("▁")] if space else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*fallback, *([decoders.Strip(" ", 1, 0)] if space else [])])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*special, *SPECIAL)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


_UNSUPPORTED = "supported are LlamaForCausalLM, PhiForCausalLM"
KINDS = [
    Kind("SmolLM2: Llama, byte-level BPE, tied head", byte_level),
    Kind(
        "Llama 3: eos as a list, no pad token, scaled rope",
        lambda: byte_level(begin=True),
        settings={
            "eos_token_id": [1, 7],
            "pad_token_id": None,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    Kind("TinyLlama, Llama 2: SentencePiece BPE", sentencepiece, settings={"tie_word_embeddings": False}),
    Kind("Llama, SentencePiece BPE with a space before the first text only", lambda: sentencepiece("first")),
    Kind("Llama, Unigram", lambda: sentencepiece("first", unigram=True), settings={"bos_token_id": None}),
    Kind("Llama, eos null, pad token past the embeddings", byte_level, eos=None, settings={"eos_token_id": 4, "pad_token_id": 9999}),
    Kind("Phi: byte-level BPE", byte_level, "Phi"),
    Kind("Qwen2: byte-level BPE, no bos", byte_level, "Qwen2", refused=_UNSUPPORTED),
    Kind("Gemma: SentencePiece BPE without a first space", lambda: sentencepiece(""), "Gemma", refused=_UNSUPPORTED),
    Kind("Mistral: SentencePiece BPE", lambda: sentencepiece("first"), "Mistral", refused=_UNSUPPORTED),
    Kind("GPT-2: byte-level BPE", byte_level, "GPT2", refused=_UNSUPPORTED),
]  # fmt: skip


IN_LLAMA_CPP = {kind.name for kind in (KINDS[0], KINDS[2], KINDS[5], KINDS[6], KINDS[7])}
NOT_EXPORTED = {
    KINDS[1].name: "rope scaling 'llama3'",
    **{kind.name: "a tokenizer that is not plain byte-level BPE" for kind in KINDS[2:5]},
}


def save(kind: Kind, folder: Path) -> Path:
    """A model of this kind as a Hugging Face folder, without a chat template."""
    import torch
    import transformers

    tokenizer = kind.tokenizer()
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind.architecture == "GPT2":
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4}
    else:
        sizes |= {"intermediate_size": 128, "num_key_value_heads": 4 if kind.architecture == "Phi" else 2}
        sizes |= {"max_position_embeddings": 512, "initializer_range": 0.25}
    ids = {"bos_token_id": tokenizer.token_to_id(kind.bos), "eos_token_id": tokenizer.token_to_id(kind.eos or kind.bos)}
    tied = {"tie_word_embeddings": kind.architecture != "Phi"}
    settings = {"vocab_size": tokenizer.get_vocab_size(), **sizes, **ids, "pad_token_id": 2, **tied, **kind.settings}
    late = {name: settings.pop(name) for name in ("pad_token_id",) if settings[name] == 9999}  # torch refuses it
    config = getattr(transformers, f"{kind.architecture}Config")(**settings)
    name = f"{kind.architecture}{'LMHeadModel' if kind.architecture == 'GPT2' else 'ForCausalLM'}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        getattr(transformers, name)(config).save_pretrained(folder)
    if late:
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(written | late))
    named = {"bos_token": kind.bos, "eos_token": kind.eos}
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named, **kind.tokenizer_settings)
    wrapped.save_pretrained(folder)
    return folder


def set_template(folder: Path, template: str | list[dict[str, str]]) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))


# Adapters of a Llama

ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "q_proj and v_proj": ({"modules": r"[qv]_proj"}, ""),
    "all linear layers": ({}, ""),
    "target_modules all-linear": ({"target_modules": "all-linear"}, ""),
    "target_modules a pattern": ({"modules": r"[qk]_proj", "target_modules": r".*\.(q|k)_proj"}, ""),
    "some layers, by layers_to_transform": ({"modules": r"layers\.1\.", "layers_to_transform": [1]}, ""),
    "rank and alpha patterns": ({"ranks": {"o_proj": 2}, "alpha_pattern": {"o_proj": 5.0}}, ""),
    "rank-stabilized": ({"use_rslora": True, "rank": 8}, ""),
    "rank 1, F16": ({"rank": 1, "dtype": np.float16}, ""),
    "lm_head": ({"modules": r"lm_head|q_proj"}, ""),
    "DoRA": ({"use_dora": True}, "uses use_dora"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "uses init_lora_weights=pissa"),
    "biases": ({"bias": "all"}, "uses bias=all"),
    "modules_to_save": ({"modules_to_save": ["embed_tokens"]}, "uses modules_to_save"),
}


# What the matrix says, as a page


def document() -> str:
    """docs/supported-models.md."""

    def table(head: str, rows: Sequence[tuple[str, ...]]) -> list[str]:
        columns = head.count("|") + 1
        return [f"| {head} |", "|" + "---|" * columns, *(f"| {' | '.join(row)} |" for row in rows), ""]

    kinds = []
    for kind in KINDS:
        here = "refused, because only Llama and Phi are supported" if kind.refused else "yes"
        export = "refused, because it can't be trained or merged here" if kind.refused else "yes, proven equal"
        if why := NOT_EXPORTED.get(kind.name):
            export = f"refused, because it has {why}"
        kinds.append((kind.name, here, export, "yes" if kind.name in IN_LLAMA_CPP else "not tried"))
    templates = [
        (
            f"`{name}`" if "{" in name else name,
            "refused, because it has no system role" if name in NO_SYSTEM else "yes",
            "refused, because it changes its messages" if name in NOT_IN_OLLAMA else "yes",
        )
        for name in TEMPLATES
    ]
    adapters = [(shape, f"refused, because it {why}" if why else _adapter_note(shape)) for shape, (_, why) in ADAPTERS.items()]
    return "\n".join(
        [
            "# Supported models",
            "",
            "Written by `python -m tests.model_matrix` from the tables that `tests/test_model_matrix.py` runs, on small random",
            "models of each kind. Every kind of model is tried with every template: token ids of prompts, system prompts,",
            "conversations and training rows must equal `apply_chat_template`'s. Logits must equal those of transformers and PEFT.",
            "",
            "## Models",
            "",
            *table("Kind | transformers: Compare, train, evaluate | Export as one GGUF | A GGUF of it in llama.cpp", kinds),
            "## Chat templates",
            "",
            *table("Template | System prompt | Ollama's Modelfile", templates),
            "## Adapters",
            "",
            "Merge one that is refused into its model with PEFT's `merge_and_unload()`, save that, and open it as a model.",
            "",
            *table("Adapter | Used", adapters),
        ]
    )


def _adapter_note(shape: str) -> str:
    return "yes; as a GGUF refused, because a tied head can't be held apart" if shape == "lm_head" else "yes"


if __name__ == "__main__":
    Path("docs/supported-models.md").write_text(document(), encoding="utf-8")
