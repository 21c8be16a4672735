"""The rows of an export: what training reads of the journal, one row a pair, with where each comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from biasdpo.dataset.pairs import derive, pair_of_row
from biasdpo.dataset.rows import Journal, Row
from biasdpo.dataset.sources import trainable


@dataclass(frozen=True)
class ExportedRow:
    """A row of an export: one pair. These are its columns, in this order.

    prompt, chosen, rejected   as training reads them
    category, target_group     of the first judgment that says
    pair_id                    the same two completions to the same prompt, whichever was chosen
    id, source, annotator,     of the first judgment that chose so; `retract` takes the id
    created_at
    votes, votes_against       judgments that chose so, and the other way round (a pair with as many is left out)
    """

    prompt: str
    chosen: str
    rejected: str
    category: str
    target_group: str
    pair_id: str
    id: str
    source: str
    annotator: str
    created_at: str
    votes: int
    votes_against: int


COLUMNS = tuple(field.name for field in fields(ExportedRow))
NUMBERS = ("votes", "votes_against")


def build_rows(journal: Journal) -> tuple[list[ExportedRow], int, int]:
    """One row a pair, as `derive` decides; the judgments that repeat another, and the pairs that are evenly split."""
    judged = trainable(journal)
    pairs = [pair_of_row(row, f"{journal.path}, judgment {row['id']}") for row in judged]
    by_choice: dict[tuple[str, str], list[Row]] = {}
    of_pair: dict[str, int] = {}
    for pair, row in zip(pairs, judged, strict=True):
        pair_id = pair.pair_id
        by_choice.setdefault((pair_id, pair.chosen), []).append(row)
        of_pair[pair_id] = of_pair.get(pair_id, 0) + 1
    derived = derive(pairs)
    rows = []
    for pair in derived.pairs:
        pair_id = pair.pair_id
        judgments = by_choice[pair_id, pair.chosen]
        first = judgments[0]
        rows.append(
            ExportedRow(
                pair.prompt,
                pair.chosen,
                pair.rejected,
                category=_first_said(judgments, "category"),
                target_group=_first_said(judgments, "target_group"),
                pair_id=pair_id,
                **{column: first[column] for column in ("id", "source", "annotator", "created_at")},
                votes=len(judgments),
                votes_against=of_pair[pair_id] - len(judgments),
            )
        )
    return rows, derived.repeats, derived.contradictions


def _first_said(judgments: Sequence[Row], column: str) -> str:
    return next((str(row[column]) for row in judgments if row[column]), "")
