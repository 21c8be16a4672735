"""The command `train`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from biasdpo.errors import ConfigError, RunError

_POLL_SECONDS = 0.5


def add_commands(commands: Any) -> None:
    """Add `train` and `runs` to the command line's subparsers."""
    command = commands.add_parser("train", help="train an adapter with DPO, in a process of its own")
    command.add_argument("--model", default="", metavar="ID", help="catalog id, Hub id, HF folder or .gguf")
    command.add_argument(
        "--dataset",
        action="append",
        default=[],
        metavar="FILE|hub:OWNER/NAME|workspace",
        help="preference pairs: a JSONL file with prompt, chosen, rejected; a Hub data set; or the workspace's journal. "
        "Several are joined",
    )
    command.add_argument("--run-id", metavar="NAME", help="the run's name and folder")
    command.add_argument("--config", type=Path, metavar="FILE", help="a run config, e.g. training/configs/smollm2-quick.toml")
    command.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="key=value", help="one setting, over the config's"
    )
    command.add_argument("--resume", action="store_true", help="go on with a run that was stopped, interrupted or failed")
    command.add_argument("--num-processes", type=int, metavar="N", help="training processes (data parallel)")
    command.add_argument(
        "--estimate", action="store_true", help="measure what the run would take in time and memory, and start nothing"
    )
    _add_workspace_and_json(command)
    command.set_defaults(handler=train)


def _add_workspace_and_json(command: argparse.ArgumentParser) -> None:
    """The two flags that every command has."""
    command.add_argument("--workspace", metavar="DIR", help="default: $BIASDPO_WORKSPACE, else ./workspace")
    command.add_argument("--json", action="store_true", help="print one JSON object (or one a line) on stdout")


def train(args: argparse.Namespace) -> int:
    """Start (or resume) a run and wait for it; Ctrl-C asks it to stop."""
    from biasdpo.cli_jobs import summary
    from biasdpo.jobs import store
    from biasdpo.jobs.job import shown_command
    from biasdpo.workspace import open_workspace

    if not args.run_id and not args.estimate:
        raise ConfigError("A run needs a name: got none; give it with --run-id")
    workspace = open_workspace(args.workspace)
    if args.resume:
        given = [f"--{name}" for name in ("model", "dataset", "config", "num_processes", "estimate") if getattr(args, name)]
        given += ["--set"] * bool(args.settings)
        if given:
            raise ConfigError(f"--resume goes on with the run's own settings: got {', '.join(given)} too; leave them out")
        folder = store.resume_job(args.run_id, workspace, "train").folder
    else:
        config = _config(args)
        if args.estimate:
            return _estimate(config, workspace, as_json=args.json)
        folder = store.start_training(config, workspace, args.run_id, command=shown_command(sys.argv[1:])).folder
    run = _wait(folder, workspace)
    if args.json:
        print(json.dumps(run.to_json(), ensure_ascii=False))
    if run.status.state == "finished":
        if not args.json:
            print(summary(run))
        return 0
    if run.status.state == "stopped":
        raise RunError(
            f"Run {folder.id!r} was stopped at step {run.status.step} of {run.status.total_steps}: go on with "
            f"`python -m biasdpo train --run-id {folder.id} --resume`"
        )
    raise RunError(f"Run {folder.id!r} {run.status.state}: {run.status.error}")


def _config(args: argparse.Namespace) -> Any:
    """The run config of the flags, over that of --config."""
    from biasdpo import config as run_config
    from biasdpo import models

    values = run_config.read_toml(args.config) if args.config else {}
    values |= {"model": args.model} if args.model else {}
    values |= {"datasets": args.dataset} if args.dataset else {}
    values |= {"num_processes": args.num_processes} if args.num_processes is not None else {}
    values |= run_config.parse_settings(args.settings)
    config = run_config.TrainConfig(**values)
    # The training process has another working folder.
    return config.replace(model=models.absolute_name(config.model), datasets=tuple(map(_absolute, config.datasets)))


def _estimate(config: Any, workspace: Any, *, as_json: bool) -> int:
    """Print what a run would take; one that can't fit is an error after that."""
    from biasdpo.jobs.estimate import estimate_training

    print("Measuring a few steps…", file=sys.stderr)
    found = estimate_training(config, workspace)
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        minutes, needed, free = found.seconds_total / 60, found.memory_bytes / 1e9, found.memory_free_bytes / 1e9
        print(f"{found.steps} steps of {found.seconds_per_step:.2f} s, {minutes:.1f} minutes in all on {found.device}")
        print(f"{needed:.1f} GB of memory at the peak, {free:.1f} GB are free")
        print(f"{found.pairs_train} pairs to train on, {found.pairs_held_out} held out, {found.dropped} dropped, {found.cut} cut")
        print("seconds: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in found.parts.items()))
    if not found.fits:
        raise RunError(found.refusal)
    return 0


def _absolute(source: str) -> str:
    """A dataset file's absolute path; other sources as they are."""
    if source == "workspace" or source.startswith("hub:"):
        return source
    return str(Path(source).expanduser().resolve())


def _wait(folder: Any, workspace: Any) -> Any:
    """Show a run's progress on stderr until it has ended."""
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
                bar.write("Asked the run to stop; it saves a checkpoint first. Ctrl-C again leaves it alone.", file=sys.stderr)
                if read_job(folder).status.state in ACTIVE:
                    stop_job(folder.id, workspace, "train")
