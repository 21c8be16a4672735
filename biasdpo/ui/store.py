"""What the page knows of the journal: read as it grows, shared by all visitors."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

from biasdpo.dataset.agreement import Agreement, agreement
from biasdpo.dataset.confounds import Confounds, Meter
from biasdpo.dataset.coverage import cell_counts
from biasdpo.dataset.overlap import load_overlap
from biasdpo.dataset.rows import Journal
from biasdpo.errors import BiasDPOError
from biasdpo.workspace import Workspace

Row = dict[str, Any]


class Store:
    """One per app. What it gives out are copies or frozen; the journal itself is read under its lock."""

    def __init__(self, workspace: Workspace, benchmarks: Path | None = None) -> None:
        """`benchmarks`: the folder of --data-dir, whose items no pair should repeat; read in the background."""
        self.workspace = workspace
        self.overlap_error: BiasDPOError | None = None
        self._benchmarks = benchmarks
        self._lock = threading.Lock()
        self._journal = Journal(workspace.preferences)
        self._meter = Meter()
        if benchmarks is not None:
            threading.Thread(target=self.read_benchmarks, name="benchmarks", daemon=True).start()

    def read_benchmarks(self) -> None:
        """Read the benchmark files; until then the meter counts no overlap."""
        assert self._benchmarks is not None
        try:
            meter = Meter(load_overlap(self._benchmarks))
        except BiasDPOError as exc:
            self.overlap_error = exc
            return
        with self._lock:
            self._meter = meter

    def confounds(self) -> Confounds:
        """The confound meter, now."""
        with self._lock:
            return self._meter.refresh(self._journal.refresh())

    def standing(self) -> list[Row]:
        """The judgments that were not taken back, in their order."""
        with self._lock:
            return self._journal.refresh().standing()

    def counts(self) -> Counter[tuple[str, str]]:
        """The coverage matrix's cells."""
        return cell_counts(self.standing())

    def judged_by(self, annotator: str) -> list[Row]:
        """An annotator's standing judgments in their order."""
        return [row for row in self.standing() if annotator and row["annotator"] == annotator]

    def agreement(self) -> Agreement:
        """How consistent annotators are with themselves and with each other."""
        return agreement(self.standing())
