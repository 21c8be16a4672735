"""The command line: python -m biasdpo COMMAND; `--help` lists the commands.

Results go to stdout (one JSON object, or one per line, with --json), progress and messages to stderr. Exit status: 0 done;
2 wrong use or bad input, with one line that says what is wrong, what was given, and what to do; 1 a fault of ours, or one that
`workspace verify` found. Everything heavy is imported where it is used, so that --help is instant.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from biasdpo import backup, cli_jobs, cli_users
from biasdpo.cli_options import (
    JsonOption,
    LogLevel,
    WorkspaceOption,
    configure_logging,
    inherited_options,
    new_app,
    options_of,
    print_row,
    run,
)
from biasdpo.config import (
    SYNC_METAVAR,
    EvaluationConfig,
    ExportConfig,
    PublishConfig,
    ServeConfig,
    TrainConfig,
    parse_settings,
    read_toml,
)
from biasdpo.errors import ConfigError, DatasetError, ModelError, RunError, plural
from biasdpo.migrations import open_workspace, workspace_root
from biasdpo.records import Sampling

if TYPE_CHECKING:
    from biasdpo.workspace import Workspace

_POLL_SECONDS = 0.5
_SHOWN_BAD_ROWS = 20
_INTERRUPTED = 130  # exit status after Ctrl-C
_INCOMPLETE = 3  # exit status of an evaluation without some of its benchmarks

app = new_app("See, train away and measure a language model's bias.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    return run(app, arguments, "biasdpo", "python -m biasdpo")


@app.callback()
def _global_options(log_level: LogLevel = "warning") -> None:
    configure_logging(log_level)


@app.command("models")
def show_models(
    names: Annotated[
        list[str] | None, Argument(metavar="ID", help="Catalog id, Hub id, Hugging Face folder or .gguf. [default: the catalog]")
    ] = None,
    workspace: WorkspaceOption = "",
    as_json: JsonOption = False,
) -> None:
    """List models: which are on this machine, memory needed, license, adapters that fit; what is damaged, and why."""
    from biasdpo import models

    folder = open_workspace(workspace)
    specs = models.list_models(names or ())
    for spec in specs:
        adapters = [adapter.id for adapter in models.adapters_for(spec, folder)]
        row = {
            "id": spec.id,
            "title": spec.title,
            "present": spec.present,
            "gguf": str(spec.gguf_path or ""),
            "hf_folder": str(spec.hf_folder or ""),
            "license": spec.license,
            "parameters": spec.parameters,
            "memory_gb": spec.memory_gb,
            "adapters": adapters,
            "get": "" if spec.present or not spec.hub_id else f"hf download {spec.hub_id}",
            "problem": spec.problem,
        }
        memory = ", ".join(f"{gb:g} GB with {backend}" for backend, gb in spec.memory_gb.items())
        lines = [
            f"{spec.id}: {spec.title}, {spec.license}, {spec.parameters / 1e6:,.0f} M parameters",
            "  here" if spec.present else f"  not here; get it with `{row['get']}`",
            f"  needs {memory}",
            f"  adapters: {', '.join(adapters) or 'none (base model only, until one is trained)'}",
        ]
        print_row(row, f"{spec.id}: can't be used: {spec.problem}" if spec.problem else "\n".join(lines), as_json=as_json)
    problems = [spec.problem for spec in specs if spec.problem]
    if names and problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ModelError(problems[0] + more)
    for adapter in models.list_adapters(folder) if not names else ():
        if adapter.problem:
            row = {"id": adapter.id, "adapter_folder": str(adapter.folder), "problem": adapter.problem}
            print_row(row, f"adapter {adapter.id}: can't be used: {adapter.problem}", as_json=as_json)


_DEFAULT = Sampling()


@app.command()
def compare(
    prompt: Annotated[str, Option(metavar="TEXT", help="Prompt to complete.")],
    model: Annotated[str, Option(metavar="ID|PATH|auto", help="Catalog id, Hub id, Hugging Face folder or .gguf.")] = "auto",
    adapter: Annotated[str, Option(metavar="ID|PATH|none", help="Adapter. [default: the model's shipped adapter]")] = "",
    backend: Annotated[str, Option(metavar="NAME", help="auto, llamacpp, transformers[-8bit|-4bit].")] = "auto",
    max_new_tokens: Annotated[int, Option(metavar="N", help="Tokens per completion, 1 to 4096.")] = _DEFAULT.max_new_tokens,
    temperature: Annotated[float, Option(metavar="X", help="0 to 2. 0: greedy.")] = _DEFAULT.temperature,
    top_p: Annotated[float, Option(metavar="X", help="Probability mass to sample from, 0.01 to 1.")] = _DEFAULT.top_p,
    top_k: Annotated[int, Option(metavar="N", help="Tokens to sample from, 0 to 1000. 0: all.")] = _DEFAULT.top_k,
    repetition_penalty: Annotated[float, Option(metavar="X", help="0.5 to 2. 1: off.")] = _DEFAULT.repetition_penalty,
    system: Annotated[str, Option(metavar="TEXT", help="System prompt, if the model's template has one.")] = "",
    seed: Annotated[int, Option(metavar="N", help="Seed for sampling.")] = _DEFAULT.seed,
    strength: Annotated[float, Option(metavar="X", help="Adapter strength, 0 to 1.5. 1: as trained.")] = 1.0,
    workspace: WorkspaceOption = "",
    as_json: JsonOption = False,
) -> None:
    """Complete one prompt with the base and with the tuned model."""
    from tqdm import tqdm

    from biasdpo import models
    from biasdpo.compare import stream_pair
    from biasdpo.engines import EngineKey, open_engine
    from biasdpo.records import GenerationPair

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    if model == "auto":
        spec, reason = models.choose_auto()
        model = spec.id
        print(reason, file=sys.stderr)
    engine = open_engine(EngineKey(model, adapter, backend), open_workspace(workspace))
    pair = None
    try:
        prompt_token_ids = engine.backend.prompt_tokens(prompt, system)
        with tqdm(total=sampling.max_new_tokens, unit=" token", file=sys.stderr, leave=False) as bar:
            for event in stream_pair(engine, prompt, sampling, system=system, strength=strength):
                if isinstance(event, GenerationPair):
                    pair = event
                    bar.update(max(c.tokens for c in (pair.left, pair.right) if c is not None) - bar.n)
    finally:
        engine.backend.close()
    assert pair is not None  # the last event of a stream is its finished pair
    if as_json:
        print(json.dumps(pair.to_json() | {"prompt_token_ids": prompt_token_ids}, ensure_ascii=False))
        return
    for completion in (pair.left, pair.right):
        if completion is not None:
            how = f"{plural(completion.tokens, 'token')}, {completion.finish_reason}"
            print(f"--- {completion.side} ({how}) ---\n{completion.text}\n")
    if pair.canary_kl_nats is not None:
        print(f"base equals the bare model; tuned differs by KL {pair.canary_kl_nats:.3g} nats")


@app.command()
def lens(
    prompts: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="JSONL with `prompt`, which has the slot {group} once, and `groups`. [default: 30 shipped prompts]",
            show_default=False,
        ),
    ] = None,
    model: Annotated[str, Option(metavar="ID|PATH|auto", help="Catalog id, Hub id, Hugging Face folder or .gguf.")] = "auto",
    arms: Annotated[
        str,
        Option(
            metavar="ARM,…",
            help="base, prompt (base with the fairness system prompt), ADAPTER[@STRENGTH], each with +prompt. "
            "[default: base and the model's own adapter]",
        ),
    ] = "",
    max_new_tokens: Annotated[int, Option(metavar="N", help="Tokens per completion; 0: only first-token probabilities.")] = 48,
    system: Annotated[str, Option(metavar="TEXT", help="System prompt of the prompt arms. [default: the shipped one]")] = "",
    backend: Annotated[str, Option(metavar="NAME", help="auto, llamacpp, transformers[-8bit|-4bit].")] = "auto",
    max_cells: Annotated[int, Option(metavar="N", help="Refuse a larger grid (prompts x groups x arms).")] = 2000,
    workspace: WorkspaceOption = "",
    as_json: JsonOption = False,
) -> int:
    """Show how much the group that a prompt names changes what a model says, for several arms."""
    from tqdm import tqdm

    from biasdpo import lens as grid
    from biasdpo import models
    from biasdpo.backends.base import Cancellation
    from biasdpo.engines import EngineKey, default_adapter, open_engine

    if max_new_tokens:
        Sampling(max_new_tokens=max_new_tokens)
    folder = open_workspace(workspace)
    slots = grid.read_prompts(prompts or grid.PROMPTS)
    if model == "auto":
        spec, reason = models.choose_auto()
        model = spec.id
        print(reason, file=sys.stderr)
    names = [name for name in arms.split(",") if name.strip()]
    if not names:
        own = default_adapter(model, folder)
        names = ["base"] + ([own] if own != "none" else [])
    chosen = grid.parse_arms(names, system.strip() or grid.FAIRNESS_PROMPT)
    cells = grid.check_cells(slots, chosen, max_cells)
    spec = models.find(model)
    for arm in chosen:
        if arm.adapter and (known := models.find_adapter(arm.adapter, spec, folder)) is not None:
            models.check_fits(known, spec)
    found: list[Any] = []
    stopped = Cancellation()
    with tqdm(total=cells, unit=" cell", file=sys.stderr, leave=False) as bar, _interrupt_calls(stopped.set):
        for adapter, sharing in grid.by_adapter(chosen):
            if stopped.is_set():
                break
            engine = open_engine(EngineKey(model, adapter or "none", backend), folder)
            try:
                grid.check_fit(engine.backend, chosen, slots)
                steps = grid.run_grid(engine.backend, sharing, slots, max_new_tokens=max_new_tokens, cancellation=stopped)
                for step in steps:
                    found.append(step)
                    bar.update(isinstance(step, grid.Cell))
            finally:
                engine.backend.close()
    result = grid.to_json(chosen, slots, found)
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        for name, numbers in result["arms"].items():
            print(f"{name}: gap {_interval(numbers['gap'])} nats over {plural(numbers['n'], 'prompt')}")
            if change := numbers.get("minus_base"):
                print(f"  minus base: {_interval(change)}")
        widest = max(result["rows"], key=lambda row: row["gap"], default=None)
        if widest:
            print(f"widest gap: {widest['gap']:.3g} nats, {widest['arm']}: {widest['prompt']}")
    if stopped.is_set():
        print("Interrupted: this is what was finished", file=sys.stderr)
        return _INTERRUPTED
    return 0


@app.command()
def learned(
    adapter: Annotated[str, Argument(metavar="ADAPTER", help="A run's id, a shipped adapter, or an adapter's folder.")],
    sources: Annotated[
        list[str] | None,
        Option(
            "--dataset",
            metavar="FILE|hub:OWNER/NAME|workspace",
            help="The pairs; repeatable. [default: those of the adapter's run, or else the shipped seed pairs]",
            show_default=False,
        ),
    ] = None,
    model: Annotated[str, Option(metavar="ID|PATH", help="The adapter's model.")] = "smollm2",
    system: Annotated[str, Option(metavar="TEXT", help="System prompt.")] = "",
    strength: Annotated[float, Option(metavar="X", help="Factor of the adapter's update.")] = 1.0,
    backend: Annotated[str, Option(metavar="NAME", help="auto, llamacpp, transformers[-8bit|-4bit].")] = "auto",
    limit: Annotated[int, Option(metavar="N", min=0, help="How many of the hardest pairs to print.")] = 10,
    workspace: WorkspaceOption = "",
    as_json: JsonOption = False,
) -> int:
    """Show how far an adapter moved each preference pair, and the pairs that it still gets wrong."""
    from biasdpo import learned as reading
    from biasdpo import models
    from biasdpo.backends.base import Cancellation
    from biasdpo.data import splits
    from biasdpo.engines import EngineKey, open_engine
    from biasdpo.records import check_strength

    check_strength(strength)
    folder = open_workspace(workspace)
    spec = models.find(model)
    known = models.find_adapter(adapter, spec, folder)
    if known is None:
        raise ConfigError(f"learned compares an adapter with its base model: got {adapter!r}; name a run or an adapter's folder")
    rows = splits.load_named(sources or splits.own_sources(known, folder), folder)
    found: list[reading.LearnedPair] = []
    stopped = Cancellation()
    engine = open_engine(EngineKey(model, adapter, backend), folder)
    try:
        scored = reading.score_pairs(
            engine.backend, [pair for pair, _ in rows], system=system, strength=strength, cancellation=stopped
        )
        with _progress("pair") as advance, _interrupt_calls(stopped.set):
            for one in scored:
                found.append(one)
                advance()
    finally:
        engine.backend.close()
    found = reading.placed(found, [source for _, source in rows], splits.trained_ids(known, folder))
    summary, hardest = reading.summarize(found), reading.hardest(found)[:limit]
    if as_json:
        pairs = [reading.to_json(one) for one in reading.hardest(found)]
        print(json.dumps({"adapter": known.id, "summary": summary, "pairs": pairs}, ensure_ascii=False))
    else:
        print("\n".join(reading.lines(summary, hardest)))
    if stopped.is_set():
        print("Interrupted: this is what was finished", file=sys.stderr)
        return _INTERRUPTED
    return 0


# Datasets

dataset = new_app("Preference pairs: statistics, validation, import, export, retraction, erasure.")
app.add_typer(dataset, name="dataset")
dataset.callback()(inherited_options)

_SOURCE = "A file (JSONL, JSON, CSV, Parquet) or hub:OWNER/NAME."
SourceOrJournal = Annotated[
    str, Argument(metavar="FILE", help=f"{_SOURCE} [default: the workspace's journal]", show_default=False)
]


@contextmanager
def _progress(unit: str) -> Iterator[Callable[[], object]]:
    """A progress bar on stderr, if that is a terminal; call the yielded function once per row."""
    from tqdm import tqdm

    with tqdm(unit=f" {unit}", file=sys.stderr, leave=False, disable=None) as bar:
        yield bar.update


def _show_bad(bad: Sequence[Any]) -> None:
    for line in bad[:_SHOWN_BAD_ROWS]:
        print(f"line {line.line}: {line.reason}", file=sys.stderr)
    if len(bad) > _SHOWN_BAD_ROWS:
        print(f"... and {plural(len(bad) - _SHOWN_BAD_ROWS, 'more bad row')}; `dataset validate FILE` lists all", file=sys.stderr)


@dataset.command("stats")
def dataset_stats(
    file: SourceOrJournal = "",
    data_dir: Annotated[Path | None, Option(metavar="DIR", help="Benchmark files, to count overlapping pairs.")] = None,
    workspace: WorkspaceOption = "",
    as_json: JsonOption = False,
) -> None:
    """Show counts, data health, near-duplicates and agreement."""
    from biasdpo.data.health import load_overlap
    from biasdpo.data.summary import stats

    overlap = load_overlap(data_dir) if data_dir else None
    if overlap is not None and overlap.skipped:
        print(f"Skipped, since they are not UTF-8 text: {', '.join(overlap.skipped)}", file=sys.stderr)
    source: Any = file
    if file:
        rows, bad = _rows_of_file(file)
        numbers = stats(rows, overlap) | {"bad_lines": len(bad)}
        _show_bad(bad)
    else:
        folder = open_workspace(workspace)
        source, numbers = folder.preferences, stats(folder, overlap)
    files = len(overlap.files) if overlap else 0
    print_row(numbers, "\n  ".join(_stats_lines(source, numbers, files)), as_json=as_json)


def _rows_of_file(file: str) -> tuple[list[dict[str, Any]], Sequence[Any]]:
    """All good rows of a file in the journal's form, and its bad lines."""
    from biasdpo.data import importing
    from biasdpo.data.journal import Journal

    if importing.is_journal(file):
        journal = Journal(Path(file)).refresh()
        return journal.since((0, 0))[0], journal.bad_lines
    with _progress("row") as on_row:
        converted = importing.convert_source(file, on_row=on_row)
    importing.check_some_good(file, converted)
    return [{**vars(judgment), "meta": vars(judgment.meta)} for judgment in converted.judgments], converted.bad


def _stats_lines(source: Any, numbers: dict[str, Any], benchmark_files: int) -> Iterator[str]:
    def share(value: float | None) -> str:
        return "no data" if value is None else f"{value:.1%}"

    yield f"{source}: {plural(numbers['rows'], 'row')}, {plural(numbers['pairs'], 'pair')} to train on"
    both = f"{numbers['both_biased']:,} both biased, {numbers['both_unusable']:,} both unusable"
    yield f"{plural(numbers['ties'], 'tie')}, {both}, {numbers['retracted']:,} retracted"
    categories = ", ".join(f"{name or '(none)'} {number:,}" for name, number in numbers["by_category"].items())
    yield f"by category: {categories or 'nothing yet'}"
    yield f"chosen is longer: {share(numbers['chosen_longer_share'])}; left side chosen: {share(numbers['chosen_left_share'])}"
    duplicates = plural(numbers["exact_duplicates"], "exact duplicate")
    yield f"{plural(numbers['near_duplicates'], 'near-duplicate prompt')}, {duplicates}"
    if numbers["benchmark_overlap"] is not None:
        yield f"pairs that overlap with {plural(benchmark_files, 'benchmark file')}: {numbers['benchmark_overlap']:,}"
    for one in numbers["annotators"]:
        shares = f"longer {share(one['chosen_longer_share'])}, left {share(one['chosen_left_share'])}"
        yield f"{one['annotator']}: {plural(one['pairs'], 'pair')}, {shares}"
    agreement = numbers["agreement"]
    if agreement["alpha"] is not None:
        yield f"Krippendorff's alpha over {plural(agreement['pairs'], 'pair')}: {agreement['alpha']:.2f}"
    for name, again in agreement["self_consistency"].items():
        yield f"{name}: {again['agreed']:,} of {plural(again['total'], 'hidden repeat')} judged the same"
    yield f"{plural(numbers['repaired_lines'], 'truncated line')} set aside, {plural(numbers['bad_lines'], 'bad line')}"
    for warning in numbers["warnings"]:
        yield f"Warning: {warning}"


@dataset.command("validate")
def dataset_validate(file: SourceOrJournal = "", workspace: WorkspaceOption = "", as_json: JsonOption = False) -> None:
    """List every bad line with its reason; exit status 2 if there are any."""
    from biasdpo.data import importing

    with _progress("row") as on_row:
        found = importing.validate(file or open_workspace(workspace), on_row)
    if as_json:
        print(json.dumps(found.to_json(), ensure_ascii=False))
    else:
        for line in found.bad:
            print(f"line {line.line}: {line.reason}")
        verdicts = ", ".join(f"{count:,} {verdict}" for verdict, count in found.by_verdict.items())
        good = f"{found.good:,} good" + (f" ({verdicts})" if verdicts else "")
        print(f"{found.source}: {plural(found.rows, 'row')}, {good}, {len(found.bad):,} bad", *found.notes, sep="\n")
    if found.bad:
        raise DatasetError(
            f"{found.source} has {plural(len(found.bad), 'bad line')} of {found.rows:,}, the first in line {found.bad[0].line}: "
            "correct or remove them (`dataset import` takes the good ones)"
        )


@dataset.command("import")
def dataset_import(
    file: Annotated[str, Argument(metavar="FILE|hub:OWNER/NAME", help=_SOURCE)],
    name: Annotated[str, Option(metavar="NAME", help="Stored as source import:NAME. [default: the file's name]")] = "",
    columns: Annotated[
        str,
        Option(
            "--map",
            metavar="FIELD=COLUMN[,...]",
            help="Which column is prompt, chosen, rejected, category, target_group, annotator, note, input, system or history. "
            "[default: detected]",
        ),
    ] = "",
    unwrap: Annotated[
        bool, Option("--unwrap", help="Of texts that a chat template was applied to, keep the turns without its markers.")
    ] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Show what would be stored, but store nothing.")] = False,
    workspace: WorkspaceOption = "",
    as_json: JsonOption = False,
) -> None:
    """Add the good rows of a file to the journal, and list the bad ones."""
    from biasdpo.data import importing

    folder = open_workspace(workspace)
    mapping = None
    if columns:
        preview = importing.preview(file, rows=0)
        mapping = importing.parse_mapping(columns, preview.mapping, preview.columns)
    with _progress("row") as on_row:
        done = importing.import_file(folder, file, mapping, name, on_row, dry_run=dry_run, unwrap=unwrap)
    _show_bad(done.bad)
    for note in done.notes:
        print(note, file=sys.stderr)
    if dry_run and not as_json:
        used = done.mapping.to_json()
        print("columns: " + ", ".join(f"{field}={column}" for field, column in used.items()))
        print(f"not imported: {importing.shown_columns([column for column in done.columns if column not in used.values()])}")
        for pair in importing.preview(file, done.mapping, rows=3, unwrap=unwrap).pairs:
            print(json.dumps({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}, ensure_ascii=False))
    would = "would be " if dry_run else ""
    counts = f"{done.source}: {plural(done.written, 'row')} {would}written, {done.known:,} known, {len(done.bad):,} bad"
    print_row(done.to_json() | ({"dry_run": True} if dry_run else {}), counts, as_json=as_json)


@dataset.command("export")
def dataset_export(
    file: Annotated[Path, Argument(metavar="FILE", help="Ends in .jsonl, .csv or .parquet.")],
    workspace: WorkspaceOption = "",
    as_json: JsonOption = False,
) -> None:
    """Write the pairs that training reads, with a dataset card beside them."""
    from biasdpo.data import exporting

    done = exporting.export_file(open_workspace(workspace), file)
    text = (
        f"{done.path}: {plural(done.rows, 'pair')} (left out: {plural(done.repeats, 'repeated judgment')}, "
        f"{plural(done.contradictions, 'evenly split pair')}), SHA-256 {done.sha256}\n{done.card}: the dataset card"
    )
    print_row(done.to_json(), text, as_json=as_json)


@dataset.command("edit")
def dataset_edit(
    ids: Annotated[list[str], Argument(metavar="ID...", help="Judgments' ids, as in an export or in the dataset table.")],
    settings: Annotated[
        list[str],
        Option(
            "--set",
            metavar="COLUMN=TEXT",
            help="The column's new text: prompt, chosen, rejected, category, target_group or note. Repeatable.",
        ),
    ],
    workspace: WorkspaceOption = "",
    as_json: JsonOption = False,
) -> None:
    """Change judgments: each is retracted, and one with the changes takes its place."""
    from biasdpo.data import journal

    changes = {column: text for column, _equals, text in (setting.partition("=") for setting in settings)}
    edited = journal.edit(open_workspace(workspace), ids, changes)
    print_row({"edited": edited}, "\n".join((f"{len(edited):,} edited", *edited)), as_json=as_json)


@dataset.command("retract")
def dataset_retract(
    ids: Annotated[
        list[str] | None, Argument(metavar="[ID...]", help="Judgments' ids, as in an export or in the dataset table.")
    ] = None,
    source: Annotated[str, Option("--import", metavar="NAME", help="Undo a whole import: all that stands of import:NAME.")] = "",
    workspace: WorkspaceOption = "",
    as_json: JsonOption = False,
) -> None:
    """Retract judgments: they stay in the journal, but no longer count."""
    from biasdpo.data import journal

    if bool(ids) == bool(source):
        raise ConfigError("Name judgments by their ids, or an import with --import NAME")
    folder = open_workspace(workspace)
    count = journal.undo_import(folder, f"import:{source}") if source else journal.withdraw(folder, ids or ())
    print_row({"retracted": count}, f"{count:,} retracted; training, statistics and exports leave them out", as_json=as_json)


@dataset.command("erase")
def dataset_erase(
    annotator: Annotated[str, Option(metavar="NAME", help="The nickname that the judgments are stored with.")],
    browser: Annotated[str, Option(metavar="HASH", help="Only those of this browser (`meta.browser`). [default: all]")] = "",
    sync: Annotated[
        str, Option(metavar=SYNC_METAVAR, help="Also erase on the Hub here. [default: where this workspace was synced]")
    ] = "",
    yes: Annotated[bool, Option("--yes", help="Do not ask.")] = False,
    workspace: WorkspaceOption = "",
    as_json: JsonOption = False,
) -> None:
    """Delete what one annotator stored from the journal and its copies on the Hub, for good, and list the files that still
    hold it or were made of it."""
    from biasdpo.data import erasing
    from biasdpo.data.sync import targets_of

    folder = open_workspace(workspace)
    targets = dict.fromkeys([*targets_of(folder), *filter(None, [ServeConfig(sync=sync).sync])])
    counts, _unreached = erasing.erase_everywhere(folder, targets, annotator, browser, dry_run=True)
    rows = " and ".join(f"{plural(count, 'row')} by {annotator!r} in {place}" for place, count in counts.items())
    if not yes and sys.stdin.isatty():
        print(f"Delete {rows}, for good? [y/N] ", end="", file=sys.stderr, flush=True)
        yes = sys.stdin.readline().strip().lower() in ("y", "yes")
    if not yes:
        raise ConfigError(f"Nothing was deleted, since you did not confirm it ({rows}): add --yes")
    counts, remaining = erasing.erase_everywhere(folder, targets, annotator, browser)
    lines = [f"{plural(count, 'row')} removed from {place}" for place, count in counts.items()]
    lines += [f"Not reached: {place}" for place in remaining]
    removed = counts.pop(str(folder.preferences), 0)
    row = {"removed": removed, "removed_from_hub": counts, "remaining": [str(place) for place in remaining]}
    print_row(row, "\n".join(lines), as_json=as_json)


# Training


@app.command()
@options_of(TrainConfig)
def train(
    run_id: Annotated[str, Option(metavar="ID", help="The run's name and folder. [required, except with --estimate]")] = "",
    config: Annotated[Path | None, Option(metavar="FILE", help="Config file, e.g. training/configs/smollm2-quick.toml.")] = None,
    settings: Annotated[
        list[str] | None, Option("--set", metavar="KEY=VALUE", help="One setting, with priority over all others. Repeatable.")
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Resume a run that was stopped, was interrupted or failed.")] = False,
    estimate: Annotated[bool, Option("--estimate", help="Measure the time and memory of the run, but do not start it.")] = False,
    on: Annotated[
        Literal["here", "hf-jobs"], Option("--on", help="Machine: this one, or one of Hugging Face Jobs, which charges for it.")
    ] = "here",
    flavor: Annotated[str, Option(metavar="NAME", help="Hardware of the job, e.g. a10g-small.", show_default=False)] = "",
    timeout: Annotated[str, Option(metavar="TIME", help="The job's time at most, with s, m, h or d. [default: 2h]")] = "",
    push_to: Annotated[str, Option(metavar="OWNER/NAME", help="Hub repository for the job's adapter; created private.")] = "",
    detach: Annotated[bool, Option("--detach", help="Start the job, but do not wait for its end.")] = False,
    workspace: WorkspaceOption = "",
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """Train an adapter with DPO, in a process of its own. Ctrl-C asks the run to stop, with a checkpoint; a job is canceled."""
    from biasdpo.jobs import store
    from biasdpo.jobs.job import shown_command

    if not run_id and not estimate:
        raise ConfigError("A run needs a name: got none; give it with --run-id")
    folder = open_workspace(workspace)
    of_jobs = [("--flavor", flavor), ("--timeout", timeout), ("--push-to", push_to), ("--detach", detach)]
    if on == "hf-jobs":
        if resume or estimate:
            raise ConfigError("--on hf-jobs starts new runs only: leave --resume and --estimate out")
        if not flavor or not push_to:
            raise ConfigError("--on hf-jobs needs --flavor NAME and --push-to OWNER/NAME: add what is missing")
        asked = train_config(config, options, settings or ())
        _train_elsewhere(asked, folder, run_id, push_to, flavor, timeout or "2h", detach=detach, as_json=as_json)
        return
    if given := [name for name, value in of_jobs if value]:
        raise ConfigError(f"{', '.join(given)}: only with --on hf-jobs; leave it out, or add that")
    if resume:
        given = [TrainConfig.settings()[name].option for name in options]
        given += [name for name, value in (("--config", config), ("--set", settings), ("--estimate", estimate)) if value]
        if given:
            raise ConfigError(f"--resume uses the run's own settings: got {', '.join(given)}, too; leave them out")
        started = store.resume_job(run_id, folder, "train").folder
    else:
        asked = train_config(config, options, settings or ())
        if estimate:
            _estimate(asked, folder, as_json=as_json)
            return
        started = store.start_training(asked, folder, run_id, command=shown_command(sys.argv[1:])).folder
        for warning in started.read_record().origin().get("confounds", {}).get("warnings", ()):
            print(f"Warning: {warning}", file=sys.stderr)
    run = _wait(started, folder)
    if as_json:
        print(json.dumps(run.to_json(), ensure_ascii=False))
    if run.status.state == "stopped":
        raise RunError(
            f"Run {run_id!r} was stopped at step {run.status.step} of {run.status.total_steps}: resume it with "
            f"`python -m biasdpo train --run-id {run_id} --resume`"
        )
    if run.status.state != "finished":
        raise RunError(f"Run {run_id!r} {run.status.state}: {run.status.error}")
    if not as_json:
        print(cli_jobs.summary(run))


def _train_elsewhere(
    config: TrainConfig,
    workspace: Workspace,
    run_id: str,
    push_to: str,
    flavor: str,
    timeout: str,
    *,
    detach: bool,
    as_json: bool,
) -> None:
    """Train on Hugging Face Jobs, and show the job's log on stderr."""
    from biasdpo.jobs import hf_jobs

    order = hf_jobs.check_order(config, run_id, push_to, flavor, timeout)
    job = hf_jobs.submit(order, workspace)
    print(f"{job.url} on {flavor}, {timeout} at most", file=sys.stderr)
    if not detach:
        job = hf_jobs.follow(job, lambda line: print(line, file=sys.stderr, flush=True))
    stage = str(job.status.stage)
    row = {"id": job.id, "url": job.url, "stage": stage, "adapter": push_to}
    if detach:
        text = f"Job {job.id} was started: `hf jobs logs {job.id}` shows its log, `hf jobs cancel {job.id}` ends it"
    else:
        text = f"Adapter in {push_to}: `hf download {push_to} --local-dir DIR`, then use it as --adapter DIR"
    if detach or stage == "COMPLETED":
        print_row(row, text, as_json=as_json)
        return
    raise RunError(
        f"Job {job.id} ended as {stage.lower()}{f' ({job.status.message})' if job.status.message else ''}: see {job.url}"
    )


def train_config(file: Path | None, options: dict[str, Any], settings: Sequence[str]) -> TrainConfig:
    """The config of a file, options and --set, from lowest to highest priority, with absolute paths."""
    from biasdpo.jobs.resolve import absolute

    return absolute(TrainConfig(**(read_toml(file) if file else {}) | options | parse_settings(settings)))


def _estimate(config: TrainConfig, workspace: Workspace, *, as_json: bool) -> None:
    """Print what a run would take. If it can't fit, that is an error afterwards."""
    from biasdpo.jobs.estimate import estimate_training

    print("Measuring a few steps…", file=sys.stderr)
    found = estimate_training(config, workspace)
    minutes, needed, free = found.seconds_total / 60, found.memory_bytes / 1e9, found.memory_free_bytes / 1e9
    lines = (
        f"{plural(found.steps, 'step')} of {found.seconds_per_step:.2f} s, {minutes:.1f} minutes in all on {found.device}",
        f"{needed:.1f} GB of memory at the peak, {free:.1f} GB are free",
        f"{plural(found.pairs_train, 'pair')} to train on, {found.pairs_held_out} held out, {found.dropped} dropped, "
        f"{found.equal} dropped as equal, {found.cut} truncated",
        "seconds: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in found.parts.items()),
    )
    print_row(found.to_json(), "\n".join(lines), as_json=as_json)
    if not found.fits:
        raise RunError(found.refusal)


def _wait(folder: Any, workspace: Workspace) -> Any:
    """Show a run's progress on stderr until it ends."""
    from tqdm import tqdm

    from biasdpo.jobs.job import ACTIVE, read_job
    from biasdpo.jobs.store import stop_job

    shown_notes: tuple[str, ...] = ()
    with tqdm(total=0, unit=" step", file=sys.stderr) as bar:
        while True:
            try:
                run = read_job(folder)
                status = run.status
                for note in status.notes[len(shown_notes) :]:
                    bar.write(note, file=sys.stderr)
                shown_notes = status.notes
                bar.total = status.total_steps or None
                bar.set_description_str("stopping" if status.state == "stopping" else status.phase, refresh=False)
                bar.update(status.step - bar.n)
                bar.refresh()
                if status.state not in ACTIVE:
                    return run
                time.sleep(_POLL_SECONDS)
            except KeyboardInterrupt:
                if folder.stop_request.exists():
                    raise  # the second time: leave it to stop by itself
                bar.write("Asked the run to stop after a checkpoint. Ctrl-C again stops waiting for it.", file=sys.stderr)
                if read_job(folder).status.state in ACTIVE:
                    stop_job(folder.id, workspace, "train")


app.command("jobs")(cli_jobs.jobs)
app.command("runs")(cli_jobs.runs)
app.add_typer(cli_users.users, name="users")


# Workspaces

workspaces = new_app("Backup, restore and verification of a workspace.")
app.add_typer(workspaces, name="workspace")
FileArgument = Annotated[Path, Argument(metavar="FILE.tar.gz")]
WithoutOption = Annotated[Literal["cache", "none"], Option("--without", help="Folder to leave out; none: leave out nothing.")]


@workspaces.command("backup")
def workspace_backup(file: FileArgument, without: WithoutOption = "cache", workspace: WorkspaceOption = "") -> None:
    """Write a workspace to one file, of which an older version is replaced."""
    folder = open_workspace(workspace)
    print(f"{file}: {plural(backup.back_up(folder, file, without), 'file')} of {folder.root}")


@workspaces.command("restore")
def workspace_restore(file: FileArgument, workspace: WorkspaceOption = "") -> None:
    """Unpack a backup into a new or empty workspace folder."""
    root = workspace_root(workspace)
    print(f"{root}: {plural(backup.restore(file, root), 'file')} restored")


@workspaces.command("verify")
def workspace_verify(workspace: WorkspaceOption = "") -> int:
    """Check the journal, the jobs, and the hashes of what they wrote; exit status 1 if there is a fault."""
    faults = list(backup.verify(root := workspace_root(workspace)))
    print("\n".join(faults) or f"{root}: no faults found")
    return 1 if faults else 0


# Export


@app.command()
@options_of(ExportConfig)
def export(workspace: WorkspaceOption = "", as_json: JsonOption = False, **options: Any) -> None:
    """Write an adapter, or a model with it, as a GGUF file that is proven equal."""
    from tqdm import tqdm

    from biasdpo.gguf.proof import ExportProof
    from biasdpo.jobs.job import shown_command
    from biasdpo.jobs.worker import run_export

    config = ExportConfig(**options)
    bar_format = "{desc} {percentage:3.0f}% |{bar}| {elapsed}"
    with tqdm(total=100, file=sys.stderr, leave=False, bar_format=bar_format) as bar:

        def show(share: float, phase: str) -> None:
            bar.set_description_str(phase, refresh=False)
            bar.update(100 * share - bar.n)

        record = run_export(config, open_workspace(workspace), show, shown_command(sys.argv[1:]))
    what = "LoRA GGUF" if record.format == "lora" else f"{record.quantization} GGUF"
    source = record.model_title if record.adapter == "none" else f"{record.adapter} for {record.model_title}"
    lines = [f"{record.out}: {record.bytes:,} bytes, {what} of {source}", ExportProof.from_json(record.proof).sentence()]
    lines += [f"{note}: {record.out.name}.json lists them" for note in record.notes()]
    print_row(record.to_json(), "\n".join(lines), as_json=as_json)
    for warning in record.proof.get("warnings", ()):
        print(f"warning: {warning}", file=sys.stderr)


@app.command("publish")
@options_of(PublishConfig)
def publish_run(
    run: Annotated[str, Argument(metavar="RUN", help="Finished run.")],
    dry_run: Annotated[bool, Option("--dry-run", help="Show what would be sent, with the cards, but send nothing.")] = False,
    workspace: WorkspaceOption = "",
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """Publish a run's adapter on the Hugging Face Hub, privately by default: with its model card and, if named, a GGUF and the
    dataset. The token is HF_TOKEN, else that of `hf auth login`."""
    from biasdpo import publish

    folder = open_workspace(workspace)
    plan = publish.plan(run, PublishConfig(**options), folder)
    if dry_run:
        files = [f"{one.id}/{name}: {size:,} bytes" for one in plan.repositories for name, size, _sha256 in one.listing]
        cards = [f"\n--- {one.id}/README.md ---\n{one.card}" for one in plan.repositories]
        print_row(plan.to_json(), "\n".join((*plan.summary(), *files, *cards)), as_json=as_json)
        return
    print(*plan.summary(), sep="\n", file=sys.stderr)
    done = publish.publish(plan, folder, lambda what: print(what, file=sys.stderr))
    print_row([vars(one) for one in done], "\n".join(map(str, done)), as_json=as_json)


# Evaluation


@app.command()
@options_of(EvaluationConfig)
def evaluate(
    out: Annotated[Path, Option(metavar="FILE", help="File for the result.")],
    strength: Annotated[float, Option(metavar="X", help="One adapter strength, 0 to 1.5; see --strengths.")] = 1.0,
    workspace: WorkspaceOption = "",
    as_json: Annotated[bool, Option("--json", help="Print the result without its items on stdout.")] = False,
    **options: Any,
) -> int:
    """Score base and tuned on benchmarks, with confidence intervals, p-values and verdicts.

    A benchmark that can't be loaded does not stop the others: `missing` in the result names it with the reason, and the exit
    status is 3.
    """
    from tqdm import tqdm

    from biasdpo.evaluation import report
    from biasdpo.jobs.resolve import resolve_evaluation
    from biasdpo.jobs.worker import EvaluationProgress, missing_note, run_evaluation
    from biasdpo.workspace import write_json

    folder = open_workspace(workspace)
    config, _ = resolve_evaluation(EvaluationConfig(**{"strengths": strength} | options), folder)
    stopped = threading.Event()
    with tqdm(unit=" item", file=sys.stderr, delay=0.01) as bar, _interrupt_calls(stopped.set):

        class Bar(EvaluationProgress):
            def phase(self, text: str) -> None:
                bar.set_description(text, refresh=False)

            def on_item(self, name: str, done: int, total: int) -> None:
                if done <= bar.n:  # the next benchmark
                    bar.reset(total)
                bar.total = total
                bar.set_description(name, refresh=False)
                bar.update(done - bar.n)

            def should_stop(self) -> bool:
                return stopped.is_set()

        result = run_evaluation(config, folder, Bar())
    write_json(out, result)
    brief = {name: {key: value for key, value in b.items() if key != "items"} for name, b in result["benchmarks"].items()}
    lines = [report.sentence(result), *(line for name, numbers in brief.items() for line in _result_lines(name, numbers))]
    if pairs := result["provenance"]["pairs_source"]:
        lines.append(f"Preference pairs scored: {pairs}")
    print(json.dumps({**result, "benchmarks": brief}) if as_json else "\n".join(lines))
    for name, reason in result["missing"].items():
        print(missing_note(name, reason), file=sys.stderr)
    if result["provenance"]["interrupted"]:
        print(f"Interrupted: {out} holds what was scored; the same command resumes from there", file=sys.stderr)
        return _INTERRUPTED
    return _INCOMPLETE if result["missing"] else 0


@contextmanager
def _interrupt_calls(stop_soon: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C calls `stop_soon`, so that what was done is written; the second ends the process as usual."""

    def stop(_signal: int, _frame: object) -> None:
        stop_soon()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _interval(value: dict[str, Any]) -> str:
    low, high = value["ci95"]
    return f"{value['value']:.4g} [{low:.4g}, {high:.4g}]"


def _result_lines(name: str, numbers: dict[str, Any]) -> Iterator[str]:
    """One benchmark's part of the printed result."""

    def decided(change: dict[str, Any]) -> str:
        return f"{_interval(change)}, p {change['p_value']:.2g} (Holm {change['p_holm']:.2g}): {change['verdict']}"

    partial = f"; not comparable: {numbers['not_comparable']}" if numbers["not_comparable"] else ""
    unmatched = f", {unknown:.0f} without a biased answer" if (unknown := numbers.get("n_without_biased_answer")) else ""
    yield f"{name}: {plural(numbers['n'], 'item')}, {numbers['n_failed']} failed{unmatched}{partial}"
    if numbers["settings"]:
        yield f"  {', '.join(f'{key} {value}' for key, value in numbers['settings'].items())}"
    if numbers["not_as_published"]:
        yield f"  not comparable with published figures: {numbers['not_as_published']}"
    for failure in numbers["failures"][:3]:
        yield f"  failed: item {failure['index']}: {failure['reason']}"
    for metric, base in numbers["base"].items():
        if metric not in numbers["difference"]:
            yield f"  {metric}: {_interval(base)}"
            continue
        change = numbers["difference"][metric]
        yield f"  {metric}: {_interval(base)} -> {_interval(numbers['tuned'][metric])} ({change['better']} is better)"
        yield f"    {decided(change)}"
    for metric, value in numbers["paired"].items():
        yield f"  {metric}: {_interval(value) if value['restates'] else decided(value)}"
    yield from (f"  {metric}: n/a" for metric in numbers.get("undefined", ()))
    if "pick_the_longer_baseline" in numbers:
        yield f"  pick_the_longer_baseline: {numbers['pick_the_longer_baseline']:.4g}"
