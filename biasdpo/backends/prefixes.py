"""Texts that begin alike: in what order, and in which rows, their common beginnings are computed once.

The twelve answers to one question, four questions about one context, a sentence and its twin: as sequences of tokens they form
a tree, of which every node need be computed once, for it depends on nothing but the tokens before it. Sorted, sequences stand
beside those that they share most with, and the tree is walked from left to right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

_LONGEST_ROW = 256  # tokens of a row that more than one sequence shares: attention grows with its square


@dataclass(frozen=True)
class TokenPath:
    """One request's tokens, all but the last, from which nothing is predicted.

    index    of the request
    first    index in `tokens` of the one that predicts the first scored token
    scored   the tokens that are predicted, `tokens[first:]` each its own
    """

    index: int
    tokens: tuple[int, ...]
    first: int
    scored: tuple[int, ...]


def sort_paths(requests: Sequence[tuple[list[int], list[int]]]) -> list[TokenPath]:
    """The (given, scored) tokens of requests as paths, those that begin alike side by side."""
    paths = [
        TokenPath(index, (*given, *scored[:-1]), len(given) - 1, tuple(scored)) for index, (given, scored) in enumerate(requests)
    ]
    return sorted(paths, key=lambda path: path.tokens)


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """With how many equal tokens both begin."""
    shortest = min(len(one), len(other))
    return next((i for i in range(shortest) if one[i] != other[i]), shortest)


def shared_lengths(paths: Sequence[TokenPath]) -> list[int]:
    """For each of the paths with how many tokens of the one before it it begins."""
    return [0, *(common_length(one.tokens, other.tokens) for one, other in pairwise(paths))][: len(paths)]


def trunk_length(paths: Sequence[TokenPath], least: int) -> int:
    """How many tokens of the beginning of sorted paths are worth computing apart, ahead of their rows: those that all share
    and from which nothing is predicted. 0 where all fit into one row, or share fewer than `least`."""
    if len(paths) < 2 or _Sizes(paths).of(0, len(paths)) <= _LONGEST_ROW:
        return 0
    shared = min(common_length(paths[0].tokens, paths[-1].tokens), *(path.first for path in paths))
    return shared if shared >= least else 0


def split_into_rows(paths: Sequence[TokenPath], trunk: int) -> Iterator[Sequence[TokenPath]]:
    """Sorted paths in parts that are short enough for a row each, divided where neighbours share least."""
    sizes = _Sizes(paths)

    def divide(begin: int, end: int) -> Iterator[Sequence[TokenPath]]:
        if end - begin < 2 or sizes.of(begin, end) - trunk <= _LONGEST_ROW:
            yield paths[begin:end]
            return
        middle = (begin + end) / 2
        cut = min(range(begin + 1, end), key=lambda i: (sizes.shared[i], abs(i - middle)))
        yield from divide(begin, cut)
        yield from divide(cut, end)

    return divide(0, len(paths))


class _Sizes:
    """How many nodes the trees of neighbouring paths have. `shared[i]`: tokens that path i shares with the one before it."""

    def __init__(self, paths: Sequence[TokenPath]) -> None:
        self.shared = shared_lengths(paths)
        own = (len(path.tokens) - shared for path, shared in zip(paths, self.shared, strict=True))
        self._own_before = list(accumulate(own, initial=0))

    def of(self, begin: int, end: int) -> int:
        """Of paths[begin:end]."""
        return self._own_before[end] - self._own_before[begin] + self.shared[begin]


@dataclass
class Row:
    """The tree of some sorted paths, laid out depth first.

    tokens, positions   of its nodes; positions count from the beginning of the text
    ends                for each node the index behind its last descendant: node i sees j where j <= i < ends[j]
    nodes               for each path its nodes from `first` on: those that predict its scored tokens
    """

    paths: Sequence[TokenPath]
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    nodes: list[list[int]] = field(default_factory=list)


def lay_out(paths: Sequence[TokenPath], trunk: int) -> Row:
    """Sorted paths as a row. Their first `trunk` tokens, which all share, are left out."""
    row = Row(paths)
    way: list[int] = []  # the nodes of the path before, in turn
    before: Sequence[int] = ()
    for path in paths:
        tokens = path.tokens[trunk:]
        kept = common_length(before, tokens)
        for node in way[kept:]:
            row.ends[node] = len(row.tokens)
        del way[kept:]
        for position in range(kept, len(tokens)):
            way.append(len(row.tokens))
            row.tokens.append(tokens[position])
            row.positions.append(trunk + position)
            row.ends.append(0)
        row.nodes.append(way[path.first - trunk :])
        before = tokens
    for node in way:
        row.ends[node] = len(row.tokens)
    return row
