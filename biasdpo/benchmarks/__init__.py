"""Benchmarks: items to requests, outputs to scores. None of them knows a backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from biasdpo.benchmarks import bbq, crows_pairs, stereoset, truthfulqa, utility, winobias
from biasdpo.benchmarks.base import Benchmark
from biasdpo.errors import ConfigError

_FROM_DATA_DIR: dict[str, Callable[[Path | None], Benchmark]] = {
    "crows_pairs": crows_pairs.build,
    "stereoset": stereoset.build,
    "bbq": bbq.build,
    "winobias": winobias.build,
    "truthfulqa": truthfulqa.build,
    "utility": utility.build,
}
NAMES = ("preference", *_FROM_DATA_DIR)


def check_name(name: str) -> str:
    """The name of a benchmark; another one is a ConfigError that lists them."""
    if name not in NAMES:
        raise ConfigError(f"Unknown benchmark {name!r}: choose of {', '.join(NAMES)}")
    return name


def build(name: str, data_dir: Path | None) -> Benchmark:
    """A benchmark of public items, from DATA_DIR/NAME or, where DATA_DIR is None, of the Hub. (`preference` has pairs of the
    user's own: see `preference.Preference`.)"""
    return _FROM_DATA_DIR[check_name(name)](data_dir)
