"""The coverage matrix, category x target group, and which prompts fill its thinnest cells first."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from biasdpo.dataset.rows import Row

Cell = tuple[str, str]
"""Category and target group; "" where that is not known."""


class HasCell(Protocol):
    """What names the cell that it would fill."""

    @property
    def category(self) -> str: ...
    @property
    def target_group(self) -> str: ...


Prompt = TypeVar("Prompt", bound=HasCell)


@dataclass(frozen=True)
class Coverage:
    """The matrix: `counts[i][j]` judgments of `categories[i]` about `groups[j]`; both in alphabetical order, "" last."""

    categories: tuple[str, ...]
    groups: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    def cells(self) -> list[tuple[str, str, int]]:
        """Category, group and count of every cell, the thinnest first; ties in the matrix's order."""
        every = [
            (category, group, count)
            for category, counts in zip(self.categories, self.counts, strict=True)
            for group, count in zip(self.groups, counts, strict=True)
        ]
        return sorted(every, key=lambda cell: cell[2])


def cell_counts(rows: Iterable[Row]) -> Counter[Cell]:
    """How many of a journal's standing rows each cell holds: those that prefer one completion, hidden repeats left out."""
    return Counter(
        (row["category"], row["target_group"]) for row in rows if row["verdict"] == "preferred" and not row["repeat_of"]
    )


def coverage(counts: Mapping[Cell, int], prompts: Iterable[HasCell] = ()) -> Coverage:
    """The matrix of the counts, with the cells that the prompts at hand would fill."""
    cells = {*counts, *((prompt.category, prompt.target_group) for prompt in prompts)}
    categories, groups = (tuple(sorted({cell[i] for cell in cells}, key=lambda name: (not name, name))) for i in (0, 1))
    return Coverage(categories, groups, tuple(tuple(counts.get((c, g), 0) for g in groups) for c in categories))


def thinnest(prompts: Sequence[Prompt], counts: Mapping[Cell, int]) -> list[Prompt]:
    """The prompts in the order in which to offer them: each time one of the cell that is thinnest then.

    A prompt that was offered counts as judged, so that the cells fill side by side. Ties, and prompts of one cell, keep the
    order that they have.
    """
    by_cell: dict[Cell, list[int]] = {}
    for place, prompt in enumerate(prompts):
        by_cell.setdefault((prompt.category, prompt.target_group), []).append(place)
    # Of each cell its next prompt: how full the cell is then, the prompt's place, how many of the cell were offered.
    heap = [(counts.get(cell, 0), places[0], 0, cell) for cell, places in by_cell.items()]
    heapq.heapify(heap)
    order = []
    while heap:
        count, place, offered, cell = heap[0]
        order.append(prompts[place])
        places = by_cell[cell]
        if offered + 1 < len(places):
            heapq.heapreplace(heap, (count + 1, places[offered + 1], offered + 1, cell))
        else:
            heapq.heappop(heap)
    return order
