"""What a benchmark is: a list of items, the requests that each needs, and metrics over what came back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from biasdpo.evaluation.stats import Array, Metric
from biasdpo.records import Completion, CompletionRequest, Likelihood, Request


class Measured(Protocol):
    """What every benchmark has. An item's scores are K numbers; a metric is a function of their averages."""

    name: str
    items: Sequence[Any]
    columns: Sequence[str]  # the names of the K numbers
    data_sha256: str  # of the files that the items came from, "" where they came from elsewhere

    def describe(self, item: Any) -> dict[str, str]:
        """What a reader must see to know the item again: its texts, its category."""
        ...

    def outcome(self, item: Any, numbers: Sequence[float]) -> str:
        """What the side that got these numbers decided, in words ("prefers the stereotype"); "" where nothing is decided.
        Where base's and tuned's differ, the item flipped."""
        ...

    def groups(self, item: Any) -> Sequence[str]:
        """The groups (categories, domains) that the item counts in, beside the whole."""
        ...

    def side_metrics(self) -> Mapping[str, Metric]:
        """Metrics of one side, over its items' numbers (N, K)."""
        ...

    def paired_metrics(self) -> Mapping[str, Metric]:
        """Metrics that need both sides: over (N, 2K), base's K numbers first."""
        ...

    def report(self, items: Sequence[Any], numbers: Array) -> dict[str, float]:
        """What else belongs beside the metrics, such as a baseline that needs no model. `numbers` (N, K): base's."""
        ...


class Benchmark(Measured, Protocol):
    """Scores a side by likelihood."""

    def requests(self, item: Any) -> Sequence[Request]:
        """What must be scored for one item."""
        ...

    def scores(self, item: Any, outputs: Sequence[Likelihood]) -> Sequence[float]:
        """An item's K numbers for one side, from the likelihoods of its requests."""
        ...


class OneSided:
    """What most benchmarks have in common: nothing is decided, no metric of both sides, nothing beside the metrics."""

    def outcome(self, _item: Any, _numbers: Sequence[float]) -> str:
        """Nothing."""
        return ""

    def paired_metrics(self) -> Mapping[str, Metric]:
        """None."""
        return {}

    def report(self, _items: Sequence[Any], _numbers: Array) -> dict[str, float]:
        """Nothing."""
        return {}


class GenerationBenchmark(OneSided, ABC):
    """Scores a side by what it writes; else as `Measured`.

    settings           how it was run, to be named in the result: samples, tokens, temperature, scorer
    not_as_published   why its figures must not be set beside the paper's; "" where they may
    """

    name: str
    items: Sequence[Any]
    columns: Sequence[str]
    data_sha256: str
    settings: Mapping[str, Any]
    not_as_published: str = ""

    @abstractmethod
    def requests(self, item: Any) -> Sequence[CompletionRequest]:
        """What must be written for one item; an evaluation sets the seeds."""

    @abstractmethod
    def scores(self, items: Sequence[Any], outputs: Sequence[Sequence[Completion]]) -> Sequence[Sequence[float]]:
        """Each item's K numbers for one side, from the completions of its requests; of several items at once, since classifiers
        are quick on many texts. Not a number where nothing was written that could be scored; a scorer that fails is an error."""

    @abstractmethod
    def describe(self, item: Any) -> dict[str, str]:
        """See `Measured`."""

    @abstractmethod
    def groups(self, item: Any) -> Sequence[str]:
        """See `Measured`."""

    @abstractmethod
    def side_metrics(self) -> Mapping[str, Metric]:
        """See `Measured`."""
