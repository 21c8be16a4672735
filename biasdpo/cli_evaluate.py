"""The command `evaluate`: base against tuned on benchmarks, with intervals, p-values and verdicts."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from biasdpo.errors import ConfigError, DatasetError

BENCHMARKS = ("preference", "crows_pairs", "stereoset", "bbq", "winobias", "truthfulqa", "utility")
_INTERRUPTED = 130  # the exit status of what Ctrl-C ended


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `evaluate` to the command line."""
    command = commands.add_parser("evaluate", help="score base and tuned on benchmarks, with intervals")
    command.add_argument("--model", default="auto", metavar="ID|auto")
    command.add_argument("--adapter", default="", metavar="ID|PATH|none", help="default: the model's shipped adapter")
    command.add_argument("--backend", default="auto", metavar="B", help="auto, llamacpp or transformers")
    command.add_argument("--benchmark", required=True, metavar="NAME[,NAME]", help=", ".join(BENCHMARKS))
    command.add_argument("--dataset", metavar="FILE", help="preference: the file trained on; what the run held out is scored")
    command.add_argument("--data-dir", type=Path, metavar="DIR", help="holds one folder a benchmark; default: the Hub")
    command.add_argument("--limit", type=int, metavar="N", help="items of each benchmark, drawn by the seed")
    command.add_argument("--seed", type=int, default=0, metavar="S", help="of the draw and the bootstrap")
    command.add_argument("--strength", type=float, default=1.0, metavar="X")
    command.add_argument("--out", required=True, type=Path, metavar="FILE")
    command.add_argument("--workspace", metavar="DIR", help="default: $BIASDPO_WORKSPACE, else ./workspace")
    command.add_argument("--json", action="store_true", help="print the result without its items on stdout")
    command.set_defaults(handler=evaluate)


def evaluate(args: argparse.Namespace) -> int:
    """Run the benchmarks, write FILE, print what changed."""
    from tqdm import tqdm

    from biasdpo import evaluate as evaluation
    from biasdpo import models
    from biasdpo.engines import EngineKey, open_engine
    from biasdpo.run_config import RunConfig
    from biasdpo.workspace import open_workspace, write_json

    workspace = open_workspace(args.workspace)
    model = models.choose_auto()[0].id if args.model == "auto" else args.model
    adapter = models.find_adapter(args.adapter, models.find(model), workspace)
    held_out_share = RunConfig.held_out_share if adapter is None or adapter.held_out_share is None else adapter.held_out_share
    benchmarks = [_build(name, args, held_out_share) for name in args.benchmark.split(",")]
    engine = open_engine(EngineKey(model, args.adapter, args.backend), workspace)
    try:
        with tqdm(unit=" item", file=sys.stderr) as bar:

            def show(name: str, done: int, total: int) -> None:
                if done <= bar.n:  # the next benchmark
                    bar.reset(total)
                bar.total = total
                bar.set_description(name, refresh=False)
                bar.update(done - bar.n)

            with _stop_on_interrupt() as stopped:
                result = evaluation.run(
                    engine,
                    benchmarks,
                    strength=args.strength,
                    limit=args.limit,
                    seed=args.seed,
                    workspace=workspace,
                    on_item=show,
                    should_stop=stopped.is_set,
                )
    finally:
        engine.backend.close()
    write_json(args.out, result)
    if args.json:
        brief = {name: {key: value for key, value in b.items() if key != "items"} for name, b in result["benchmarks"].items()}
        print(json.dumps({**result, "benchmarks": brief}))
    else:
        for name, numbers in result["benchmarks"].items():
            print("\n".join(_lines(name, numbers)))
    if result["provenance"]["interrupted"]:
        print(f"Interrupted: {args.out} holds what was scored; the same command goes on from there", file=sys.stderr)
        return _INTERRUPTED
    return 0


@contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that what was scored is written; the second ends the process as usual."""
    stopped = threading.Event()

    def stop(_signal: int, _frame: object) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _lines(name: str, numbers: dict[str, Any]) -> Iterator[str]:
    """One benchmark's part of the table."""
    partial = f"; not comparable: {numbers['not_comparable']}" if numbers["not_comparable"] else ""
    yield f"{name}: {numbers['n']} items, {numbers['n_failed']} failed{partial}"
    for failure in numbers["failures"][:3]:
        yield f"  failed: item {failure['index']}: {failure['reason']}"
    for metric, base in numbers["base"].items():
        if metric not in numbers["difference"]:
            yield f"  {metric}: {_shown(base)}"
            continue
        change = numbers["difference"][metric]
        yield f"  {metric}: {_shown(base)} -> {_shown(numbers['tuned'][metric])} ({change['better']} is better)"
        yield f"    {_decided(change)}"
    for metric, value in numbers["paired"].items():
        yield f"  {metric}: {_decided(value)}"
    for key in ("pick_the_longer_baseline", "n_without_biased_answer"):
        if key in numbers:
            yield f"  {key}: {numbers[key]:.4g}"


def _decided(change: dict[str, Any]) -> str:
    return f"{_shown(change)}, p {change['p_value']:.2g} (Holm {change['p_holm']:.2g}): {change['verdict']}"


def _build(name: str, args: argparse.Namespace, held_out_share: float) -> Any:
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit must be at least 1: got {args.limit}; leave it out for all items")
    from biasdpo import benchmarks as known

    if known.check_name(name) == "preference":
        from biasdpo import dataset
        from biasdpo.benchmarks.preference import Preference
        from biasdpo.workspace import sha256_of

        if args.dataset is None:
            raise ConfigError("preference needs the pairs: name the file that was trained on with --dataset")
        pairs = dataset.derive(dataset.load_jsonl(Path(args.dataset))).pairs
        held_out = dataset.split(pairs, held_out_share).held_out
        if not held_out:
            raise DatasetError(
                f"No pairs to score: of the {len(pairs)} in {Path(args.dataset).name} the run held none out (held_out_share "
                f"{held_out_share:g}), and those it was trained on prove nothing; train again with held_out_share 0.1 or more, "
                "or score another benchmark"
            )
        return Preference(held_out, sha256_of(Path(args.dataset)))
    return known.build(name, args.data_dir)


def _shown(interval: dict[str, Any]) -> str:
    low, high = interval["ci95"]
    return f"{interval['value']:.4g} [{low:.4g}, {high:.4g}]"
