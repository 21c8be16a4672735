"""What went wrong in a training process, as one line of cause and remedy."""

from __future__ import annotations

import errno

from biasdpo.errors import BiasDPOError
from biasdpo.run_endings import MEMORY_WORDS, THREAD_WORDS, is_at_memory_limit

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = (
    "No space left on device", "Disk quota exceeded", "File too large", "os error 28", "os error 27",
    "PytorchStreamWriter failed", "unexpected pos", "iostream error",  # torch.save, which hides the reason
)  # fmt: skip
# What gloo and NCCL say to a process that waits for another one, which is gone.
_CONNECTION_WORDS = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "NCCL error: remote")


def cause_and_remedy(exc: BaseException, log: str = "the run's train.log") -> str:
    """One line for people. `log`: where its traceback is."""
    if isinstance(exc, BiasDPOError):
        return str(exc)
    text = str(exc)
    of_memory = isinstance(exc, MemoryError) or type(exc).__name__ == "OutOfMemoryError"
    if of_memory or any(words in text for words in MEMORY_WORDS) or is_at_memory_limit():
        return (
            "Out of memory: start a new run with a lower batch_size (and gradient_accumulation raised as much) or max_length, or "
            "free memory and resume; the checkpoints are kept"
        )
    if any(words in text for words in THREAD_WORDS):
        return (
            "Out of memory or of processes, since no thread could be started: free memory, lower `threads`, or raise the limit "
            "of processes (ulimit -u), then resume; the checkpoints are kept"
        )
    if (isinstance(exc, OSError) and exc.errno in _FULL) or any(words in text for words in _FULL_WORDS):
        return "The disk is full: free some space, then resume the run; its checkpoints are kept"
    if any(words in text for words in _CONNECTION_WORDS):
        return (
            "Another of the run's processes ended without a word, as it does when it is killed or the machine runs out of "
            f"memory: resume the run, or start a new one with fewer num_processes; {log} has more"
        )
    first_line = (text.strip() or type(exc).__name__).split("\n")[0]
    return f"{type(exc).__name__}: {first_line[:300]}; the whole story is in {log}"
