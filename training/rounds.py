"""Held-out rows shared out among processes, so that a mean over all of them is one, whatever the batch and the processes.

TRL takes an evaluation's metrics as the mean of its batches' means, in which a last batch of one pair counts as much as a full
one; and accelerate fills the last batches of several processes up with rows that were seen before. Here no row is seen twice by
one process, all have the same number of rows in a round, and a round says how many pairs it counts for.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Round:
    """What one process computes while the others compute theirs.

    rows    numbers of its rows
    pairs   different rows of all processes together
    """

    rows: range
    pairs: int


def rounds(count: int, batch_size: int, processes: int, rank: int) -> list[Round]:
    """Rows 0 … count - 1 in rounds of at most `batch_size` rows a process.

    Full batches first, then equal parts of what is left; fewer rows than processes are computed by every process, whose equal
    numbers change no mean.
    """
    at_once = batch_size * processes
    found = [_share(start, batch_size, processes, rank) for start in range(0, count - at_once + 1, at_once)]
    left = count % at_once
    start = count - left
    if each := left // processes:
        found.append(_share(start, each, processes, rank))
        start += each * processes
    return found + [
        Round(range(i, min(i + batch_size, count)), min(batch_size, count - i)) for i in range(start, count, batch_size)
    ]


def _share(start: int, each: int, processes: int, rank: int) -> Round:
    mine = start + rank * each
    return Round(range(mine, mine + each), each * processes)
