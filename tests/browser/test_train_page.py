"""The Train tab: the panel for a new run, and runs that have ended. Every test also fails on a console error (but a validator's
no, which Gradio sends as HTTP status 422) or a request to another host."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from biasdpo.run_folder import RunFolder
from biasdpo.workspace import Workspace
from tests.app_process import running_app
from tests.browser.trainer import Trainer, write_pairs
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


@pytest.fixture(scope="module")
def empty_app(browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:  # noqa: ARG001
    with running_app(tmp_path_factory.mktemp("empty"), "--model", "smollm2") as url:
        yield url


# A new run


def test_an_empty_workspace_says_what_to_do_and_has_all_filled_in(new_visitor, empty_app):
    trainer = Trainer(new_visitor(empty_app)).open()
    trainer.page.wait_for_selector("#train-empty:has-text('No runs yet')")
    trainer.wait_mixture("258 rows read")
    assert trainer.page.locator("#train-mixture .bd-meter").is_visible()
    assert trainer.value("train-model") == "SmolLM2-135M-Instruct"
    assert trainer.value("train-run-id") == "smollm2-1"
    assert trainer.page.locator("#train-list").count() == 0
    assert trainer.page.locator("#train-preset input:checked").count() == 1


def test_only_settings_that_have_an_effect_are_shown(new_visitor, empty_app):
    trainer = Trainer(new_visitor(empty_app)).open()
    page = trainer.page
    page.wait_for_selector("#train-max-steps")
    trainer.set("train-max-steps", "0")
    page.wait_for_selector("#train-epochs")
    trainer.set("train-max-steps", "9")
    page.wait_for_selector("#train-epochs", state="detached")
    trainer.visitor.unfold("train-group-loss")
    assert page.locator("#train-label-smoothing").count() == page.locator("#train-loss-weights").count() == 0
    page.click("#train-loss-type input")
    page.locator("#train-loss-type").get_by_role("option", name="robust").click()
    page.wait_for_selector("#train-label-smoothing")
    page.wait_for_selector("#train-loss-weights")
    trainer.visitor.unfold("train-group-evaluation")
    trainer.set("train-eval-every", "0")
    page.wait_for_selector("#train-early-stopping", state="detached")
    trainer.set("train-eval-every", "5")
    page.wait_for_selector("#train-early-stopping")
    trainer.set("train-held-out-share", "0")
    page.wait_for_selector("#train-eval-every", state="detached")
    for element in ("train-beta", "train-loss-type", "train-rank"):  # each with its explanation
        if element == "train-rank":
            trainer.visitor.unfold("train-group-lora")
        page.wait_for_selector(f"#{element} .info-text")


def test_settings_out_of_range_are_named_at_the_field_and_nothing_starts(new_visitor, empty_app):
    trainer = Trainer(new_visitor(empty_app)).open()
    trainer.wait_mixture("258 rows read")
    trainer.set("train-beta", "-1")
    trainer.page.wait_for_selector("#train-beta:has-text('beta must be a number from 0.0001 to 1000: got -1.0')")
    trainer.set("train-batch-size", "2.5")
    trainer.page.wait_for_selector("#train-batch-size:has-text('batch_size must be')")
    trainer.visitor.unfold("train-group-lora")
    trainer.set("train-rank", "0")
    trainer.page.wait_for_selector("#train-rank:has-text('rank must be')")
    trainer.visitor.unfold("train-group-lora")  # folded again: its error must still be found
    trainer.page.click("#train-start")
    trainer.page.wait_for_selector("#train-trouble .bd-error")
    said = trainer.page.inner_text("#train-trouble")
    for name in ("beta must be", "batch_size must be a whole number", "rank must be a whole number from 1"):
        assert name in said
    trainer.page.wait_for_selector("#train-rank:has-text('rank must be')")  # unfolded
    trainer.page.wait_for_selector("#train-batch-size:has-text('batch_size must be')")
    for name, value in (("train-beta", "0.1"), ("train-batch-size", "2"), ("train-rank", "4")):
        trainer.set(name, value)
    trainer.set("train-run-id", "../../etc")
    trainer.page.click("#train-start")
    trainer.page.wait_for_selector("#train-new-notice .bd-error:has-text('A run id is')")
    assert trainer.page.locator("#train-trouble .bd-error").count() == 0
    assert trainer.page.locator("#train-list").count() == 0


def test_data_that_can_not_be_trained_on_is_one_line_each(new_visitor, empty_app, tmp_path):
    trainer = Trainer(new_visitor(empty_app)).open()
    trainer.wait_mixture("258 rows read")
    one, none, bad = tmp_path / "one.jsonl", tmp_path / "none.jsonl", tmp_path / "bad.jsonl"
    # One row, and by its prompt's hash it is held out. A row that is not can be trained on: see test_train_process.
    one.write_text('{"prompt": "Who leads 1?", "chosen": "Anyone.", "rejected": "Men."}\n')
    none.write_text("")
    bad.write_text('{"prompt": "a", "chosen": "b"}\n')
    for source, line in (
        ("workspace", "No preference pairs in the workspace yet"),
        (str(none), "none.jsonl"),
        (str(one), "no pairs to train on (1 rows read, 1 held out"),
        (str(bad), "No column was recognised as rejected"),
        (str(tmp_path / "missing.jsonl"), "missing.jsonl"),
        ("hub:not-a-name", "hub:OWNER/NAME"),
    ):
        trainer.choose_source(1, source)
        trainer.page.wait_for_selector(f"#train-mixture .bd-error:has-text({json.dumps(line)})")
        trainer.page.click("#train-start")
        trainer.page.wait_for_selector(f"#train-new-notice .bd-error:has-text({json.dumps(line)})")
    assert trainer.page.locator("#train-list").count() == 0


def test_sources_are_mixed_with_weights(new_visitor, empty_app, tmp_path):
    trainer = Trainer(new_visitor(empty_app)).open()
    trainer.wait_mixture("258 rows read")
    mine = tmp_path / "mine.jsonl"
    write_pairs(mine, 40)
    trainer.page.set_input_files("#train-data input[type=file]", str(mine))
    trainer.wait_mixture("298 rows read")
    assert "mine.jsonl: 40 rows" in trainer.page.inner_text("#train-mixture")
    trained = int(re.search(r"([\d,]+) to train on", trainer.page.inner_text("#train-mixture"))[1])  # type: ignore[index]
    trainer.set("train-weight-2", "2")
    trainer.page.wait_for_selector("#train-mixture:has-text('rows an epoch')")
    epoch = int(re.search(r"([\d,]+) rows an epoch", trainer.page.inner_text("#train-mixture"))[1])  # type: ignore[index]
    assert trained < epoch <= trained + 40
    trainer.page.click("#train-remove-2")
    trainer.wait_mixture("258 rows read")
    assert trainer.page.locator("#train-source-row-2").count() == 0


# Runs that have ended


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
    assert RunFolder(library.run_folder("first")).read_status().state == "finished"


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
    assert RunFolder(library.run_folder("second")).read_note() == "Lower the beta <b>next</b> time."
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
    trainer.page.wait_for_function("() => document.querySelector('#train-learning-rate :is(input, textarea)')?.value === '1e-4'")
    assert trainer.value("train-beta") == "0.3"
    assert trainer.value("train-max-steps") == "40"
    assert trainer.value("train-run-id") == "smollm2-1"
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
    with trainer.exported("#train-export-lora", ".gguf") as file:
        assert file.read_bytes()[:4] == b"GGUF"
    assert "--adapter first" in trainer.page.inner_text("#train-evaluate")
    trainer.page.click("#train-to-compare")
    trainer.page.wait_for_selector("#proof:has-text('run first')", timeout=60_000)
    assert trainer.value("adapter").startswith("first")
    trainer.wait_address("run=", there=False)
