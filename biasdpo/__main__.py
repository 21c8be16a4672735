"""The command line: python -m biasdpo models|compare|dataset|train|jobs|runs|export|evaluate.

Results go to stdout (one JSON object, or one a line, with --json), progress and messages to stderr.
Exit status: 0 done; 2 wrong use or bad input, with one line that says what, what was got, and the remedy; 1 a fault of ours.
Everything heavy is imported where it is used, so that --help is instant.
"""

from __future__ import annotations

import argparse
import json
import sys

from biasdpo.errors import BiasDPOError
from biasdpo.records import Sampling


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = build_parser()
    try:
        if arguments[:1] in (["jobs"], ["runs"]):
            from biasdpo import cli_jobs

            return cli_jobs.main(arguments)
        args = parser.parse_args(arguments)
        return int(args.handler(args))
    except BiasDPOError as exc:
        print(f"biasdpo: {exc}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` closed stdout: not a fault
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print("biasdpo: interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; README's list of commands is tested against it."""
    from biasdpo import cli_dataset, cli_evaluate, cli_export, cli_train

    parser = argparse.ArgumentParser(prog="python -m biasdpo", description="See, train away and measure a language model's bias.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("models", help="list the models: which are here, memory needed, licence, adapters that fit")
    command.add_argument("names", nargs="*", metavar="ID", help="catalog id, Hub id, HF folder or .gguf; default: the catalog")
    add_workspace_and_json(command)
    command.set_defaults(handler=show_models)

    defaults = Sampling()
    command = commands.add_parser("compare", help="one prompt, two completions: base and tuned")
    command.add_argument("--prompt", required=True, metavar="TEXT")
    add_model_and_adapter(command)
    command.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens, metavar="N")
    command.add_argument("--temperature", type=float, default=defaults.temperature, metavar="T", help="0 is greedy")
    command.add_argument("--top-p", type=float, default=defaults.top_p, metavar="P")
    command.add_argument("--top-k", type=int, default=defaults.top_k, metavar="K", help="0 keeps all tokens")
    command.add_argument("--repetition-penalty", type=float, default=defaults.repetition_penalty, metavar="R", help="1 is off")
    command.add_argument("--system", default="", metavar="TEXT", help="system prompt, where the model's template has one")
    command.add_argument("--seed", type=int, default=defaults.seed, metavar="S")
    command.add_argument("--strength", type=float, default=1.0, metavar="X", help="adapter strength, 0 to 1.5; 1 is as trained")
    add_workspace_and_json(command)
    command.set_defaults(handler=compare)

    cli_dataset.add_commands(commands)
    cli_train.add_commands(commands)
    commands.add_parser("jobs", add_help=False, help="list, show, stop, resume, delete training runs, evaluations and exports")
    commands.add_parser("runs", add_help=False, help="the same for training runs alone")
    cli_export.add_commands(commands)
    cli_evaluate.add_commands(commands)

    return parser


def add_workspace_and_json(command: argparse.ArgumentParser) -> None:
    """The two flags that every command has."""
    command.add_argument("--workspace", metavar="DIR", help="default: $BIASDPO_WORKSPACE, else ./workspace")
    command.add_argument("--json", action="store_true", help="print one JSON object (or one a line) on stdout")


def add_model_and_adapter(command: argparse.ArgumentParser) -> None:
    """The flags that name what is compared or scored."""
    command.add_argument("--model", default="auto", metavar="ID|auto", help="catalog id, Hub id, HF folder or .gguf")
    command.add_argument("--adapter", default="", metavar="ID|PATH|none", help="default: the model's shipped adapter")
    command.add_argument("--backend", default="auto", metavar="B", help="auto, llamacpp or transformers")


def show_models(args: argparse.Namespace) -> int:
    """List the catalog with what is on this machine, or the models that are named."""
    from biasdpo import models
    from biasdpo.workspace import open_workspace

    workspace = open_workspace(args.workspace)
    named = map(models.find, args.names) if args.names else map(models.with_files, models.catalog().values())
    for spec in named:
        adapters = [adapter.id for adapter in models.adapters_for(spec, workspace)]
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
            "get": "" if spec.present else f"hf download {spec.hub_id}",
        }
        if args.json:
            print(json.dumps(row))
        else:
            memory = ", ".join(f"{gb:g} GB with {backend}" for backend, gb in spec.memory_gb.items())
            here = "here" if spec.present else f"not here; get it with `{row['get']}`"
            print(
                f"{spec.id}: {spec.title}, {spec.license}, {spec.parameters / 1e6:,.0f} M parameters\n  {here}\n  needs {memory}"
            )
            print(f"  adapters: {', '.join(adapters) or 'none (base-only until one is trained)'}")
    return 0


def compare(args: argparse.Namespace) -> int:
    """Stream both sides of one prompt; print them, or one JSON object."""
    from tqdm import tqdm

    from biasdpo import models
    from biasdpo.compare import stream_pair
    from biasdpo.engines import EngineKey, open_engine
    from biasdpo.records import GenerationPair
    from biasdpo.workspace import open_workspace

    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.repetition_penalty, args.seed)
    model = args.model
    if model == "auto":
        spec, reason = models.choose_auto()
        model = spec.id
        print(reason, file=sys.stderr)
    engine = open_engine(EngineKey(model, args.adapter, args.backend), open_workspace(args.workspace))
    pair = None
    try:
        with tqdm(total=sampling.max_new_tokens, unit=" token", file=sys.stderr, leave=False) as bar:
            for event in stream_pair(engine, args.prompt, sampling, system=args.system, strength=args.strength):
                if isinstance(event, GenerationPair):
                    pair = event
                    bar.update(max(c.tokens for c in (pair.left, pair.right) if c is not None) - bar.n)
    finally:
        engine.backend.close()
    assert pair is not None  # the last event of a stream is its finished pair
    if args.json:
        print(json.dumps(pair.to_json(), ensure_ascii=False))
        return 0
    for completion in (pair.left, pair.right):
        if completion is not None:
            print(f"--- {completion.side} ({completion.tokens} tokens, {completion.finish_reason}) ---\n{completion.text}\n")
    if pair.canary_kl_nats is not None:
        print(f"base equals the bare model; tuned differs by KL {pair.canary_kl_nats:.3g} nats")
    return 0


if __name__ == "__main__":
    sys.exit(main())
