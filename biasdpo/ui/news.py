"""What a page was sent last, part by part, so that a tick of the clock sends only what is new."""

from __future__ import annotations

from typing import Any

Updates = dict[Any, Any]
Mark = dict[str, int]


def key(part: Any) -> str:
    """A component's name in a mark."""
    return str(part.elem_id or part._id)


def news(parts: Updates, mark: Mark) -> tuple[Updates, Mark]:
    """The parts that are not as `mark` remembers them, and what is to be remembered now."""
    marks = {key(part): hash(repr(value)) for part, value in parts.items()}
    return {part: value for part, value in parts.items() if mark.get(key(part)) != marks[key(part)]}, mark | marks
