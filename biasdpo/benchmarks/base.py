"""The interface of a benchmark: items, the requests each needs, an item's numbers, and metrics over the numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from biasdpo.evaluation.stats import Array, Metric
from biasdpo.records import Completion, CompletionRequest, Likelihood, Request, Sampling

Item = TypeVar("Item")


class Benchmark(ABC, Generic[Item]):
    """Items that get K numbers from each side, and metrics over those numbers.

    name         as on the command line and in results
    columns      names of an item's K numbers
    data_sha256  of the files the items were read from, "" if they came from the Hub
    settings     how completions are generated and scored, as shown in results
    not_as_published   why its figures can't be compared with the paper's; "" if they can
    pairs_source       of `preference`: which pairs are scored, as shown in results
    """

    name: str
    columns: Sequence[str]
    settings: Mapping[str, Any] = MappingProxyType({})
    not_as_published: str = ""
    pairs_source: str = ""

    def __init__(self, items: Sequence[Item], data_sha256: str = "") -> None:
        self.items = items
        self.data_sha256 = data_sha256

    def describe(self, item: Item) -> dict[str, str]:
        """The item as a reader knows it: its texts and its category."""
        return asdict(item)  # type: ignore[call-overload, no-any-return]

    def groups(self, item: Item) -> Sequence[str]:
        """The groups (categories, domains) the item counts in, besides the whole."""
        category = getattr(item, "category", "")
        return [category] if category else []

    def outcome(self, _item: Item, _numbers: Sequence[float]) -> str:
        """The decision of a side with these numbers, in words ("prefers the stereotype"); "" if nothing is decided. An item whose
        outcomes differ between base and tuned has flipped."""
        return ""

    @abstractmethod
    def side_metrics(self) -> Mapping[str, Metric]:
        """Metrics of one side, over its items' numbers (N, K)."""

    def paired_metrics(self) -> Mapping[str, Metric]:
        """Metrics that need both sides, over (N, 2K), base's K numbers first."""
        return {}

    def report(self, _items: Sequence[Item], _numbers: Array) -> dict[str, float]:
        """Figures beside the metrics, such as a baseline that needs no model. `_numbers` (N, K): base's."""
        return {}


class LikelihoodBenchmark(Benchmark[Item]):
    """A benchmark that scores a side by likelihoods."""

    @abstractmethod
    def requests(self, item: Item) -> Sequence[Request]:
        """The likelihood requests of one item."""

    def scores(self, _item: Item, outputs: Sequence[Likelihood]) -> Sequence[float]:
        """An item's K numbers for one side, from the likelihoods of its requests: by default their logp."""
        return [output.logp for output in outputs]


def limited(sampling: Sampling, max_new_tokens: int | None) -> Sampling:
    """The sampling with another number of tokens, if one is given."""
    return sampling if max_new_tokens is None else replace(sampling, max_new_tokens=max_new_tokens)


class GenerationBenchmark(Benchmark[Item]):
    """A benchmark that scores a side by its completions. `settings`: what results show besides the sampling."""

    def __init__(self, items: Sequence[Item], sampling: Sampling, data_sha256: str = "", **settings: Any) -> None:
        super().__init__(items, data_sha256)
        self.sampling = sampling
        self.settings = {"samples": 1, "max_new_tokens": sampling.max_new_tokens, "temperature": sampling.temperature, **settings}

    @abstractmethod
    def requests(self, item: Item) -> Sequence[CompletionRequest]:
        """The completions to generate for one item; the evaluation sets the seeds."""

    @abstractmethod
    def scores(self, items: Sequence[Item], outputs: Sequence[Sequence[Completion]]) -> Sequence[Sequence[float]]:
        """Each item's K numbers for one side, from the completions of its requests; for several items at once, because
        classifiers work in batches. NaN where there is nothing to score; a scorer that fails is an error."""
