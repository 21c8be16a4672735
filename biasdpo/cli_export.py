"""The command `export`: an adapter, or a model with it, as a GGUF that is proven equal."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

_FORMATS = ("lora", "merged")  # `jobs.requests.FORMATS`, whose import is not light
_SOURCES = ("auto", "hf", "gguf")


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `export` to the command line."""
    command = commands.add_parser("export", help="write an adapter, or a model with it, as a GGUF that is proven equal")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", default="", metavar="NAME", help="a finished run")
    source.add_argument(
        "--adapter", default="", metavar="ID|PATH|none", help="a shipped adapter or a PEFT folder; none: the model alone"
    )
    command.add_argument("--model", default="", metavar="ID", help="base model; default: the one that the adapter names")
    command.add_argument(
        "--format", required=True, choices=_FORMATS, help="lora: the adapter alone; merged: one complete model with it in"
    )
    command.add_argument(
        "--quantization",
        default="",
        metavar="Q",
        help="of a merged file: F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_1, Q4_0, or keep: as the base GGUF; default: Q8_0",
    )
    command.add_argument(
        "--source", default="auto", choices=_SOURCES, help="of a merged file; auto: the Hugging Face folder where there is one"
    )
    command.add_argument(
        "--pairs", type=int, default=64, metavar="N", help="held-out pairs scored before and after; 0: none; default: 64"
    )
    command.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: all cores")
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help="the file; its record is FILE.json")
    command.add_argument("--workspace", metavar="DIR", help="default: $BIASDPO_WORKSPACE, else ./workspace")
    command.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    command.set_defaults(handler=export)


def export(args: argparse.Namespace) -> int:
    """Write the file, prove it, say what was found."""
    from tqdm import tqdm

    from biasdpo.config import ExportConfig
    from biasdpo.jobs.job import shown_command
    from biasdpo.jobs.worker import run_export
    from biasdpo.workspace import open_workspace

    request = ExportConfig(
        out=args.out,
        format=args.format,
        run=args.run,
        adapter=args.adapter,
        model=args.model,
        quantization=args.quantization,
        source=args.source,
        pairs=args.pairs,
        threads=args.threads,
    )
    bar_format = "{desc} {percentage:3.0f} % |{bar}| {elapsed}"
    with tqdm(total=100, file=sys.stderr, leave=False, bar_format=bar_format) as bar:

        def tell(share: float, phase: str) -> None:
            bar.set_description_str(phase, refresh=False)
            bar.update(100 * share - bar.n)

        record = run_export(request, open_workspace(args.workspace), tell, shown_command(sys.argv[1:]))
    if args.json:
        print(json.dumps(record.to_json(), ensure_ascii=False))
    else:
        print(_summary(record))
    for warning in record.proof.get("warnings", ()):
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def _summary(record: Any) -> str:
    from biasdpo.gguf.proof import ExportProof

    what = "LoRA GGUF" if record.format == "lora" else f"{record.quantization} GGUF"
    of = record.model_title if record.adapter == "none" else f"{record.adapter} for {record.model_title}"
    fallbacks = record.written.get("fallbacks") or ()
    lines = [f"{record.out}: {record.bytes:,} bytes, {what} of {of}", ExportProof.from_json(record.proof).sentence()]
    if fallbacks:
        lines.append(f"{len(fallbacks)} tensors are of another type than asked for: {record.out.name}.json lists them")
    return "\n".join(lines)
