"""Training on Hugging Face Jobs: `train --on hf-jobs`. The pairs, the config and this code go to a private dataset repository,
which the job mounts; the job trains, and pushes the adapter to the Hub before its time is over.
"""

from __future__ import annotations

import math
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biasdpo import models
from biasdpo.access import audit, require_owner
from biasdpo.config import TrainConfig, repository_name
from biasdpo.data import splits
from biasdpo.errors import ConfigError, JobError
from biasdpo.hub import client, create_private, explained, reason_of, require_token
from biasdpo.jobs.job import ROOT
from biasdpo.workspace import Workspace, check_id

if TYPE_CHECKING:
    from huggingface_hub import JobInfo

IMAGE = "python:3.12"  # PyTorch's wheel brings CUDA
MOUNT = "/biasdpo"
WORKSPACE = "/tmp/workspace"
LEAST_MINUTES = 30
PUSH_MINUTES = 10  # of the job's time, for scoring, saving and pushing
_CODE = ("biasdpo", "training", "assets")
_UNUSED = shutil.ignore_patterns("__pycache__", "ui", "adapters", "*.png")
_MODEL_FILES = "--include '*.json' --include '*.safetensors' --include '*.txt'"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_POLL_SECONDS = 5.0
_LOST_POLLS = 20  # failed looks at a job in a row

ENDED = ("COMPLETED", "CANCELED", "ERROR", "DELETED")


@dataclass(frozen=True)
class Order:
    """A job to be sent: its config, whose data are files in the mounted folder, and where it runs and pushes to."""

    config: TrainConfig
    run_id: str
    push_to: str
    flavor: str
    seconds: int

    @property
    def data_repo(self) -> str:
        return f"{self.push_to}-jobs"


def check_order(config: TrainConfig, run_id: str, push_to: str, flavor: str, timeout: str) -> Order:
    """Raises ConfigError for what can't be sent."""
    from huggingface_hub import JobHardware

    check_id(run_id, "run")
    order = Order(config, run_id, push_to, flavor, seconds_of(timeout))
    try:
        repository_name(order.push_to)
        repository_name(order.data_repo)
    except ValueError as exc:
        raise ConfigError(f"--push-to {exc}") from exc
    flavors = [one.value for one in JobHardware]
    if flavor not in flavors:
        raise ConfigError(f"--flavor must be one of {', '.join(flavors)}: got {flavor!r}")
    if not config.model or Path(config.model).is_absolute():
        raise ConfigError(f"A job needs a model of the catalog or the Hub: got {config.model or 'none'}; name one with --model")
    return order


def seconds_of(timeout: str) -> int:
    """Seconds of "90m", "2h" or "1d". ConfigError for anything else, and where too little would be left to train."""
    number, unit = timeout[:-1], timeout[-1:]
    try:
        seconds = int(float(number) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError) as exc:
        raise ConfigError(f"--timeout must be a number with s, m, h or d: got {timeout!r}; write e.g. 2h") from exc
    if seconds < 60 * LEAST_MINUTES:
        raise ConfigError(f"--timeout must be {LEAST_MINUTES}m or more, since a job also installs and pushes: got {timeout!r}")
    return seconds


# What is uploaded


def write_inputs(order: Order, workspace: Workspace, folder: Path) -> Order:
    """Write the code and the pairs into an empty folder; return the order with the pairs as the job finds them.

    There is a file for each weight, whatever the sources were. Raises ConfigError or DatasetError for what can't be trained.
    """
    if not (ROOT / "requirements.txt").is_file():
        raise ConfigError(f"A job runs the code of a checkout, and {ROOT} is none: clone the repository and start it there")
    data = splits.resolve(order.config, workspace)
    order.config.check_warmup(len(data.epoch))
    for name in _CODE:
        shutil.copytree(ROOT / name, folder / "code" / name, ignore=_UNUSED)
    for name in ("requirements.txt", "constraints.txt"):
        shutil.copy(ROOT / name, folder / "code")
    weights = sorted(set(data.weights))
    files = [f"pairs-{number}.jsonl" for number in range(1, len(weights) + 1)]
    for file, weight in zip(files, weights, strict=True):
        pairs = [pair for pair, of_pair in zip(data.derived.pairs, data.weights, strict=True) if of_pair == weight]
        splits.write_dataset(pairs, folder / file)
    config = order.config.replace(
        datasets=tuple(f"{MOUNT}/{file}" for file in files), dataset_weights=() if weights == [1.0] else tuple(weights)
    )
    (folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    return replace(order, config=config)


def job_script(order: Order) -> str:
    """What the job runs, in bash. The run's time limit is what installing has left of the job's, less the time to push."""
    spec = models.catalog().get(order.config.model)
    hub_id = order.config.model if spec is None else spec.hub_id
    is_packaged = spec is not None and "package" in spec.gguf_source
    adapter = shlex.quote(f"{WORKSPACE}/runs/{order.run_id}/adapter")
    train = shlex.join(order.config.replace(max_minutes=0.0).to_arguments())
    own = math.ceil(order.config.max_minutes)
    lines = [
        "set -e",
        f"end=$(( $(date +%s) + {order.seconds} - {60 * PUSH_MINUTES} ))",
        f"cd {MOUNT}/code",
        "pip install -q -r requirements.txt -c constraints.txt",
        *([] if is_packaged else [f"hf download {shlex.quote(hub_id)} {_MODEL_FILES}"]),
        "minutes=$(( (end - $(date +%s)) / 60 ))",
        '[ "$minutes" -ge 1 ] || { echo "No time is left to train: give the job a longer --timeout" >&2; exit 1; }',
        *([f'[ "$minutes" -le {own} ] || minutes={own}'] if own else []),
        f"python -m biasdpo train {train} --run-id={order.run_id} --workspace={WORKSPACE} --max-minutes=$minutes",
        f"hf upload {shlex.quote(order.push_to)} {adapter} . --private --commit-message='Adapter of run {order.run_id}'",
    ]
    return "\n".join(lines)


# The job


def submit(order: Order, workspace: Workspace) -> JobInfo:
    """Upload what the job needs, and start it. Nothing is started where a step before it fails.

    Raises RefusedError for a visitor, ConfigError or DatasetError for what can't be trained, JobError for what the Hub refuses.
    """
    from huggingface_hub import Volume

    require_owner("Training on Hugging Face Jobs")
    token = require_token("A job")
    with tempfile.TemporaryDirectory() as scratch:
        order = write_inputs(order, workspace, Path(scratch))
        with explained("Can't upload the run's data", JobError):
            for name, kind, what in ((order.push_to, "model", "adapter"), (order.data_repo, "dataset", "pairs")):
                if not create_private(name, kind):
                    raise ConfigError(
                        f"The {kind} {name} is public, and your {what} would be: make it private, or choose another"
                    )
            audit(workspace.root, "start", job=f"hf-jobs/{order.run_id}", repository=order.data_repo)
            commit = client().upload_folder(
                repo_id=order.data_repo,
                repo_type="dataset",
                folder_path=scratch,
                path_in_repo=order.run_id,
                delete_patterns="*",
                commit_message=f"Run {order.run_id}",
            )
    data = Volume(type="dataset", source=order.data_repo, mount_path=MOUNT, revision=commit.oid, path=order.run_id)
    with explained("Can't start the job", JobError):
        return client().run_job(
            image=IMAGE,
            command=["bash", "-c", job_script(order)],
            flavor=order.flavor,
            timeout=order.seconds,
            secrets={"HF_TOKEN": token},
            volumes=[data],
            labels={"app": "biasdpo", "run": order.run_id},
            namespace=order.push_to.partition("/")[0],
        )


def follow(job: JobInfo, show: Callable[[str], Any]) -> JobInfo:
    """Show a job's stages and log until it has ended. Ctrl-C cancels it; a second one stops waiting for its end.

    Raises JobError after many failed looks in a row; the job goes on.
    """
    stage, shown, lost = "", 0, 0
    is_canceled = False
    where: dict[str, Any] = {"job_id": job.id, "namespace": job.owner.name}
    while True:
        try:
            try:
                job, lost = client().inspect_job(**where), 0
            except Exception as exc:  # huggingface_hub raises many unrelated classes
                lost += 1
                if lost == _LOST_POLLS:
                    raise JobError(f"Job {job.id} goes on, but can't be followed: {reason_of(exc)}; see {job.url}") from exc
            if not lost and job.status.stage != stage:
                stage = str(job.status.stage)
                show(f"Job {job.id}: {stage.lower()}{f', {job.status.message}' if job.status.message else ''}")
            lines: list[str] = []
            with suppress(Exception):  # a job that waits for its machine has none yet
                lines = list(client().fetch_job_logs(**where))
            for line in lines[shown:]:
                show(line.rstrip())
            shown = max(shown, len(lines))
            if stage in ENDED:
                return job
            time.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:
            if is_canceled:
                raise
            is_canceled = True
            show(f"Canceling job {job.id}. Ctrl-C again stops waiting for it.")
            with explained(f"Can't cancel job {job.id}, which goes on", JobError, f"; or cancel it at {job.url}"):
                client().cancel_job(**where)
