"""The command `evaluate`: held-out pairs and neutral text, base against tuned."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from biasdpo.errors import ConfigError

BENCHMARKS = ("preference", "utility")


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `evaluate` to the command line."""
    command = commands.add_parser("evaluate", help="score base and tuned on benchmarks, with intervals")
    command.add_argument("--model", default="auto", metavar="ID|auto")
    command.add_argument("--adapter", default="", metavar="ID|PATH", help="default: the model's shipped adapter")
    command.add_argument("--backend", default="auto", metavar="B", help="auto, llamacpp or transformers")
    command.add_argument("--benchmark", required=True, metavar="NAME[,NAME]", help=", ".join(BENCHMARKS))
    command.add_argument("--dataset", metavar="FILE", help="preference: the file trained on; what the run held out is scored")
    command.add_argument("--data-dir", type=Path, default=Path(), metavar="DIR", help="holds one folder a benchmark")
    command.add_argument("--limit", type=int, metavar="N", help="items of each benchmark")
    command.add_argument("--seed", type=int, default=0, metavar="S", help="of the bootstrap")
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

            result = evaluation.run(engine, benchmarks, strength=args.strength, limit=args.limit, seed=args.seed, on_item=show)
    finally:
        engine.backend.close()
    write_json(args.out, result)
    if args.json:
        brief = {name: {k: v for k, v in b.items() if k != "items"} for name, b in result["benchmarks"].items()}
        print(json.dumps({**result, "benchmarks": brief}))
        return 0
    for name, numbers in result["benchmarks"].items():
        print(f"{name}: {numbers['n']} items, {numbers['n_failed']} failed{', partial' if numbers['partial'] else ''}")
        for metric in numbers["base"]:
            print(f"  {metric}: {_shown(numbers['base'][metric])} -> {_shown(numbers['tuned'][metric])}")
        for metric, value in numbers["paired"].items():
            print(f"  {metric}: {_shown(value)}")
        for key in ("pick_the_longer_baseline",):
            if key in numbers:
                print(f"  {key}: {numbers[key]:.4g}")
    return 0


def _build(name: str, args: argparse.Namespace, held_out_share: float) -> Any:
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit must be at least 1: got {args.limit}; leave it out for all items")
    if name == "preference":
        from biasdpo import dataset
        from biasdpo.benchmarks.preference import Preference

        if args.dataset is None:
            raise ConfigError("preference needs the pairs: name the file that was trained on with --dataset")
        pairs = dataset.derive(dataset.load_jsonl(Path(args.dataset))).pairs
        return Preference(dataset.split(pairs, held_out_share).held_out)
    if name == "utility":
        from biasdpo.benchmarks.utility import Utility, load_texts

        return Utility(load_texts(args.data_dir))
    raise ConfigError(f"Unknown benchmark {name!r}: choose of {', '.join(BENCHMARKS)}")


def _shown(interval: dict[str, Any]) -> str:
    low, high = interval["ci95"]
    return f"{interval['value']:.4g} [{low:.4g}, {high:.4g}]"
