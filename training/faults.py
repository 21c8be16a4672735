"""What went wrong in a training process, as one line of cause and remedy."""

from __future__ import annotations

import errno

from biasdpo.errors import BiasDPOError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = (
    "No space left on device", "Disk quota exceeded", "File too large", "os error 28", "os error 27",
    "PytorchStreamWriter failed", "unexpected pos", "iostream error",  # torch.save, which hides the reason
)  # fmt: skip
_MEMORY_WORDS = ("can't allocate memory", "out of memory", "bad_alloc", "Cannot allocate memory")


def cause_and_remedy(exc: BaseException, log: str = "the run's train.log") -> str:
    """One line for people. `log`: where its traceback is."""
    if isinstance(exc, BiasDPOError):
        return str(exc)
    text = str(exc)
    if isinstance(exc, MemoryError) or type(exc).__name__ == "OutOfMemoryError" or any(words in text for words in _MEMORY_WORDS):
        return (
            "Out of memory: start a new run with a lower batch_size (and gradient_accumulation raised as much) or max_length, or "
            "free memory and resume; the checkpoints are kept"
        )
    if (isinstance(exc, OSError) and exc.errno in _FULL) or any(words in text for words in _FULL_WORDS):
        return "The disk is full: free some space, then resume the run; its checkpoints are kept"
    first_line = (text.strip() or type(exc).__name__).split("\n")[0]
    return f"{type(exc).__name__}: {first_line[:300]}; the whole story is in {log}"
