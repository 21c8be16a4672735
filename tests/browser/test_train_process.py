"""Runs that are started, stopped, resumed and queued in the page, with their real processes and a model of 20,000 parameters."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from biasdpo.jobs.job import JobFolder
from tests.browser.conftest import SLOW_MS, App
from tests.browser.trainer import Trainer

pytestmark = pytest.mark.slow
SMALL = {"batch_size": "2", "gradient_accumulation": "1", "rank": "2", "eval_every": "0", "threads": "1"}
ENDLESS = "200000"  # steps: a run that is there until it is stopped


@pytest.fixture
def trainer(new_visitor) -> Trainer:
    return Trainer(new_visitor())


def step_of(app: App, run_id: str) -> int:
    return JobFolder(app.workspace.run_folder(run_id)).read_status().step


def wait_step(app: App, run_id: str, step: int) -> None:
    end = time.monotonic() + SLOW_MS / 1000
    while step_of(app, run_id) < step:
        assert time.monotonic() < end, f"{run_id} stays at step {step_of(app, run_id)}"
        time.sleep(0.1)


def test_one_row_can_be_trained_on_and_its_adapter_compared(trainer, app, tiny_bytes, tmp_path):
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"prompt": "Is a0 more b0 than c0?", "chosen": "Neither.", "rejected": "They are worse!"}) + "\n")
    run_id = trainer.new_run(tiny_bytes, one, **SMALL, max_steps="2", probe_every="2")
    trainer.wait_mixture("1 to train on")
    trainer.start(run_id)
    trainer.wait_state(run_id, "finished", slow=True)
    trainer.wait_run(run_id, "step 2 of 2")
    trainer.page.wait_for_selector("#train-charts figure[data-name=loss]")
    trainer.visitor.wait("#train-probe-position", "After step 2")
    folder = JobFolder(app.workspace.run_folder(run_id))
    assert [row["step"] for row in folder.read_metrics() if "loss" in row] == [1, 2]
    trainer.page.click("#train-to-compare")  # the adapter is in the picker of another tab at once, and loads
    trainer.visitor.wait_proof(f"run {run_id}")


def test_stop_queue_reload_resume_and_the_app_killed_in_between(trainer, app, tiny_bytes: Path, pairs_file: Path):
    page, visitor = trainer.page, trainer.visitor
    run_id = trainer.new_run(tiny_bytes, pairs_file, **SMALL, max_steps=ENDLESS, save_steps="5", probe_every="0")
    trainer.start(run_id)
    trainer.wait_run(run_id, "of 200,000", slow=True)
    bad = trainer.new_run(tiny_bytes, pairs_file, **SMALL, max_steps="3", target_modules="no_such_layer", probe_every="0")
    assert bad != run_id
    trainer.start(bad)
    trainer.wait_run(bad, f"waits for {run_id}")

    trainer.choose(run_id)
    visitor.reload()
    trainer.wait_run(run_id, "training")  # the address names it
    page.click("#train-stop")
    visitor.wait("#train-notice", "Asked to stop")
    trainer.wait_state(run_id, "stopped", slow=True)
    stopped_at = step_of(app, run_id)
    trainer.wait_state(bad, "failed", slow=True)  # its turn came
    trainer.choose(bad)
    visitor.wait("#train-head [role=alert]", "no_such_layer")
    visitor.wait("#train-head [role=alert]", "choose")  # the remedy

    trainer.choose(run_id)
    page.click("#train-resume")
    trainer.wait_state(run_id, "running", slow=True)
    wait_step(app, run_id, stopped_at + 1)
    page.goto("about:blank")  # the page is closed
    app.kill()
    before = step_of(app, run_id)
    wait_step(app, run_id, before + 3)  # the run goes on
    app.start()
    trainer.open()
    trainer.wait_run(run_id, "training")  # the one that trains is shown
    page.wait_for_selector("#train-charts figure[data-name=loss]")
    page.click("#train-stop")
    trainer.wait_state(run_id, "stopped", slow=True)
    assert step_of(app, run_id) >= before + 3


def test_an_estimate_is_measured(trainer, tiny_bytes, pairs_file):
    trainer.new_run(tiny_bytes, pairs_file, **SMALL, max_steps="7", probe_every="0")
    trainer.page.click("#train-estimate")
    trainer.visitor.wait("#train-new-notice", "Measuring real steps")
    trainer.visitor.wait("#train-estimate-view .bd-estimate", "7 of", slow=True)
    trainer.visitor.wait("#train-estimate-view", "at the peak")
    trainer.visitor.set("train-max-steps", "8")  # what was measured is of another run
    trainer.visitor.wait_gone("#train-estimate-view .bd-estimate")
