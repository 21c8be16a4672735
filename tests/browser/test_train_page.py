"""The Train tab: runs that have ended, one that goes on (the test plays its process), and the form for a new one."""

from __future__ import annotations

import os
import re
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from biasdpo.cli import train_config
from biasdpo.config import TrainConfig
from biasdpo.data import journal, splits
from biasdpo.data.splits import SEED_PAIRS
from biasdpo.jobs.job import JobFolder
from biasdpo.workspace import Workspace
from tests.browser.conftest import App
from tests.browser.trainer import Trainer
from tests.run_folders import metrics, probe, write_lines, write_run

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def library(app: App) -> Workspace:
    """The shared workspace with two finished runs and one that failed."""
    root = app.workspace.root
    write_run(root, "first", status={"best_step": 30, "best_accuracy": 0.785, "notes": ("232 pairs to train on",)})
    write_run(root, "second", learning_rate=1e-4, beta=0.3, probe_every=0).probes.unlink()
    hot = {"error": f"The loss became nan {EVIL}: lower learning_rate", "best_step": 10, "best_accuracy": 0.5}
    write_run(root, "too-hot", "failed", steps=12, status=hot, learning_rate=0.02)
    return app.workspace


@pytest.fixture
def trainer(new_visitor, library: Workspace) -> Trainer:  # noqa: ARG001
    return Trainer(new_visitor())


# Runs that have ended


def test_a_finished_run_with_its_outcome_curves_and_answers(trainer):
    visitor, page = trainer.visitor, trainer.open("first").page
    trainer.wait_head("first", "Reward accuracy 0.89 [0.71, 0.96] on 26 held-out pairs; mean reward margin 1.1 nats.")
    trainer.wait_head("first", "232 pairs to train on")
    for curve in ("accuracy", "margin", "loss"):
        page.wait_for_selector(f"#train-{curve} .js-plotly-plot")
    assert page.locator("#train-kl").count() == 0  # none was logged
    visitor.wait("#train-probe-step", "after step 40")
    visitor.wait("#train-probe-1", "as 40 steps have taught")
    page.click("#train-probe-earlier")
    visitor.wait("#train-probe-1", "as 20 steps have taught")
    page.click("#train-probe-earlier")
    visitor.wait("#train-probe-step", "before training")
    visitor.wait("#train-probe-1", "The same as base")
    assert page.locator("#train-probe-earlier").is_disabled()
    visitor.unfold("train-details")
    visitor.wait("#train-details", "3fa9c1d2" * 8)
    visitor.unfold("train-log-box")
    page.wait_for_function("() => document.querySelector('#train-log textarea').value.endsWith('step 40 of 40')")
    trainer.choose("second")
    visitor.wait("#train-probe-step", "no probes")
    page.reload()
    trainer.wait_head("second")  # the address names it


def test_redrawn_charts_leave_nothing_behind(trainer):
    page = trainer.open("first").page
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable")

    def redraw(run_id: str) -> None:
        trainer.visitor.wait("#train-loss .main-svg")  # returns no handle, which would keep the chart alive
        page.evaluate("() => { for (const chart of document.querySelectorAll('.js-plotly-plot')) chart.dataset.old = 'yes'; }")
        trainer.choose(run_id)
        for curve in ("accuracy", "margin", "loss"):
            trainer.visitor.wait(f"#train-{curve} .js-plotly-plot:not([data-old]) .main-svg")

    def held(name: str) -> int:
        """A count of the whole page, with what is in no document but still referenced."""
        page.wait_for_timeout(1500)  # what is replaced is let go of a second later
        devtools.send("HeapProfiler.collectGarbage")
        return next(one["value"] for one in devtools.send("Performance.getMetrics")["metrics"] if one["name"] == name)

    for run_id in ("too-hot", "first"):  # whose curves differ: a chart that stays the same is not drawn again
        redraw(run_id)
    nodes, listeners = held("Nodes"), held("JSEventListeners")
    for run_id in ("too-hot", "first") * 5:
        redraw(run_id)
    chart = page.evaluate("() => document.querySelectorAll('#train-loss *').length")
    assert held("Nodes") < nodes + chart
    assert held("JSEventListeners") < listeners + chart


def test_an_event_does_not_search_the_page_for_other_components(trainer):
    """Gradio would look up each input of every earlier event, five times; see assets/page.js."""
    page = trainer.open("first").page
    trainer.visitor.wait("#train-probe-step", "after step 40")
    page.wait_for_selector("#train-loss .main-svg")
    devtools = page.context.new_cdp_session(page)
    devtools.send("Profiler.enable")
    devtools.send("Profiler.startPreciseCoverage", {"callCount": True, "detailed": False})
    page.click("#train-probe-earlier")
    trainer.visitor.wait("#train-probe-step", "after step 20")
    scripts = devtools.send("Profiler.takePreciseCoverage")["result"]
    tree = [function for script in scripts if "/assets/core-" in script["url"] for function in script["functions"]]
    assert sum(function["ranges"][0]["count"] for function in tree) < 30_000  # calls; one search of the whole page: 400


def test_notes_stay_with_their_run(trainer, library):
    page = trainer.open("second").page
    trainer.wait_head("second")
    page.fill("#train-note textarea", "Lower the beta <b>next</b> time.")
    trainer.choose("first")
    page.wait_for_function("() => document.querySelector('#train-note textarea').value === ''")
    trainer.choose("second")
    page.wait_for_function("() => document.querySelector('#train-note textarea').value.startsWith('Lower')")
    assert JobFolder(library.run_folder("second")).read_note() == "Lower the beta <b>next</b> time."


def test_a_failed_run_says_why_and_retry_takes_its_settings_over(trainer):
    trainer.open("too-hot")
    trainer.wait_head("too-hot", f"The loss became nan {EVIL}: lower learning_rate")  # text
    assert trainer.page.locator("#train-resume").inner_text() == "Retry"
    assert trainer.page.locator("#train-job button.primary").all_inner_texts() == ["Retry with changes"]
    trainer.page.click("#train-retry")
    trainer.visitor.wait(".toast-body", "the settings of too-hot")
    trainer.visitor.wait_value("train-learning-rate", "0.02")
    trainer.choose("second")
    trainer.page.click("#train-retry")
    for field, value in (("learning-rate", "0.0001"), ("beta", "0.3"), ("max-steps", "40")):
        trainer.visitor.wait_value(f"train-{field}", value)
    trainer.visitor.set("train-run-id", "second")
    trainer.page.click("#train-start")
    trainer.visitor.wait(".toast-body", "already exists")


def test_deleting_asks_first(trainer, library):
    write_run(library.root, "unwanted", "stopped", steps=8)  # as one that the command line has started
    page, visitor = trainer.open("unwanted").page, trainer.visitor
    trainer.wait_head("unwanted")
    page.click("#train-delete")
    visitor.wait("#train-confirm", "Delete unwanted, the run with its adapter, checkpoints and log?")
    trainer.choose("too-hot")  # another run meanwhile: the question is gone
    page.wait_for_selector("#train-confirm", state="hidden")
    trainer.choose("unwanted")
    page.click("#train-delete")
    page.click("#train-keep")
    page.wait_for_selector("#train-confirm", state="hidden")
    assert library.run_folder("unwanted").is_dir()
    page.click("#train-delete")
    page.click("#train-confirm-delete")
    page.wait_for_function("() => !document.querySelector('#train-jobs').innerText.includes('unwanted')")
    assert not library.run_folder("unwanted").exists()


def test_runs_are_compared(trainer):
    page = trainer.open("first").page
    trainer.visitor.unfold("train-compare")
    trainer.visitor.wait("#train-picked .token")  # two runs are chosen when it opens; only then are others chosen
    while (crosses := page.locator("#train-picked .token-remove:not(.remove-all)")).count():
        crosses.first.click()
    for run_id in ("first", "second"):
        page.fill("#train-picked input", run_id)
        page.locator("#train-picked").get_by_role("option", name=run_id, exact=True).click()
        trainer.visitor.wait("#train-picked .token", run_id)
    table = "#train-compared"
    trainer.visitor.wait(table, "second")
    for words in ("0.89 [0.71, 0.96]", "Learning rate", "Beta", "0.3"):
        trainer.visitor.wait(table, words)
    assert "Max steps" not in page.inner_text(table)
    trainer.visitor.wait("#train-compare .js-plotly-plot", "second, held-out")


def test_a_finished_run_is_downloaded_and_opens_other_tabs(trainer):
    page = trainer.open("first").page
    file = trainer.visitor.save("#train-zip")
    assert "first/adapter_model.safetensors" in zipfile.ZipFile(file).namelist()
    for button, step in (("to-compare", "Compare"), ("to-measure", "Measure"), ("to-export", "Export")):
        page.click(f"#train-{button}")
        page.wait_for_selector(f"#steps [role=tab][aria-selected=true]:has-text({step!r})")
        page.get_by_role("tab", name="Train").click()
        trainer.wait_head("first")


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
    folder = write_run(workspace.root, run_id, "running", steps=8, status=status)
    folder.split.write_text('{"held_out": [' + ",".join(["1"] * 26) + "]}")
    played = Played(folder)
    try:
        yield played
    finally:
        played.at(8, state="stopped")


def test_the_page_follows_a_run_to_its_end(trainer, library):
    with playing(library, "followed") as run:
        waiting = write_run(library.root, "waiting", "queued", steps=0, total=0, status=_me() | {"waits_for": "followed"})
        page, visitor = trainer.open("followed").page, trainer.visitor
        trainer.wait_head("followed", "step 8 of 40 · training · about 5 min left")
        trainer.wait_head("followed", "802 tokens/s")
        assert page.locator("#train-head progress").get_attribute("value") == "0.200"
        assert page.locator("#train-stop").is_visible()
        assert page.locator("#train-delete").count() == 0  # not while it trains
        run.at(24, best_step=20, best_accuracy=0.69, eta_seconds=100.0)
        trainer.wait_head("followed", "Best so far: step 20, reward accuracy 0.69 [0.50, 0.83] on 26 held-out pairs.")
        visitor.wait("#train-probe-step", "after step 20")
        trainer.wait_listed("followed", "Running · 60%")
        trainer.choose("waiting")
        trainer.wait_head("waiting", "Waiting for followed")
        trainer.choose("followed")
        waiting.write_status(replace(waiting.read_status(), state="stopped"))
        run.at(40, state="finished", phase="", eta_seconds=0.0)
        trainer.wait_listed("followed", "Finished")
        page.wait_for_selector("#train-delete")
        assert page.locator("#train-stop").count() == 0


def test_a_run_whose_process_is_gone_is_interrupted(trainer, library):
    with playing(library, "killed") as run:
        trainer.open("killed")
        trainer.wait_head("killed", "step 8 of 40")
        run.at(9, pid_created=1.0)  # as it is when another process has its number now
        trainer.wait_head("killed", "ended unexpectedly at step 9")
        assert trainer.page.locator("#train-resume").inner_text() == "Resume"


# A new run


def test_presets_fill_the_form_and_the_config_file_starts_the_same_run(trainer, tmp_path):
    page, visitor = trainer.open().page, trainer.visitor
    page.get_by_text("Thorough").click()
    visitor.unfold("train-config")
    visitor.wait("#train-preview", "target_modules")
    trainer.set(beta="0.25")
    visitor.wait("#train-preview", "beta = 0.25")
    with page.expect_download() as download:
        page.click("#train-preview [aria-label='Download'], #train-preview a[download], #train-preview button[title='Download']")
    text = Path(download.value.path()).read_text()
    assert "python -m biasdpo train --config FILE" in text
    (tmp_path / "run.toml").write_text(text)
    config = train_config(tmp_path / "run.toml", {}, [])
    assert (config.model, config.beta, config.schedule) == ("smollm2", 0.25, "cosine")
    (tmp_path / "mine.toml").write_text(text.replace("beta = 0.25", "beta = 0.5"))
    page.set_input_files("#train-import input[type=file], #train-config input[type=file]", str(tmp_path / "mine.toml"))
    visitor.wait("#train-preview", "beta = 0.5")
    visitor.wait_value("train-beta", "0.5")
    assert tomllib.loads(text)["datasets"][0].endswith("seed_pairs.jsonl")


def test_settings_out_of_range_are_named_and_nothing_starts(trainer, app):
    trainer.open()
    before = sorted((app.workspace.root / "runs").iterdir())
    trainer.set(beta="-1")
    trainer.visitor.wait(trainer.line, "beta must be a number from 0.0001 to 1000: got -1.0")
    assert trainer.page.locator("#train-start").is_disabled()
    trainer.set(beta="0.1", run_id="../../etc")
    trainer.visitor.wait(trainer.line, "232 pairs to train on")
    trainer.page.click("#train-start")
    trainer.visitor.wait(".toast-body", "letters, digits")
    assert sorted((app.workspace.root / "runs").iterdir()) == before


def test_data_that_can_not_be_trained_on_is_one_line_with_the_way_to_more(trainer, tmp_path, pairs_file):
    page, visitor = trainer.open().page, trainer.visitor
    one, bad = tmp_path / "one.jsonl", tmp_path / "bad.jsonl"
    one.write_text('{"prompt": "Who leads 1?", "chosen": "Anyone.", "rejected": "Men."}\n')  # by its hash it is held out
    bad.write_text('{"prompt": "a", "chosen": "b"}\n')
    for source, line in (
        (one, "no pairs to train on (1 row read, 1 held out"),
        (bad, "No column was recognized as rejected"),
        (tmp_path / "missing.jsonl", "missing.jsonl"),
    ):
        trainer.choose_data(source)
        visitor.wait(trainer.line, line)
        assert page.locator("#train-start").is_disabled()
    page.set_input_files("#train-upload input[type=file], input[type=file]", str(pairs_file))
    trainer.choose_data(pairs_file)
    page.wait_for_selector("#train-start:not([disabled])")
    visitor.wait(trainer.line, "to train on")
    trainer.choose_data(one)
    visitor.wait(trainer.line, "About 40 pairs needed")
    page.locator("#train-needed").get_by_role("button", name="Label pairs").click()
    page.wait_for_selector("#steps [role=tab][aria-selected=true]:has-text('Label')")


def test_own_pairs_that_are_not_selected_are_said_and_added(trainer, library):
    rows = [journal.new_judgment(f"Who does job {i}?", f"Anyone may do job {i}.", f"Only men do job {i}!") for i in range(3)]
    journal.append_all(library, rows)
    own = trainer.open().page
    trainer.visitor.wait("#train-add-own", re.compile(r"Your own \d+ pairs are not selected: add them"))
    own.click("#train-add-own")
    trainer.visitor.wait("#train-data .token", "Your own pairs")
    own.wait_for_selector("#train-add-own", state="hidden")
    config = TrainConfig(datasets=(SEED_PAIRS, splits.WORKSPACE))
    trainer.visitor.wait(trainer.line, f"{splits.mixture_of(config, library).pairs_train} pairs to train on")


def test_sources_are_mixed_with_weights(trainer, library, pairs_file: Path):
    trainer.open()
    trainer.choose_data(SEED_PAIRS, pairs_file)
    config = TrainConfig(datasets=(SEED_PAIRS, str(pairs_file)))
    trainer.visitor.wait(trainer.line, f"{splits.mixture_of(config, library).pairs_train} pairs to train on")
    trainer.visitor.set("train-dataset-weights", "1, 2")
    trainer.visitor.wait(trainer.line, "per epoch, by weight")
