"""The Train tab: the panel for a new run. Every test also fails on a console error (but a validator's no, which Gradio sends as
HTTP status 422) or a request to another host."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.app_process import running_app
from tests.browser.trainer import Trainer, write_pairs


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
    trainer.wait_value("train-model", "SmolLM2-135M-Instruct")
    trainer.wait_value("train-run-id", "smollm2-1")
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
        (str(bad), "No column was recognized as rejected"),
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
