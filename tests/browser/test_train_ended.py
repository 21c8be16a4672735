"""The Train tab: runs that have ended."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from biasdpo.jobs.job import JobFolder
from biasdpo.workspace import Workspace
from tests.app_process import running_app
from tests.browser.trainer import Trainer
from tests.run_folders import write_run


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with two finished runs and one that failed."""
    workspace = Workspace(tmp_path_factory.mktemp("runs"))
    write_run(workspace.root, "first", status={"best_step": 30, "best_accuracy": 0.785, "notes": ("232 pairs to train on",)})
    write_run(workspace.root, "second", learning_rate=1e-4, beta=0.3, probe_every=0).probes.unlink()
    hot = {"error": "The loss became nan at step 12: lower learning_rate, and resume", "best_step": 10, "best_accuracy": 0.5}
    write_run(workspace.root, "too-hot", "failed", steps=12, status=hot)
    return workspace


@pytest.fixture(scope="module")
def library_app(browser, library: Workspace) -> Iterator[str]:  # noqa: ARG001 (no browser, no app)
    with running_app(library.root, "--model", "smollm2") as url:
        yield url


@pytest.fixture
def trainer(new_visitor, library_app: str) -> Trainer:
    return Trainer(new_visitor(library_app)).open()


def test_the_list_and_a_finished_run(trainer, library):
    for run_id in ("first", "second", "too-hot"):
        trainer.page.wait_for_selector(f"#train-table tr[data-id={run_id}]")
    trainer.choose("first")
    head = trainer.page.inner_text("#train-head")
    for part in ("finished", "step 40 of 40", "0.885", "picking the longer: 0.615", "step 30", "232 pairs to train on"):
        assert part in head
    trainer.wait_address("run=first")
    titles = trainer.page.locator("#train-charts figcaption b").all_inner_texts()
    assert titles == ["Loss", "Reward margin", "Reward accuracy", "Learning rate", "Speed"]
    legend = trainer.page.inner_text("#train-charts figure[data-name=accuracies] .bd-legend")
    assert "pick the longer" in legend
    assert "best: step 30" in legend
    trainer.visitor.unfold("train-details")
    assert "3fa9c1d2" * 8 in trainer.page.inner_text("#train-details")
    trainer.visitor.unfold("train-log")
    trainer.page.wait_for_selector("#train-log .bd-log:has-text('step 40 of 40')")
    trainer.reload()
    trainer.page.wait_for_selector("#train-head:has-text('first')")  # the address names the run
    trainer.page.get_by_role("tab", name="Data set").click()
    trainer.wait_address("run=", there=False)
    assert JobFolder(library.run_folder("first")).read_status().state == "finished"


def test_probes_can_be_looked_back_through(trainer):
    trainer.choose("first")
    trainer.page.wait_for_selector("#train-probe-position:has-text('After step 40 · probe 3 of 3, the latest')")
    tuned = trainer.page.locator("#train-probes .bd-probe-tuned").first
    assert "as 40 steps have taught" in tuned.inner_text()
    assert tuned.locator("ins").all_inner_texts()[:2] == ["Leaders", "people"]
    assert trainer.page.locator("#train-probes article").count() == 3
    trainer.page.click("#train-probe-earlier")
    trainer.page.wait_for_selector("#train-probe-position:has-text('probe 2 of 3')")
    trainer.page.click("#train-probe-earlier")
    trainer.page.wait_for_selector("#train-probes:has-text('the same so far')")
    trainer.page.click("#train-probe-later")
    trainer.page.wait_for_selector("#train-probes:has-text('as 20 steps have taught')")
    trainer.choose("second")
    trainer.page.wait_for_selector("#train-probes:has-text('makes no probes')")


def test_charts_with_the_mouse_the_keyboard_and_as_files(trainer):
    trainer.choose("first")
    figure = trainer.page.locator("#train-charts figure[data-name=accuracies]")
    plot = figure.locator(".bd-plot")
    plot.focus()
    trainer.page.keyboard.press("ArrowRight")
    trainer.page.keyboard.press("ArrowRight")
    assert figure.locator(".bd-tip").inner_text().startswith("step 2")
    plot.hover()
    trainer.page.wait_for_selector("#train-charts figure[data-name=accuracies] .bd-tip:has-text('held-out')")
    with trainer.page.expect_download() as download:
        figure.locator("button[data-curve=csv]").click()
    lines = Path(download.value.path()).read_text().splitlines()
    assert lines[0] == "curve,step,value"
    assert '"held-out",40,0.88' in lines  # 0.5 + 0.38 * 40/40
    assert sum(line.startswith('"train",') for line in lines) == 40  # as logged; drawn are these and their moving mean
    with trainer.page.expect_download() as download:
        figure.locator("button[data-curve=svg]").click()
    picture = Path(download.value.path()).read_text()
    assert picture.startswith("<svg")
    assert "var(" not in picture  # it stands alone


def test_notes_stay_with_their_run(trainer, library):
    trainer.choose("second")
    trainer.page.fill("#train-note textarea", "Lower the beta <b>next</b> time.")
    trainer.page.click("#train-save-note")
    trainer.page.wait_for_selector("#train-note-saved:has-text('Saved with run second')")
    assert JobFolder(library.run_folder("second")).read_note() == "Lower the beta <b>next</b> time."
    trainer.choose("first")
    trainer.page.wait_for_function("() => document.querySelector('#train-note textarea').value === ''")
    trainer.page.wait_for_function("() => !document.querySelector('#train-note-saved')?.textContent.trim()")
    trainer.choose("second")
    trainer.page.wait_for_function("() => document.querySelector('#train-note textarea').value.startsWith('Lower')")


def test_a_failed_run_says_why_and_retry_takes_its_settings_over(trainer):
    trainer.choose("too-hot")
    alert = trainer.page.locator("#train-head [role=alert]")
    assert alert.inner_text() == "The loss became nan at step 12: lower learning_rate, and resume"
    trainer.page.wait_for_selector("#train-resume")
    trainer.choose("second")
    trainer.page.click("#train-retry")
    trainer.page.wait_for_selector("#train-preset-text:has-text('tried again')")
    for field, value in (("learning-rate", "1e-4"), ("beta", "0.3"), ("max-steps", "40"), ("run-id", "smollm2-1")):
        trainer.wait_value(f"train-{field}", value)
    trainer.wait_mixture("258 rows read")
    trainer.set("train-run-id", "second")
    trainer.page.click("#train-start")
    trainer.page.wait_for_selector("#train-new-notice .bd-error:has-text('exists already')")


def test_deleting_asks_and_says_what_is_lost(trainer, library):
    write_run(library.root, "unwanted", "stopped", steps=8)
    trainer.page.wait_for_selector("#train-table tr[data-id=unwanted]")  # as one that the command line has started
    trainer.choose("unwanted")
    trainer.page.click("#train-delete")
    trainer.page.wait_for_selector("#train-confirm-text:has-text('Delete run unwanted?')")
    trainer.choose("too-hot")  # another run meanwhile: the question is gone with its own
    trainer.page.wait_for_selector("#train-really-delete", state="detached")
    trainer.page.wait_for_function("() => !document.querySelector('#train-confirm-text')?.textContent.trim()")
    trainer.choose("unwanted")
    trainer.page.click("#train-delete")
    trainer.page.wait_for_selector("#train-confirm-text:has-text('Delete run unwanted?')")
    assert "snapshot of the data" in trainer.page.inner_text("#train-confirm-text")
    trainer.page.wait_for_function("() => document.activeElement?.id === 'train-keep'")
    trainer.page.keyboard.press("Enter")
    trainer.page.wait_for_selector("#train-really-delete", state="detached")
    assert library.run_folder("unwanted").is_dir()
    trainer.page.click("#train-delete")
    trainer.page.click("#train-really-delete")
    trainer.page.wait_for_selector("#train-notice:has-text('Run unwanted was deleted')")
    assert not library.run_folder("unwanted").exists()
    assert trainer.page.locator("#train-table tr[data-id=unwanted]").count() == 0


def test_runs_are_compared_in_one_chart(trainer):
    trainer.page.click("#train-several")
    trainer.page.wait_for_selector("#train-comparison figure")
    trainer.pick_runs("first", "second")
    trainer.page.wait_for_selector("#train-comparison figure[data-name=compare-loss] .bd-legend:has-text('first, train')")
    assert "second, held-out" in trainer.page.inner_text("#train-comparison figure[data-name=compare-accuracies] .bd-legend")
    with trainer.page.expect_download() as download:
        trainer.page.click("#train-comparison figure[data-name=compare-accuracies] button[data-curve=csv]")
    assert '"second, held-out",40,0.88' in Path(download.value.path()).read_text().splitlines()
    differs = trainer.page.inner_text("#train-comparison table >> nth=1")
    for part in ("learning_rate", "beta", "0.3"):
        assert part in differs
    assert "max_steps" not in differs
    assert "0.885" in trainer.page.inner_text("#train-comparison table >> nth=0")


def test_a_finished_run_goes_to_compare_and_is_exported(trainer):
    trainer.choose("first")
    with trainer.exported("#train-export-zip", ".zip") as file:
        names = zipfile.ZipFile(file).namelist()
    assert "adapter_model.safetensors" in names
    assert "--adapter first" in trainer.page.inner_text("#train-evaluate")
    trainer.page.click("#train-to-compare")
    trainer.page.wait_for_selector("#proof:has-text('run first')", timeout=60_000)
    trainer.page.wait_for_function("() => document.querySelector('#adapter input').value.startsWith('first')")
    trainer.wait_address("run=", there=False)
