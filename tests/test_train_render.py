"""What the Train tab shows of runs, without a browser."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from biasdpo.config import TrainConfig
from biasdpo.jobs import store
from biasdpo.jobs.job import Status
from biasdpo.ui import train
from biasdpo.ui.train import SeenRun, see
from biasdpo.workspace import Workspace
from tests.run_folders import probe, write_run

EVIL = "<script>alert(1)</script>"


@pytest.fixture
def seen(tmp_path: Path) -> SeenRun:
    write_run(tmp_path, "first", status={"best_step": 30, "best_accuracy": 0.785})
    return see(store.find_job("first", Workspace(tmp_path), "train"))


def test_what_is_read_of_a_finished_run(seen):
    assert (seen.model, seen.data) == ("SmolLM2-135M-Instruct", "seed set")
    assert (seen.accuracy, seen.baseline) == (0.885, 0.615)
    assert seen.has_adapter
    assert not seen.active


def test_a_damaged_folder_shows_what_it_has(tmp_path):
    folder = write_run(tmp_path, "torn", "stopped", steps=3)
    folder.config.write_text("{")
    folder.record.write_text("")
    seen = see(store.find_job("torn", Workspace(tmp_path), "train"))
    assert (seen.config, seen.model, seen.started_at) == (None, "–", "")
    assert "step 3 of 40" in train.head(seen)
    assert "torn" in train.table([seen], "torn")
    assert train.details(seen)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (Status("queued", waits_for="a-1"), "waits for a-1: one run at a time"),
        (Status("queued"), "is about to start"),
        (Status("running", phase="training"), "training"),
        (Status("stopping", step=3, total_steps=9), "saves a checkpoint after this step, then ends"),
        (Status("stopped", step=3, total_steps=9), "stopped at step 3 of 9; Resume goes on from there"),
        (Status("failed"), "failed at its start"),
        (Status("interrupted", step=1, total_steps=9), "interrupted at step 1 of 9; Resume goes on from the last checkpoint"),
    ],
)
def test_states_in_words(status, said):
    assert train.words(status) == said


def test_progress_and_error(seen):
    running = replace(
        seen, status=Status("running", step=30, total_steps=120, eta_seconds=214, tokens_per_second=802.4, device="cpu")
    )
    html = train.head(running)
    for part in ('aria-valuenow="25"', "step 30 of 120", "about 4 min left", "802 tokens/s", "CPU"):
        assert part in html
    failed = replace(seen, status=Status("failed", error=f"The disk is full: free some space {EVIL}"))
    html = train.head(failed)
    assert 'role="alert">The disk is full' in html
    assert EVIL not in html


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (89, "89 s"), (90, "2 min"), (3000, "50 min"), (7500, "2 h 5 min"), (86400, "24 h 0 min")]
)
def test_durations(seconds, words):
    assert train.duration(seconds) == words


def test_sizes():
    assert [train.size(n) for n in (12, 14_900, 2_340_000, 1.5e9)] == ["12 bytes", "14.9 kB", "2.34 MB", "1.5 GB"]


def test_sources_never_show_a_folder_of_this_machine():
    assert train.source_title("/home/me/secret/pairs.jsonl") == "pairs.jsonl"
    assert train.source_title("/w/runs/first/dataset.jsonl") == "data of run first"
    assert train.source_title("hub:owner/name") == "hub:owner/name"
    assert train.model_title("/home/me/models/tiny") == "tiny"
    assert train.model_title("owner/name") == "owner/name"


def test_the_step_of_a_probe_that_is_shown_follows_the_latest_until_one_looks_back():
    rows = [row for step in (0, 20, 40) for row in probe(step)]
    assert train.step_shown(rows, None) == 40
    assert train.turned(rows, None, -1) == 20
    assert train.turned(rows, 20, -1) == 0
    assert train.turned(rows, 0, -1) == 0
    assert train.turned(rows, 20, 1) is None  # the latest, whatever follows
    assert train.step_shown(rows, 30) == 40  # gone after a resume
    assert train.step_shown([], None) is None
    assert "probe 2 of 3" in train.position(rows, 20)


def test_a_probe_marks_the_words_of_one_side():
    html = train.probes([{"step": 1, "prompt": EVIL, "category": "", "base": "a b c", "tuned": "a x c"}], None, expected=True)
    assert "a <del>b</del> c" in html
    assert "a <ins>x</ins> c" in html
    assert EVIL not in html
    same = train.probes([{"step": 0, "prompt": "p", "base": EVIL, "tuned": EVIL}], None, expected=True)
    assert "the same so far" in same
    assert EVIL not in same


def test_what_differs_between_configs():
    configs = {"a": TrainConfig(beta=0.1, rank=8), "b": TrainConfig(beta=0.3, rank=8)}
    assert train.differing(configs) == {"beta": {"a": 0.1, "b": 0.3}}
    assert TrainConfig(beta=0.3).changed() == {"beta": 0.3}


def test_runs_compared(tmp_path):
    write_run(tmp_path, "first")
    write_run(tmp_path, "second", "stopped", steps=20, beta=0.3, keep="last")
    chosen = [see(store.find_job(name, Workspace(tmp_path), "train")) for name in ("first", "second")]
    html = train.comparison(chosen)
    for part in ("first, held-out", "second, train", "Reward accuracy", "0.885", "beta", "0.3", "keep"):
        assert part in html
    assert "max_steps" not in train.differences(chosen)


def test_a_run_that_held_nothing_out_has_no_command_to_measure_it(seen):
    assert "--benchmark preference" in train.evaluate_command(seen)
    unmeasured = replace(seen, held_out={})  # as under FSDP: there are held-out pairs, not scored at the end
    assert "--benchmark preference" in train.evaluate_command(unmeasured)
    nothing = replace(unmeasured, origin=seen.origin | {"held_out_longer_baseline": None})
    html = train.evaluate_command(nothing)
    assert "held no pairs out" in html
    assert "held-out share of 0.1" in html
    assert "--benchmark" not in html


def test_deleting_names_what_is_lost(seen):
    html = train.deleting(seen, 12_300_000)
    assert "Delete run first?" in html
    assert "its adapter, its checkpoints" in html
    assert "12.3 MB" in html
