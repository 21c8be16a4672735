"""The data of a run as rows of the page: a source and its weight each. What a row may name, and what the rows come to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from biasdpo.dataset import HUB, WORKSPACE
from biasdpo.errors import BiasDPOError, ConfigError
from biasdpo.ui.store import Store
from biasdpo.ui.train_reading import SEED_SET, source_title

MOST_SOURCES = 5
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")

Rows = list[tuple[str, float]]


@cache
def seed_pairs() -> int:
    """Lines of the shipped seed set."""
    with SEED_SET.open(encoding="utf-8") as file:
        return sum(1 for line in file if line.strip())


def choices(store: Store, named: Sequence[str] = ()) -> list[tuple[str, str]]:
    """What a row offers; `named`: sources beside, such as an uploaded file. Others may be typed."""
    try:
        usable = store.confounds().pairs
        mine = f"Workspace: {usable:,} usable judgment{'' if usable == 1 else 's'}" if usable else "Workspace: nothing judged yet"
    except BiasDPOError:
        mine = "Workspace: its journal can't be read"
    offered = [(f"Shipped seed set: {seed_pairs():,} pairs", str(SEED_SET)), (mine, WORKSPACE)]
    known = [value for _, value in offered]
    return offered + [(source_title(name), name) for name in dict.fromkeys(named) if name and name not in known]


def read_rows(given: Sequence[Any]) -> Rows:
    """The rows that name something, as config values: (source, weight). `given`: source, weight, source, weight, …

    Raises ConfigError for what is no source or no weight. That a source can be read is `dataset`'s to say.
    """
    rows: Rows = []
    for source, weight in zip(given[::2], given[1::2], strict=True):
        if source in (None, ""):
            continue
        if not isinstance(source, str):
            raise ConfigError(f"A data source is text: got {source!r}; choose one, or type hub:OWNER/NAME or a file's path")
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ConfigError(
                f"The weight of {source_title(source)} must be a number: got {weight!r}; 1 sees each pair once an epoch"
            )
        rows.append((absolute(source.strip()), float(weight)))
    if not rows:
        raise ConfigError("No data to train on: choose a source under Data")
    names = [name for name, _ in rows]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{source_title(twice)} is named twice: name it once, with a weight")
    return rows


def absolute(source: str) -> str:
    """A file's path as the training process finds it; other sources as they are. ConfigError for a Hub name that is none."""
    if source.startswith(HUB):
        if not _HUB_NAME.fullmatch(source.removeprefix(HUB)):
            raise ConfigError(f"A data set of the Hub is hub:OWNER/NAME: got {source[:60]!r}; write such a name")
        return source
    return source if source == WORKSPACE else str(Path(source).expanduser().resolve())


def config_values(rows: Rows) -> dict[str, Any]:
    """`datasets` and `dataset_weights` of a config; weights of 1 throughout are left out, as they are the default."""
    weights = tuple(weight for _, weight in rows)
    return {"datasets": tuple(name for name, _ in rows), "dataset_weights": () if set(weights) == {1.0} else weights}


def rows_of(datasets: Sequence[str], weights: Sequence[float]) -> Rows:
    """The other way round: a config's data as rows."""
    return list(zip(datasets, weights or (1.0,) * len(datasets), strict=True))


def is_there(source: str) -> bool:
    """Whether a config's source can still be read: a file must exist; of the Hub and the workspace that is theirs to say."""
    return source == WORKSPACE or source.startswith(HUB) or Path(source).is_file()


def titles(sources: Sequence[str]) -> str:
    """Sources for people."""
    return ", ".join(map(source_title, sources))
