"""How long from `runs stop` until a run is stopped, in each phase of it, beside the seconds of one of its steps.

    python -m tests.perf.stop [tiny] [smollm2]

For each phase a run of its own is started, and asked to stop as soon as its status names the phase. SmolLM2 trains on the seed
pairs with batches of 4 x 2, the tiny model (random, of bytes) on 40 pairs. Prints one JSON object, seconds; null: the phase was
over before it was seen. A run is to be stopped within one step and 10 s.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from biasdpo.config import TrainConfig
from biasdpo.jobs import store
from biasdpo.jobs.job import START_MARK, Job, JobFolder, read_job
from biasdpo.workspace import ASSETS, Workspace
from tests.byte_model import save_tiny_llama
from tests.run_line import checkpoints, ended, kill

LOOK_SECONDS = 0.005
ENDLESS = 100_000
QUIET = {"max_steps": ENDLESS, "eval_every": 0, "probe_every": 0, "save_steps": 0}
PHASES: dict[str, dict[str, Any]] = {  # as the status names it: the settings that bring it about
    "waits for": QUIET,
    "starting": QUIET,
    "loading the libraries": QUIET,
    "reading the data": QUIET,
    "preparing the model's files": QUIET,
    "tokenizing": QUIET,
    "loading the model": QUIET,
    "computing reference log-probabilities": QUIET,
    "training": QUIET,
    "evaluating on the held-out pairs": QUIET | {"eval_every": 1},
    "completing the probe's prompts": QUIET | {"probe_every": 1},
    "saving": QUIET | {"save_steps": 1},
    "scoring the held-out pairs": QUIET | {"max_steps": 2},
}


def is_in(run: Job, phase: str) -> bool:
    if phase == "starting":  # it has the device, and its launcher loads
        return START_MARK in run.folder.log_tail(50)
    if phase == "saving":
        return len(list(run.folder.checkpoints.glob("checkpoint-*"))) > len(checkpoints(run.folder))
    first_steps = phase != "training" or run.status.step >= 2  # and not before the first
    return run.status.phase.startswith(phase) and first_steps


def seconds_to_stop(config: TrainConfig, phase: str, workspace: Workspace) -> float | None:
    """Start a run, and stop it in a phase."""
    for cached in ("reference", "hf"):
        shutil.rmtree(workspace.cache / cached, ignore_errors=True)
    first = store.start_training(config, workspace, "first").folder if phase == "waits for" else None
    folder = store.start_training(config, workspace, "stopped").folder
    try:
        while not is_in(run := read_job(folder), phase):
            if ended(run):
                print(f"{phase}: {run.status}", file=sys.stderr)
                return None
            time.sleep(LOOK_SECONDS)
        asked_at = time.perf_counter()
        store.stop_job("stopped", workspace)
        while not ended(run := read_job(folder)):
            time.sleep(LOOK_SECONDS)
        took = time.perf_counter() - asked_at
        print(f"{phase}: {took:.2f} s, {run.status.state} at step {run.status.step}", file=sys.stderr)
        return round(took, 2) if run.status.state == "stopped" else None
    finally:
        for started in (folder, first):
            if started is not None:
                end(started, workspace)


def end(folder: JobFolder, workspace: Workspace) -> None:
    """Kill what is left of a run, and delete it."""
    run = read_job(folder)
    if not ended(run):
        kill(run.status)
        while not ended(read_job(folder)):
            time.sleep(0.05)
    store.delete_job(folder.id, workspace)


def seconds_of_a_step(config: TrainConfig, workspace: Workspace) -> float:
    """The mean of four, of a run that does nothing else."""
    folder = store.start_training(config, workspace, "timed").folder
    seen: dict[int, float] = {}
    while 6 not in seen:
        run = read_job(folder)
        assert not ended(run), run.status
        seen.setdefault(run.status.step, time.perf_counter())
        time.sleep(LOOK_SECONDS)
    first = min(step for step in seen if step >= 2)
    end(folder, workspace)
    return round((seen[6] - seen[first]) / (6 - first), 3)


def main(names: list[str]) -> None:
    found = {}
    for name in names or ["tiny", "smollm2"]:
        with tempfile.TemporaryDirectory() as root:
            workspace = Workspace(Path(root) / "workspace")
            if name == "tiny":
                pairs = Path(root) / "pairs.jsonl"
                rows = [{"prompt": f"Is a{i} b{i}?", "chosen": f"No, not {i}.", "rejected": f"All of {i}!"} for i in range(40)]
                pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
                model, batch = str(save_tiny_llama(Path(root) / "tiny")), {"batch_size": 2, "gradient_accumulation": 1}
            else:
                model, pairs, batch = name, ASSETS / "seed_pairs.jsonl", {"batch_size": 4, "gradient_accumulation": 2}
            configs = {
                phase: TrainConfig(model=model, datasets=(str(pairs),), **batch, **settings) for phase, settings in PHASES.items()
            }
            step = seconds_of_a_step(configs["training"], workspace)
            stops = {phase: seconds_to_stop(config, phase, workspace) for phase, config in configs.items()}
        worst = max(seconds for seconds in stops.values() if seconds is not None)
        found[name] = {"step": step, "stop": stops, "worst": worst, "limit": round(step + 10, 2)}
    print(json.dumps({"cores": os.cpu_count(), "seconds": found}))


if __name__ == "__main__":
    main(sys.argv[1:])
