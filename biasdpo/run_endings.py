"""Why a training process may have ended without a word: what its log and the kernel's counters say of memory that ran out.

A process that the kernel kills, or that a C++ library aborts, can't speak for itself. What is left are the words of those
libraries in train.log, and counters of processes killed for want of memory, which have risen since the run began, or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

MEMORY_WORDS = (
    "can't allocate memory", "out of memory", "Out of memory", "bad_alloc", "Cannot allocate memory", "MemoryError",
    "ALLOC_FAILED", "failed to map segment", "Memory allocation still failed", "error return without exception set",
)  # fmt: skip
"""What Python, torch, the C++ runtime, CUDA, the loader of libraries and OpenBLAS say where no memory is left. The last of them
is what Python 3.11 makes of a call for whose frame there is none."""

THREAD_WORDS = ("can't start new thread", "Thread creation failed", "pthread_create failed")
"""What Python, OpenMP and OpenBLAS say where no thread can be made: of memory for its stack, or of a limit of processes."""

AT_LIMIT_BYTES = 96 * 1024 * 1024  # of which the training process's ballast has a third

_VMSTAT = Path("/proc/vmstat")
_GROUPS = Path("/sys/fs/cgroup")


def memory_kills() -> dict[str, int]:
    """Processes that were killed for want of memory so far, by the file that counts them: on this machine, and in this process's
    control group (version 2, version 1). {} where nothing counts."""
    found = {str(file): _count(file) for file in (_VMSTAT, *_group_files())}
    return {file: count for file, count in found.items() if count is not None}


def is_at_memory_limit() -> bool:
    """Whether a limit of this process (`ulimit -v`, `ulimit -d`) leaves it next to nothing: what goes wrong then goes wrong for
    want of memory, whatever a library makes of it (importing torch, a SystemError without a cause)."""
    with suppress(ImportError, psutil.Error):
        import resource

        soft = [resource.getrlimit(limit)[0] for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
        used = psutil.Process().memory_info()
        taken = (used.vms, getattr(used, "data", 0))
        limits = [(limit, of) for limit, of in zip(soft, taken, strict=True) if limit != resource.RLIM_INFINITY]
        return any(of > limit - AT_LIMIT_BYTES for limit, of in limits)
    return False


def why_memory(log: str, kills_before: Mapping[str, int]) -> str:
    """What speaks for memory that ran out, as the end of a sentence; "" where nothing does.

    log            train.log since the run's last start
    kills_before   `memory_kills` when the process began
    """
    for line in reversed(log.split("\n")):
        if any(words in line for words in MEMORY_WORDS + THREAD_WORDS):
            return f"its log says {' '.join(line.split())[:160]!r}"
    if any((_count(Path(file)) or 0) > before for file, before in kills_before.items()):
        return "since it began, the kernel has killed a process for want of memory"
    return ""


def _group_files() -> list[Path]:
    """The files of this process's control group that may hold an `oom_kill` line."""
    files = [_GROUPS / "memory.events"]  # in a container that sees itself as the root
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _number, controllers, path = line.split(":", 2)
            if not controllers:
                files.append(_GROUPS / path.lstrip("/") / "memory.events")
            elif "memory" in controllers.split(","):
                files += [group / "memory.oom_control" for group in (_GROUPS / "memory" / path.lstrip("/"), _GROUPS / "memory")]
    return files


def _count(file: Path) -> int | None:
    """The number in a file's line `oom_kill N`; None where there is none."""
    with suppress(OSError, ValueError):
        for line in file.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None
