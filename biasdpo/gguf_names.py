"""GGUF's names for the tensors and tokens of Hugging Face's models, both ways, and the order of a tensor's rows."""

from __future__ import annotations

import re
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biasdpo.modelfile import gguf_value

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
