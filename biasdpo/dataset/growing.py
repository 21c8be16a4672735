"""A file of lines that grows at its end, read on from where the last reading ended."""

from __future__ import annotations

import os
from collections.abc import Iterator

_BLOCK_BYTES = 8 * 2**20  # read at once


class GrowingLines:
    """How far a file was read: `offset` bytes, which are `count` whole lines."""

    def __init__(self) -> None:
        self.offset = 0
        self.count = 0
        self._inode = 0
        self._last = b""

    def continues_in(self, file: int) -> bool:
        """Whether an open file begins with what was read, as far as its inode, its size and the last line read can tell."""
        status = os.fstat(file)
        if self.offset == 0:
            self._inode = status.st_ino
            return True
        same = status.st_ino == self._inode and status.st_size >= self.offset
        last = self._last + b"\n"
        return same and os.pread(file, len(last), self.offset - len(last)) == last

    def read(self, file: int) -> Iterator[bytes]:
        """The whole lines that are new, without their ends. One counts as read when the next is asked for.

        A last line without an end is being written, or torn, and waits. Nothing past the size that the file has at the start is
        read: what a torn line was cut off for while it was read, and what was written in its place, would make one line.
        """
        start, end = self.offset, os.fstat(file).st_size
        rest = b""
        while start < end and (data := os.pread(file, min(_BLOCK_BYTES, end - start), start)):
            start += len(data)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                yield line
                self.offset += len(line) + 1
                self.count += 1
                self._last = line
