"""The preference data as the page reads it: judgments, health, coverage and agreement, always up to date."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

from biasdpo.access import is_owner
from biasdpo.data.health import Confounds, Meter, load_overlap
from biasdpo.data.journal import EDITABLE, Journal, Row, journal_of, replacement
from biasdpo.data.summary import Agreement, Page, Query, State, agreement, cell_counts, choices, find, query
from biasdpo.errors import BiasDPOError
from biasdpo.workspace import Workspace


class DatasetReader:
    """The preference data of a workspace, read again when its file has grown. One per app; safe across threads."""

    def __init__(self, workspace: Workspace, benchmarks: Path | None = None) -> None:
        """`benchmarks`: folder of benchmark files, whose items no pair should repeat; read in the background."""
        self.workspace = workspace
        self.overlap_error: BiasDPOError | None = None
        self._benchmarks = benchmarks
        self._journal = journal_of(workspace)
        self._meter = Meter()
        if benchmarks is not None:
            threading.Thread(target=self.read_benchmarks, name="benchmarks", daemon=True).start()

    def read_benchmarks(self) -> None:
        """Read the benchmark files; until then no overlap is counted."""
        assert self._benchmarks is not None
        try:
            meter = Meter(load_overlap(self._benchmarks))
        except BiasDPOError as exc:
            self.overlap_error = exc
            return
        self._meter = meter

    def confounds(self) -> Confounds:
        """Data health, now."""
        return self._meter.refresh(self._read())

    def standing(self) -> list[Row]:
        """The judgments that were not withdrawn, oldest first."""
        return self._read().standing()

    def counts(self) -> Counter[tuple[str, str]]:
        """Number of judgments by category and target group."""
        return cell_counts(self.standing())

    def own(self, browser: str, annotator: str) -> list[Row]:
        """The standing judgments that were made in a browser, oldest first."""
        return [row for row in self.standing() if self.is_own(row, browser, annotator)]

    @staticmethod
    def is_own(row: Row, browser: str, annotator: str) -> bool:
        """Whether a judgment was made in the browser with this hash (see `JudgmentMeta`).

        Rows of old versions have no browser: they belong to their nickname, except for visitors, who can take any.
        """
        if row["meta"]["browser"]:
            return bool(row["meta"]["browser"] == browser)
        own_name = bool(annotator) and row["annotator"] == annotator and row["source"] in ("label", "compare")
        return own_name and is_owner()

    def agreement(self) -> Agreement:
        """How consistent annotators are with themselves and each other."""
        return agreement(self.standing())

    def page(self, wanted: Query, number: int, page_rows: int) -> Page:
        """One page of the judgments that match, newest first."""
        return query(self._read(), wanted, number, page_rows)

    def ids(self, wanted: Query) -> list[str]:
        """The ids of the standing judgments that match."""
        found, retractions = find(self._read(), wanted)
        return [row["id"] for row in found if row["id"] not in retractions]

    def imports(self) -> dict[str, int]:
        """The imports of which something stands, the latest first: source and number of judgments."""
        counted = Counter(row["source"] for row in self.standing() if row["source"].startswith("import:"))
        return dict(reversed(counted.items()))

    def choices(self, state: State) -> dict[str, Counter[str]]:
        """The values to filter judgments in this state by, and their counts, by column."""
        return choices(self._read(), state)

    def judgment(self, judgment_id: str) -> tuple[Row, Row | None] | None:
        """A judgment and the row that withdraws it, if any; None for an unknown id."""
        rows, _mark = self._read().since((0, 0))
        row = next((row for row in rows if row["id"] == judgment_id and row["verdict"] != "retracted"), None)
        if row is None:
            return None
        return row, next((other for other in rows if other["retracts"] == judgment_id), None)

    def provenance(self, row: Row, retraction: Row | None) -> dict[str, str]:
        """Where a judgment comes from, what it was before each edit, and what became of it: by title, in one line each."""
        meta = row["meta"]
        seconds = f"in {meta['seconds']:.1f} s" if meta["seconds"] else ""
        facts = {"Verdict": row["verdict"].replace("_", " ")}
        facts["Judged"] = ", ".join(filter(None, (_minute(row), row["annotator"], seconds)))
        if retraction is not None:
            by = f" by {retraction['annotator']}" if retraction["annotator"] else ""
            facts["Edited since" if replacement(retraction) else "Withdrawn"] = _minute(retraction) + by
            facts["Edited version"] = replacement(retraction)
        journal = self._read()
        rows, _mark = journal.since((0, 0))
        before = {replacement(other): other["retracts"] for other in rows if other["verdict"] == "retracted"}
        new = row
        while old := journal.rows.get(before.get(new["id"], "")):
            was = "; ".join(f"{name.replace('_', ' ')} was “{old[name]}”" for name in EDITABLE if old[name] != new[name])
            facts[f"Edited from {old['id']}"] = was
            new = old
        facts |= {"Source": row["source"]} | {
            name.capitalize(): meta[name] for name in ("model", "adapter", "backend", "sampling")
        }
        facts |= {"Left side": meta["left_side"], "Chosen side": meta["chosen_side"], "Hidden repeat of": row["repeat_of"]}
        facts |= {"Row": row["id"], "Pair": row["pair_id"]}
        return {name: " ".join(text.split()) for name, text in facts.items() if text}

    def bad_lines(self) -> int:
        """Number of lines that can't be read."""
        return len(self._read().bad_lines)

    def _read(self) -> Journal:
        return self._journal.refresh()


def _minute(row: Row) -> str:
    return str(row["created_at"][:16]).replace("T", " ") + " UTC"
