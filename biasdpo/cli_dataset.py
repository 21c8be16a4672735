"""The command `dataset`: statistics, validation, import, export and withdrawal of preference pairs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from biasdpo.errors import DatasetError

_SHOWN_BAD_ROWS = 20
_SOURCE = "a file (JSONL, JSON, CSV, Parquet) or hub:OWNER/NAME"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `dataset` to the command line."""
    command = commands.add_parser("dataset", help="preference pairs: stats, validate, import, export, retract")
    _add_workspace_and_json(command, {})
    actions = command.add_subparsers(required=True, metavar="ACTION")

    action = actions.add_parser("stats", help="counts, confounds, near-duplicates, agreement")
    action.add_argument("file", nargs="?", default="", metavar="FILE", help=f"{_SOURCE}; default: the workspace's journal")
    action.add_argument("--data-dir", type=Path, metavar="DIR", help="benchmark files, to count pairs that overlap with them")
    _finish(action, stats)

    action = actions.add_parser("validate", help="list every bad line with its reason")
    action.add_argument("file", nargs="?", default="", metavar="FILE", help=f"{_SOURCE}; default: the workspace's journal")
    _finish(action, validate)

    action = actions.add_parser("import", help="take the good rows of a file into the journal, list the bad ones")
    action.add_argument("file", metavar="FILE|hub:OWNER/NAME", help=_SOURCE)
    action.add_argument("--name", default="", metavar="NAME", help="kept as source import:NAME; default: the file's name")
    action.add_argument(
        "--map",
        default="",
        metavar="FIELD=COLUMN[,...]",
        help="which column is prompt, chosen, rejected, category, target_group, annotator, note, input, system or history; "
        "default: guessed",
    )
    action.add_argument("--dry-run", action="store_true", help="show what would be stored, store nothing")
    _finish(action, import_)

    action = actions.add_parser("export", help="write what training reads, with a data set card beside it")
    action.add_argument("file", type=Path, metavar="FILE", help="ends in .jsonl, .csv or .parquet")
    _finish(action, export)

    action = actions.add_parser("retract", help="take a judgment back; it stays in the journal, and counts no more")
    action.add_argument("id", metavar="ID", help="a judgment's id, as an export or the data set table shows it")
    _finish(action, retract)


def _finish(action: argparse.ArgumentParser, handler: Callable[[argparse.Namespace], int]) -> None:
    # A flag that is absent here keeps what stood before the action.
    _add_workspace_and_json(action, {"default": argparse.SUPPRESS})
    action.set_defaults(handler=handler)


def _add_workspace_and_json(command: argparse.ArgumentParser, default: dict[str, Any]) -> None:
    command.add_argument("--workspace", metavar="DIR", help="default: $BIASDPO_WORKSPACE, else ./workspace", **default)
    command.add_argument("--json", action="store_true", help="print one JSON object on stdout", **default)


@contextmanager
def _progress(unit: str) -> Iterator[Callable[[], object]]:
    """A bar on stderr, where that is a terminal; call what it gives once a row."""
    from tqdm import tqdm

    with tqdm(unit=f" {unit}", file=sys.stderr, leave=False, disable=None) as bar:
        yield bar.update


def stats(args: argparse.Namespace) -> int:
    """Count the journal, or all good rows of a file, and say what is past its limit."""
    from biasdpo.data.health import load_overlap
    from biasdpo.data.summary import stats as count
    from biasdpo.workspace import open_workspace

    overlap = load_overlap(args.data_dir) if args.data_dir else None
    if overlap is not None and overlap.skipped:
        print(f"Not read, since they are no UTF-8 text: {', '.join(overlap.skipped)}", file=sys.stderr)
    if args.file:
        rows, bad = _rows_of_file(args.file)
        numbers = count(rows, overlap) | {"bad_lines": len(bad)}
        _show_bad(bad)
    else:
        workspace = open_workspace(args.workspace)
        numbers = count(workspace, overlap)
    if args.json:
        print(json.dumps(numbers, ensure_ascii=False))
        return 0
    print(f"{args.file or workspace.preferences}: {numbers['rows']:,} rows, {numbers['pairs']:,} pairs to train on")
    print(f"  {numbers['ties']:,} ties, {numbers['both_biased']:,} both biased, {numbers['retracted']:,} withdrawn")
    categories = ", ".join(f"{name or '(none)'} {number:,}" for name, number in numbers["by_category"].items())
    print(f"  by category: {categories or 'nothing yet'}")
    print(
        f"  chosen is the longer: {_share(numbers['chosen_longer_share'])}; on the left: {_share(numbers['chosen_left_share'])}"
    )
    print(f"  {numbers['near_duplicates']:,} near-duplicate prompts, {numbers['exact_duplicates']:,} exact duplicates")
    if numbers["benchmark_overlap"] is not None:
        print(f"  {numbers['benchmark_overlap']:,} pairs overlap with {len(overlap.files) if overlap else 0:,} benchmark files")
    for one in numbers["annotators"]:
        shares = f"longer {_share(one['chosen_longer_share'])}, left {_share(one['chosen_left_share'])}"
        print(f"  {one['annotator']}: {one['pairs']:,} pairs, {shares}")
    agreement = numbers["agreement"]
    if agreement["alpha"] is not None:
        print(f"  Krippendorff's alpha over {agreement['pairs']:,} pairs: {agreement['alpha']:.2f}")
    for name, again in agreement["self_consistency"].items():
        print(f"  {name}: {again['agreed']:,} of {again['total']:,} hidden repeats judged as before")
    print(f"  {numbers['repaired_lines']:,} torn lines set aside, {numbers['bad_lines']:,} bad lines")
    for warning in numbers["warnings"]:
        print(f"  Warning: {warning}")
    return 0


def _rows_of_file(file: str) -> tuple[list[dict[str, Any]], Sequence[Any]]:
    """All good rows of a file as the journal's, and its bad lines."""
    from biasdpo.data import importing
    from biasdpo.data.journal import Journal

    if importing.is_journal(file):
        journal = Journal(Path(file)).refresh()
        return journal.since((0, 0))[0], journal.bad_lines
    with _progress("row") as on_row:
        converted = importing.convert_source(file, on_row=on_row)
    importing.check_some_good(file, converted)
    return [{**vars(judgment), "meta": vars(judgment.meta)} for judgment in converted.judgments], converted.bad


def _share(share: float | None) -> str:
    return "no data" if share is None else f"{share:.1%}"


def validate(args: argparse.Namespace) -> int:
    """List the bad lines on stdout; where there are some, exit status 2 with one line on stderr."""
    from biasdpo.data import importing
    from biasdpo.workspace import open_workspace

    with _progress("row") as on_row:
        found = importing.validate(args.file or open_workspace(args.workspace), on_row)
    if args.json:
        print(json.dumps(found.to_json(), ensure_ascii=False))
    else:
        for line in found.bad:
            print(f"line {line.line}: {line.reason}")
        verdicts = ", ".join(f"{count:,} {verdict}" for verdict, count in found.by_verdict.items())
        good = f"{found.good:,} good" + (f" ({verdicts})" if verdicts else "")
        print(f"{found.source}: {found.rows:,} rows, {good}, {len(found.bad):,} bad")
        for note in found.notes:
            print(note)
    if found.bad:
        raise DatasetError(
            f"{found.source} has {len(found.bad):,} bad lines of {found.rows:,}, the first in line {found.bad[0].line}: "
            "fix or drop them (`dataset import` takes over the good ones)"
        )
    return 0


def import_(args: argparse.Namespace) -> int:
    """Store the good rows, list the bad ones on stderr."""
    from biasdpo.data import importing
    from biasdpo.workspace import open_workspace

    workspace = open_workspace(args.workspace)
    mapping = None
    if args.map:
        seen = importing.preview(args.file, rows=0)
        mapping = importing.parse_mapping(args.map, seen.mapping, seen.columns)
    with _progress("row") as on_row:
        done = importing.import_file(workspace, args.file, mapping, args.name, on_row, dry_run=args.dry_run)
    _show_bad(done.bad)
    for note in done.notes:
        print(note, file=sys.stderr)
    if args.json:
        print(json.dumps(done.to_json() | ({"dry_run": True} if args.dry_run else {}), ensure_ascii=False))
        return 0
    if args.dry_run:
        print("columns: " + ", ".join(f"{field}={column}" for field, column in done.mapping.to_json().items()))
        ignored = [column for column in done.columns if column not in done.mapping.to_json().values()]
        print(f"not taken over: {importing.shown_columns(ignored)}")
        for pair in importing.preview(args.file, done.mapping, rows=3).pairs:
            print(json.dumps({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}, ensure_ascii=False))
    would = "would be " if args.dry_run else ""
    print(f"{done.source}: {done.written:,} rows {would}written, {done.known:,} known, {len(done.bad):,} bad")
    return 0


def _show_bad(bad: Sequence[Any]) -> None:
    for line in bad[:_SHOWN_BAD_ROWS]:
        print(f"line {line.line}: {line.reason}", file=sys.stderr)
    if len(bad) > _SHOWN_BAD_ROWS:
        print(f"... and {len(bad) - _SHOWN_BAD_ROWS:,} more bad rows; `dataset validate FILE` lists all", file=sys.stderr)


def export(args: argparse.Namespace) -> int:
    """Write the file and its card, say where they lie."""
    from biasdpo.data import exporting
    from biasdpo.workspace import open_workspace

    done = exporting.export_file(open_workspace(args.workspace), args.file)
    if args.json:
        print(json.dumps(done.to_json(), ensure_ascii=False))
    else:
        print(
            f"{done.path}: {done.rows:,} pairs ({done.repeats:,} judgments repeat another, {done.contradictions:,} pairs evenly "
            f"split are left out), SHA-256 {done.sha256}\n{done.card}: the data set card"
        )
    return 0


def retract(args: argparse.Namespace) -> int:
    """Take one judgment back."""
    from biasdpo.data import journal
    from biasdpo.workspace import open_workspace

    judgment = journal.retract(open_workspace(args.workspace), args.id)
    row = {"id": judgment.id, "retracts": judgment.retracts, "pair_id": judgment.pair_id}
    print(json.dumps(row) if args.json else f"{judgment.retracts}: withdrawn; training, statistics and exports leave it out")
    return 0
