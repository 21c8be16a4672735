"""Training runs as a user has them: the command line, and processes that are stopped, killed and go wrong."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from biasdpo import dataset, models, runs
from biasdpo.errors import RefusedError, RunError
from biasdpo.run_config import RunConfig
from biasdpo.run_folder import RunFolder, Status
from biasdpo.workspace import Workspace
from tests.byte_model import save_tiny_llama

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 120


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pairs, no prompt nearly another (those would all be on one side of the split); a model of bytes learns at once that
    chosen ends otherwise than rejected."""
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    lines = [
        {"prompt": f"Is a{i} more b{i} than c{i}?", "chosen": f"Neither of the {i}.", "rejected": f"They are worse {i}!"}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@dataclass
class CommandLine:
    """`python -m biasdpo` in a workspace of its own. Runs that still train at the end of a test are killed by their pid."""

    workspace: Workspace
    model: Path
    rows: Path
    run_ids: list[str] = field(default_factory=list)

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "biasdpo", *arguments, "--workspace", str(self.workspace.root)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)

    def train(self, run_id: str, *settings: str, arguments: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        self.run_ids.append(run_id)
        sets = [part for setting in SMALL + settings for part in ("--set", setting)]
        files = ("--model", str(self.model), "--dataset", str(self.rows))
        return self("train", *files, "--run-id", run_id, *sets, "--json", *arguments)

    def start(self, run_id: str, **settings: Any) -> RunFolder:
        """Start a run without waiting for it."""
        self.run_ids.append(run_id)
        small: dict[str, Any] = {"max_steps": 6, "batch_size": 2, "gradient_accumulation": 1, "rank": 2, "save_steps": 2}
        config = RunConfig(model=str(self.model), datasets=(str(self.rows),), threads=1, **(small | settings))
        return runs.start(config, run_id, self.workspace)


SMALL = ("max_steps=6", "batch_size=2", "gradient_accumulation=1", "rank=2", "save_steps=2", "threads=1", "beta=0.5")


@pytest.fixture
def command_line(tmp_path: Path, tiny: Path, rows: Path) -> Iterator[CommandLine]:
    line = CommandLine(Workspace(tmp_path / "workspace"), tiny, rows)
    yield line
    for run_id in line.run_ids:
        folder = RunFolder(line.workspace.run_folder(run_id))
        if folder.status_file.is_file():
            kill(folder.read_status())


def kill(status: Status) -> None:
    if status.pid and psutil.pid_exists(status.pid):
        process = psutil.Process(status.pid)
        if abs(process.create_time() - status.pid_created) < 1:
            process.kill()


def wait_for(folder: RunFolder, condition: Callable[[runs.Run], bool]) -> runs.Run:
    end = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < end:
        run = runs.poll(folder)
        if condition(run):
            return run
        time.sleep(0.05)
    raise AssertionError(f"still {run.status} after {TIMEOUT_SECONDS} s; {folder.log.read_text()[-2000:]}")


def test_a_run_from_the_data_to_the_adapter(command_line: CommandLine) -> None:
    result = command_line.train("first", "learning_rate=0.01", "max_steps=12", "eval_every=6")
    assert result.returncode == 0, result.stderr
    shown = json.loads(result.stdout)
    assert (shown["state"], shown["step"], shown["total_steps"], shown["error"]) == ("finished", 12, 12, "")

    # The folder holds what DESIGN says, and the data's hash leads back to the rows.
    folder = RunFolder(Path(shown["folder"]))
    assert hashlib.sha256(folder.snapshot.read_bytes()).hexdigest() == shown["dataset_sha256"]
    pairs = dataset.load_jsonl(folder.snapshot)
    parts = dataset.split(pairs, 0.1)
    assert len(pairs) == 40
    lines = folder.read_metrics()
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "eval_loss" in line] == [6, 12]
    assert {"rewards/margins", "rewards/accuracies", "logps/chosen"} <= lines[0].keys()
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # policy = reference: -log(1/2)
    assert folder.log.stat().st_size > 0

    # The adapter: three files, F16, no pickle; its path of this machine is nowhere but in the model's id.
    assert sorted(p.name for p in folder.adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "provenance.json",
    ]
    config = json.loads((folder.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "model"
    tensors = load_file(folder.adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float16)}
    assert any(np.abs(tensor).max() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    provenance = json.loads((folder.adapter / "provenance.json").read_text())
    assert provenance["rows"] == {"train": len(parts.train), "held_out": len(parts.held_out)}
    assert provenance["dataset_files"] == ["pairs.jsonl"]
    assert provenance["base_sha256"] == hashlib.sha256((command_line.model / "model.safetensors").read_bytes()).hexdigest()
    assert provenance["command"].startswith("python -m biasdpo train --model model --dataset pairs.jsonl --run-id first --set")

    # It learned: on held-out pairs, rewards say so, and the model itself prefers what it did not before.
    scores = provenance["metrics"]["held_out"]
    assert scores["pairs"] == len(parts.held_out) > 0
    assert scores["reward_accuracy"] == 1.0
    assert scores["reward_margin_nats"] > 0.5
    assert scores["length_normalised_accuracy_tuned"] >= scores["length_normalised_accuracy_base"]
    assert scores["kl_base_to_tuned_nats_per_token"] > 0

    # The other commands see it too.
    assert json.loads(command_line("runs", "show", "first", "--json").stdout) == shown
    assert [json.loads(line)["id"] for line in command_line("runs", "list", "--json").stdout.splitlines()] == ["first"]
    assert models.from_run(command_line.workspace, "first").dataset_sha256 == shown["dataset_sha256"]
    again = command_line.train("first")
    assert again.returncode == 2
    assert "exists already" in again.stderr
    assert "nothing to stop" in command_line("runs", "stop", "first").stderr


def test_the_same_run_twice_gives_the_same_adapter(command_line: CommandLine) -> None:
    hashes = set()
    for run_id in ("one", "two"):
        shown = json.loads(command_line.train(run_id, "learning_rate=0.01").stdout)
        hashes.add(hashlib.sha256((Path(shown["adapter"]) / "adapter_model.safetensors").read_bytes()).hexdigest())
    assert len(hashes) == 1


def test_two_processes_give_the_curve_of_one(command_line: CommandLine) -> None:
    curves = []
    for processes, batch_size in ((1, 4), (2, 2)):  # the same pairs a step
        shown = json.loads(
            command_line.train(
                f"by-{processes}", "learning_rate=0.01", f"batch_size={batch_size}", arguments=("--num-processes", str(processes))
            ).stdout
        )
        curves.append([line["loss"] for line in RunFolder(Path(shown["folder"])).read_metrics()])
    assert len(curves[0]) == 6
    assert curves[1] == pytest.approx(curves[0], abs=1e-3)
    assert curves[0][-1] < curves[0][0] - 0.01  # else equal curves would show nothing


def test_strength_is_baked_into_the_adapter(command_line: CommandLine) -> None:
    tensors = []
    for run_id, strength in (("whole", 1.0), ("half", 0.5)):
        settings = ("learning_rate=0.01", f"strength={strength}", "adapter_dtype=float32")
        shown = json.loads(command_line.train(run_id, *settings).stdout)
        tensors.append(load_file(Path(shown["adapter"]) / "adapter_model.safetensors"))
    whole, half = tensors
    for name in whole:
        np.testing.assert_array_equal(half[name], whole[name] * (0.5 if "lora_B" in name else 1.0))


def test_stop_saves_a_checkpoint_and_resume_ends_as_if_never_stopped(command_line: CommandLine) -> None:
    settings = {"max_steps": 60, "save_steps": 20, "learning_rate": 0.01}  # long enough to be stopped in the middle
    whole = wait_for(command_line.start("whole", **settings), lambda run: run.status.state == "finished").folder
    folder = command_line.start("stopped", **settings)
    wait_for(folder, lambda run: run.status.step >= 1)
    stopping = command_line("runs", "stop", "stopped", "--json")
    assert json.loads(stopping.stdout)["state"] in ("stopping", "stopped")
    stopped = wait_for(folder, lambda run: run.status.state not in ("running", "stopping"))
    assert stopped.status.state == "stopped"
    assert 1 <= stopped.status.step < 60
    checkpoint = folder.last_checkpoint()
    assert checkpoint is not None
    assert checkpoint.name == f"checkpoint-{stopped.status.step}"
    assert not folder.adapter.exists()

    resumed = command_line("train", "--run-id", "stopped", "--resume", "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["state"] == "finished"
    losses = [[line["loss"] for line in each.read_metrics()] for each in (whole, folder)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    again = command_line("train", "--run-id", "stopped", "--resume")
    assert (again.returncode, "only a stopped, interrupted or failed run" in again.stderr) == (2, True)
    with_settings = command_line("train", "--run-id", "stopped", "--resume", "--set", "beta=1")
    assert (with_settings.returncode, "--set" in with_settings.stderr) == (2, True)


def test_ctrl_c_asks_the_run_to_stop(command_line: CommandLine) -> None:
    folder = RunFolder(command_line.workspace.run_folder("interactive"))
    command_line.run_ids.append("interactive")
    sets = [part for setting in (*SMALL, "max_steps=5000") for part in ("--set", setting)]
    files = ["--model", str(command_line.model), "--dataset", str(command_line.rows), "--workspace"]
    arguments = [*files, str(command_line.workspace.root), "--run-id", "interactive", *sets]
    process = subprocess.Popen(
        [sys.executable, "-m", "biasdpo", "train", *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < end and not (folder.status_file.is_file() and folder.read_status().step >= 1):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 2
    assert "was stopped at step" in stderr.splitlines()[-1]
    assert "--resume" in stderr.splitlines()[-1]
    assert folder.read_status().state == "stopped"


def test_a_killed_process_is_seen_as_interrupted(command_line: CommandLine) -> None:
    folder = command_line.start("killed", max_steps=5000)
    run = wait_for(folder, lambda run: run.status.step >= 3)
    assert run.status.state == "running"
    os.kill(run.status.pid, signal.SIGKILL)
    interrupted = wait_for(folder, lambda run: run.status.state != "running")
    assert interrupted.status.state == "interrupted"
    assert "--run-id killed --resume" in interrupted.status.error
    shown = json.loads(command_line("runs", "show", "killed", "--json").stdout)
    assert (shown["state"], shown["error"]) == ("interrupted", interrupted.status.error)
    assert folder.last_checkpoint() is not None


def test_alive_means_pid_and_creation_time_and_no_zombie(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    me = psutil.Process()
    folder.write_status(Status("running", pid=me.pid, pid_created=me.create_time()))
    assert runs.poll(folder).status.state == "running"
    folder.write_status(Status("running", pid=me.pid, pid_created=me.create_time() - 60))  # the pid was given anew
    assert runs.poll(folder).status.state == "interrupted"
    child = subprocess.Popen([sys.executable, "-c", ""])
    created = psutil.Process(child.pid).create_time()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    folder.write_status(Status("running", pid=child.pid, pid_created=created))
    assert runs.poll(folder).status.state == "interrupted"
    child.wait()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (("learning_rate=1", "max_steps=200", "max_grad_norm=1e6", "beta=1000", "alpha=4096"), "loss became nan"),
        (('target_modules=["Wqkv"]',), "target_modules Wqkv: no such layers"),
        (("max_length=16",), "No rows to train on"),
    ],
)
def test_what_goes_wrong_in_the_process_is_one_line(command_line: CommandLine, settings: tuple[str, ...], reason: str) -> None:
    result = command_line.train("bad", *settings)
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("biasdpo: Run 'bad' failed: ")
    assert reason in last
    status = json.loads(result.stdout)
    assert status["state"] == "failed"
    assert reason in status["error"]
    assert not (Path(status["folder"]) / "adapter").exists()


def test_data_changed_under_a_run_is_refused(command_line: CommandLine) -> None:
    folder = command_line.start("changed", max_steps=5000)
    wait_for(folder, lambda run: run.status.step >= 1)
    runs.stop("changed", command_line.workspace)
    wait_for(folder, lambda run: run.status.state == "stopped")
    with folder.snapshot.open("a") as file:
        file.write("\n")
    result = command_line("train", "--run-id", "changed", "--resume")
    assert result.returncode == 2
    assert "was changed after the run was started" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--run-id", "x", "--dataset", "ROWS"), "No model to train"),
        (("--run-id", "x", "--model", "MODEL"), "No data to train on"),
        (("--run-id", "x", "--model", "gpt-7", "--dataset", "ROWS"), "Unknown model 'gpt-7': choose one of smollm2"),
        (("--run-id", "x", "--model", "MODEL", "--dataset", "none.jsonl"), "No dataset file"),
        (("--run-id", "../x", "--model", "MODEL", "--dataset", "ROWS"), "A run id is 1 to 64 letters"),
        (("--run-id", "x", "--model", "MODEL", "--dataset", "ROWS", "--set", "beta=0"), "beta must be a number"),
        (("--run-id", "x", "--model", "MODEL", "--dataset", "ROWS", "--num-processes", "0"), "num_processes must be"),
        (("--run-id", "x", "--resume"), "No run 'x'"),
    ],
)
def test_wrong_use_is_one_line_and_makes_no_run(command_line: CommandLine, arguments: tuple[str, ...], reason: str) -> None:
    names = {"ROWS": str(command_line.rows), "MODEL": str(command_line.model)}
    result = command_line("train", *(names.get(part, part) for part in arguments))
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert reason in result.stderr
    assert list(command_line.workspace.runs.glob("*")) == []


def test_a_public_space_refuses_to_train(tmp_path: Path, tiny: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "someone/space")
    config = RunConfig(model=str(tiny), datasets=(str(rows),))
    with pytest.raises(RefusedError):
        runs.start(config, "x", Workspace(tmp_path))
    with pytest.raises(RefusedError):
        runs.resume("x", Workspace(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_run_lists_the_known(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    RunFolder(workspace.run_folder("mine")).write_status(Status("finished"))
    with pytest.raises(RunError, match=r"No run 'yours' .* there are mine"):
        runs.show("yours", workspace)


def test_over_long_rows_are_counted_and_said(command_line: CommandLine) -> None:
    # "Is a10 more b10 than c10?" has 25 bytes, "Neither of the 10." and "They are worse 10!" 18, and an end: 44 tokens, as
    # numbers 10 to 39 have; the ten with one digit less have 40.
    result = command_line.train("long", "max_length=43", "max_steps=1", "held_out_share=0.0")
    assert result.returncode == 0, result.stderr
    notes = json.loads(result.stdout)["notes"]
    assert "max_length 43: 0 training pairs dropped (prompt too long), 30 with a completion cut" in notes
    assert json.loads(result.stdout)["metrics"] == {"held_out": None}
