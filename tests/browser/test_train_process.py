"""Runs that are started, stopped, resumed and queued in the page, with their real processes. SmolLM2 trains once; the rest is a
model of 20,000 random parameters."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from biasdpo import models
from biasdpo.jobs import store
from biasdpo.jobs.job import ACTIVE, JobFolder
from biasdpo.ui.train import SEED_SET
from biasdpo.workspace import Workspace
from tests.app_process import free_port, start_app, wait_for_page
from tests.browser.trainer import Trainer, write_pairs
from tests.byte_model import save_tiny_llama
from tests.run_line import kill

STARTED_SECONDS = 240  # libraries are loaded, on two cores that others may use, too
ENDLESS = "200000"  # steps: a run that is there until it is stopped


@dataclass
class Bench:
    """A workspace, an app over it that can be killed and started again at the same address, a tiny model and its data."""

    workspace: Workspace
    model: Path
    pairs: Path
    port: int

    def start_app(self) -> None:
        self.process = start_app(self.workspace.root, self.port, "--model", "smollm2")
        wait_for_page(self.url, self.process, self.workspace.root / "app.log")

    def kill_app(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def step(self, run_id: str) -> int:
        return JobFolder(self.workspace.run_folder(run_id)).read_status().step

    def wait_step(self, run_id: str, step: int) -> None:
        end = time.monotonic() + STARTED_SECONDS
        while self.step(run_id) < step:
            assert time.monotonic() < end, f"{run_id} stays at step {self.step(run_id)}"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def bench(browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:  # noqa: ARG001 (no browser, no app)
    root = tmp_path_factory.mktemp("bench")
    model = save_tiny_llama(root / "tiny")
    made = Bench(Workspace(root), model, write_pairs(root / "pairs.jsonl", 40), free_port())
    made.start_app()
    yield made
    made.kill_app()
    for run in store.list_jobs(made.workspace):
        if run.status.state in ACTIVE:
            kill(run.status)


@pytest.fixture
def trainer(new_visitor, bench: Bench) -> Trainer:
    return Trainer(new_visitor(bench.url)).open()


def test_a_whole_run_of_smollm2_on_16_seed_pairs(trainer, bench):
    seeds = bench.workspace.root / "seed16.jsonl"
    seeds.write_text("".join(SEED_SET.read_text(encoding="utf-8").splitlines(keepends=True)[:16]), encoding="utf-8")
    settings = {"max_steps": "2", "batch_size": "2", "gradient_accumulation": "1", "max_length": "256"}
    run_id = trainer.new_run(None, seeds, **settings, eval_every="0", probe_every="0", rank="4")
    assert run_id == "smollm2-1"
    trainer.start(run_id)
    trainer.wait_run(run_id, "training", STARTED_SECONDS)
    trainer.page.wait_for_selector("#train-charts figure[data-name=loss]", timeout=1000 * STARTED_SECONDS)
    trainer.wait_state(run_id, "finished", STARTED_SECONDS)
    trainer.page.wait_for_selector("#train-head:has-text('step 2 of 2')")
    assert [row["step"] for row in JobFolder(bench.workspace.run_folder(run_id)).read_metrics() if "loss" in row] == [1, 2]
    # The adapter is in the picker of another tab at once, and loads.
    assert models.from_run(bench.workspace, run_id).model == "smollm2"
    trainer.page.click("#train-to-compare")
    trainer.page.wait_for_selector(f"#proof .bd-facts:has-text('run {run_id}')", timeout=60_000)


def test_stop_reload_resume_and_the_app_killed_in_between(trainer, bench):
    settings = {"max_steps": ENDLESS, "batch_size": "2", "gradient_accumulation": "1", "save_steps": "5", "rank": "2"}
    run_id = trainer.new_run(bench.model, bench.pairs, **settings, eval_every="0", probe_every="0", threads="1")
    trainer.start(run_id)
    trainer.wait_run(run_id, "of 200,000", STARTED_SECONDS)
    bench.wait_step(run_id, 3)
    trainer.reload()
    trainer.wait_run(run_id, "training")  # the address names it
    trainer.page.click("#train-stop")
    trainer.page.wait_for_selector("#train-notice:has-text('Asked to stop')")
    trainer.wait_state(run_id, "stopped", STARTED_SECONDS)
    stopped_at = bench.step(run_id)
    trainer.page.wait_for_selector("#train-stop", state="detached")
    trainer.page.click("#train-resume")
    trainer.wait_state(run_id, "running", STARTED_SECONDS)
    bench.wait_step(run_id, stopped_at + 1)

    trainer.leave()  # the browser is closed
    bench.kill_app()
    seen = bench.step(run_id)
    bench.wait_step(run_id, seen + 3)  # the run went on
    bench.start_app()
    trainer.open()
    trainer.wait_run(run_id, "training")  # the one that trains is shown
    trainer.page.wait_for_selector("#train-charts figure[data-name=loss]")
    trainer.page.click("#train-stop")
    trainer.wait_state(run_id, "stopped", STARTED_SECONDS)
    assert bench.step(run_id) >= seen + 3


def test_runs_wait_in_line_and_a_failing_one_says_why(trainer, bench):
    small = {"batch_size": "2", "gradient_accumulation": "1", "rank": "2", "eval_every": "0", "threads": "1"}
    first = trainer.new_run(bench.model, bench.pairs, **small, probe_every="0", max_steps=ENDLESS)
    trainer.start(first)
    trainer.page.click("#train-new-button")
    bad = trainer.new_run(None, None, max_steps="3", target_modules="no_such_layer")
    trainer.start(bad)
    trainer.wait_run(bad, f"waits for {first}")
    trainer.page.click("#train-new-button")
    good = trainer.new_run(None, None, max_steps="4", target_modules="q_proj, v_proj", probe_every="2")
    assert len({first, bad, good}) == 3
    trainer.start(good)
    for waiting in (bad, good):
        trainer.page.wait_for_selector(f"#train-table tr[data-id='{waiting}'] .bd-waits:has-text('waits for {first}')")
    trainer.choose(first)
    trainer.page.click("#train-stop")
    trainer.wait_state(first, "stopped", STARTED_SECONDS)
    trainer.wait_state(bad, "failed", STARTED_SECONDS)
    trainer.choose(bad)
    alert = trainer.page.locator("#train-head [role=alert]")
    assert "no_such_layer" in alert.inner_text()
    assert "choose of" in alert.inner_text()  # the remedy
    trainer.choose(good)
    trainer.wait_state(good, "finished", STARTED_SECONDS)
    trainer.page.wait_for_selector("#train-probe-position:has-text('After step 4')")
    assert trainer.page.locator("#train-probes article").count() == 3


def test_one_row_can_be_trained_on(trainer, bench, tmp_path):
    one = write_pairs(tmp_path / "one.jsonl", 1)
    small = {"batch_size": "2", "gradient_accumulation": "1", "rank": "2", "probe_every": "0", "threads": "1"}
    run_id = trainer.new_run(bench.model, one, **small, max_steps="2")
    trainer.wait_mixture("1 to train on")
    trainer.start(run_id)
    trainer.wait_state(run_id, "finished", STARTED_SECONDS)
    trainer.page.wait_for_selector("#train-head:has-text('step 2 of 2')")


def test_an_estimate_is_measured_and_can_be_cancelled(trainer, bench):
    trainer.new_run(
        bench.model, bench.pairs, max_steps="7", batch_size="2", rank="2", eval_every="0", probe_every="0", threads="1"
    )
    trainer.page.click("#train-estimate")
    trainer.page.wait_for_selector("#train-new-notice:has-text('Measuring real steps')")
    trainer.page.click("#train-cancel")
    trainer.page.wait_for_selector("#train-new-notice:has-text('Cancelled')", timeout=60_000)
    trainer.page.wait_for_selector("#train-cancel", state="detached")
    trainer.page.click("#train-estimate")
    trainer.page.wait_for_selector("#train-estimate-view .bd-estimate", timeout=1000 * STARTED_SECONDS)
    said = trainer.page.inner_text("#train-estimate-view")
    for part in ("7 of", "at the peak", "Measured"):
        assert part in said
    trainer.set("train-max-steps", "8")  # what was measured is of another run
    trainer.page.wait_for_selector("#train-estimate-view .bd-estimate", state="detached")
