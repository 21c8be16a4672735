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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from biasdpo.config import EvaluationConfig

BENCHMARKS = (
    "preference",
    "crows_pairs",
    "stereoset",
    "bbq",
    "winobias",
    "truthfulqa",
    "bold",
    "real_toxicity_prompts",
    "utility",
    "perplexity",
    "utility_generation",
)
_INTERRUPTED = 130  # the exit status of what Ctrl-C ended


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `evaluate` to the command line."""
    command = commands.add_parser("evaluate", help="score base and tuned on benchmarks, with intervals")
    command.add_argument("--model", default="auto", metavar="ID|auto")
    command.add_argument("--adapter", default="", metavar="ID|PATH|none", help="default: the model's shipped adapter")
    command.add_argument("--backend", default="auto", metavar="B", help="auto, llamacpp, transformers[-8bit|-4bit]")
    command.add_argument(
        "--benchmark", required=True, metavar="NAME[,NAME]", help=f"{', '.join(BENCHMARKS)} (the last two are utility's halves)"
    )
    command.add_argument(
        "--dataset", metavar="FILE|workspace|run", help="preference: what was trained on; its held-out pairs score"
    )
    command.add_argument("--data-dir", type=Path, metavar="DIR", help="holds one folder a benchmark; default: the Hub")
    command.add_argument("--limit", type=int, metavar="N", help="items of each benchmark, drawn by the seed")
    command.add_argument("--seed", type=int, default=0, metavar="S", help="of the draw, what is generated, and the bootstrap")
    command.add_argument("--strength", type=float, default=1.0, metavar="X")
    command.add_argument("--strengths", type=_numbers, metavar="X,X", help="several, for the curve of bias against perplexity")
    command.add_argument("--samples", type=int, metavar="K", help="completions of each of real_toxicity_prompts; default: 5")
    command.add_argument("--max-new-tokens", type=int, metavar="N", help="of a completion; default: as each benchmark has it")
    command.add_argument(
        "--toxicity-scorer", default="", metavar="NAME", help="profanity_check (default) or hub:OWNER/NAME, a classifier"
    )
    command.add_argument("--out", required=True, type=Path, metavar="FILE")
    command.add_argument("--workspace", metavar="DIR", help="default: $BIASDPO_WORKSPACE, else ./workspace")
    command.add_argument("--json", action="store_true", help="print the result without its items on stdout")
    command.set_defaults(handler=evaluate)


def evaluate(args: argparse.Namespace) -> int:
    """Run the benchmarks, write FILE, print what changed."""
    from tqdm import tqdm

    from biasdpo.jobs.resolve import resolve_evaluation
    from biasdpo.jobs.worker import EvaluationProgress, run_evaluation
    from biasdpo.workspace import open_workspace, write_json

    workspace = open_workspace(args.workspace)
    config, _ = resolve_evaluation(_request(args), workspace)
    with tqdm(unit=" item", file=sys.stderr) as bar, _stop_on_interrupt() as stopped:

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

        result = run_evaluation(config, workspace, Bar())
    write_json(args.out, result)
    if args.json:
        brief = {name: {key: value for key, value in b.items() if key != "items"} for name, b in result["benchmarks"].items()}
        print(json.dumps({**result, "benchmarks": brief}))
    else:
        for name, numbers in result["benchmarks"].items():
            print("\n".join(_lines(name, numbers)))
    if result["provenance"]["interrupted"]:
        print(f"Interrupted: {args.out} holds what was scored; the same command resumes from there", file=sys.stderr)
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
    if numbers["settings"]:
        yield f"  {', '.join(f'{key} {value}' for key, value in numbers['settings'].items())}"
    if numbers["not_as_published"]:
        yield f"  not comparable with published figures: {numbers['not_as_published']}"
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
        yield f"  {metric}: {_shown(value) if value['restates'] else _decided(value)}"
    for key in ("pick_the_longer_baseline", "n_without_biased_answer"):
        if key in numbers:
            yield f"  {key}: {numbers[key]:.4g}"


def _decided(change: dict[str, Any]) -> str:
    return f"{_shown(change)}, p {change['p_value']:.2g} (Holm {change['p_holm']:.2g}): {change['verdict']}"


def _request(args: argparse.Namespace) -> EvaluationConfig:
    """What the flags ask for."""
    from biasdpo.config import EvaluationConfig

    return EvaluationConfig(
        model=args.model,
        adapter=args.adapter,
        backend=args.backend,
        benchmarks=tuple(name.strip() for name in args.benchmark.split(",")),
        limit=args.limit,
        seed=args.seed,
        strengths=tuple(args.strengths or [args.strength]),
        data_dir="" if args.data_dir is None else str(args.data_dir),
        dataset=args.dataset or "",
        samples=args.samples,
        max_new_tokens=args.max_new_tokens,
        toxicity_scorer=args.toxicity_scorer,
    )


def _numbers(text: str) -> list[float]:
    """argparse says what is wrong where one is no number."""
    return [float(part) for part in text.split(",")]


def _shown(interval: dict[str, Any]) -> str:
    low, high = interval["ci95"]
    return f"{interval['value']:.4g} [{low:.4g}, {high:.4g}]"
