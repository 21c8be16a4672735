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


def step_of(app: App, run_id: str) -> int:
    return JobFolder(app.workspace.run_folder(run_id)).read_status().step


def wait_step(app: App, run_id: str, step: int) -> None:
    end = time.monotonic() + SLOW_MS / 1000
    while step_of(app, run_id) < step:
        assert time.monotonic() < end, f"{run_id} stays at step {step_of(app, run_id)}"
        time.sleep(0.1)


def test_stop_queue_reload_resume_and_the_app_killed_in_between(new_visitor, app, tiny_bytes: Path, pairs_file: Path, tmp_path):
    trainer = Trainer(new_visitor()).open()
    page = trainer.page
    trainer.new_run("endless", tiny_bytes, pairs_file, "pairs", **SMALL, max_steps=ENDLESS, save_steps="5", probe_every="0")
    one = tmp_path / "one.jsonl"  # a single pair can be trained on
    one.write_text(json.dumps({"prompt": "Is a0 more b0 than c0?", "chosen": "Neither.", "rejected": "They are worse!"}) + "\n")
    trainer.new_run("short", tiny_bytes, one, "1 pair", **SMALL, max_steps="2", probe_every="2")
    trainer.wait_head("short", "Waiting for endless")
    trainer.choose("endless")
    page.reload()
    trainer.wait_head("endless", "of 200,000 · training", slow=True)  # the address names it
    page.wait_for_selector("#train-loss .js-plotly-plot")
    page.click("#train-stop")
    trainer.wait_listed("endless", "Stopped", slow=True)
    stopped_at = step_of(app, "endless")
    trainer.choose("short")  # its turn came
    trainer.wait_head("short", "Finished", slow=True)
    trainer.wait_head("short", "No pairs were held out")
    trainer.visitor.wait("#train-probe-step", "after step 2")
    page.wait_for_selector("#train-to-compare")
    rows = JobFolder(app.workspace.run_folder("short")).read_metrics()
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]

    trainer.choose("endless")
    page.click("#train-resume")
    trainer.wait_listed("endless", "Running", slow=True)
    wait_step(app, "endless", stopped_at + 1)
    page.goto("about:blank")  # the page is closed
    app.kill()
    before = step_of(app, "endless")
    wait_step(app, "endless", before + 3)  # the run goes on
    app.start()
    trainer.open()
    trainer.wait_head("endless", "training")  # the one that trains is shown
    page.click("#train-stop")
    trainer.wait_listed("endless", "Stopped", slow=True)
    assert step_of(app, "endless") >= before + 3


def test_an_estimate_is_measured_and_can_be_cancelled(new_visitor, tiny_bytes, pairs_file):
    trainer = Trainer(new_visitor()).open()
    visitor, page = trainer.visitor, trainer.page
    trainer.choose_data(pairs_file)
    visitor.wait(trainer.line, "pairs")
    trainer.choose_model(tiny_bytes)
    trainer.set(**SMALL, max_steps="7")
    page.click("#train-estimate")
    visitor.wait("#train-cost", "measuring a few steps")
    page.click("#train-cancel")
    visitor.wait("#train-cost", "Cancelled")
    page.wait_for_timeout(2000)  # until then Gradio takes the event for one that still runs, and drops a second one
    page.click("#train-estimate")
    visitor.wait("#train-cost", "(7 steps)", slow=True)
    visitor.wait("#train-cost", "GB are free")
    trainer.set(max_steps="8")  # what was measured is of another run
    visitor.wait("#train-cost", "not measured for these settings yet")
