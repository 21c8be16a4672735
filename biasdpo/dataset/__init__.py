"""Preference pairs: the journal of judgments, what training reads of it, import and export."""

from biasdpo.dataset.agreement import Agreement, agreement, self_consistency
from biasdpo.dataset.confounds import AnnotatorShares, Confounds, Meter, measure
from biasdpo.dataset.coverage import Coverage, cell_counts, coverage, thinnest
from biasdpo.dataset.exporting import Exported, export_file
from biasdpo.dataset.formats import ColumnMapping, ForeignPair, detect, parse_mapping, shown_columns
from biasdpo.dataset.importing import (
    Converted,
    Imported,
    Preview,
    check_some_good,
    convert_source,
    import_file,
    preview,
    try_import,
)
from biasdpo.dataset.journal import (
    Appended,
    BadLine,
    Journal,
    append,
    append_all,
    mend,
    new_judgment,
    repaired_lines,
    retract,
    undo,
)
from biasdpo.dataset.mixture import Mixed, load_snapshot, mix, weighted
from biasdpo.dataset.near_duplicates import normalise_prompt
from biasdpo.dataset.overlap import Overlap, load_overlap
from biasdpo.dataset.pairs import (
    Derived,
    PreferencePair,
    check_text,
    derive,
    longer_baseline,
    pair_id_of,
    pair_of_row,
    shown_pair_id,
)
from biasdpo.dataset.reading import HUB
from biasdpo.dataset.sources import WORKSPACE, load, load_file, load_journal, load_jsonl, trainable
from biasdpo.dataset.splits import Split, is_held_out, snapshot, split
from biasdpo.dataset.stats import stats
from biasdpo.dataset.table import Page, Query, choices, query
from biasdpo.dataset.validation import Validated, is_journal, validate

__all__ = [
    "HUB",
    "WORKSPACE",
    "Agreement",
    "AnnotatorShares",
    "Appended",
    "BadLine",
    "ColumnMapping",
    "Confounds",
    "Converted",
    "Coverage",
    "Derived",
    "Exported",
    "ForeignPair",
    "Imported",
    "Journal",
    "Meter",
    "Mixed",
    "Overlap",
    "Page",
    "PreferencePair",
    "Preview",
    "Query",
    "Split",
    "Validated",
    "agreement",
    "append",
    "append_all",
    "cell_counts",
    "check_some_good",
    "check_text",
    "choices",
    "convert_source",
    "coverage",
    "derive",
    "detect",
    "export_file",
    "import_file",
    "is_held_out",
    "is_journal",
    "load",
    "load_file",
    "load_journal",
    "load_jsonl",
    "load_overlap",
    "load_snapshot",
    "longer_baseline",
    "measure",
    "mend",
    "mix",
    "new_judgment",
    "normalise_prompt",
    "pair_id_of",
    "pair_of_row",
    "parse_mapping",
    "preview",
    "query",
    "repaired_lines",
    "retract",
    "self_consistency",
    "shown_columns",
    "shown_pair_id",
    "snapshot",
    "split",
    "stats",
    "thinnest",
    "trainable",
    "try_import",
    "undo",
    "validate",
    "weighted",
]
