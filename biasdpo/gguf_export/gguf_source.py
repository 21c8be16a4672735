"""A base GGUF as what another GGUF is made of: its tensors as they are, its metadata and tokenizer unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biasdpo.errors import ModelError
from biasdpo.gguf_export.factors import Layout
from biasdpo.gguf_export.tensors import StoredTensor
from biasdpo.gguf_export.written import Source
from biasdpo.gguf_names import MODULES, pre_tokenizer_of
from biasdpo.modelfile import gguf_value, open_gguf

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

        for field in self.reader.fields.values():
            if field.name.startswith("GGUF.") or field.name in (*_OWN, "general.name"):
                continue
            kind = field.types[0]
            if kind == GGUFValueType.ARRAY and len(field.types) == 1:
                continue  # an empty list, which the gguf package can't write: the same as none
            writer.add_key_value(
                field.name, field.contents(), kind, sub_type=field.types[-1] if kind == GGUFValueType.ARRAY else None
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
