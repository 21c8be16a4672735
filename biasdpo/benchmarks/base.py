"""What a benchmark is: a list of items, the requests that each needs, and metrics over what came back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from biasdpo.records import Likelihood, LikelihoodRequest, TextRequest
from biasdpo.stats import Array, Metric


class Benchmark(Protocol):
    """Scores a side by likelihood. An item's scores are K numbers; a metric is a function of all items' numbers."""

    name: str
    items: Sequence[Any]

    def requests(self, item: Any) -> Sequence[LikelihoodRequest | TextRequest]:
        """What must be scored for one item."""
        ...

    def scores(self, item: Any, outputs: Sequence[Likelihood]) -> Sequence[float]:
        """An item's K numbers for one side, from the likelihoods of its requests."""
        ...

    def side_metrics(self) -> Mapping[str, Metric]:
        """Metrics of one side, over its items' numbers (N, K)."""
        ...

    def paired_metrics(self) -> Mapping[str, Metric]:
        """Metrics that need both sides: over (N, 2K), base's K numbers first."""
        ...

    def report(self, items: Sequence[Any], numbers: Array) -> dict[str, float]:
        """What else belongs beside the metrics, such as a baseline that needs no model."""
        ...
