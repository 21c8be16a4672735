"""The data set in numbers: what `dataset stats` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from biasdpo.dataset.agreement import agreement
from biasdpo.dataset.bulk import without_collection
from biasdpo.dataset.confounds import measure
from biasdpo.dataset.overlap import Overlap
from biasdpo.dataset.pairs import judged_pair_id
from biasdpo.dataset.rows import Journal, Row
from biasdpo.dataset.torn import repaired_lines
from biasdpo.workspace import Workspace


def stats(source: Workspace | Journal | Iterable[Row], overlap: Overlap | None = None) -> dict[str, Any]:
    """Counts and confounds of a workspace's journal, of a journal as far as it was read, or of its rows.

    rows                 judgments, retracted ones among them, and rows that take one back
    pairs                what training reads: distinct pairs by majority, see `derive`
    ties, both_biased    standing judgments without hidden repeats, as are those of `by_category` ("" where none was given),
                         which prefer one completion
    retracted            judgments taken back
    repaired_lines       torn lines that were set aside; 0 unless a workspace is given, as are `bad_lines`: lines that are no rows
    the others           see `Confounds` and `Agreement`
    """
    with without_collection():
        return _stats(source, overlap)


def _stats(source: Workspace | Journal | Iterable[Row], overlap: Overlap | None) -> dict[str, Any]:
    repaired = bad = 0
    if isinstance(source, Workspace):
        repaired = repaired_lines(source)
        source = Journal(source.preferences).refresh()
    if isinstance(source, Journal):
        bad = len(source.bad_lines)
        source = source.since((0, 0))[0]
    rows = list(source)
    retracted = {row["retracts"] for row in rows if row["verdict"] == "retracted"}
    standing = [row for row in rows if row["verdict"] != "retracted" and row["id"] not in retracted]
    judged = [row for row in standing if not row["repeat_of"]]
    preferred = [row for row in judged if row["verdict"] == "preferred"]
    verdicts = Counter(row["verdict"] for row in judged)
    confounds = measure(judged, overlap)
    agreed = agreement(standing)
    return {
        "rows": len(rows),
        "pairs": _derived_pairs(preferred),
        "ties": verdicts["tie"],
        "both_biased": verdicts["both_biased"],
        "retracted": sum(row["verdict"] != "retracted" and row["id"] in retracted for row in rows),
        "by_category": dict(sorted(Counter(row["category"] for row in preferred).items())),
        "chosen_longer_share": confounds.chosen_longer_share,
        "chosen_left_share": confounds.chosen_left_share,
        "near_duplicates": confounds.near_duplicates,
        "repaired_lines": repaired,
        "bad_lines": bad,
        "exact_duplicates": confounds.exact_duplicates,
        "benchmark_overlap": confounds.benchmark_overlap,
        "annotators": [asdict(shares) for shares in confounds.annotators],
        "agreement": {
            "alpha": agreed.alpha,
            "pairs": agreed.pairs,
            "self_consistency": {name: {"agreed": a, "total": t} for name, (a, t) in sorted(agreed.self_consistency.items())},
        },
        "warnings": list(confounds.warnings),
    }


def _derived_pairs(preferred: Sequence[Row]) -> int:
    """How many pairs `derive` leaves, by the rows' pair ids, which it would have to compute again."""
    pair_ids = list(map(judged_pair_id, preferred))
    votes = Counter(pair_ids)
    lead: Counter[str] = Counter()  # of pairs with several votes: those for one completion less those for the other
    for pair_id, row in zip(pair_ids, preferred, strict=True):
        if votes[pair_id] > 1:
            lead[pair_id] += 1 if row["chosen"] < row["rejected"] else -1
    return len(votes) - sum(not margin for margin in lead.values())
