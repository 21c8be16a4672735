"""Adapter -> GGUF: as a LoRA file beside its base model, or merged into one complete, quantized file."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from biasdpo.errors import AdapterError, ConfigError, ExportError, ModelError, WorkspaceError
from biasdpo.gguf.quantize import (
    FILE_TYPES,
    KEEP,
    Progress,
    Source,
    Written,
    bytes_of,
    decode,
    encode,
    fallbacks,
    is_weight,
    planned_types,
    quantize_file,
    require_known,
)
from biasdpo.model_files import (
    ARCHITECTURES,
    END_TOKENS,
    MODULES,
    QKV,
    TokenType,
    gguf_name,
    gguf_value,
    is_permuted,
    open_gguf,
    permute_rows,
    pre_tokenizer_of,
    read_header,
)
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.workspace import Workspace, locked, read_json, refuse_on_public_space, replacing, sha256_of

# --- factors: A PEFT LoRA adapter's factors, and where they belong among a GGUF's tensors


_PEFT_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")
# PEFT features that a plain pair (A, B) does not carry.
_UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "fan_in_fan_out",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
)


@dataclass(frozen=True)
class Factors:
    """One adapted matrix: W + alpha / rank * B @ A is the tuned one. A is (rank, in), B is (out, rank)."""

    a: NDArray[Any]
    b: NDArray[Any]
    alpha: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Part:
    """Factors in a GGUF tensor's row order, for its rows from `first_row` on (not 0 only in a fused attn_qkv)."""

    first_row: int
    factors: Factors


@dataclass(frozen=True)
class Layout:
    """What a GGUF's (or a model's future GGUF's) tensors look like. `shapes`: {tensor: (out, in)}, (n,) for vectors."""

    architecture: str
    blocks: int
    heads: int
    kv_heads: int
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of_gguf(cls, path: Path) -> Layout:
        """The layout of a GGUF. ModelError where it is damaged or does not say how many blocks and heads it has."""
        header = read_header(path)
        architecture = str(header.values.get("general.architecture"))
        blocks = header.values.get(f"{architecture}.block_count")
        heads = header.values.get(f"{architecture}.attention.head_count")
        if not isinstance(blocks, int) or not isinstance(heads, int):
            raise ModelError(f"{path} lacks {architecture}.block_count or its number of heads: fetch or export it again")
        return cls(
            architecture,
            blocks=blocks,
            heads=heads,
            kv_heads=int(header.values.get(f"{architecture}.attention.head_count_kv", heads)),
            shapes={name: tensor.shape for name, tensor in header.tensors.items()},
        )

    def heads_of(self, module: str) -> int:
        """How many heads the rows of attn_q or attn_k are."""
        return self.heads if module.removesuffix(".weight").removesuffix(".bias").endswith("attn_q") else self.kv_heads


def read_adapter(adapter: AdapterSpec) -> dict[str, Factors]:
    """An adapter's factors by Hugging Face module. AdapterError where it holds more than plain LoRA or is damaged."""
    config = read_json(adapter.folder / "adapter_config.json")
    used = [name for name in _UNSUPPORTED if config.get(name)]
    if used:
        raise AdapterError(f"Adapter {adapter.id} uses {', '.join(used)}, which a GGUF can't hold: use --backend transformers")
    pairs = load_factors(adapter.weights)
    return {module: Factors(pair["A"], pair["B"], _alpha(config, module, pair["A"].shape[0])) for module, pair in pairs.items()}


def load_factors(weights: Path) -> dict[str, dict[str, NDArray[Any]]]:
    """{module: {"A": (rank, in), "B": (out, rank)}} of a PEFT LoRA file."""
    from safetensors import SafetensorError, safe_open

    factors: dict[str, dict[str, NDArray[Any]]] = {}
    try:
        with safe_open(weights, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                match = _PEFT_NAME.fullmatch(name)
                if match is None:
                    what = "adapts the embeddings" if "lora_embedding" in name else "is no LoRA factor"
                    raise AdapterError(f"{weights} holds {name}, which {what}: only plain LoRA on linear layers can be used")
                factors.setdefault(match["module"], {})[match["factor"]] = _float_tensor(file, weights, name)
    except (OSError, SafetensorError) as exc:
        raise AdapterError(f"{weights} is no complete safetensors file ({exc}): train or fetch the adapter again") from exc
    for module, pair in factors.items():
        if set(pair) != {"A", "B"} or pair["A"].ndim != 2 or pair["B"].ndim != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise AdapterError(f"{weights}: {module} has no matching pair of LoRA factors; train or fetch the adapter again")
    if not factors:
        raise AdapterError(f"{weights} holds no LoRA factors: name an adapter that was trained")
    return factors


def _float_tensor(file: Any, weights: Path, name: str) -> NDArray[Any]:
    dtype = file.get_slice(name).get_dtype()
    if dtype in ("F16", "F32", "F64"):
        return np.asarray(file.get_tensor(name))
    if dtype != "BF16":
        raise AdapterError(f"{weights} holds {name} as {dtype}: save the adapter in F32, F16 or BF16")
    from safetensors import safe_open  # numpy has no bfloat16; torch has

    with safe_open(weights, framework="pt") as torch_file:
        return np.asarray(torch_file.get_tensor(name).float().numpy())


def _alpha(config: dict[str, Any], module: str, rank: int) -> float:
    """The numerator that makes alpha / rank PEFT's scaling (alpha / sqrt(rank) with rank-stabilised LoRA)."""
    alpha = float(config["lora_alpha"])
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):  # the first that fits, as PEFT's get_pattern_key chooses
            alpha = float(own)
            break
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def place(factors: Mapping[str, Factors], layout: Layout, adapter_id: str) -> dict[str, tuple[Part, ...]]:
    """The factors by GGUF tensor, their rows in its order.

    Raises AdapterError where the adapter was made for another base model.
    """
    names = _name_map(layout)
    placed: dict[str, tuple[Part, ...]] = {}
    for module, pair in sorted(factors.items()):
        name = names.get_name(module)
        if name is not None and f"{name}.weight" in layout.shapes:
            tensor, first, shape = f"{name}.weight", 0, layout.shapes[f"{name}.weight"]
        else:
            tensor, first, shape = _fused(name, module, layout, adapter_id)
        if (pair.b.shape[0], pair.a.shape[1]) != shape:
            raise AdapterError(
                f"Adapter {adapter_id} was made for another base model: its {module} is {pair.b.shape[0]} x {pair.a.shape[1]}, "
                f"this model's {' x '.join(map(str, shape))}"
            )
        b = permute_rows(pair.b, layout.heads_of(tensor)) if is_permuted(tensor, layout.architecture) else pair.b
        placed[tensor] = (*placed.get(tensor, ()), Part(first, Factors(pair.a, b, pair.alpha)))
    return {tensor: tuple(sorted(parts, key=lambda part: part.first_row)) for tensor, parts in placed.items()}


def _fused(name: str | None, module: str, layout: Layout, adapter_id: str) -> tuple[str, int, tuple[int, int]]:
    """(tensor, first row, shape) of q, k or v within attn_qkv, where the GGUF keeps them in one."""
    block, _, part = (name or "").rpartition(".")
    tensor = f"{block}.attn_qkv.weight"
    if part not in QKV or tensor not in layout.shapes:
        raise AdapterError(f"Adapter {adapter_id} was made for another base model: it adapts {module}, which this model lacks")
    if layout.architecture != "phi2":  # others may order or permute the rows in ways of their own
        raise AdapterError(
            f"The GGUF keeps q, k and v in one tensor (attn_qkv), {adapter_id} adapts {module}: convert the model "
            "again with a current convert_hf_to_gguf.py, which keeps them apart"
        )
    rows, width = layout.shapes[tensor]
    head = rows // (layout.heads + 2 * layout.kv_heads)
    sizes = {"attn_q": layout.heads * head, "attn_k": layout.kv_heads * head, "attn_v": layout.kv_heads * head}
    first = sum(sizes[before] for before in QKV[: QKV.index(part)])
    return tensor, first, (sizes[part], width)


def _name_map(layout: Layout) -> Any:
    import gguf

    for member, name in gguf.MODEL_ARCH_NAMES.items():
        if name == layout.architecture:
            return gguf.get_tensor_name_map(member, layout.blocks)
    raise AdapterError(f"llama.cpp's architecture {layout.architecture!r} is unknown to the gguf package: update gguf")


# --- hf tokenizer: A Hugging Face folder's tokenizer as GGUF metadata: byte-level BPE, with the name of its pre-to


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


# --- safetensors files: The tensors of a Hugging Face folder's safetensors, sharded or not, as mapped files: nothing is


_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}  # bytes of a number


@dataclass(frozen=True)
class HfTensor:
    """A tensor in a file: `dtype` F32, F16 or BF16; `offset` of its first byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def mapped(self) -> NDArray[Any]:
        """The tensor as the gguf package has it: numbers for F32 and F16, bytes (…, 2 * in) for BF16."""
        count = prod(self.shape)
        data = np.memmap(self.file, np.uint8, "r", self.offset, (count * _WIDTHS[self.dtype],))
        if self.dtype == "BF16":
            return data.reshape(*self.shape[:-1], 2 * self.shape[-1])
        return data.view("<f4" if self.dtype == "F32" else "<f2").reshape(self.shape)


def read_headers(folder: Path) -> dict[str, HfTensor]:
    """{name: tensor} of a folder's weights. ModelError where a shard is missing or cut off, or of another dtype."""
    tensors: dict[str, HfTensor] = {}
    for file in _files(folder):
        for name, entry in _header(file).items():
            tensors[name] = entry
    return tensors


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{folder} has no *.safetensors: fetch the model's safetensors weights (pickles are not opened)")
        return files
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError, WorkspaceError) as exc:
        raise ModelError(f"{index} is no index of safetensors ({exc}): fetch the model again") from exc
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {', '.join(missing)} of {len(names)} files of weights: fetch the model again")
    return [folder / name for name in names]


def _header(file: Path) -> Mapping[str, HfTensor]:
    size = file.stat().st_size
    tensors = {}
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > size - 8:
                raise ValueError(f"its header should be {length:,} bytes long")
            header = json.loads(opened.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            shape = tuple(int(n) for n in entry["shape"])
            begin, end = entry["data_offsets"]
            if 8 + length + end > size:
                raise ValueError(f"{size:,} of {8 + length + end:,} bytes are there")
            if entry["dtype"] in _WIDTHS and end - begin != prod(shape) * _WIDTHS[entry["dtype"]]:
                raise ValueError(f"{name} has {end - begin:,} bytes for the shape {list(shape)}")
            tensors[name] = HfTensor(file, str(entry["dtype"]), shape, 8 + length + begin)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ModelError(f"{file} is no complete safetensors file ({exc}): fetch the model again") from exc
    odd = next((f"{name} is {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in _WIDTHS), "")
    if odd:
        raise ModelError(f"{file}: {odd}, of {', '.join(_WIDTHS)} one is needed: fetch the model in one of these")
    return tensors


# --- tensors: Tensors on their way from a mapped file to a GGUF, a block of rows in memory at a time


_BLOCK = 2**22  # elements of a matrix in memory at a time, for each thread: 16 MiB in F32


@dataclass(frozen=True)
class StoredTensor:
    """A tensor under its GGUF name, in a mapped file.

    shape   (out, in) or (n,)
    kind    gguf.GGMLQuantizationType of `data`
    data    (out, bytes or numbers of a row)
    rows    the rows of `data` in the GGUF's order, or None where that is their own
    """

    name: str
    shape: tuple[int, ...]
    kind: Any
    data: NDArray[Any] = field(repr=False)
    rows: NDArray[np.int64] | None = field(default=None, repr=False)

    def stored(self, first: int, last: int) -> NDArray[Any]:
        """Rows as they lie in the file."""
        if len(self.shape) == 1:  # always whole: a row of a vector in BF16 would be two bytes
            return self.data
        return self.data[first:last] if self.rows is None else self.data[self.rows[first:last]]


@dataclass(frozen=True)
class Output:
    """What becomes of a stored tensor: `kind` as it is written, `parts` of an adapter that are added before."""

    tensor: StoredTensor
    kind: Any
    parts: tuple[Part, ...] = ()

    @property
    def bytes(self) -> int:
        from gguf import GGML_QUANT_SIZES

        block, size = GGML_QUANT_SIZES[self.kind]
        return int(prod(self.tensor.shape) // block * size)

    def rows(self, first: int, last: int) -> NDArray[Any]:
        """Rows as they are written. Untouched rows of the type they had are the file's own bytes."""
        tensor = self.tensor
        stored = tensor.stored(first, last)
        if not self.parts and self.kind == tensor.kind:
            return stored
        values = decode(stored, tensor.kind, tensor.name)
        if self.parts:
            values = np.array(values)  # of F32 they are the file's own, mapped
        for part in self.parts:
            _add(values, first, part)
        return encode(values, self.kind, tensor.name)


def _add(values: NDArray[np.float32], first: int, part: Part) -> None:
    """Add a part's change, scale * B @ A in float32, to those of its rows that are among `values` (rows from `first` on)."""
    b = part.factors.b
    start, stop = max(first, part.first_row), min(first + len(values), part.first_row + len(b))
    if start < stop:
        rows = b[start - part.first_row : stop - part.first_row].astype(np.float32)
        values[start - first : stop - first] += np.float32(part.factors.scale) * (rows @ part.factors.a.astype(np.float32))


def write_gguf(
    path: Path,
    architecture: str,
    add_metadata: Callable[[Any], None],
    outputs: Sequence[Output],
    *,
    threads: int,
    on_progress: Callable[[float], None],
) -> None:
    """Write a GGUF. `on_progress` is called with the share of its bytes written. OSError where the disk is full."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    try:
        add_metadata(writer)
        for output in outputs:
            writer.add_tensor_info(output.tensor.name, output.tensor.shape, np.dtype(np.float32), output.bytes, output.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        total, done = sum(output.bytes for output in outputs), 0
        with ThreadPoolExecutor(threads) as pool:
            for output in outputs:
                for rows in _blocks(output, pool, threads):
                    file.write(np.ascontiguousarray(rows).data)
                    done += rows.nbytes
                    on_progress(done / total)
                writer.write_padding(file, output.bytes)
        file.flush()
    finally:
        for file in writer.fout or ():
            file.close()


def _blocks(output: Output, pool: ThreadPoolExecutor, threads: int) -> Iterator[NDArray[Any]]:
    """A tensor's rows as they are written, in order; as many blocks at once as there are threads."""
    count = output.tensor.shape[0]
    step = max(1, _BLOCK // prod(output.tensor.shape[1:])) if len(output.tensor.shape) > 1 else count
    starts = range(0, count, step)
    for i in range(0, len(starts), threads):
        yield from pool.map(lambda first: output.rows(first, min(first + step, count)), starts[i : i + threads])


# --- hf source: A Hugging Face folder as what a GGUF is made of: tensors under GGUF's names and in its row orde


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
    values = decode(tensor.data, tensor.kind, name)  # llama.cpp wants vectors in F32; they are small
    return replace(tensor, kind=GGMLQuantizationType.F32, data=values if rows is None else values[rows], rows=None)


# --- expected: How large a GGUF will be, from the headers of the model's files alone: for the page before an e


# About what a GGUF's header takes for a token with its merge, for a tensor, and for all other keys.
_TOKEN_BYTES, _TENSOR_BYTES, _KEYS_BYTES = 36, 60, 1500


def expected_bytes(spec: ModelSpec, quantization: str, *, source: Literal["auto", "hf", "gguf"] = "auto") -> int:
    """About how large the file of `merged` will be. Raises ModelError and ConfigError as `merged` does."""
    path = source_path(spec, quantization, source)
    if quantization == KEEP:
        return path.stat().st_size
    if path.is_dir():
        shapes = expected_shapes(path)
        stored = {name: bytes_of("F32", shape) for name, shape in shapes.items()}
        header = _TOKEN_BYTES * shapes["token_embd.weight"][0] + _TENSOR_BYTES * len(shapes) + _KEYS_BYTES
        return header + tensor_bytes(quantization, shapes, stored)
    tensors = read_header(path).tensors
    stored = {name: tensor.n_bytes for name, tensor in tensors.items()}
    header = path.stat().st_size - sum(stored.values())
    return header + tensor_bytes(quantization, {name: tensor.shape for name, tensor in tensors.items()}, stored)


def tensor_bytes(quantization: str, shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, int]) -> int:
    """Bytes of all tensors by a quantization's recipe. `stored`: bytes as they are, for those that stay so."""
    planned = {} if quantization == KEEP else planned_types(quantization, shapes)
    return sum(bytes_of(planned[name][1], shapes[name]) if name in planned else stored[name] for name in shapes)


def source_path(spec: ModelSpec, quantization: str, source: str) -> Path:
    """The Hugging Face folder or the GGUF that `source` ("auto", "hf", "gguf") means.

    Raises ConfigError where there is no such source or quantization, ModelError where the model has no such files here.
    """
    if source not in ("auto", "hf", "gguf"):
        raise ConfigError(f"Unknown source {source!r}: choose one of auto, hf, gguf")
    spec.require_files()
    if source == "auto":
        source = "hf" if spec.hf_folder is not None and quantization != KEEP else "gguf"
    require_known(quantization, keep=source == "gguf")
    path = spec.hf_folder if source == "hf" else spec.gguf_path
    if path is None and source == "hf":
        raise ModelError(f"{spec.title} has no Hugging Face folder here: get it with `hf download`, or use --source gguf")
    if path is None:
        raise ModelError(f"{spec.title} has no GGUF file here: name a .gguf with --model, or use --source hf")
    return path


# --- lora file: Adapter -> LoRA GGUF, for llama.cpp


def lora(adapter: AdapterSpec, base_gguf: Path, out: Path) -> Path:
    """Write `adapter` as a LoRA GGUF for the base model in `base_gguf`; return `out`.

    Raises AdapterError where the adapter was made for another base model, or uses what a LoRA GGUF can't hold; ExportError where
    the file can't be written.
    """
    factors = read_adapter(adapter)
    layout = Layout.of_gguf(base_gguf)
    placed = place(factors, layout, adapter.id)
    # The file holds one alpha. Layers with another one, or another rank, carry the difference in their B.
    alpha = Counter(pair.alpha for pair in factors.values()).most_common(1)[0][0] or 1.0  # llama.cpp reads 0 as "none": rank
    tensors: dict[str, NDArray[Any]] = {}
    for name, parts in placed.items():
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = _joined(parts, layout.shapes[name][0], alpha)
    _write(out, layout.architecture, alpha, tensors, adapter)
    return out


def export_lora(adapter: AdapterSpec, base_gguf: Path, out: Path) -> Path:
    """`lora` on a user's request: refused on a public Space, where only the cache may be written."""
    refuse_on_public_space("Export")
    return lora(adapter, base_gguf, out)


def cached_lora(adapter: AdapterSpec, base_gguf: Path, workspace: Workspace) -> Path:
    """The LoRA GGUF of an adapter for a base model, built on first use into WORKSPACE/cache."""
    parents = (
        f"{sha256_of(adapter.weights)[:12]}-{sha256_of(adapter.folder / 'adapter_config.json')[:8]}-{sha256_of(base_gguf)[:12]}"
    )
    out = workspace.cache / "lora" / f"{adapter.id}-{parents}.gguf"
    with locked(out):
        return out if out.is_file() else lora(adapter, base_gguf, out)


def _joined(parts: Sequence[Part], rows: int, alpha: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """A (R, in) and B (rows, R) of one tensor, whose ranks sum to R: alpha / R * B @ A is the sum of its parts' changes.

    A fused attn_qkv has A's rows one under the other and B block-diagonal. A lone part with the file's alpha is as it was.
    """
    rank = sum(part.factors.rank for part in parts)
    wanted = [part.factors.scale * rank / alpha for part in parts]
    if len(parts) == 1 and parts[0].factors.b.shape[0] == rows:
        pair = parts[0].factors
        return pair.a, pair.b if pair.alpha == alpha else (pair.b.astype(np.float32) * np.float32(wanted[0]))
    b = np.zeros((rows, rank), np.float32)
    column = 0
    for part, scale in zip(parts, wanted, strict=True):
        into = b[part.first_row : part.first_row + part.factors.b.shape[0], column : column + part.factors.rank]
        into[:] = part.factors.b.astype(np.float32) * np.float32(scale)
        column += part.factors.rank
    return np.concatenate([part.factors.a for part in parts]), b


def _write(out: Path, architecture: str, alpha: float, tensors: dict[str, NDArray[Any]], adapter: AdapterSpec) -> None:
    import gguf

    try:
        with replacing(out) as temporary:
            writer = gguf.GGUFWriter(temporary, architecture)
            writer.add_type("adapter")
            writer.add_string("adapter.type", "lora")
            writer.add_float32("adapter.lora.alpha", alpha)
            writer.add_name(adapter.id)
            writer.add_string("biasdpo.adapter_sha256", sha256_of(adapter.weights))
            for name, tensor in tensors.items():
                writer.add_tensor(name, tensor if tensor.dtype == np.float16 else tensor.astype(np.float32))
            try:
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_tensors_to_file()
            finally:
                writer.close()
    except OSError as exc:
        raise ExportError(f"Can't write {out}: {exc.strerror or exc}; make room or choose another folder") from exc


# --- gguf source: A base GGUF as what another GGUF is made of: its tensors as they are, its metadata and tokenize


# Written anew.
_OWN = ("general.architecture", "general.file_type", "general.alignment", "biasdpo.adapters", "biasdpo.adapters_sha256")


@dataclass(frozen=True)
class GgufSource:
    """The tensors of a GGUF, mapped, and its reader."""

    path: Path
    layout: Layout
    tensors: tuple[StoredTensor, ...]
    reader: Any

    @property
    def kind(self) -> Source:
        return "gguf"

    @property
    def header_bytes(self) -> int:
        """What stands before the weights."""
        return int(self.reader.data_offset)

    @property
    def file_type(self) -> int | None:
        """llama.cpp's number of the file's quantization, or None where it names none."""
        found = gguf_value(self.reader, "general.file_type")
        return None if found is None else int(found)

    @property
    def adapters(self) -> tuple[tuple[str, str], ...]:
        """(id, SHA-256 of its weights) of the adapters that were merged into this file before."""
        names = gguf_value(self.reader, "biasdpo.adapters", [])
        return tuple(zip(names, gguf_value(self.reader, "biasdpo.adapters_sha256", []), strict=False))

    def add_metadata(self, writer: Any, name: str) -> None:
        """Add all keys but the file's type and its adapters to a gguf.GGUFWriter, under another name."""
        from gguf import GGUFValueType

        for entry in self.reader.fields.values():
            if entry.name.startswith("GGUF.") or entry.name in (*_OWN, "general.name"):
                continue
            kind = entry.types[0]
            if kind == GGUFValueType.ARRAY and len(entry.types) == 1:
                continue  # an empty list, which the gguf package can't write: the same as none
            writer.add_key_value(
                entry.name, entry.contents(), kind, sub_type=entry.types[-1] if kind == GGUFValueType.ARRAY else None
            )
        writer.add_name(name)
        pre = pre_tokenizer_of(self.reader)
        if pre is not None and gguf_value(self.reader, "tokenizer.ggml.pre") is None:
            writer.add_tokenizer_pre(pre)


def open_base_gguf(path: Path) -> GgufSource:
    """Check a GGUF and map its tensors. ModelError where it is damaged or can't be a base."""
    reader = open_gguf(path)
    architecture = str(gguf_value(reader, "general.architecture", ""))
    if gguf_value(reader, "general.type", "model") != "model":
        raise ModelError(f"{path} is a GGUF, but no model (type {gguf_value(reader, 'general.type')!r}): name a model's file")
    if architecture not in MODULES:
        raise ModelError(
            f"{path.name} is of the architecture {architecture!r}, into which nothing can be merged here (only into "
            f"{', '.join(MODULES)}): export the adapter as a LoRA GGUF"
        )
    if int(gguf_value(reader, "split.count", 1)) > 1:
        raise ModelError(f"{path.name} is one part of several: join them with llama.cpp's llama-gguf-split --merge first")
    if reader.byte_order != "I":
        raise ModelError(f"{path.name} is of the other byte order: fetch the model's usual (little-endian) GGUF")
    if gguf_value(reader, "tokenizer.ggml.model") == "gpt2" and pre_tokenizer_of(reader) is None:
        raise ModelError(
            f"{path.name} names no pre-tokenizer (tokenizer.ggml.pre), so its text would be cut wrongly: convert the model again "
            "with a current convert_hf_to_gguf.py"
        )
    layout = Layout.of_gguf(path)
    tensors = tuple(
        StoredTensor(tensor.name, layout.shapes[tensor.name], tensor.tensor_type, tensor.data) for tensor in reader.tensors
    )
    return GgufSource(path, layout, tensors, reader)


# --- scratch: A folder for what an export has not finished, beside its target: removed at its end, or by the


_SUFFIX = ".exporting"


@contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out`, on the same disk. It is locked: one export writes `out` at a time.

    Folders that killed exports left in `out`'s folder are removed. Raises ExportError where another export writes `out`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(out.parent)
    folder = out.parent / f".{out.name}{_SUFFIX}"
    folder.mkdir(exist_ok=True)
    lock = FileLock(folder / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as exc:
        raise ExportError(f"Another export writes {out} now: wait for its end, or choose another name") from exc
    try:
        yield folder
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def finish(file: Path, out: Path) -> None:
    """Give a complete file its final name: on the disk first, then by one rename."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    file.chmod(0o644)
    file.replace(out)


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f".*{_SUFFIX}"):
        lock = FileLock(folder / "lock", timeout=0)
        try:
            lock.acquire()
        except (Timeout, OSError):
            continue
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


# --- merging: Model (+ adapter) -> one complete GGUF, merged and quantized


_PLAIN = ("F32", "F16", "BF16")  # written without llama.cpp's quantizer


def merged(
    spec: ModelSpec,
    adapter: AdapterSpec | None,
    quantization: str,
    out: Path,
    *,
    source: Literal["auto", "hf", "gguf"] = "auto",
    threads: int | None = None,
    on_progress: Progress = lambda _share, _what: None,
) -> Written:
    """Write a model, with an adapter merged into it, as one GGUF at `out`; `adapter` None: a plain conversion.

    quantization   a name of QUANTIZATIONS, or "keep": onto a base GGUF, each tensor in the type it had
    source         "hf": from the model's Hugging Face folder; "gguf": onto its GGUF, whose metadata and tokenizer are kept and
                   whose untouched tensors are copied byte for byte; "auto": from the folder where there is one

    `out` is complete or absent. Raises ModelError, AdapterError, ConfigError or ExportError.
    """
    started = time.monotonic()
    path = source_path(spec, quantization, source)
    opened = open_hf(path) if path.is_dir() else open_base_gguf(path)
    if out.is_dir():
        raise ExportError(f"{out} is a folder: name a file")
    if out.exists() and any(out.samefile(file) for file in (spec.gguf_path,) if file is not None and file.exists()):
        raise ExportError(f"{out} is the base model's own file: choose another name")
    placed = {} if adapter is None else place(read_adapter(adapter), opened.layout, adapter.id)
    count = threads or os.cpu_count() or 1
    try:
        with scratch(out) as folder:
            outputs = _outputs(opened, placed, quantization)
            _require_room(out, opened, outputs, quantization)
            file = _written(
                opened, outputs, _Metadata(opened, spec, adapter, quantization), folder, quantization, count, on_progress
            )
            types = _verified(file, opened)
            finish(file, out)
    except OSError as exc:
        free = shutil.disk_usage(_existing(out)).free
        raise ExportError(
            f"Can't write {out}: {exc.strerror or exc} ({free / 1e9:.1f} GB are free there); make room or choose another folder"
        ) from exc
    on_progress(1.0, "done")
    return Written(
        path=out,
        bytes=out.stat().st_size,
        architecture=opened.layout.architecture,
        source=opened.kind,
        quantization=quantization,
        tensors=len(types),
        touched=len(placed),
        fallbacks=() if quantization == KEEP else fallbacks(quantization, opened.layout.shapes, types),
        seconds=time.monotonic() - started,
    )


def export_merged(spec: ModelSpec, adapter: AdapterSpec | None, quantization: str, out: Path, **options: Any) -> Written:
    """`merged` on a user's request: refused on a public Space."""
    refuse_on_public_space("Export")
    return merged(spec, adapter, quantization, out, **options)


# Types and room


def _outputs(opened: HfSource | GgufSource, placed: Mapping[str, tuple[Part, ...]], quantization: str) -> list[Output]:
    """Each tensor as it is written: into the final file, or into the intermediate one that is quantized afterwards."""
    return [
        Output(tensor, _output_kind(tensor, tensor.name in placed, quantization), placed.get(tensor.name, ()))
        for tensor in opened.tensors
    ]


def _output_kind(tensor: StoredTensor, touched: bool, quantization: str) -> Any:
    """gguf.GGMLQuantizationType of a tensor in the file that is written here."""
    from gguf import GGMLQuantizationType as Kind

    if quantization in _PLAIN and is_weight(tensor.name, tensor.shape):
        return Kind[quantization]
    if quantization == KEEP or not touched:
        return tensor.kind  # its own bytes
    # For the quantizer: F16's rounding, 2^-11, is lost in any quantization's (Q8_0: 2^-8 of a block's largest weight).
    return Kind.F32 if tensor.kind == Kind.F32 else Kind.F16


def _require_room(out: Path, opened: HfSource | GgufSource, outputs: list[Output], quantization: str) -> None:
    """Refuse what can't fit on the disk before anything is written."""
    needed = opened.header_bytes + sum(output.bytes for output in outputs)
    if quantization not in (*_PLAIN, KEEP):
        stored = {tensor.name: Output(tensor, tensor.kind).bytes for tensor in opened.tensors}
        needed += opened.header_bytes + tensor_bytes(quantization, opened.layout.shapes, stored)
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise ExportError(
            f"The export to {out} needs {needed / 1e9:.2f} GB while it runs, {free / 1e9:.2f} GB are free there: make room or "
            "choose another folder"
        )


def _existing(path: Path) -> Path:
    """The nearest folder above a path that exists."""
    return next(folder for folder in path.absolute().parents if folder.is_dir())


# Writing


class _Metadata:
    """Adds a file's keys: what the source says, the file's type, and the adapter it holds."""

    def __init__(self, opened: HfSource | GgufSource, spec: ModelSpec, adapter: AdapterSpec | None, quantization: str) -> None:
        self.opened, self.spec, self.adapter, self.quantization = opened, spec, adapter, quantization

    def __call__(self, writer: Any) -> None:
        self.opened.add_metadata(writer, self.spec.title + (f" + {self.adapter.id}" if self.adapter else ""))
        file_type = self.opened.file_type if self.quantization == KEEP else FILE_TYPES[self.quantization]
        if file_type is not None:
            writer.add_file_type(file_type)
        adapters = list(self.opened.adapters)  # of a base that was merged before, its own come first
        if self.adapter is not None:
            adapters.append((self.adapter.id, sha256_of(self.adapter.weights)))
        writer.add_array("biasdpo.adapters", [name for name, _ in adapters])
        writer.add_array("biasdpo.adapters_sha256", [sha256 for _, sha256 in adapters])


def _written(
    opened: HfSource | GgufSource,
    outputs: list[Output],
    metadata: _Metadata,
    folder: Path,
    quantization: str,
    threads: int,
    on_progress: Progress,
) -> Path:
    """Write the file into a folder, under a passing name."""
    file, quantized = folder / "merged.gguf", folder / "quantized.gguf"
    plain = quantization in (*_PLAIN, KEEP)
    share = 1.0 if plain else 0.4
    what = "merging the adapter" if metadata.adapter is not None else "converting the weights"
    write_gguf(
        file,
        opened.layout.architecture,
        metadata,
        outputs,
        threads=threads,
        on_progress=lambda done: on_progress(0.98 * share * done, what),
    )
    if plain:
        return file
    quantize_file(
        file,
        quantized,
        quantization,
        threads=threads,
        on_progress=lambda done: on_progress(0.98 * (share + (1 - share) * done), f"quantizing to {quantization}"),
    )
    file.unlink()
    return quantized


def _verified(file: Path, opened: HfSource | GgufSource) -> dict[str, str]:
    """{tensor: type} of a file that is to get its final name. OSError where it is not whole: a C++ stream that fails late on
    a full disk may not say so."""
    try:
        types = {name: tensor.kind for name, tensor in read_header(file).tensors.items()}
    except ModelError as exc:
        raise OSError(f"the file that was written is not whole ({exc})") from exc
    if set(types) != {tensor.name for tensor in opened.tensors}:
        raise OSError(f"the file that was written holds {len(types)} of {len(opened.tensors)} tensors")
    return types
