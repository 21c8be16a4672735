"""Writes GGUF files: an adapter as a LoRA beside its base model, or a model with the adapter merged in, quantized.

Tensors stream from mapped files, a block of rows at a time: Phi-2's size takes 0.37 GB of memory.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from biasdpo.errors import AdapterError, ConfigError, ExportError, ModelError
from biasdpo.gguf.quantize import (
    COSTS,
    FILE_TYPES,
    KEEP,
    UNQUANTIZED,
    bytes_of,
    decode,
    encode,
    fallbacks,
    is_weight,
    quantize_file,
)
from biasdpo.gguf.sources import Layout, Source, StoredTensor, open_source, read_safetensors
from biasdpo.model_files import QKV, read_header, read_model_header
from biasdpo.models import AdapterSpec, ModelSpec, check_fits_file
from biasdpo.workspace import Workspace, locked, replacing, sha256_of

Progress = Callable[[float, str], None]
"""Called with the share done (0 to 1) and what is being done."""

SourceName = Literal["auto", "hf", "gguf"]


# An adapter's factors, and where they belong among a GGUF's tensors


@dataclass(frozen=True)
class Factors:
    """LoRA of one matrix: W + scale * B @ A is the tuned one. A is (rank, in), B is (out, rank)."""

    a: NDArray[Any]
    b: NDArray[Any]
    alpha: float
    first_row: int = 0  # of the GGUF's tensor that B's first row belongs to: not 0 only in a fused attn_qkv

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def read_factors(adapter: AdapterSpec, model: Path) -> dict[str, Factors]:
    """An adapter's factors by Hugging Face module. AdapterError if it does not fit `model`, a folder or a GGUF."""
    modules = check_fits_file(adapter, model)
    try:
        tensors = read_safetensors(adapter.weights)
    except ModelError as exc:
        raise AdapterError(f"{exc}, or train the adapter again") from exc

    def factor(module: str, letter: str) -> NDArray[Any]:
        tensor = tensors[f"base_model.model.{module}.lora_{letter}.weight"]
        return tensor.data if tensor.data.dtype == np.float16 else decode(tensor.data, tensor.kind, module)

    return {name: Factors(factor(name, "A"), factor(name, "B"), lora.alpha) for name, lora in modules.items()}


def place(factors: Mapping[str, Factors], layout: Layout, adapter_id: str) -> dict[str, tuple[Factors, ...]]:
    """The factors by GGUF tensor, rows in its order. AdapterError if one has no place in a GGUF of an architecture that
    `models.check_fits` has no names for."""
    names = _name_map(layout)
    placed: dict[str, tuple[Factors, ...]] = {}
    for module, pair in sorted(factors.items()):
        name = names.get_name(module) or ""
        tensor, first, shape = f"{name}.weight", 0, layout.shapes.get(f"{name}.weight")
        if module == "lm_head" and shape is None and "token_embd.weight" in layout.shapes:
            raise AdapterError(
                f"Adapter {adapter_id} adapts lm_head, which this model ties to its embeddings; a GGUF can't hold them apart: "
                "use --backend transformers, or train without lm_head"
            )
        if shape is None:
            tensor, first, shape = _fused_place(name, layout)
        if shape != (len(pair.b), pair.a.shape[1]):
            has = f"has {' x '.join(map(str, shape))}" if shape else "lacks it"
            raise AdapterError(
                f"Adapter {adapter_id} was made for another base model: it adapts {module} ({len(pair.b)} x {pair.a.shape[1]}), "
                f"this model {has}; choose the adapter's own model"
            )
        placed[tensor] = (*placed.get(tensor, ()), replace(pair, b=layout.permute(tensor, pair.b), first_row=first))
    return {tensor: tuple(sorted(parts, key=lambda pair: pair.first_row)) for tensor, parts in placed.items()}


def _fused_place(name: str, layout: Layout) -> tuple[str, int, tuple[int, ...] | None]:
    """(tensor, first row, shape) of q, k or v in a fused attn_qkv; shape None if the model has no such matrix."""
    block, _, part = name.rpartition(".")
    tensor = f"{block}.attn_qkv.weight"
    if part not in QKV or tensor not in layout.shapes:
        return tensor, 0, None
    if layout.architecture != "phi2":  # others may order or permute the rows in ways of their own
        raise AdapterError(
            "The GGUF stores q, k and v in one tensor (attn_qkv), which the adapter adapts separately: convert the model again "
            "with a current convert_hf_to_gguf.py, which keeps them apart"
        )
    rows, width = layout.shapes[tensor]
    head = rows // (layout.heads + 2 * layout.kv_heads)
    sizes = {"attn_q": layout.heads * head, "attn_k": layout.kv_heads * head, "attn_v": layout.kv_heads * head}
    return tensor, sum(sizes[before] for before in QKV[: QKV.index(part)]), (sizes[part], width)


def _name_map(layout: Layout) -> Any:
    import gguf

    architectures = {name: member for member, name in gguf.MODEL_ARCH_NAMES.items()}
    if layout.architecture not in architectures:
        raise ModelError(f"The gguf package does not know the architecture {layout.architecture!r}: update gguf")
    return gguf.get_tensor_name_map(architectures[layout.architecture], layout.blocks)


# Adapter -> LoRA GGUF


def lora(adapter: AdapterSpec, base_gguf: Path, out: Path) -> Path:
    """Write `adapter` as a LoRA GGUF for the base model in `base_gguf`; return `out`. `out` is complete or absent.

    Raises AdapterError if the adapter does not fit or a LoRA GGUF can't hold it; ExportError if the file can't be written.
    """
    factors = read_factors(adapter, base_gguf)
    layout = Layout.of(read_model_header(base_gguf))
    placed = place(factors, layout, adapter.id)
    # The file holds one alpha. Layers with another alpha or rank carry the difference in their B.
    alpha = Counter(pair.alpha for pair in factors.values()).most_common(1)[0][0] or 1.0  # llama.cpp reads 0 as "unset"
    outputs = []
    for name, parts in placed.items():
        for letter, factor in zip("ab", _joined(parts, layout.shapes[name][0], alpha), strict=True):
            kind = "F16" if factor.dtype == np.float16 else "F32"
            outputs.append(Output(StoredTensor(f"{name}.lora_{letter}", factor.shape, kind, factor), kind))

    def add_metadata(writer: Any) -> None:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        writer.add_name(adapter.id)
        writer.add_string("biasdpo.adapter_sha256", sha256_of(adapter.weights))

    try:
        with replacing(out) as temporary:
            _write_gguf(temporary, layout.architecture, add_metadata, outputs)
    except OSError as exc:
        raise _cannot_write(out, exc) from exc
    return out


def cached_lora(adapter: AdapterSpec, base_gguf: Path, workspace: Workspace) -> Path:
    """The LoRA GGUF of an adapter for a base model, built on first use into WORKSPACE/cache."""
    parents = (adapter.weights, 12), (adapter.folder / "adapter_config.json", 8), (base_gguf, 12)
    key = "-".join(sha256_of(path)[:length] for path, length in parents)
    out = workspace.cache / "lora" / f"{adapter.id}-{key}.gguf"
    with locked(out):
        return out if out.is_file() else lora(adapter, base_gguf, out)


def _joined(parts: Sequence[Factors], rows: int, alpha: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """A (R, in) and B (rows, R) of one tensor, R the sum of its parts' ranks: alpha / R * B @ A is the sum of their changes.

    In a fused attn_qkv A's rows are stacked and B is block-diagonal. A single part with the file's alpha stays as it is.
    """
    if len(parts) == 1 and len(parts[0].b) == rows:
        pair = parts[0]
        return pair.a, pair.b if pair.alpha == alpha else pair.b.astype(np.float32) * np.float32(pair.alpha / alpha)
    rank = sum(pair.rank for pair in parts)
    b = np.zeros((rows, rank), np.float32)
    column = 0
    for pair in parts:
        block = pair.b.astype(np.float32) * np.float32(pair.scale * rank / alpha)
        b[pair.first_row : pair.first_row + len(pair.b), column : column + pair.rank] = block
        column += pair.rank
    return np.concatenate([pair.a for pair in parts]), b


# Tensors on their way from a mapped file to a GGUF

_BLOCK_ELEMENTS = 2**22  # of a matrix in memory at a time, for each thread: 16 MiB in F32


@dataclass(frozen=True)
class Output:
    """A tensor to write: `kind` is its type in the file, `parts` of an adapter are added before."""

    tensor: StoredTensor
    kind: str
    parts: tuple[Factors, ...] = ()

    @property
    def bytes(self) -> int:
        return bytes_of(self.kind, self.tensor.shape)

    def rows(self, first: int, last: int) -> NDArray[Any]:
        """Rows as they are written. Untouched rows that keep their type are the source's own bytes."""
        tensor = self.tensor
        stored = tensor.rows(first, last)
        if not self.parts and self.kind == tensor.kind:
            return stored
        values = decode(stored, tensor.kind, tensor.name)
        if self.parts:
            values = np.array(values)  # F32 is decoded to the mapped file itself
        for part in self.parts:
            _add(values, first, part)
        return encode(values, self.kind, tensor.name)

    def blocks(self, pool: ThreadPoolExecutor, threads: int) -> Iterator[NDArray[Any]]:
        """All rows in order, as many blocks at once as there are threads."""
        count = self.tensor.shape[0]
        step = max(1, _BLOCK_ELEMENTS // prod(self.tensor.shape[1:])) if len(self.tensor.shape) > 1 else count
        starts = range(0, count, step)
        for i in range(0, len(starts), threads):
            yield from pool.map(lambda first: self.rows(first, min(first + step, count)), starts[i : i + threads])


def _add(values: NDArray[np.float32], first: int, pair: Factors) -> None:
    """Add a change, scale * B @ A in float32, to `values`, a tensor's rows from `first` on."""
    start, stop = max(first, pair.first_row), min(first + len(values), pair.first_row + len(pair.b))
    if start < stop:
        rows = pair.b[start - pair.first_row : stop - pair.first_row].astype(np.float32)
        values[start - first : stop - first] += np.float32(pair.scale) * (rows @ pair.a.astype(np.float32))


def _write_gguf(
    path: Path,
    architecture: str,
    add_metadata: Callable[[Any], None],
    outputs: Sequence[Output],
    *,
    threads: int = 1,
    on_progress: Callable[[float], None] = lambda _share: None,
) -> None:
    """Write a GGUF. `on_progress` is called with the share of bytes written. OSError if the disk is full.

    Not by the writer's own `write_tensors_to_file`: numpy's tofile, which it calls, loses the last error of a full disk.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    try:
        add_metadata(writer)
        for output in outputs:
            kind = gguf.GGMLQuantizationType[output.kind]
            writer.add_tensor_info(output.tensor.name, output.tensor.shape, np.dtype(np.float32), output.bytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        total, done = sum(output.bytes for output in outputs), 0
        with ThreadPoolExecutor(threads) as pool:
            for output in outputs:
                for rows in output.blocks(pool, threads):
                    file.write(np.ascontiguousarray(rows).data)
                    done += rows.nbytes
                    on_progress(done / total)
                writer.write_padding(file, output.bytes)
        file.flush()
    finally:
        for file in writer.fout or ():
            file.close()


# Model (+ adapter) -> one complete GGUF


@dataclass(frozen=True)
class Written:
    """The writer's report. `fallbacks`: {tensor, wanted, got} of tensors stored in a type other than the quantization's own."""

    source: Literal["hf", "gguf"]  # of the weights
    tensors: int
    touched: int  # tensors that the adapter changed
    fallbacks: list[dict[str, str]]


def source_path(spec: ModelSpec, quantization: str, source: SourceName) -> Path:
    """The Hugging Face folder or the GGUF that a merged file is made from.

    Raises ConfigError where the quantization does not go with it, ModelError if the model has no such files here.
    """
    spec.require_files()
    if source == "auto":
        source = "hf" if spec.hf_folder is not None and quantization != KEEP else "gguf"
    if quantization == KEEP and source == "hf":
        raise ConfigError("Quantization 'keep' needs a base GGUF whose types are kept: choose another quantization")
    path = spec.hf_folder if source == "hf" else spec.gguf_path
    if path is not None:
        return path
    if source == "hf":
        raise ModelError(f"{spec.title} has no Hugging Face folder here: get it with `hf download`, or use --source gguf")
    raise ModelError(f"{spec.title} has no GGUF file here: choose a .gguf with --model, or use --source hf")


def expected_sizes(spec: ModelSpec, adapter: AdapterSpec | None, format: str, source: SourceName) -> dict[str, int]:
    """About the bytes of an export, by the quantizations that the model allows; {"": bytes} of a LoRA."""
    if format == "lora":
        return {"": 0 if adapter is None else adapter.weights.stat().st_size}
    opened = open_source(source_path(spec, "F32", source))
    sizes: dict[str, int] = {}
    for quantization in COSTS:
        if quantization != KEEP or opened.kind == "gguf":
            with suppress(ExportError):  # a width that does not fit
                sizes[quantization] = opened.bytes_as(quantization)
    return sizes


def merged(
    spec: ModelSpec,
    adapter: AdapterSpec | None,
    quantization: str,
    out: Path,
    *,
    source: SourceName = "auto",
    threads: int | None = None,
    on_progress: Progress = lambda _share, _what: None,
) -> Written:
    """Write a model, with an adapter merged into it, as one GGUF; `adapter` None: a plain conversion.

    quantization   a name in COSTS; "keep": in a base GGUF, each tensor keeps its type
    source         "hf": from the model's Hugging Face folder; "gguf": from its GGUF, whose metadata, tokenizer and untouched
                   tensors are kept; "auto": from the folder if there is one

    `out` is complete or absent. Raises ModelError, AdapterError, ConfigError or ExportError.
    """
    threads = threads or os.cpu_count() or 1
    path = source_path(spec, quantization, source)
    opened = open_source(path)
    placed = {} if adapter is None else place(read_factors(adapter, path), opened.layout, adapter.id)
    outputs = [
        Output(tensor, _kind(tensor, quantization, touched=tensor.name in placed), placed.get(tensor.name, ()))
        for tensor in opened.tensors
    ]

    def add_metadata(writer: Any) -> None:
        for key, value, kind, item_kind in opened.metadata:
            writer.add_key_value(key, value, kind, sub_type=item_kind)
        writer.add_name(spec.title + (f" + {adapter.id}" if adapter else ""))
        file_type = opened.file_type if quantization == KEEP else FILE_TYPES[quantization]
        if file_type is not None:
            writer.add_file_type(file_type)
        adapters = [*opened.adapters, *([(adapter.id, sha256_of(adapter.weights))] if adapter else [])]
        writer.add_array("biasdpo.adapters", [name for name, _ in adapters])
        writer.add_array("biasdpo.adapters_sha256", [sha256 for _, sha256 in adapters])

    phase = "converting the weights" if adapter is None else "merging the adapter"
    by_llama_cpp = quantization not in (*UNQUANTIZED, KEEP)
    half = 0.39 if by_llama_cpp else 0.98  # of the progress
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _require_room(out, opened, outputs, quantization if by_llama_cpp else "")
        with replacing(out) as file, NamedTemporaryFile(prefix=f".{out.name}.", dir=out.parent) as unquantized:
            _write_gguf(
                Path(unquantized.name) if by_llama_cpp else file,
                opened.layout.architecture,
                add_metadata,
                outputs,
                threads=threads,
                on_progress=lambda done: on_progress(half * done, phase),
            )
            if by_llama_cpp:
                what = f"quantizing to {quantization}"
                quantize_file(
                    Path(unquantized.name),
                    file,
                    quantization,
                    threads=threads,
                    on_progress=lambda done: on_progress(half + (0.98 - half) * done, what),
                )
            types = _verified_types(file, opened)
    except OSError as exc:
        raise _cannot_write(out, exc) from exc
    on_progress(1.0, "done")
    return Written(
        source=opened.kind,
        tensors=len(types),
        touched=len(placed),
        fallbacks=[] if quantization == KEEP else fallbacks(quantization, opened.layout.shapes, types),
    )


def _kind(tensor: StoredTensor, quantization: str, *, touched: bool) -> str:
    """A tensor's type in the file that is written here, before llama.cpp's quantizer."""
    if quantization in UNQUANTIZED and is_weight(tensor.name, tensor.shape):
        return quantization
    if quantization == KEEP or not touched:
        return tensor.kind
    # For the quantizer. F16's rounding, 2^-11, is far below any quantization's (Q8_0: 2^-8 of a block's largest weight).
    return "F32" if tensor.kind == "F32" else "F16"


def _require_room(out: Path, opened: Source, outputs: Sequence[Output], quantization: str) -> None:
    """Refuse what can't fit on the disk before anything is written. `quantization`: of a second file, "" for none."""
    needed = opened.header_bytes + sum(output.bytes for output in outputs)
    needed += opened.bytes_as(quantization) if quantization else 0
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise ExportError(
            f"The export to {out} needs {needed / 1e9:.2f} GB while it runs, {free / 1e9:.2f} GB are free there: make room or "
            "choose another folder"
        )


def _verified_types(file: Path, opened: Source) -> dict[str, str]:
    """{tensor: type} of the written file. OSError if it is incomplete: a C++ stream may not report a full disk."""
    try:
        types = {name: tensor.kind for name, tensor in read_header(file).tensors.items()}
    except ModelError as exc:
        raise OSError(f"the written file is incomplete ({exc})") from exc
    if set(types) != {tensor.name for tensor in opened.tensors}:
        raise OSError(f"the written file holds {len(types)} of {len(opened.tensors)} tensors")
    return types


def _cannot_write(out: Path, exc: OSError) -> ExportError:
    existing = next(folder for folder in out.absolute().parents if folder.is_dir())
    why = f"{exc.strerror or exc} ({shutil.disk_usage(existing).free / 1e9:.1f} GB are free there)"
    return ExportError(f"Can't write {out}: {why}; make room or choose another folder")
