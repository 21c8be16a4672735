"""Layout of texts with common beginnings, so that those are computed once.

Twelve answers to one question, four questions about one context, a sentence and its twin: as token sequences they form a tree,
and each node needs to be computed once, since it depends only on the tokens before it. Sorted, sequences are next to those that
they share most with, and the tree is walked from left to right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

_LONGEST_ROW = 256  # tokens in a row of several sequences: attention grows with its square


@dataclass(frozen=True)
class TokenPath:
    """One request's tokens without the last, which predicts nothing.

    index    of the request
    first    index in `tokens` of the token that predicts the first scored token
    scored   the predicted tokens: tokens[first + i] predicts scored[i]
    """

    index: int
    tokens: tuple[int, ...]
    first: int
    scored: tuple[int, ...]


def sort_paths(requests: Sequence[tuple[list[int], list[int]]]) -> list[TokenPath]:
    """Paths of requests' (given, scored) tokens, sorted so that common beginnings are adjacent."""
    paths = [
        TokenPath(index, (*given, *scored[:-1]), len(given) - 1, tuple(scored)) for index, (given, scored) in enumerate(requests)
    ]
    return sorted(paths, key=lambda path: path.tokens)


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of leading tokens that are equal."""
    shortest = min(len(one), len(other))
    return next((i for i in range(shortest) if one[i] != other[i]), shortest)


def shared_lengths(paths: Sequence[TokenPath]) -> list[int]:
    """Number of leading tokens that each path shares with the one before it."""
    return [0, *(common_length(one.tokens, other.tokens) for one, other in pairwise(paths))][: len(paths)]


def trunk_length(paths: Sequence[TokenPath], least: int) -> int:
    """Number of leading tokens of sorted paths to compute once, before their rows: shared by all, predicting nothing. 0 if all
    fit into one row, or fewer than `least` are shared."""
    if len(paths) < 2 or _Sizes(paths).of(0, len(paths)) <= _LONGEST_ROW:
        return 0
    shared = min(common_length(paths[0].tokens, paths[-1].tokens), *(path.first for path in paths))
    return shared if shared >= least else 0


def split_into_rows(paths: Sequence[TokenPath], trunk: int) -> Iterator[Sequence[TokenPath]]:
    """Split sorted paths into parts short enough for one row each, where neighbors share least."""
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
    """Numbers of nodes in the trees of adjacent paths. `shared[i]`: tokens that path i shares with the one before it."""

    def __init__(self, paths: Sequence[TokenPath]) -> None:
        self.shared = shared_lengths(paths)
        own = (len(path.tokens) - shared for path, shared in zip(paths, self.shared, strict=True))
        self._own_before = list(accumulate(own, initial=0))

    def of(self, begin: int, end: int) -> int:
        """Nodes of the tree of paths[begin:end]."""
        return self._own_before[end] - self._own_before[begin] + self.shared[begin]


@dataclass
class Row:
    """The tree of sorted paths in depth-first order.

    tokens, positions   of the nodes; positions count from the beginning of the text
    ends                per node, the index after its last descendant: node i attends to j if j <= i < ends[j]
    nodes               per path, its nodes from `first` on, which predict its scored tokens
    """

    paths: Sequence[TokenPath]
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    nodes: list[list[int]] = field(default_factory=list)


def lay_out(paths: Sequence[TokenPath], trunk: int) -> Row:
    """Lay out sorted paths as a row, without their first `trunk` tokens, which all share."""
    row = Row(paths)
    nodes: list[int] = []  # of the previous path
    before: Sequence[int] = ()
    for path in paths:
        tokens = path.tokens[trunk:]
        shared = common_length(before, tokens)
        for node in nodes[shared:]:
            row.ends[node] = len(row.tokens)
        del nodes[shared:]
        for position in range(shared, len(tokens)):
            nodes.append(len(row.tokens))
            row.tokens.append(tokens[position])
            row.positions.append(trunk + position)
            row.ends.append(0)
        row.nodes.append(nodes[path.first - trunk :])
        before = tokens
    for node in nodes:
        row.ends[node] = len(row.tokens)
    return row
