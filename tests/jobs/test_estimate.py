"""What a run will take: counted and measured on its own rows, remembered, and a refusal where it can't fit."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from biasdpo import models
from biasdpo.config import TrainConfig
from biasdpo.errors import RunError
from biasdpo.jobs import estimate, resolve, store
from biasdpo.jobs.estimate import Estimate
from biasdpo.jobs.job import Status
from biasdpo.workspace import Workspace, write_json
from tests.run_line import CommandLine, pretend

# 40 pairs, of which some 4 are held out; ten have numbers of one digit, thirty of two (see `pairs_file`).
FULL: dict[str, Any] = {"max_steps": 0, "batch_size": 2, "eval_every": 5, "probe_every": 10, "probe_prompts": ("Who?",)}


@pytest.mark.slow
def test_the_command_line_prints_it_and_starts_nothing(command_line: CommandLine) -> None:
    arguments = ["--model", str(command_line.model), "--dataset", str(command_line.rows), "--estimate"]
    settings = [part for name, value in FULL.items() if name != "probe_prompts" for part in ("--set", f"{name}={value}")]
    done = command_line("train", *arguments, *settings, "--set", "threads=1", "--set", 'probe_prompts=["Who?"]', "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(command_line.workspace.runs.glob("*")) == []
    train = found["pairs_train"]
    assert train + found["pairs_held_out"] == 40
    assert found["steps"] == math.ceil(math.ceil(train / 2) / 2)  # two batches of 2 a step
    assert (found["dropped"], found["cut"], found["device"], found["fits"], found["refusal"]) == (0, 0, "cpu", True, "")
    # 22 to 25 bytes of prompt, and two completions of 17 or 18 and an end each: 58 to 63 tokens a pair.
    assert 58 * train <= found["tokens_per_epoch"] <= 63 * train
    assert found["seconds_total"] == pytest.approx(sum(found["parts"].values()), abs=0.1)
    assert found["parts"]["training"] == pytest.approx(found["steps"] * found["seconds_per_step"], abs=0.01)
    assert all(found["parts"][name] > 0 for name in ("loading", "reference", "training", "evaluations", "probes", "scoring"))
    assert 200e6 < found["memory_bytes"] < 3e9  # torch and TRL, and a model that is nothing beside them
    assert found["memory_free_bytes"] > found["memory_bytes"]

    # Remembered for a config that costs the same, and for that alone.
    config = command_line.config(**FULL, gradient_accumulation=2, save_steps=50, rank=16)
    known = estimate.known_estimate(config, command_line.workspace)
    assert known is not None
    assert known.to_json() == found
    assert estimate.known_estimate(config.replace(learning_rate=0.5, seed=3), command_line.workspace) == known
    assert estimate.known_estimate(config.replace(batch_size=4), command_line.workspace) is None
    assert estimate.known_estimate(config.replace(datasets=("nowhere.jsonl",)), command_line.workspace) is None

    # What is remembered not to fit is refused at once, unless memory has come free.
    path = estimate._estimate_file(config, command_line.workspace)
    much = replace(known, memory_bytes=10**15, fits=False, refusal="too much")
    path.write_text(json.dumps(asdict(much)))
    with pytest.raises(RunError, match=r"The run needs 1000000.0 GB of memory at its peak on cpu, .* lower batch_size") as caught:
        store.start_training(config, command_line.workspace, "big")
    assert "\n" not in str(caught.value)
    assert not (command_line.workspace.runs / "big").exists()
    path.write_text(json.dumps(asdict(replace(much, fits=True, refusal=""))))  # it fitted then
    with pytest.raises(RunError, match=r"The run needs 1000000.0 GB"):
        store.start_training(config, command_line.workspace, "big")
    path.write_text(json.dumps(asdict(replace(much, memory_bytes=1))))
    estimate.refuse_oversized_run(config, models.find(config.model), command_line.workspace)


def test_what_would_wait_for_another_run_is_not_refused(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    config = command_line.config()
    spec = models.find(config.model)
    monkeypatch.setattr(estimate, "free_memory_bytes", lambda _device: 1)
    monkeypatch.setattr(estimate, "device_of_training", lambda _config: "cpu")
    pretend(command_line.workspace, "runs/elsewhere", "gpu")
    with pytest.raises(RunError, match="can't be trained here"):
        estimate.refuse_oversized_run(config, spec, command_line.workspace)
    other = pretend(command_line.workspace, "runs/other")
    estimate.refuse_oversized_run(config, spec, command_line.workspace)
    other.write_status(Status("finished"))
    with pytest.raises(RunError, match="can't be trained here"):
        estimate.refuse_oversized_run(config, spec, command_line.workspace)


def test_what_was_measured_beside_a_run_is_not_remembered(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    config = command_line.config()
    measured = Estimate(
        **dict.fromkeys(("steps", "pairs_train", "pairs_held_out", "dropped", "equal", "cut", "tokens_per_epoch"), 1),
        **dict.fromkeys(("seconds_per_step", "seconds_total"), 1.0),
        **dict.fromkeys(("memory_bytes", "memory_free_bytes"), 1),
        **dict.fromkeys(("refusal", "device", "measured_at"), ""),
        fits=True,
        parts={},
    )

    class Measured:  # instead of the measuring process
        returncode = 0

        def __init__(self, command: list[str], **_more: Any) -> None:
            write_json(Path(command[-2]), measured.to_json())

        def poll(self) -> int:
            return 0

    monkeypatch.setattr(subprocess, "Popen", Measured)
    other = pretend(command_line.workspace, "runs/other", resolve.device_of_training(config))
    assert estimate.estimate_training(config, command_line.workspace) == measured
    assert estimate.known_estimate(config, command_line.workspace) is None
    other.write_status(Status("finished"))
    assert estimate.estimate_training(config, command_line.workspace) == measured
    assert estimate.known_estimate(config, command_line.workspace) == measured


def test_a_failing_measurement_is_one_line(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.estimate import main

    class InThisProcess:
        returncode = 1

        def __init__(self, command: list[str], **_more: Any) -> None:
            main(command[-3:])

        def poll(self) -> int:
            return 1

    monkeypatch.setattr(subprocess, "Popen", InThisProcess)
    with pytest.raises(RunError, match="No rows to train on") as caught:
        estimate.estimate_training(command_line.config(max_length=16), command_line.workspace)
    assert "\n" not in str(caught.value)
    assert list((command_line.workspace.cache / "estimates").glob("*.json")) == []


def test_it_can_be_cancelled(command_line: CommandLine) -> None:
    asked: list[int] = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) > 3

    with pytest.raises(RunError, match="was cancelled"):
        estimate.estimate_training(command_line.config(), command_line.workspace, cancelled=cancelled)
    assert len(asked) == 4
    assert [path.name for path in (command_line.workspace.cache / "estimates").iterdir()] == ["last.log"]


def test_oversized_weights_are_refused_unmeasured(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    phi = replace(models.catalog()["phi-2"], hf_folder=Path("/nowhere"))
    monkeypatch.setattr(estimate, "free_memory_bytes", lambda _device: 8_000_000_000)
    config = TrainConfig(model="phi-2", accelerate="cpu")
    # 2,779,683,840 parameters of 4 bytes.
    with pytest.raises(RunError, match=r"Phi-2 can't be trained here: its weights alone take 11\.1 GB \(4 bytes each\), 8\.0 GB"):
        estimate.refuse_oversized_weights(config, phi, workspace)
    monkeypatch.setattr(models, "free_gpu_memory_gb", lambda: 8.0)
    on_gpu = TrainConfig(model="phi-2", precision="bf16")  # 2 bytes each: 5.6 GB
    estimate.refuse_oversized_weights(on_gpu, phi, workspace)
    with pytest.raises(RunError, match="of GPU memory are free"):
        estimate.refuse_oversized_weights(on_gpu.replace(precision="fp32"), phi, workspace)
    with pytest.raises(RunError, match=r"44\.5 GB \(4 bytes each, 4 times\)"):
        estimate.refuse_oversized_weights(config.replace(num_processes=4), phi, workspace)


def test_the_line_through_two_timed_batches() -> None:
    from training.estimate import Timed, linear, times

    median, longest = Timed(100, 2.0), Timed(300, 5.0)
    assert linear(100, median, longest) == 2.0
    assert linear(200, median, longest) == 3.5  # half way
    assert linear(50, Timed(100, 2.0), Timed(100, 2.0)) == 1.0  # one length: through nothing
    assert linear(1000, median, Timed(300, 1.0)) == 2.0  # a longer one that was faster is noise
    # 933 rows in batches of 4: 234 of them, two a step: 117 steps an epoch.
    assert TrainConfig(epochs=1.0).steps_for(933) == 117
    assert TrainConfig(epochs=2.5).steps_for(933) == 293
    assert TrainConfig(epochs=1.0, num_processes=2).steps_for(933) == 59
    assert TrainConfig(max_steps=20).steps_for(933) == 20
    assert [times(40, steps) for steps in (117, 120, 20)] == [3, 3, 1]  # and at the last step


def test_the_longest_row_is_among_those_measured(
    command_line: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six rows in batches of four: the median batch and the longest one share rows."""
    from training.estimate import measure
    from training.trainer import TokenizedDPOTrainer

    words = [f"{'word ' * 4**i}{i}" for i in range(1, 4)] + [f"A{i} or b{i}?" for i in range(3)]
    rows = [{"prompt": f"Who is {text}", "chosen": "Nobody.", "rejected": "They are."} for text in words]
    command_line.rows = tmp_path / "rows.jsonl"
    command_line.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    widths: list[int] = []
    step = TokenizedDPOTrainer.training_step

    def seen(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        widths.append(inputs["input_ids"].shape[1])
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(TokenizedDPOTrainer, "training_step", seen)
    config = command_line.config(batch_size=4, held_out_share=0.0, max_steps=0, epochs=1.0)
    measure(config, command_line.workspace, tmp_path, time.time())
    assert max(widths) > len(words[2]) > min(widths)


def test_a_parents_memory_is_not_the_childs():
    ballast = b"x" * 600_000_000
    code = "from biasdpo.jobs.estimate import peak_resident_bytes; print(peak_resident_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 10e6 < int(done.stdout) < len(ballast) / 2
