"""The Train tab: runs that have ended, one that goes on (the test plays its process), and the panel for a new one."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from biasdpo.jobs.job import JobFolder
from biasdpo.workspace import Workspace
from tests.browser.conftest import App
from tests.browser.trainer import Trainer
from tests.run_folders import metrics, probe, write_lines, write_run


@pytest.fixture(scope="module")
def library(app: App) -> Workspace:
    """The shared workspace with two finished runs and one that failed."""
    root = app.workspace.root
    write_run(root, "first", status={"best_step": 30, "best_accuracy": 0.785, "notes": ("232 pairs to train on",)})
    write_run(root, "second", learning_rate=1e-4, beta=0.3, probe_every=0).probes.unlink()
    hot = {"error": "The loss became nan at step 12: lower learning_rate, and resume", "best_step": 10, "best_accuracy": 0.5}
    write_run(root, "too-hot", "failed", steps=12, status=hot)
    return app.workspace


@pytest.fixture
def trainer(new_visitor, library: Workspace) -> Trainer:  # noqa: ARG001
    return Trainer(new_visitor()).open()


# Runs that have ended


def test_a_finished_run_with_its_numbers_curves_and_probes(trainer):
    visitor, page = trainer.visitor, trainer.page
    trainer.choose("first")
    head = page.inner_text("#train-head")
    for part in ("finished", "step 40 of 40", "0.885", "picking the longer: 0.615", "step 30", "232 pairs to train on"):
        assert part in head
    trainer.wait_address("run=first")
    assert page.locator("#train-charts figure").count() == 5  # loss, margin, accuracy, learning rate, speed
    csv = visitor.save("#train-charts figure[data-name=accuracies] button[data-curve=csv]").read_text().splitlines()
    assert csv[0] == "curve,step,value"
    assert '"held-out",40,0.88' in csv  # 0.5 + 0.38 * 40/40
    assert sum(line.startswith('"train",') for line in csv) == 40
    visitor.wait("#train-probe-position", "After step 40 · probe 3 of 3, the latest")
    assert "as 40 steps have taught" in page.inner_text("#train-probes .bd-probe-tuned >> nth=0")
    page.click("#train-probe-earlier")
    visitor.wait("#train-probe-position", "probe 2 of 3")
    page.click("#train-probe-earlier")
    visitor.wait("#train-probes", "the same so far")
    visitor.unfold("train-details")
    assert "3fa9c1d2" * 8 in page.inner_text("#train-details")
    visitor.unfold("train-log")
    visitor.wait("#train-log .bd-log", "step 40 of 40")
    visitor.reload()
    trainer.wait_run("first")  # the address names the run
    visitor.tab("Data set")
    trainer.wait_address("run=", there=False)


def test_notes_stay_with_their_run(trainer, library):
    trainer.choose("second")
    trainer.page.fill("#train-note textarea", "Lower the beta <b>next</b> time.")
    trainer.page.click("#train-save-note")
    trainer.visitor.wait("#train-note-saved", "Saved with run second")
    assert JobFolder(library.run_folder("second")).read_note() == "Lower the beta <b>next</b> time."
    trainer.choose("first")
    trainer.page.wait_for_function("() => document.querySelector('#train-note textarea').value === ''")
    trainer.choose("second")
    trainer.page.wait_for_function("() => document.querySelector('#train-note textarea').value.startsWith('Lower')")


def test_a_failed_run_says_why_and_retry_takes_its_settings_over(trainer):
    trainer.choose("too-hot")
    trainer.visitor.wait("#train-head [role=alert]", "The loss became nan at step 12: lower learning_rate, and resume")
    trainer.page.wait_for_selector("#train-resume")
    trainer.choose("second")
    trainer.page.click("#train-retry")
    for field, value in (("learning-rate", "0.0001"), ("beta", "0.3"), ("max-steps", "40")):
        trainer.visitor.wait_value(f"train-{field}", value)
    trainer.wait_mixture("258 rows read")
    trainer.visitor.set("train-run-id", "second")
    trainer.page.click("#train-start")
    trainer.visitor.wait("#train-new-notice .bd-error", "already exists")


def test_deleting_asks_and_says_what_is_lost(trainer, library):
    write_run(library.root, "unwanted", "stopped", steps=8)  # as one that the command line has started
    page, visitor = trainer.page, trainer.visitor
    trainer.choose("unwanted")
    page.click("#train-delete")
    visitor.wait("#train-confirm-text", "Delete run unwanted?")
    trainer.choose("too-hot")  # another run meanwhile: the question is gone with its own
    visitor.wait_gone("#train-really-delete")
    trainer.choose("unwanted")
    page.click("#train-delete")
    visitor.wait("#train-confirm-text", "snapshot of the data")
    page.wait_for_function("() => document.activeElement?.id === 'train-keep'")
    page.keyboard.press("Enter")
    visitor.wait_gone("#train-really-delete")
    assert library.run_folder("unwanted").is_dir()
    page.click("#train-delete")
    page.click("#train-really-delete")
    visitor.wait("#train-notice", "Run unwanted was deleted")
    assert not library.run_folder("unwanted").exists()
    assert page.locator("#train-table tr[data-id=unwanted]").count() == 0


def test_runs_are_compared_in_one_chart(trainer):
    trainer.page.click("#train-several")
    trainer.page.wait_for_selector("#train-comparison figure")
    trainer.pick_runs("first", "second")
    trainer.visitor.wait("#train-comparison figure[data-name=compare-loss] .bd-legend", "first, train")
    csv = trainer.visitor.save("#train-comparison figure[data-name=compare-accuracies] button[data-curve=csv]")
    assert '"second, held-out",40,0.88' in csv.read_text().splitlines()
    differs = trainer.page.inner_text("#train-comparison table >> nth=1")
    assert all(part in differs for part in ("learning_rate", "beta", "0.3"))
    assert "max_steps" not in differs


def test_a_finished_run_is_exported_and_goes_to_compare(trainer):
    trainer.choose("first")
    trainer.page.click("#train-export-zip")
    trainer.visitor.wait("#train-download", ".zip")
    assert "adapter_model.safetensors" in zipfile.ZipFile(trainer.visitor.save("#train-download")).namelist()
    trainer.page.click("#train-to-compare")
    trainer.visitor.wait_proof("run first")
    trainer.page.wait_for_function("() => document.querySelector('#adapter input').value.startsWith('first')")
    trainer.wait_address("run=", there=False)


# A run that goes on


def _me() -> dict[str, Any]:
    return {"pid": os.getpid(), "pid_created": psutil.Process().create_time()}


class Played:
    """A run whose process is this test's own."""

    def __init__(self, folder: JobFolder) -> None:
        self.folder = folder

    def at(self, step: int, **status: Any) -> None:
        """Write what a training writes at a step."""
        write_lines(self.folder.metrics, metrics(step, 40, 1e-4))
        write_lines(self.folder.probes, [row for at in range(0, step + 1, 20) for row in probe(at)])
        self.folder.write_status(replace(self.folder.read_status(), step=step, **status))


@contextmanager
def playing(workspace: Workspace, run_id: str) -> Iterator[Played]:
    status = {**_me(), "phase": "training", "eta_seconds": 300.0, "tokens_per_second": 801.6}
    played = Played(write_run(workspace.root, run_id, "running", steps=8, status=status))
    try:
        yield played
    finally:
        played.at(8, state="stopped")


def test_the_panel_follows_a_run_to_its_end(new_visitor, library):
    with playing(library, "followed") as run:
        waiting = write_run(library.root, "waiting", "queued", steps=0, total=0, status=_me() | {"waits_for": "followed"})
        trainer = Trainer(new_visitor()).open()
        trainer.wait_run("followed", "step 8 of 40")  # the one that trains, not the newest
        trainer.wait_run("followed", "802 tokens/s")
        trainer.visitor.wait("#train-table tr[data-id=waiting] .bd-waits", "waits for followed")
        trainer.page.focus("#train-table tr[data-id=followed] button")
        run.at(24, best_step=20, best_accuracy=0.69, eta_seconds=100.0)
        trainer.wait_run("followed", "step 24 of 40")
        trainer.visitor.wait("#train-probe-position", "After step 20")
        trainer.visitor.wait("#train-table tr[data-id=followed]", "24 / 40")
        trainer.page.wait_for_function("() => document.activeElement?.closest('tr')?.dataset.id === 'followed'")
        assert trainer.page.locator("#train-stop").is_visible()
        assert trainer.page.locator("#train-delete").count() == 0  # not while it trains
        waiting.write_status(replace(waiting.read_status(), state="stopped"))
        run.at(40, state="finished", phase="", eta_seconds=0.0)
        trainer.wait_state("followed", "finished")
        trainer.visitor.wait_gone("#train-stop")
        trainer.page.wait_for_selector("#train-delete")


def test_a_run_whose_process_is_gone_is_interrupted(new_visitor, library):
    with playing(library, "killed") as run:
        trainer = Trainer(new_visitor()).open()
        trainer.wait_run("killed", "step 8 of 40")
        run.at(9, pid_created=1.0)  # as it is when another process has its number now
        trainer.wait_state("killed", "interrupted")
        trainer.visitor.wait("#train-head [role=alert]", "ended unexpectedly at step 9")
        trainer.page.wait_for_selector("#train-resume")


# A new run


def test_settings_out_of_range_are_named_at_the_field_and_nothing_starts(new_visitor, app):
    trainer = Trainer(new_visitor()).open_new()
    visitor = trainer.visitor
    trainer.wait_mixture("258 rows read")
    visitor.set("train-beta", "-1")
    visitor.wait("#train-beta", "beta must be a number from 0.0001 to 1000: got -1.0")
    visitor.unfold("train-group-lora")
    visitor.set("train-rank", "0")
    visitor.wait("#train-rank", "rank must be")
    visitor.unfold("train-group-lora")  # folded again: its error must still be found
    before = sorted((app.workspace.root / "runs").iterdir())
    trainer.page.click("#train-start")
    visitor.wait("#train-trouble .bd-error", "beta must be")
    visitor.wait("#train-trouble .bd-error", "rank must be a whole number from 1")
    visitor.wait("#train-rank", "rank must be")  # unfolded
    for name, value in (("train-beta", "0.1"), ("train-rank", "4"), ("train-run-id", "../../etc")):
        visitor.set(name, value)
    trainer.page.click("#train-start")
    visitor.wait("#train-new-notice .bd-error", "letters, digits")
    assert trainer.page.locator("#train-trouble .bd-error").count() == 0
    assert sorted((app.workspace.root / "runs").iterdir()) == before


def test_data_that_can_not_be_trained_on_is_one_line(new_visitor, tmp_path):
    trainer = Trainer(new_visitor()).open_new()
    trainer.wait_mixture("258 rows read")
    one, bad = tmp_path / "one.jsonl", tmp_path / "bad.jsonl"
    # One row, and by its prompt's hash it is held out. A row that is not can be trained on: see test_train_process.
    one.write_text('{"prompt": "Who leads 1?", "chosen": "Anyone.", "rejected": "Men."}\n')
    bad.write_text('{"prompt": "a", "chosen": "b"}\n')
    for source, line in (
        (str(one), "no pairs to train on (1 rows read, 1 held out"),
        (str(bad), "No column was recognized as rejected"),
        (str(tmp_path / "missing.jsonl"), "missing.jsonl"),
        ("hub:not-a-name", "hub:OWNER/NAME"),
    ):
        trainer.choose_source(1, source)
        trainer.page.wait_for_selector(f"#train-mixture .bd-error:has-text({json.dumps(line)})")
        trainer.page.click("#train-start")
        trainer.page.wait_for_selector(f"#train-new-notice .bd-error:has-text({json.dumps(line)})")


def test_sources_are_mixed_with_weights(new_visitor, pairs_file: Path):
    trainer = Trainer(new_visitor()).open_new()
    trainer.wait_mixture("258 rows read")
    trainer.page.set_input_files("#train-data input[type=file]", str(pairs_file))
    trainer.wait_mixture("298 rows read")

    def number(words: str) -> int:
        found = re.search(rf"([\d,]+) {words}", trainer.page.inner_text("#train-mixture"))
        assert found is not None
        return int(found[1].replace(",", ""))

    trained = number("to train on")
    trainer.visitor.set("train-weight-2", "2")
    trainer.visitor.wait("#train-mixture", "rows an epoch")
    assert trained < number("rows an epoch") <= trained + 40
    trainer.page.click("#train-remove-2")
    trainer.wait_mixture("258 rows read")
