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
from biasdpo.dataset.table import Page, Query, choices, query
from biasdpo.errors import BiasDPOError
from biasdpo.workspace import Workspace

Row = dict[str, Any]


class Store:
    """One per app. Journal and meter lock themselves; what is given out are copies or frozen."""

    def __init__(self, workspace: Workspace, benchmarks: Path | None = None) -> None:
        """`benchmarks`: the folder of --data-dir, whose items no pair should repeat; read in the background."""
        self.workspace = workspace
        self.overlap_error: BiasDPOError | None = None
        self._benchmarks = benchmarks
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
        self._meter = meter

    def confounds(self) -> Confounds:
        """The confound meter, now."""
        return self._meter.refresh(self._read())

    def standing(self) -> list[Row]:
        """The judgments that were not taken back, in their order."""
        return self._read().standing()

    def counts(self) -> Counter[tuple[str, str]]:
        """The coverage matrix's cells."""
        return cell_counts(self.standing())

    def judged_by(self, annotator: str) -> list[Row]:
        """An annotator's standing judgments in their order."""
        return [row for row in self.standing() if annotator and row["annotator"] == annotator]

    def agreement(self) -> Agreement:
        """How consistent annotators are with themselves and with each other."""
        return agreement(self.standing())

    def page(self, wanted: Query, number: int, page_rows: int) -> Page:
        """One page of the judgments that a query finds, the newest first."""
        return query(self._read(), wanted, number, page_rows)

    def choices(self) -> dict[str, Counter[str]]:
        """By column that can be filtered: its values, with how many judgments have each."""
        return choices(self._read())

    def judgment(self, judgment_id: str) -> tuple[Row, Row | None] | None:
        """A judgment with the row that takes it back, if one does; None where there is no judgment of that id."""
        rows, _mark = self._read().since((0, 0))
        row = next((row for row in rows if row["id"] == judgment_id and row["verdict"] != "retracted"), None)
        if row is None:
            return None
        return row, next((other for other in rows if other["retracts"] == judgment_id), None)

    def bad_lines(self) -> int:
        """Lines of the journal that are no rows."""
        return len(self._read().bad_lines)

    def _read(self) -> Journal:
        return self._journal.refresh()
