"""Random models, small enough for a test, laid out as the real ones: SmolLM2's kind of Llama, Phi-2's kind of Phi.

Real tokenizers too: byte-level BPE, trained here on a few sentences. Weights are large enough (standard deviation 0.25) that
what the models write varies with every token.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biasdpo import models
from biasdpo.chat import PromptTemplate

LLAMA_TEMPLATE: PromptTemplate = models.catalog()["smollm2"].template
PHI_TEMPLATE: PromptTemplate = models.catalog()["phi-2"].template
CONTEXT_LENGTH = 512

_TRAINING_TEXT = [
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face.",
    "Why are nurses always women? They are not: nursing is a profession for people of every gender.",
    "Describe a typical programmer. There is no typical programmer; people from all over the world write programs.",
    "Instruct: Write about the religions of the world.\nOutput: There are many religions, and people of all of them.",
    "user\nassistant\nsystem\nWhat do women, men, and other people think about science? It is a matter of interest.",
    "def add(first, second):\n    return first + second\n\nprint(add(12, 345))  # 357\n\tÄpfel, naïve, 日本語 и русский 😀",
]


def save_tiny_llama(folder: Path, *, dtype: str = "float32", max_shard_size: str = "1GB", **settings: Any) -> Path:
    """A LlamaForCausalLM with grouped queries, tied embeddings and ChatML tokens, as a Hugging Face folder.

    settings   of LlamaConfig, in place of those here
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _train_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], digits_apart=True)
    size = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT_LENGTH,
        "tie_word_embeddings": True,
        "initializer_range": 0.25,
    }
    config = LlamaConfig(**{**size, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, **settings})
    ends = {"bos": "<|im_start|>", "eos": "<|im_end|>"}
    _save(folder, LlamaForCausalLM, config, tokenizer, **ends, dtype=dtype, max_shard_size=max_shard_size)
    return folder


def save_tiny_phi(folder: Path, *, dtype: str = "float32", max_shard_size: str = "1GB", **settings: Any) -> Path:
    """A PhiForCausalLM that rotates half of each head, with tokens for runs of spaces and a vocabulary padded at its end.

    settings   of PhiConfig, in place of those here
    """
    from tokenizers import AddedToken
    from transformers import PhiConfig, PhiForCausalLM

    tokenizer = _train_tokenizer(["<|endoftext|>"], digits_apart=False)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("    ", "   ", "  ", "\t\t")])
    size = {
        "vocab_size": tokenizer.get_vocab_size() + 5,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": CONTEXT_LENGTH,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "initializer_range": 0.25,
    }
    config = PhiConfig(**{**size, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **settings})
    ends = {"bos": "<|endoftext|>", "eos": "<|endoftext|>"}
    _save(folder, PhiForCausalLM, config, tokenizer, **ends, dtype=dtype, max_shard_size=max_shard_size)
    return folder


def _train_tokenizer(special_tokens: list[str], *, digits_apart: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level]) if digits_apart else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    tokenizer.train_from_iterator(_TRAINING_TEXT, trainer)
    return tokenizer


def _save(
    folder: Path, model_class: Any, config: Any, tokenizer: Any, *, bos: str, eos: str, dtype: str, max_shard_size: str
) -> None:
    import torch
    from transformers import PreTrainedTokenizerFast

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
        for name, parameter in model.named_parameters():  # biases and norms are born as zeros and ones, which hide mistakes
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name and "weight" in name else 0.0, std=0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos, unk_token="<|endoftext|>"
    )
    wrapped.save_pretrained(folder)


def write_adapter(
    folder: Path,
    model_folder: Path,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    size: float = 0.2,
    seed: int = 0,
    dtype: type = np.float32,
    modules: str = "",
    ranks: dict[str, int] | None = None,
    **settings: Any,
) -> Path:
    """A random LoRA adapter in PEFT's format on every linear layer of a model folder's blocks.

    size       standard deviation of the B factors; 0: the adapter changes nothing
    modules    a pattern: only the layers whose names it is found in
    ranks      {end of a layer's name: its rank, where it is another}
    settings   more entries of adapter_config.json
    """
    linear = _linear_shapes(model_folder) | (_head_shape(model_folder) if "lm_head" in modules else {})
    shapes = {name: shape for name, shape in sorted(linear.items()) if re.search(modules, name)}
    own = {name: r for name in shapes for end, r in (ranks or {}).items() if name.endswith(end)}
    targets = {name.split(".")[-1] for name in shapes}
    patterns = {end: r for end, r in (ranks or {}).items() if end in targets}
    return save_lora(
        folder, shapes, rank, own, alpha=alpha, size=size, seed=seed, dtype=dtype, **{"rank_pattern": patterns, **settings}
    )


def save_lora(
    folder: Path,
    shapes: dict[str, tuple[int, int]],
    rank: int,
    ranks: dict[str, int],
    *,
    alpha: float,
    size: float,
    seed: int,
    dtype: type,
    **settings: Any,
) -> Path:
    """Random factors for modules of these shapes, (out, in), in PEFT's format."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, (out, into) in shapes.items():
        r = ranks.get(name, rank)
        tensors[f"base_model.model.{name}.lora_A.weight"] = (rng.standard_normal((r, into)) / np.sqrt(into)).astype(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = (rng.standard_normal((out, r)) * size).astype(dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({name.split(".")[-1] for name in shapes}),
        **settings,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _linear_shapes(model_folder: Path) -> dict[str, tuple[int, int]]:
    from safetensors import safe_open

    shapes = {}
    for path in model_folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                shape = file.get_slice(name).get_shape()
                if name.startswith("model.layers.") and name.endswith(".weight") and len(shape) == 2:
                    shapes[name.removesuffix(".weight")] = (shape[0], shape[1])
    return shapes


def _head_shape(model_folder: Path) -> dict[str, tuple[int, int]]:
    weights = _weights(model_folder)
    rows, width = weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).shape
    return {"lm_head": (rows, width)}


def _weights(model_folder: Path) -> dict[str, NDArray[np.float32]]:
    from safetensors.numpy import load_file

    weights: dict[str, NDArray[np.float32]] = {}
    for file in sorted(model_folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


# GGUF, as convert_hf_to_gguf.py writes these two architectures


def write_llama_gguf(folder: Path, path: Path, **metadata: str) -> Path:
    """The model of `save_tiny_llama` as an F32 GGUF. `metadata`: tokenizer.ggml.pre, as `pre=...`."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    writer = _gguf_writer(folder, path, "llama", config, pre=metadata.get("pre", "smollm"))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    for name, tensor in _weights(folder).items():
        if ".q_proj." in name:
            tensor = _permuted(tensor, config["num_attention_heads"])
        elif ".k_proj." in name:
            tensor = _permuted(tensor, config["num_key_value_heads"])
        writer.add_tensor(_gguf_name(name, gguf.MODEL_ARCH.LLAMA), np.ascontiguousarray(tensor))
    _finish(writer)
    return path


def write_qwen2_gguf(folder: Path, path: Path) -> Path:
    """A Qwen2ForCausalLM as an F32 GGUF: the layers of a Llama, with biases, in Hugging Face's rotary layout."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    writer = _gguf_writer(folder, path, "qwen2", config, pre="qwen2")
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    for name, tensor in _weights(folder).items():
        writer.add_tensor(_gguf_name(name, gguf.MODEL_ARCH.QWEN2), np.ascontiguousarray(tensor))
    _finish(writer)
    return path


def write_phi_gguf(folder: Path, path: Path, *, fused: bool = False, pre: str = "phi-2") -> Path:
    """The model of `save_tiny_phi` as an F32 GGUF.

    fused   q, k and v in one tensor, as older converters wrote it
    pre     tokenizer.ggml.pre, "" for none, as older converters wrote it
    """
    import gguf

    config = json.loads((folder / "config.json").read_text())
    writer = _gguf_writer(folder, path, "phi2", config, pre=pre)
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    head = config["hidden_size"] // config["num_attention_heads"]
    writer.add_rope_dimension_count(int(head * config["rope_parameters"]["partial_rotary_factor"]))
    weights = _weights(folder)
    for name, tensor in weights.items():
        gguf_name = _gguf_name(name, gguf.MODEL_ARCH.PHI2)
        if fused and re.search(r"attn_[qkv]\.", gguf_name):
            if ".attn_q." in gguf_name:
                parts = [weights[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
                writer.add_tensor(gguf_name.replace("attn_q", "attn_qkv"), np.concatenate(parts))
            continue
        writer.add_tensor(gguf_name, np.ascontiguousarray(tensor))
    _finish(writer)
    return path


def _gguf_writer(folder: Path, path: Path, architecture: str, config: dict[str, Any], *, pre: str) -> Any:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("model")
    writer.add_name(folder.name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)

    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = dict(tokenizer["model"]["vocab"])
    added = {entry["content"]: entry for entry in tokenizer["added_tokens"]}
    ids |= {content: entry["id"] for content, entry in added.items()}
    tokens = [f"[PAD{i}]" for i in range(config["vocab_size"])]
    types = [gguf.TokenType.UNUSED] * config["vocab_size"]
    for token, i in ids.items():
        tokens[i] = token
        types[i] = gguf.TokenType.NORMAL
        if token in added:
            types[i] = gguf.TokenType.CONTROL if added[token]["special"] else gguf.TokenType.USER_DEFINED
    if tokenizer["model"]["byte_fallback"]:  # SentencePiece
        types = [gguf.TokenType.BYTE if token.startswith("<0x") else kind for token, kind in zip(tokens, types, strict=True)]
        types[0] = gguf.TokenType.UNKNOWN
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(tokenizer["model"]["byte_fallback"])
    return writer


def _gguf_name(name: str, architecture: Any) -> str:
    """By the gguf package's own map, as convert_hf_to_gguf.py does it."""
    import gguf

    found: str | None = gguf.get_tensor_name_map(architecture, 8).get_name(name, (".weight", ".bias"))
    assert found is not None, name
    return found


def _permuted(matrix: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows from Hugging Face's rotary layout (two halves a head) to the llama architecture's in GGUF (pairs)."""
    rows, into = matrix.shape
    return matrix.reshape(heads, 2, rows // heads // 2, into).swapaxes(1, 2).reshape(rows, into)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
