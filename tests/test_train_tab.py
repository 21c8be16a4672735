"""The Train tab's handlers without a browser: what they leave on the page when something changes or fails under them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from biasdpo.config import TrainConfig
from biasdpo.engines import EnginePool
from biasdpo.errors import RunError
from biasdpo.ui import train as train_page
from biasdpo.ui.components import Store
from biasdpo.ui.train import TrainTab
from biasdpo.workspace import Workspace
from tests.run_folders import write_run
from tests.test_train_forms import page_of


@pytest.fixture
def tab(tmp_path: Path) -> TrainTab:
    workspace = Workspace(tmp_path)

    async def built() -> TrainTab:  # where no event loop runs, Gradio makes some that nobody closes
        made = TrainTab(Store(workspace), EnginePool(workspace, 1), lambda *_: {}, [])
        with gr.Blocks() as demo, gr.Tabs() as tabs, gr.Tab("Train", id="train") as one:
            made.build(demo, tabs, one)
        return made

    with ThreadPoolExecutor(1) as thread:  # Playwright keeps a loop running in the main one
        return thread.submit(asyncio.run, built()).result()


def test_an_error_in_place_of_the_list_goes_when_the_list_can_be_read_again(tab, monkeypatch):
    write_run(tab.workspace.root, "first")
    mark = tab.watch("run", "first", {}, None, False)[tab.mark]
    assert tab.table not in tab.watch("run", "first", mark, None, False)  # nothing is new

    def unreadable(_workspace: Workspace, _kind: str) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(train_page.jobs_store, "list_jobs", unreadable)
        failed = tab.watch("run", "first", mark, None, False)
    assert "can&#x27;t be read" in failed[tab.table]
    again = tab.watch("run", "first", failed[tab.mark], None, False)
    assert 'data-id="first"' in again[tab.table]
    assert tab.charts not in again


def test_the_clock_goes_slowly_while_no_run_is_active_and_reads_no_curves_then(tab, monkeypatch):
    folder = write_run(tab.workspace.root, "first")
    seen = tab.watch("run", "first", {}, None, False)
    assert seen[tab.timer] == gr.update(value=5.0, active=True)
    monkeypatch.setattr(type(folder), "read_metrics", lambda _self: pytest.fail("read though nothing has changed"))
    assert tab.watch("run", "first", seen[tab.mark], None, False).keys() == {tab.mark}


def _estimating(tab: TrainTab, monkeypatch: pytest.MonkeyPatch, ends: threading.Event) -> Any:
    """An estimate that goes on until it is cancelled, and sets `ends` then."""

    def estimate(_config: TrainConfig, _workspace: Workspace, *, cancelled: Callable[[], bool]) -> None:
        while not cancelled():
            time.sleep(0.01)
        ends.set()
        raise RunError("The estimate was cancelled: ask for it again")

    monkeypatch.setattr(train_page, "estimate_training", estimate)
    fields = page_of(TrainConfig(max_steps=2))
    sources = [str(Path("data.jsonl").resolve()), 1.0, "", 1.0, "", 1.0, "", 1.0, "", 1.0]
    return tab.estimate(SimpleNamespace(session_hash="visitor"), "smollm2", "", 1, *sources, *fields)


def test_an_estimate_that_nobody_waits_for_any_more_ends_at_once(tab, monkeypatch):
    ends = threading.Event()
    going = _estimating(tab, monkeypatch, ends)
    next(going)
    next(going)  # it is measured now
    closing = threading.Thread(target=going.close, daemon=True)
    closing.start()
    closing.join(5)
    assert not closing.is_alive()
    assert ends.is_set()
    assert tab.estimates == {}


def test_a_cancelled_estimate_says_so_and_a_failed_one_says_why(tab, monkeypatch):
    going = _estimating(tab, monkeypatch, threading.Event())
    next(going)
    next(going)
    tab.cancel_estimate(SimpleNamespace(session_hash="visitor"))
    assert "Cancelled." in list(going)[-1][tab.new_notice]

    def failing(*_given: Any, **_more: Any) -> None:
        raise RunError("It can't fit: lower max_length")

    again = _estimating(tab, monkeypatch, threading.Event())
    monkeypatch.setattr(train_page, "estimate_training", failing)
    assert "It can&#x27;t fit" in list(again)[-1][tab.new_notice]


def test_retry_says_what_it_can_not_take_over(tab, tmp_path):
    files = [tmp_path / f"{name}.jsonl" for name in "abcdefg"]
    for file in files:
        file.write_text("")
    config = TrainConfig(model="smollm2", datasets=tuple(map(str, files)), dataset_weights=(1.0, 2.0, 3.0, 1.0, 1.0, 1.0, 1.0))
    shown = tab.fill_from(config, "snapshot.jsonl")
    assert "7 sources and there is room for 5 here: f.jsonl, g.jsonl left out" in shown[tab.new_notice]
    assert shown[tab.shown_sources] == 5
    files[1].unlink()
    shown = tab.fill_from(config.replace(datasets=config.datasets[:2], dataset_weights=(1.0, 2.0)), "snapshot.jsonl")
    assert "b.jsonl: not there any more" in shown[tab.new_notice]
    assert "weights are lost (a.jsonl 1, b.jsonl 2)" in shown[tab.new_notice]
    shown = tab.fill_from(config.replace(datasets=config.datasets[:1], dataset_weights=()), "snapshot.jsonl")
    assert shown[tab.new_notice] == ""


def test_the_config_file_of_the_form_starts_the_same_run(tab, tmp_path):
    from biasdpo.cli import train_config

    config = TrainConfig(model="smollm2", datasets=(str(tmp_path / "data.jsonl"),), max_steps=2, beta=0.25)
    sources = [config.datasets[0], 1.0, "", 1.0, "", 1.0, "", 1.0, "", 1.0]
    (tmp_path / "run.toml").write_text(tab.show_config("smollm2", "", 1, *sources, *page_of(config)))
    assert train_config(tmp_path / "run.toml", {}, []) == config
    assert tab.show_config("smollm2", "", 1, *["", 1.0] * 5, *page_of(config)).startswith("# No data to train on")
