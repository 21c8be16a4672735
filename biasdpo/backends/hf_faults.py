"""Torch's failures as one line of ours, with nothing of what failed kept alive."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from biasdpo.errors import BackendError

_OUT_OF_MEMORY = (
    "Out of memory: shorten the prompt, close what else uses the device, or choose a smaller model, --backend "
    "transformers-4bit (a GPU with bitsandbytes) or --backend llamacpp"
)


@contextmanager
def foreign_errors() -> Iterator[None]:
    """Torch's failures as BackendErrors."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as exc:
        raise BackendError(_OUT_OF_MEMORY) from exc
    except RuntimeError as exc:
        if "alloc" in str(exc) and "memory" in str(exc):
            raise BackendError(_OUT_OF_MEMORY) from exc
        raise BackendError(f"torch failed ({first_line(exc)}): reload the model, or use --backend llamacpp") from exc


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Errors that leave the block hold nothing of what was computed in it: one that somebody keeps (a page shows it) would keep
    the variables of every call on its way, and so the weights, and the tensors that were too many."""
    try:
        yield
    except BackendError as exc:
        release(exc)
        raise


def release(exc: BaseException) -> None:
    """Free what the calls that an error came through hold, but for those still under way."""
    link: BaseException | None = exc
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def first_line(exc: BaseException) -> str:
    return (str(exc).strip().split("\n") or [""])[0][:300]
