"""Preference pairs: the journal of judgments, what training reads of it, import and export."""

from biasdpo.dataset.journal import Appended, BadLine, Journal, append, append_all, new_judgment, repaired_lines, retract, undo
from biasdpo.dataset.near_duplicates import normalise_prompt
from biasdpo.dataset.pairs import Derived, PreferencePair, derive, longer_baseline, pair_id_of, pair_of_row
from biasdpo.dataset.sources import HUB, WORKSPACE, load, load_journal, load_jsonl, trainable
from biasdpo.dataset.splits import Split, is_held_out, snapshot, split

__all__ = [
    "HUB",
    "WORKSPACE",
    "Appended",
    "BadLine",
    "Derived",
    "Journal",
    "PreferencePair",
    "Split",
    "append",
    "append_all",
    "derive",
    "is_held_out",
    "load",
    "load_journal",
    "load_jsonl",
    "longer_baseline",
    "new_judgment",
    "normalise_prompt",
    "pair_id_of",
    "pair_of_row",
    "repaired_lines",
    "retract",
    "snapshot",
    "split",
    "trainable",
    "undo",
]
