"""Evaluations as jobs: finished, killed, stopped, failed, resumed; results that lie in their folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from biasdpo.config import EvaluationConfig
from biasdpo.errors import AdapterError, ConfigError, EvaluationError, JobError, ModelError
from biasdpo.evaluation.results import table
from biasdpo.jobs import store
from biasdpo.jobs.estimate import estimate_evaluation, known_seconds
from biasdpo.jobs.job import Job, Progress
from biasdpo.jobs.resolve import command_of
from biasdpo.workspace import Workspace
from tests import evaluating
from tests.evaluating import stop_midway
from tests.evaluation_results import result, write_result
from tests.run_line import ROOT, ended, wait_for

LONG = 1500  # items, in so many batches that it is not over before it is stopped


@pytest.fixture
def asked(tiny_llama_gguf: Path, tiny_llama_adapter: Path, tmp_path: Path) -> EvaluationConfig:
    return evaluating.request(tiny_llama_gguf, tiny_llama_adapter, evaluating.write_items(tmp_path / "data", pairs=40))


@pytest.fixture
def long(asked: EvaluationConfig, tmp_path: Path) -> EvaluationConfig:
    """One that is under way for seconds."""
    evaluating.write_items(tmp_path / "data", pairs=LONG)
    return asked


def cached_scores(workspace: Workspace) -> int:
    """Lines in the score cache: were a request scored twice, it would be there twice."""
    files = (workspace.cache / "scores").glob("*.jsonl")
    return sum(line.strip() != b"" for file in files for line in file.read_bytes().split(b"\n"))


def signal_process(job: Job, sent: signal.Signals) -> None:
    assert job.status.pid != os.getpid()
    os.kill(job.status.pid, sent)


def test_an_evaluation_from_start_to_end(asked, workspace):
    started = store.start_evaluation(asked.replace(benchmarks=("crows_pairs", "perplexity"), limit=20), workspace)
    assert (started.id, started.state, started.status.phase) == ("tiny-llama-lora-1", "queued", "starting")
    assert started.status.progress == (Progress("crows_pairs", 0, 0), Progress("utility", 0, 0))
    with pytest.raises(EvaluationError, match="is queued and has no result"):
        store.load_result(started)
    with pytest.raises(JobError, match="stop it first"):
        store.delete_job(started.id, workspace)
    with pytest.raises(JobError, match=r"is (queued|running): only a stopped"):
        store.resume_job(started.id, workspace)
    done = wait_for(started.folder, ended)
    assert (done.state, done.error, done.status.phase, done.status.eta_seconds) == ("finished", "", "", None)
    assert done.status.progress == (Progress("crows_pairs", 20, 20), Progress("utility", 6, 6))
    assert done.started_at == started.started_at
    assert done.record.resolved.model == asked.model
    found = store.load_result(done)
    assert found["benchmarks"]["crows_pairs"]["n"] == 20
    assert {row.why_not for row in table(found)} == {"limited to 20 of 40 items", ""}
    with pytest.raises(JobError, match="nothing to stop"):
        store.stop_job(done.id, workspace)
    with pytest.raises(JobError, match="is finished: only a stopped"):
        store.resume_job(done.id, workspace)
    # The shown command is the one that did it: it gives the same result, which is listed where it is written.
    by_hand = workspace.root / "evaluations" / "by-hand.json"
    command = command_of(done.config, by_hand, workspace.root)
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0
    assert json.loads(by_hand.read_text()) == found
    listed = store.find_job("by-hand", workspace)
    assert (listed.state, listed.config, store.load_result(listed)) == ("finished", None, found)
    store.delete_job(done.id, workspace)
    store.delete_job("by-hand", workspace)
    assert store.list_jobs(workspace) == []
    assert list((workspace.root / "evaluations").iterdir()) == []


def test_a_killed_one_is_interrupted_and_goes_on_without_scoring_anything_twice(long, workspace):
    started = store.start_evaluation(long, workspace)
    seen = stop_midway(started.folder)
    assert 0 < seen.status.progress[0].done < LONG
    assert seen.status.eta_seconds is not None
    signal_process(started, signal.SIGKILL)
    killed = wait_for(started.folder, ended)
    assert (killed.state, killed.has_result, "\n" in killed.error) == ("interrupted", False, False)
    assert "it was probably killed" in killed.error
    assert 0 < cached_scores(workspace) < 2 * 2 * LONG
    resumed = store.resume_job(killed.id, workspace)
    assert (resumed.id, resumed.state) == (killed.id, "queued")
    done = wait_for(resumed.folder, ended)
    assert (done.state, done.status.progress) == ("finished", (Progress("crows_pairs", LONG, LONG),))
    # Two sentences of LONG pairs on two sides; the kill may have torn one line.
    assert 2 * 2 * LONG <= cached_scores(workspace) <= 2 * 2 * LONG + 1
    assert store.load_result(done)["benchmarks"]["crows_pairs"]["not_comparable"] == ""


def test_a_stopped_one_keeps_what_it_scored_and_goes_on_and_a_second_stop_kills(long, workspace):
    started = store.start_evaluation(long, workspace)
    stop_midway(started.folder)
    assert store.stop_job(started.id, workspace).state == "stopping"
    signal_process(started, signal.SIGCONT)
    stopped = wait_for(started.folder, ended)
    assert (stopped.state, stopped.error) == ("stopped", "")
    (found,) = store.load_result(stopped)["benchmarks"].values()
    assert 0 < found["n"] < LONG
    assert found["not_comparable"].startswith("interrupted after")
    assert not any(row.comparable for row in table(store.load_result(stopped)))

    resumed = store.resume_job(started.id, workspace)
    stop_midway(resumed.folder)  # it hears nothing any more
    store.stop_job(started.id, workspace)
    store.stop_job(started.id, workspace)
    killed = wait_for(started.folder, ended)
    assert (killed.state, killed.error) == ("stopped", "")

    done = wait_for(store.resume_job(started.id, workspace).folder, ended)
    assert (done.state, store.load_result(done)["benchmarks"]["crows_pairs"]["n"]) == ("finished", LONG)


def test_what_can_not_be_evaluated_is_refused_before_anything_is_written(asked, workspace, tiny_phi_adapter, tmp_path):
    for changes, error, words in (
        ({"model": "no-such"}, ModelError, "Unknown model"),
        ({"adapter": "no-such"}, AdapterError, "Unknown adapter"),
        ({"adapter": str(tiny_phi_adapter)}, AdapterError, "made for another base model"),
        ({"data_dir": str(tmp_path / "none")}, ConfigError, "No folder .*none"),
    ):
        with pytest.raises(error, match=words):
            store.start_evaluation(asked.replace(**changes), workspace)
    assert store.list_jobs(workspace) == []


def test_missing_data_fail_with_one_line(asked, workspace):
    failed = wait_for(store.start_evaluation(asked.replace(benchmarks=("bbq",)), workspace).folder, ended)
    assert failed.state == "failed"
    assert failed.error.startswith(f"No items of bbq: no folder {asked.data_dir}/bbq; get them with `git clone")
    assert "\n" not in failed.error
    store.delete_job(failed.id, workspace)
    assert store.list_jobs(workspace) == []


def test_other_files_are_listed_as_what_they_are(workspace):
    folder = workspace.root / "evaluations"
    made = result(8, benchmarks=("crows_pairs",))
    write_result(workspace.root, "whole", made)
    write_result(workspace.root, "partial", {**made, "provenance": made["provenance"] | {"interrupted": True}})
    (folder / "torn.json").write_text("{")
    (folder / "else.json").write_text('{"a": 1}')
    found = {one.id: (one.state, one.has_result) for one in store.list_jobs(workspace)}
    states = {"whole": "finished", "partial": "stopped", "torn": "failed", "else": "failed"}
    assert found == {name: (state, True) for name, state in states.items()}
    with pytest.raises(EvaluationError, match=r"else\.json"):
        store.load_result(store.find_job("else", workspace))
    with pytest.raises(JobError, match="has no config to resume with"):
        store.resume_job("partial", workspace)
    for bad in ("../evaluations/whole", "none", "", "evaluate/../whole", "other/whole", "\0", "x" * 300):
        with pytest.raises(JobError, match=r"No .*: there are"):
            store.find_job(bad, workspace)


def test_an_estimate_is_measured_once_and_then_known(asked, workspace):
    assert known_seconds(asked, workspace) == {"crows_pairs": None}
    with pytest.raises(EvaluationError, match="cancelled"):
        estimate_evaluation(asked, workspace, cancelled=lambda: True)
    seconds = estimate_evaluation(asked, workspace)
    assert 0 < seconds["crows_pairs"] < 60
    assert known_seconds(asked, workspace) == seconds
    half = known_seconds(asked.replace(limit=20), workspace)["crows_pairs"]
    assert half == pytest.approx(seconds["crows_pairs"] / 2)  # 20 of 40 items
    base = known_seconds(asked.replace(adapter="none"), workspace)["crows_pairs"]
    assert 0 < base <= seconds["crows_pairs"]
    curve = known_seconds(asked.replace(strengths=(0.0, 0.5, 1.0)), workspace)["crows_pairs"]
    assert curve == pytest.approx(base + 2 * (seconds["crows_pairs"] - base))  # base once, tuned twice; 0 is base
    assert not (workspace.cache / "scores").exists()  # measured items are no evaluation's
    assert list((workspace.cache / "evaluation_speeds").glob(".measuring-*")) == []
    with pytest.raises(EvaluationError, match="Nothing could be measured: No items of bbq"):
        estimate_evaluation(asked.replace(benchmarks=("bbq",)), workspace)


def test_starting_needs_no_engine_in_this_process(asked, workspace):
    script = (
        "import sys, json; from biasdpo.jobs import store, estimate; from biasdpo.migrations import open_workspace\n"
        "from biasdpo.config import EvaluationConfig\n"
        "config = EvaluationConfig(**json.loads(sys.argv[1]))\n"
        "estimate.known_seconds(config, open_workspace(sys.argv[2]))\n"
        "print(sorted({'torch', 'llama_cpp', 'transformers', 'peft'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, json.dumps(asked.to_json()), str(workspace.root)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "[]\n"
