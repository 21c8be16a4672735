"""Training on Hugging Face Jobs: the upload, the job's arguments, polling. The Hub is a stand-in; the job's
script runs here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from biasdpo.config import TrainConfig
from biasdpo.errors import RunError
from biasdpo.jobs import hf_jobs, store
from biasdpo.workspace import Workspace
from tests import commands
from tests.hub import TOKEN, Hub, running_hub

SENT = ["--on", "hf-jobs", "--flavor", "a10g-small", "--push-to", "ana/fair", "--run-id", "first"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr(hf_jobs, "_POLL_SECONDS", 0.0)
    with running_hub(tmp_path / "hub") as started:
        started.use(monkeypatch)
        yield started


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


def train(workspace: Workspace, pairs_file: Path, *arguments: str) -> commands.Done:
    words = ["--model", "smollm2", "--dataset", str(pairs_file), "--workspace", str(workspace.root), *SENT, *arguments]
    return commands.run("train", *words)


def test_a_run_is_sent_followed_and_leaves_nothing_public(hub, workspace, pairs_file):
    done = train(workspace, pairs_file, "--beta", "0.2", "--timeout", "90m", "--json")
    assert done.returncode == 0, done.stderr
    (job,) = hub.jobs.values()
    assert json.loads(done.stdout)["adapter"] == "ana/fair"
    assert [line for line in done.stderr.splitlines() if "step" in line or "Job" in line] == [
        f"Job {job.id}: running",
        "step 1",
        "step 2",
        f"Job {job.id}: completed",
    ]
    assert (job.spec["flavor"], job.spec["timeoutSeconds"], job.spec["dockerImage"]) == ("a10g-small", 5400, "python:3.12")
    script = job.spec["command"][2]
    assert "train --model=smollm2 --dataset=/biasdpo/pairs-1.jsonl --beta=0.2 --run-id=first" in script
    assert f"{5400} - {600} ))" in script  # the run ends before the job's time does
    assert "hf upload ana/fair /tmp/workspace/runs/first/adapter . --private" in script
    data = hub.repository("dataset", "ana/fair-jobs")
    assert data.private
    assert hub.repository("model", "ana/fair").private
    (volume,) = job.spec["volumes"]
    assert (volume["source"], volume["path"], volume["mountPath"]) == ("ana/fair-jobs", "first", "/biasdpo")
    assert volume["revision"] == data.commits[-1].oid
    sent = {path.removeprefix("first/") for path in data.files}
    assert {"pairs-1.jsonl", "config.toml", "code/training/dpo.py", "code/requirements.txt"} <= sent
    assert job.spec["secrets"] == {"HF_TOKEN": TOKEN}
    assert TOKEN not in done.stdout + done.stderr + json.dumps({**job.spec, "secrets": ""})
    assert all(TOKEN.encode() not in hub.content(stored) for stored in data.files.values())
    (audited,) = map(json.loads, (workspace.root / "audit.jsonl").read_text().splitlines())
    assert (audited["action"], audited["job"], audited["repository"]) == ("start", "hf-jobs/first", "ana/fair-jobs")


def test_weights_stay_with_their_pairs(hub, workspace, pairs_file, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "Who?", "chosen": "Anybody.", "rejected": "Nobody."}) + "\n")
    done = train(workspace, pairs_file, "--dataset", str(other), "--dataset-weights", "1,3", "--detach")
    assert done.returncode == 0, done.stderr
    (job,) = hub.jobs.values()
    assert "--dataset-weights=1,3" in job.spec["command"][2].replace(", ", ",")
    heavy = hub.read("dataset", "ana/fair-jobs", "first/pairs-2.jsonl").decode()
    assert heavy.count("\n") == 1
    assert "Anybody." in heavy
    assert f"hf jobs cancel {job.id}" in done.stdout


def test_a_failed_job_is_an_error(hub, workspace, pairs_file):
    hub.plan = [("RUNNING", ["out of memory"]), ("ERROR", [])]
    done = train(workspace, pairs_file)
    assert "ended as error: see http" in done.stderr.splitlines()[-1]
    assert done.returncode == 2
    assert "out of memory" in done.stderr


def test_ctrl_c_cancels_the_job(hub, workspace, pairs_file, monkeypatch):
    hub.plan = [("RUNNING", ["step 1"])]
    interrupts = iter([True])

    def sleep(_seconds: float) -> None:
        if next(interrupts, False):
            raise KeyboardInterrupt

    monkeypatch.setattr(hf_jobs, "time", SimpleNamespace(sleep=sleep))
    done = train(workspace, pairs_file)
    assert [job.stage for job in hub.jobs.values()] == ["CANCELED"]
    assert "ended as canceled" in done.stderr.splitlines()[-1]


def test_an_outage_is_waited_for_and_a_long_one_is_an_error(hub, workspace, pairs_file):
    hub.fault("refuse", "GET", "/api/jobs/", times=3)
    assert train(workspace, pairs_file).returncode == 0
    hub.fault("refuse", "GET", "/api/jobs/", times=100)
    error = train(workspace, pairs_file).error
    assert "goes on, but can't be followed: the Hub failed with status 503: try later" in error


def test_a_job_that_waits_has_no_log_yet(hub, workspace, pairs_file):
    hub.plan = [*[("SCHEDULING", [])] * 30, ("RUNNING", ["step 1"]), ("COMPLETED", [])]
    hub.fault("refuse", "GET", "/logs", status=404, times=29)
    done = train(workspace, pairs_file)
    assert done.returncode == 0, done.stderr
    assert "step 1" in done.stderr.splitlines()


def test_what_the_hub_refuses_starts_no_job(hub, workspace, pairs_file, monkeypatch):
    hub.create("dataset", "ana/fair-jobs", private=False)
    assert "is public, and your pairs would be" in train(workspace, pairs_file).error
    hub.fault("refuse", "POST", "/api/jobs/ana", status=402)
    hub.repository("dataset", "ana/fair-jobs").private = True
    assert "Can't start the job: the account has too little credit" in train(workspace, pairs_file).error
    hub.repository("model", "ana/fair").private = False
    assert "The model ana/fair is public, and your adapter would be" in train(workspace, pairs_file).error
    assert "Can't upload" in train(workspace, pairs_file, "--push-to", "else/fair").error
    monkeypatch.delenv("HF_TOKEN")
    assert "A job needs a Hub token that may write there, and there is none" in train(workspace, pairs_file).error
    assert not hub.jobs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--flavor", "h9000"], "--flavor must be one of cpu-basic"),
        (["--timeout", "20m"], "--timeout must be 30m or more"),
        (["--timeout", "soon"], "--timeout must be a number with s, m, h or d"),
        (["--push-to", "fair"], "--push-to must be OWNER/NAME"),
        (["--push-to", "a b/c"], "--push-to can't be the name of a repository"),
        (["--push-to", "a/b--c"], "--push-to can't be the name of a repository"),
        (["--model", str(Path(__file__).parent)], "A job needs a model of the catalog or the Hub"),
        (["--resume"], "starts new runs only"),
        (["--on", "here"], "only with --on hf-jobs"),
    ],
)
def test_what_can_not_be_sent_is_one_line(words, message, workspace, pairs_file):
    assert message in train(workspace, pairs_file, *words).error


@pytest.mark.slow
def test_the_script_trains_within_its_time_and_pushes(hub, workspace, pairs_file, tiny_bytes, tmp_path, monkeypatch):
    mount = tmp_path / "mount"
    monkeypatch.setattr(hf_jobs, "MOUNT", str(mount))
    monkeypatch.setattr(hf_jobs, "WORKSPACE", str(tmp_path / "there"))
    config = TrainConfig(model=str(tiny_bytes), datasets=(str(pairs_file),), max_steps=2, accelerate="cpu", threads=1)
    order = hf_jobs.write_inputs(hf_jobs.Order(config, "first", "ana/fair", "cpu-basic", 2400), workspace, mount)
    tools = tmp_path / "tools"
    tools.mkdir()
    real = shutil.which("hf", path=str(Path(sys.executable).parent))
    for name, text in {"pip": "exit 0", "hf": f'[ "$1" = download ] || exec {real} "$@"'}.items():  # all is installed here
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    hub.create("model", "ana/fair", private=True)
    environment = os.environ | hub.environment() | {"PATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(["bash", "-c", hf_jobs.job_script(order)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ran = json.loads((tmp_path / "there" / "runs" / "first" / "config.json").read_text())
    assert 29 <= ran["max_minutes"] <= 30  # of 40, 10 are for the push
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= set(hub.repository("model", "ana/fair").files)


def test_no_time_and_a_time_limit_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "code").mkdir()
    monkeypatch.setattr(hf_jobs, "MOUNT", str(tmp_path))
    for name in ("pip", "hf"):
        (tmp_path / name).write_text("#!/bin/sh\n")
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    for name in ("pip", "hf", "python"):
        (tmp_path / name).chmod(0o755)

    def run(seconds: int, minutes: float) -> subprocess.CompletedProcess[str]:
        order = hf_jobs.Order(TrainConfig(model="smollm2", max_minutes=minutes), "first", "ana/fair", "cpu-basic", seconds)
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        return subprocess.run(["bash", "-c", hf_jobs.job_script(order)], env=path, capture_output=True, text=True, timeout=30)

    assert run(3600, 0.5).stdout.endswith("--max-minutes=1\n")
    assert run(3600, 600).stdout.split("=")[-1].strip() in ("49", "50")
    late = run(630, 0)  # installing took the rest
    assert (late.returncode, late.stdout) == (1, "")
    assert "No time is left to train" in late.stderr


def test_a_space_without_a_gpu_does_not_train(workspace, monkeypatch):
    monkeypatch.setenv("SPACE_ID", "ana/biasdpo")
    with pytest.raises(RunError, match=r"This Space can't train: .* --on hf-jobs"):
        store.start_training(TrainConfig(model="smollm2"), workspace, "first")
