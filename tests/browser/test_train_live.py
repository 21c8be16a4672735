"""A run that goes on, as the page shows it. The test plays the training process: it writes what that would write."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import psutil
import pytest

from biasdpo.jobs.job import JobFolder
from biasdpo.workspace import Workspace
from tests.app_process import running_app
from tests.browser.trainer import Trainer
from tests.run_folders import metrics, probe, write_lines, write_run


@dataclass
class Played:
    """A run whose process is this test's own."""

    folder: JobFolder

    def at(self, step: int, **status: Any) -> None:
        """Write what a training writes at a step."""
        write_lines(self.folder.metrics, metrics(step, 40, 1e-4))
        write_lines(self.folder.speed, [{"step": i, "tokens_per_second": 800, "seconds": i} for i in range(1, step + 1)])
        write_lines(self.folder.probes, [row for at in range(0, step + 1, 20) for row in probe(at)])
        self.folder.write_status(replace(self.folder.read_status(), step=step, **status))


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("live"))


@pytest.fixture(scope="module")
def live_app(browser, played: Workspace) -> Iterator[str]:  # noqa: ARG001 (no browser, no app)
    with running_app(played.root, "--model", "smollm2") as url:
        yield url


def _me() -> dict[str, Any]:
    return {"pid": os.getpid(), "pid_created": psutil.Process().create_time()}


def play(workspace: Workspace, run_id: str) -> Played:
    status = {**_me(), "phase": "training", "eta_seconds": 300.0, "tokens_per_second": 801.6}
    return Played(write_run(workspace.root, run_id, "running", steps=8, status=status))


def test_the_panel_follows_the_run_to_its_end(new_visitor, live_app, played):
    run = play(played, "followed")
    waiting = write_run(played.root, "waiting", "queued", steps=0, total=0, status=_me() | {"waits_for": "followed"})
    trainer = Trainer(new_visitor(live_app)).open()
    trainer.wait_run("followed", "step 8 of 40")  # the one that trains, not the newest
    trainer.wait_run("followed", "about 5 min left")
    trainer.wait_run("followed", "802 tokens/s")
    trainer.page.wait_for_selector("#train-table tr[data-id=waiting] .bd-waits:has-text('waits for followed')")
    assert trainer.page.locator("#train-charts .bd-key-best").count() == 0
    run.at(24, best_step=20, best_accuracy=0.69, eta_seconds=100.0)
    trainer.wait_run("followed", "step 24 of 40")
    trainer.page.wait_for_selector("#train-charts figure[data-name=loss] .bd-key-best:has-text('best: step 20')")
    trainer.page.wait_for_selector("#train-probe-position:has-text('After step 20')")
    assert trainer.page.locator("#train-stop").is_visible()
    assert trainer.page.locator("#train-delete").count() == 0  # not while it trains
    run.at(40, state="finished", phase="", eta_seconds=0.0)
    trainer.wait_state("followed", "finished")
    trainer.page.wait_for_selector("#train-stop", state="detached")
    trainer.page.wait_for_selector("#train-delete")
    waiting.write_status(replace(waiting.read_status(), state="stopped"))


def test_what_is_drawn_anew_takes_neither_focus_nor_cross_hair_away(new_visitor, live_app, played):
    run = play(played, "watched")
    trainer = Trainer(new_visitor(live_app)).open()
    trainer.wait_run("watched", "step 8 of 40")
    trainer.page.focus("#train-table tr[data-id=watched] button")
    run.at(10)
    trainer.wait_run("watched", "step 10 of 40")
    trainer.page.wait_for_selector("#train-table tr[data-id=watched]:has-text('10 / 40')")
    trainer.page.wait_for_function("() => document.activeElement?.closest('tr')?.dataset.id === 'watched'")
    plot = "#train-charts figure[data-name=loss] .bd-plot"
    tip = "#train-charts figure[data-name=loss] .bd-tip"
    trainer.page.focus(plot)
    for _ in range(3):
        trainer.page.keyboard.press("ArrowRight")
    trainer.page.wait_for_selector(f"{tip}:has-text('step 3')")
    run.at(12)
    trainer.page.wait_for_function(
        "() => JSON.parse(document.querySelector('#train-charts figure[data-name=loss]').dataset.curves)[0].points.length === 12"
    )
    trainer.page.wait_for_selector(f"{tip}:has-text('step 3')")
    trainer.page.keyboard.press("ArrowRight")
    trainer.page.wait_for_selector(f"{tip}:has-text('step 4')")
    run.at(12, state="failed", error="The disk is full: free some space, then resume the run")
    trainer.page.wait_for_selector("#train-head [role=alert]:has-text('The disk is full')")


def test_a_run_whose_process_is_gone_is_interrupted(new_visitor, live_app, played):
    run = play(played, "killed")
    trainer = Trainer(new_visitor(live_app)).open()
    trainer.wait_run("killed", "step 8 of 40")
    run.at(9, pid_created=1.0)  # as it is when another process has its number now
    trainer.wait_state("killed", "interrupted")
    trainer.page.wait_for_selector("#train-head [role=alert]:has-text('ended without a word at step 9')")
    trainer.page.wait_for_selector("#train-resume")
