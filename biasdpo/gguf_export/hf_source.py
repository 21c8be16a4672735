"""A Hugging Face folder as what a GGUF is made of: tensors under GGUF's names and in its row order, metadata, tokenizer.

Names, rows and keys as llama.cpp's convert_hf_to_gguf.py has them for LlamaForCausalLM and PhiForCausalLM.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from biasdpo.errors import ModelError, WorkspaceError
from biasdpo.gguf_export import ggml
from biasdpo.gguf_export.factors import Layout
from biasdpo.gguf_export.hf_tokenizer import GgufTokenizer, read_tokenizer
from biasdpo.gguf_export.safetensors_files import HfTensor, read_headers
from biasdpo.gguf_export.tensors import StoredTensor
from biasdpo.gguf_export.written import Source
from biasdpo.gguf_names import gguf_name, is_permuted, permute_rows
from biasdpo.modelfile import ARCHITECTURES
from biasdpo.workspace import read_json

# Old checkpoints hold these beside the weights; they follow from the config.
_DERIVED = re.compile(r".*\.(rotary_emb\.inv_freq|self_attn\.(bias|masked_bias))")


@dataclass(frozen=True)
class HfSource:
    """The weights of a Hugging Face folder. `tensors` are mapped, not read."""

    folder: Path
    layout: Layout
    tensors: tuple[StoredTensor, ...]
    tokenizer: GgufTokenizer
    shape: _Shape

    @property
    def kind(self) -> Source:
        return "hf"

    @property
    def file_type(self) -> int | None:
        return None

    @property
    def adapters(self) -> tuple[tuple[str, str], ...]:
        return ()

    @property
    def header_bytes(self) -> int:
        """About what stands before the weights in a GGUF."""
        return self.tokenizer.bytes + 100 * len(self.tensors) + 2000

    def add_metadata(self, writer: Any, name: str) -> None:
        """Add all keys but the file's type and its adapters to a gguf.GGUFWriter."""
        shape = self.shape
        writer.add_type("model")
        writer.add_name(name)
        writer.add_vocab_size(shape.vocabulary)
        writer.add_context_length(shape.context)
        writer.add_embedding_length(shape.width)
        writer.add_feed_forward_length(shape.inner)
        writer.add_block_count(shape.blocks)
        writer.add_head_count(shape.heads)
        writer.add_head_count_kv(shape.kv_heads)
        writer.add_key_length(shape.head_width)
        writer.add_value_length(shape.head_width)
        writer.add_rope_freq_base(shape.rope_theta)
        writer.add_rope_dimension_count(shape.rotary)
        if self.layout.architecture == "llama":
            writer.add_layer_norm_rms_eps(shape.epsilon)
        else:
            writer.add_layer_norm_eps(shape.epsilon)
        self.tokenizer.add_to(writer)


@dataclass(frozen=True)
class _Shape:
    """What config.json says of a model's size, in GGUF's terms."""

    vocabulary: int
    context: int
    width: int
    inner: int
    blocks: int
    heads: int
    kv_heads: int
    head_width: int
    rotary: int  # dimensions of a head that are rotated
    rope_theta: float
    epsilon: float
    tied: bool
    attention_bias: bool
    mlp_bias: bool


def open_hf(folder: Path) -> HfSource:
    """Check a folder and map its weights.

    Raises ModelError where it is damaged, incomplete, or of a kind that can't be written as a GGUF.
    """
    config, architecture = _config(folder)
    shape = _shape(config, architecture, folder)
    expected = _expected(shape, architecture)  # Hugging Face's names
    stored = read_headers(folder)
    _check(stored, expected, shape, folder)
    shapes = {str(gguf_name(theirs, architecture)): size for theirs, size in expected.items()}
    layout = Layout(architecture, shape.blocks, shape.heads, shape.kv_heads, shapes)
    tensors = tuple(_tensor(ours, stored[theirs], layout) for ours, theirs in zip(shapes, expected, strict=True))
    return HfSource(folder, layout, tensors, read_tokenizer(folder, config, architecture), shape)


def expected_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """{GGUF's name: shape} of a folder's tensors, by its config.json alone."""
    config, architecture = _config(folder)
    expected = _expected(_shape(config, architecture, folder), architecture)
    return {str(gguf_name(theirs, architecture)): size for theirs, size in expected.items()}


def _config(folder: Path) -> tuple[dict[str, Any], str]:
    """config.json and the architecture's name in GGUF."""
    try:
        config = read_json(folder / "config.json")
    except WorkspaceError as exc:
        raise ModelError(f"{folder} has no readable config.json ({exc}): fetch the model again") from exc
    name = (config.get("architectures") or ["?"])[0]
    if name not in ARCHITECTURES:
        raise ModelError(f"{folder} is a {name}, of which no GGUF can be written: supported are {', '.join(ARCHITECTURES)}")
    return config, ARCHITECTURES[name]


def _shape(config: dict[str, Any], architecture: str, folder: Path) -> _Shape:
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    activation = "silu" if architecture == "llama" else "gelu_new"
    odd = [
        f"rope scaling {kind!r}" if kind != "default" else "",
        f"activation {config.get('hidden_act')!r}" if config.get("hidden_act", activation) != activation else "",
        "qk_layernorm" if config.get("qk_layernorm") else "",
        "a tied head" if architecture == "phi2" and config.get("tie_word_embeddings") else "",
        f"quantized weights ({config['quantization_config'].get('quant_method')})" if config.get("quantization_config") else "",
    ]
    if any(odd):
        raise ModelError(
            f"{folder} has {', '.join(filter(None, odd))}, which can't be carried into a GGUF here: convert it with llama.cpp's "
            "convert_hf_to_gguf.py"
        )
    try:
        width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        head_width = int(config.get("head_dim") or width // heads) if architecture == "llama" else width // heads
        share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.5 if architecture == "phi2" else 1.0))
        return _Shape(
            vocabulary=int(config["vocab_size"]),
            context=int(config["max_position_embeddings"]),
            width=width,
            inner=int(config["intermediate_size"]),
            blocks=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_width=head_width,
            rotary=int(head_width * float(share)) if architecture == "phi2" else head_width,
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            epsilon=float(config["rms_norm_eps" if architecture == "llama" else "layer_norm_eps"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            attention_bias=architecture == "phi2" or bool(config.get("attention_bias")),
            mlp_bias=architecture == "phi2" or bool(config.get("mlp_bias")),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as exc:
        raise ModelError(f"{folder / 'config.json'} is incomplete ({type(exc).__name__}: {exc}): fetch the model again") from exc


def _expected(shape: _Shape, architecture: str) -> dict[str, tuple[int, ...]]:
    """{Hugging Face's name: shape} of every tensor, in the order that llama.cpp's converter writes."""
    llama = architecture == "llama"
    width, rows, kv_rows = shape.width, shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    norms = ["input_layernorm", "post_attention_layernorm"] if llama else ["input_layernorm"]
    attention = {"q_proj": (rows, width), "k_proj": (kv_rows, width), "v_proj": (kv_rows, width)}
    attention["o_proj" if llama else "dense"] = (width, rows)
    mlp = {"gate_proj": (shape.inner, width), "up_proj": (shape.inner, width), "down_proj": (width, shape.inner)}
    mlp = mlp if llama else {"fc1": (shape.inner, width), "fc2": (width, shape.inner)}
    found: dict[str, tuple[int, ...]] = {}

    def add(name: str, size: tuple[int, ...], bias: bool) -> None:
        found[f"{name}.weight"] = size
        if bias:
            found[f"{name}.bias"] = size[:1]

    add("model.embed_tokens", (shape.vocabulary, width), False)
    for i in range(shape.blocks):
        for norm in norms:
            add(f"model.layers.{i}.{norm}", (width,), not llama)
        for name, size in attention.items():
            add(f"model.layers.{i}.self_attn.{name}", size, shape.attention_bias)
        for name, size in mlp.items():
            add(f"model.layers.{i}.mlp.{name}", size, shape.mlp_bias)
    add("model.norm" if llama else "model.final_layernorm", (width,), not llama)
    if not shape.tied:
        add("lm_head", (shape.vocabulary, width), not llama)
    return found


def _check(stored: dict[str, HfTensor], expected: dict[str, tuple[int, ...]], shape: _Shape, folder: Path) -> None:
    missing = [name for name in expected if name not in stored]
    if missing:
        raise ModelError(
            f"{folder} lacks {missing[0]} and {len(missing) - 1} more of {len(expected)} tensors: fetch all of the model's files"
            if len(missing) > 1
            else f"{folder} lacks {missing[0]}: fetch all of the model's files"
        )
    wrong = next((name for name, size in expected.items() if stored[name].shape != size), None)
    if wrong is not None:
        raise ModelError(
            f"{folder}: {wrong} is {list(stored[wrong].shape)}, by config.json {list(expected[wrong])}; fetch the model again"
        )
    further = [name for name in stored if name not in expected and not _DERIVED.fullmatch(name)]
    if shape.tied:
        further = [name for name in further if name != "lm_head.weight"]  # the embeddings once more
    if further:
        raise ModelError(
            f"{folder} holds {further[0]}, for which such a model's GGUF has no place: convert it with convert_hf_to_gguf.py"
        )


def _tensor(name: str, hf: HfTensor, layout: Layout) -> StoredTensor:
    from gguf import GGMLQuantizationType

    rows = None
    if is_permuted(name, layout.architecture):
        rows = permute_rows(np.arange(hf.shape[0]), layout.heads_of(name))
    tensor = StoredTensor(name, hf.shape, GGMLQuantizationType[hf.dtype], hf.mapped(), rows)
    if len(hf.shape) > 1:
        return tensor
    values = ggml.decode(tensor.data, tensor.kind, name)  # llama.cpp wants vectors in F32; they are small
    return replace(tensor, kind=GGMLQuantizationType.F32, data=values if rows is None else values[rows], rows=None)
