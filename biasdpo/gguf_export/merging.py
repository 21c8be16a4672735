"""Model (+ adapter) -> one complete GGUF, merged and quantized.

From a Hugging Face folder, or onto a base GGUF. Types that numpy can write go straight to the file; llama.cpp's quantizer
makes the others of an intermediate GGUF. Weights stream: a few blocks of rows are in memory at a time, whatever the model's size.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from biasdpo.errors import ExportError, ModelError
from biasdpo.gguf_export.expected import source_path, tensor_bytes
from biasdpo.gguf_export.factors import Part, place, read_adapter
from biasdpo.gguf_export.gguf_source import GgufSource, open_base_gguf
from biasdpo.gguf_export.hf_source import HfSource, open_hf
from biasdpo.gguf_export.quantizations import FILE_TYPES, KEEP, fallbacks, is_weight
from biasdpo.gguf_export.quantizer import quantize
from biasdpo.gguf_export.scratch import finish, scratch
from biasdpo.gguf_export.tensors import Output, StoredTensor, write_gguf
from biasdpo.gguf_export.written import Progress, Written
from biasdpo.gguf_header import read_header
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.workspace import refuse_on_public_space, sha256_of

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
    quantize(
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
