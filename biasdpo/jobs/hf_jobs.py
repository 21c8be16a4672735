"""Training on Hugging Face Jobs: `train --on hf-jobs`. The pairs, the config and this code go to a private dataset repository,
which the job mounts; the job trains, and pushes the adapter to the Hub before its time is over.
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from biasdpo import models
from biasdpo.access import require_owner
from biasdpo.config import TrainConfig
from biasdpo.data import splits
from biasdpo.errors import BiasDPOError, ConfigError, JobError
from biasdpo.jobs.job import ROOT
from biasdpo.workspace import Workspace, check_id

if TYPE_CHECKING:
    from huggingface_hub import HfApi, JobInfo

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
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]{0,80}", push_to, flags=re.ASCII):
        raise ConfigError(f"--push-to must be OWNER/NAME on the Hub: got {push_to!r}")
    flavors = [one.value for one in JobHardware]
    if flavor not in flavors:
        raise ConfigError(f"--flavor must be one of {', '.join(flavors)}: got {flavor!r}")
    if not config.model or Path(config.model).is_absolute():
        raise ConfigError(f"A job needs a model of the catalog or the Hub: got {config.model or 'none'}; name one with --model")
    return Order(config, run_id, push_to, flavor, seconds_of(timeout))


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
        f"hf upload {order.push_to} {adapter} . --private --commit-message={shlex.quote(f'Adapter of run {order.run_id}')}",
    ]
    return "\n".join(lines)


# The job


def submit(order: Order, workspace: Workspace) -> tuple[HfApi, JobInfo]:
    """Upload what the job needs, and start it. Nothing is started where a step before it fails.

    Raises RefusedError for a visitor, ConfigError or DatasetError for what can't be trained, JobError for what the Hub refuses.
    """
    from huggingface_hub import HfApi, Volume, get_token

    require_owner("Training on Hugging Face Jobs")
    token = get_token()
    if not token:
        raise ConfigError("A job needs your token of the Hub, which may write: sign in with `hf auth login`, or set HF_TOKEN")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch:
        order = write_inputs(order, workspace, Path(scratch))
        with hub_errors("upload the run's data"):
            api.create_repo(order.push_to, private=True, exist_ok=True)
            api.create_repo(order.data_repo, repo_type="dataset", private=True, exist_ok=True)
            if not api.repo_info(order.data_repo, repo_type="dataset").private:
                raise ConfigError(
                    f"The dataset {order.data_repo} is public, and your pairs would be: make it private, or delete it"
                )
            commit = api.upload_folder(
                repo_id=order.data_repo,
                repo_type="dataset",
                folder_path=scratch,
                path_in_repo=order.run_id,
                delete_patterns="*",
                commit_message=f"Run {order.run_id}",
            )
    data = Volume(type="dataset", source=order.data_repo, mount_path=MOUNT, revision=commit.oid, path=order.run_id)
    with hub_errors("start the job"):
        job = api.run_job(
            image=IMAGE,
            command=["bash", "-c", job_script(order)],
            flavor=order.flavor,
            timeout=order.seconds,
            secrets={"HF_TOKEN": token},
            volumes=[data],
            labels={"app": "biasdpo", "run": order.run_id},
            namespace=order.push_to.partition("/")[0],
        )
    return api, job


def follow(api: HfApi, job: JobInfo, show: Callable[[str], Any]) -> JobInfo:
    """Show a job's stages and log until it has ended. Ctrl-C cancels it; a second one stops waiting for its end.

    Raises JobError after many failed looks in a row; the job goes on.
    """
    stage, shown, lost = "", 0, 0
    is_canceled = False
    where: dict[str, Any] = {"job_id": job.id, "namespace": job.owner.name}
    while True:
        try:
            try:
                job = api.inspect_job(**where)
                lines = cast(Sequence[str], list(api.fetch_job_logs(**where)))
                lost = 0
            except Exception as exc:  # huggingface_hub raises many unrelated classes
                lost += 1
                if lost == _LOST_POLLS:
                    raise JobError(
                        f"The Hub does not answer about job {job.id} ({_line(exc)}): it goes on; see {job.url}"
                    ) from exc
                lines = ()
            if lost == 0 and job.status.stage != stage:
                stage = str(job.status.stage)
                show(f"Job {job.id}: {stage.lower()}{f', {job.status.message}' if job.status.message else ''}")
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
            with hub_errors("cancel the job"):
                api.cancel_job(**where)


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Convert what the Hub's client raises to a JobError of one line."""
    try:
        yield
    except BiasDPOError:
        raise
    except Exception as exc:  # huggingface_hub raises many unrelated classes
        raise JobError(f"Can't {what}: {_line(exc)}; check the name, your token's rights, and your credit on the Hub") from exc


def _line(exc: Exception) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip() and not line.startswith("(Request ID")]
    return " ".join(lines)[:300].rstrip(".") or type(exc).__name__
