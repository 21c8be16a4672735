"""Rows by the hundred thousand."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """While many rows are made or counted, none of which is garbage: else Python's collector goes over all of them again and
    again, which takes as long as the work itself. Reference counts free what they free; cycles wait until afterwards.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
