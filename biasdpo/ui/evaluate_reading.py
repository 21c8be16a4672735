"""What the page reads of evaluations: results, kept in memory as long as they are shown, and what was asked for of each."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biasdpo.errors import BiasDPOError, EvaluationError
from biasdpo.evaluations import Evaluation
from biasdpo.evaluations.table import table
from biasdpo.ui.evaluate_words import setup

_KEPT_RESULTS = 6  # in memory; a full BBQ has tens of thousands of items

Result = dict[str, Any]


@dataclass(frozen=True)
class About:
    """What was asked for, by the request or, of a result that the command line wrote, by the result. `limit` None: all."""

    model: str = ""
    adapter: str = ""
    benchmarks: tuple[str, ...] = ()
    limit: int | None = None
    strengths: int = 1


class Results:
    """The results that were read last, shared by all visitors: a large file is not read at every click."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[Path, int], Result] = OrderedDict()
        self._about: dict[tuple[Path, int], About] = {}

    def of(self, one: Evaluation) -> Result:
        """The result as it is now. Raises EvaluationError where there is none, or one that can't be shown."""
        name = (one.result_file, version(one))
        with self._lock:
            found = self._kept.get(name)
            if found is None:
                found = one.load()
                try:
                    table(found)
                except (KeyError, TypeError, ValueError, AttributeError) as exc:
                    raise EvaluationError(f"The result of {one.id} can't be read ({exc!r:.80}): evaluate again") from exc
                self._kept[name] = found
            self._kept.move_to_end(name)
            while len(self._kept) > _KEPT_RESULTS:
                self._kept.popitem(last=False)
        return found

    def about(self, one: Evaluation) -> About:
        """What was asked for; of a result without a request, what it says itself."""
        if one.request is not None:
            asked = one.request
            return About(asked.model, asked.adapter, tuple(asked.parts()), asked.limit, len(asked.strengths))
        name = (one.result_file, version(one))
        if name not in self._about:
            try:
                result = self.of(one)
            except (BiasDPOError, OSError):
                return About()
            limit, curve = result["provenance"].get("limit"), result.get("curve") or [None]
            self._about[name] = About(*setup(result), tuple(result["benchmarks"]), limit, len(curve))
        return self._about[name]


def version(one: Evaluation) -> int:
    """What tells a result from the one that was there before; 0 where there is none."""
    try:
        return one.result_file.stat().st_mtime_ns
    except OSError:
        return 0
