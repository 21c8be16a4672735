"""llama.cpp's own quantizer: one GGUF into another, with its reason where it fails."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from biasdpo.errors import ExportError
from biasdpo.gguf_export.quantizations import FILE_TYPES

_BUFFER = 2**28  # bytes of a tensor's rows in llama.cpp's memory at a time; its default is 8 GiB
_PROGRESS = re.compile(r"\[\s*(\d+)/\s*(\d+)\] (\S+)")
_FAILURE = re.compile(r"failed to quantize: (.+)")


def quantize(source: Path, target: Path, quantization: str, *, threads: int, on_progress: Callable[[float], None]) -> None:
    """Write `source` as `target` in another quantization; tensors that are quantized already are quantized again.

    Raises ExportError with llama.cpp's reason. What it may have begun to write is the caller's to remove.
    """
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[quantization]
    params.nthread = threads
    params.allow_requantize = True
    params.max_buf_size = _BUFFER
    failures: list[BaseException] = []

    def heard(line: str) -> None:
        match = _PROGRESS.search(line)
        if match is not None and not failures:
            try:
                on_progress((int(match[1]) - 1) / int(match[2]))
            except BaseException as exc:  # nothing may be raised through llama.cpp: kept until it returns
                failures.append(exc)

    llama_cpp.llama_backend_init()
    with _log(heard) as lines:
        status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if failures:
        raise failures[0]
    if status != 0:
        log = "".join(lines)
        reasons = _FAILURE.findall(log) or [line for line in log.splitlines() if line.strip()] or ["it gave no reason"]
        reason = reasons[-1].strip()
        if "iostream" in reason:  # all that a C++ stream says of a failed write
            raise OSError(f"a write failed ({reason})")
        raise ExportError(f"llama.cpp could not make {quantization} of the model ({reason}): choose another quantization")


@contextmanager
def _log(heard: Callable[[str], None]) -> Iterator[list[str]]:
    """llama.cpp's log while the block runs, piece by piece; afterwards it goes where it went before."""
    import llama_cpp

    pieces: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def keep(_level: int, text: bytes, _data: Any) -> None:
        pieces.append(text.decode("utf-8", "replace"))
        heard(pieces[-1])

    former, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(former), ctypes.byref(data))
    llama_cpp.llama_log_set(keep, None)
    try:
        yield pieces
    finally:
        llama_cpp.llama_log_set(former, data)
