"""Tensors on their way from a mapped file to a GGUF, a block of rows in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biasdpo.gguf_export import ggml
from biasdpo.gguf_export.factors import Part

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
        values = ggml.decode(stored, tensor.kind, tensor.name)
        if self.parts:
            values = np.array(values)  # of F32 they are the file's own, mapped
        for part in self.parts:
            _add(values, first, part)
        return ggml.encode(values, self.kind, tensor.name)


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
