"""Evaluations in processes of their own: finished, killed, cancelled, failed, one after the other, resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from biasdpo import detached, evaluations
from biasdpo.errors import AdapterError, ConfigError, EvaluationError, ModelError, RefusedError
from biasdpo.evaluation.results import table
from biasdpo.evaluations import EvaluationConfig, Progress
from biasdpo.evaluations.status import EvaluationFiles, EvaluationStatus
from biasdpo.workspace import Workspace
from tests import evaluating
from tests.evaluating import ended, under_way, wait

LONG = 3000  # items of an evaluation, in so many batches that it is not over before it is stopped


@pytest.fixture
def asked(tiny_llama_gguf: Path, tiny_llama_adapter: Path, tmp_path: Path) -> EvaluationConfig:
    return evaluating.request(tiny_llama_gguf, tiny_llama_adapter, evaluating.write_items(tmp_path / "data", pairs=40))


@pytest.fixture
def long(tiny_llama_gguf: Path, tiny_llama_adapter: Path, tmp_path: Path) -> EvaluationConfig:
    """One that is under way for seconds."""
    return evaluating.request(tiny_llama_gguf, tiny_llama_adapter, evaluating.write_items(tmp_path / "data", pairs=LONG))


def likelihoods_kept(workspace: Workspace) -> int:
    """Lines in the score cache: were a request scored twice, it would stand there twice."""
    files = (workspace.cache / "scores").glob("*.jsonl")
    return sum(line.strip() != b"" for file in files for line in file.read_bytes().split(b"\n"))


def signal_process(evaluation: evaluations.Evaluation, sent: signal.Signals) -> None:
    status = evaluation.files.read_status()
    assert status is not None
    assert status.pid != os.getpid()
    os.kill(status.pid, sent)


def test_an_evaluation_from_start_to_end(asked, workspace, monkeypatch):
    started = evaluations.start(asked.replace(benchmarks=("crows_pairs", "perplexity"), limit=20), workspace)
    assert (started.id, started.state, started.phase) == ("tiny-llama-lora-1", "running", "starting")
    assert started.progress == (Progress("crows_pairs", 0, 0), Progress("utility", 0, 0))
    with pytest.raises(EvaluationError, match="is running and has no result"):
        started.load()
    with pytest.raises(EvaluationError, match="cancel it first"):
        evaluations.delete(started)
    with pytest.raises(EvaluationError, match="is running: only one that was cancelled"):
        evaluations.resume(started, workspace)
    done = wait(started, workspace, ended)
    assert (done.state, done.error, done.phase, done.seconds_left) == ("finished", "", "", None)
    assert done.progress == (Progress("crows_pairs", 20, 20), Progress("utility", 6, 6))
    assert done.started_at == started.started_at
    result = done.load()
    assert result["benchmarks"]["crows_pairs"]["n"] == 20
    assert {row.why_not for row in table(result)} == {"limited to 20 of 40 items", ""}
    with pytest.raises(EvaluationError, match="nothing to cancel"):
        evaluations.cancel(done)
    with pytest.raises(EvaluationError, match="is finished: only one"):
        evaluations.resume(done, workspace)
    assert evaluations.list_evaluations(workspace) == [done]
    # The shown command is the one that did it: it gives the same result.
    again = done.folder / "by-hand.json"
    command = done.request.command(again, workspace.root)
    assert subprocess.run(command, cwd=detached.ROOT, capture_output=True, check=False).returncode == 0
    assert json.loads(again.read_text()) == result
    by_hand = evaluations.find("by-hand", workspace)
    assert (by_hand.state, by_hand.request, by_hand.load()) == ("finished", None, result)
    with monkeypatch.context() as patch:
        patch.setenv("SPACE_ID", "someone/space")
        for action in (
            lambda: evaluations.start(asked, workspace),
            lambda: evaluations.resume(done, workspace),
            lambda: evaluations.delete(done),
            lambda: evaluations.estimate_seconds(asked, workspace),
        ):
            with pytest.raises(RefusedError, match="switched off on a public Space"):
                action()
    evaluations.delete(done)
    evaluations.delete(by_hand)
    assert evaluations.list_evaluations(workspace) == []
    assert [path.name for path in done.folder.iterdir() if not path.name.startswith(".")] == []


def test_a_killed_one_is_interrupted_and_goes_on_without_scoring_anything_twice(long, workspace):
    started = evaluations.start(long, workspace)
    seen = wait(started, workspace, under_way)
    assert 0 < seen.progress[0].done < LONG
    assert seen.seconds_left is not None
    signal_process(started, signal.SIGKILL)
    killed = wait(started, workspace, ended)
    assert killed.state == "interrupted"
    assert "as it does when it is killed" in killed.error
    assert "\n" not in killed.error
    assert not killed.has_result
    kept = likelihoods_kept(workspace)
    assert 0 < kept < 2 * 2 * LONG
    resumed = evaluations.resume(killed, workspace)
    assert (resumed.id, resumed.state) == (killed.id, "running")
    done = wait(resumed, workspace, ended)
    assert (done.state, done.progress) == ("finished", (Progress("crows_pairs", LONG, LONG),))
    # Two sentences of LONG pairs on two sides; the kill may have torn one line.
    assert 2 * 2 * LONG <= likelihoods_kept(workspace) <= 2 * 2 * LONG + 1
    assert done.load()["benchmarks"]["crows_pairs"]["not_comparable"] == ""


def test_a_cancelled_one_keeps_what_it_scored_and_goes_on(long, workspace):
    started = evaluations.start(long, workspace)
    wait(started, workspace, under_way)
    signal_process(started, signal.SIGSTOP)  # so that it is not over before it is asked
    evaluations.cancel(started)
    signal_process(started, signal.SIGCONT)
    cancelled = wait(started, workspace, ended)
    assert (cancelled.state, cancelled.error) == ("cancelled", "")
    (found,) = cancelled.load()["benchmarks"].values()
    assert 0 < found["n"] < LONG
    assert found["not_comparable"].startswith("interrupted after")
    assert not any(row.comparable for row in table(cancelled.load()))
    done = wait(evaluations.resume(cancelled, workspace), workspace, ended)
    assert done.state == "finished"
    assert done.load()["benchmarks"]["crows_pairs"]["n"] == LONG
    assert likelihoods_kept(workspace) == 2 * 2 * LONG


def test_the_second_waits_for_the_first_and_a_second_cancel_kills(long, workspace):
    first = evaluations.start(long, workspace)
    second = evaluations.start(long.replace(adapter="none"), workspace)
    assert second.id == "tiny-llama-F32-1"
    waiting = wait(second, workspace, lambda one: one.phase.startswith("waits"))
    assert waiting.phase == f"waits for {first.id}"
    assert [one.id for one in evaluations.list_evaluations(workspace)] in ([second.id, first.id], [first.id, second.id])
    evaluations.cancel(waiting)
    gone = wait(second, workspace, ended)
    assert (gone.state, gone.has_result, gone.error) == ("cancelled", False, "")
    signal_process(first, signal.SIGSTOP)  # it hears nothing any more
    evaluations.cancel(first)
    assert evaluations.find(first.id, workspace).phase == "stopping"
    evaluations.cancel(first)
    killed = wait(first, workspace, ended)
    assert (killed.state, killed.has_result) == ("cancelled", False)
    # Nobody is ahead any more, whatever was left behind.
    done = wait(evaluations.resume(gone, workspace), workspace, ended)
    assert done.state == "finished"
    assert done.load()["benchmarks"]["crows_pairs"]["tuned"] == {}


def test_what_can_not_be_evaluated_is_refused_before_anything_is_written(asked, workspace, tiny_phi_adapter, tmp_path):
    for changes, error, words in (
        ({"model": "no-such"}, ModelError, "Unknown model"),
        ({"adapter": "no-such"}, AdapterError, "Unknown adapter"),
        ({"adapter": str(tiny_phi_adapter)}, AdapterError, "made for another base model"),
        ({"data_dir": str(tmp_path / "none")}, ConfigError, "No folder .*none"),
        ({"benchmarks": ()}, ConfigError, "benchmarks is empty"),
    ):
        with pytest.raises(error, match=words):
            evaluations.start(asked.replace(**changes), workspace)
    assert evaluations.list_evaluations(workspace) == []


def test_missing_data_fail_with_the_one_line(asked, workspace):
    failed = wait(evaluations.start(asked.replace(benchmarks=("bbq",)), workspace), workspace, ended)
    assert failed.state == "failed"
    assert failed.error == (
        f"No items of bbq: no folder {asked.data_dir}/bbq; get oskarvanderwal/bbq from the Hub, and name with --data-dir the "
        "folder that holds bbq/"
    )
    evaluations.delete(failed)
    assert evaluations.list_evaluations(workspace) == []


def test_the_command_reports_to_no_status_but_its_own(asked, workspace, tmp_path):
    folder = workspace.root / "evaluations"
    folder.mkdir()
    files = EvaluationFiles(folder, "other")
    parent = psutil.Process(os.getppid())
    files.write_status(EvaluationStatus("running", parent.pid, parent.create_time()))
    command = [*asked.command(tmp_path / "out.json", workspace.root), f"--status={files.status}"]
    result = subprocess.run(command, cwd=detached.ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "is not this process's" in result.stderr
    assert files.read_status().state == "running"


def test_other_files_are_listed_as_what_they_are(workspace):
    folder = workspace.root / "evaluations"
    folder.mkdir()
    (folder / "whole.json").write_text('{"benchmarks": {}, "provenance": {"interrupted": false}}')
    (folder / "partial.json").write_text('{"benchmarks": {}, "provenance": {"interrupted": true}}')
    (folder / "torn.json").write_text("{")
    (folder / "else.json").write_text('{"a": 1}')
    (folder / "lost.request.json").write_text(json.dumps(EvaluationConfig(model="smollm2", benchmarks=("bbq",)).to_json()))
    (folder / "odd.status.json").write_text('{"state": "odd"}')
    (folder / "...json").write_text("{}")
    found = {one.id: (one.state, one.has_result) for one in evaluations.list_evaluations(workspace)}
    assert found == {
        "whole": ("finished", True),
        "partial": ("cancelled", True),
        "torn": ("failed", True),
        "else": ("failed", True),
        "lost": ("interrupted", False),
    }
    assert "is no evaluation's result (got an object of 1 keys)" in evaluations.find("else", workspace).error
    with pytest.raises(EvaluationError, match="is no evaluation's result"):
        evaluations.find("else", workspace).load()
    with pytest.raises(EvaluationError, match="Nobody knows what was asked"):
        evaluations.resume(evaluations.find("partial", workspace), workspace)
    for bad in ("../evaluations/whole", "none", "", "whole.json"):
        with pytest.raises(EvaluationError, match="No evaluation"):
            evaluations.find(bad, workspace)


def test_an_estimate_is_measured_once_and_then_known(asked, workspace):
    assert evaluations.known_seconds(asked, workspace) == {"crows_pairs": None}
    with pytest.raises(EvaluationError, match="cancelled"):
        evaluations.estimate_seconds(asked, workspace, cancelled=lambda: True)
    seconds = evaluations.estimate_seconds(asked, workspace)
    assert 0 < seconds["crows_pairs"] < 60
    assert evaluations.known_seconds(asked, workspace) == seconds
    half = evaluations.known_seconds(asked.replace(limit=20), workspace)["crows_pairs"]
    assert half == pytest.approx(seconds["crows_pairs"] / 2)  # 20 of 40 items
    base = evaluations.known_seconds(asked.replace(adapter="none"), workspace)["crows_pairs"]
    assert 0 < base <= seconds["crows_pairs"]
    curve = evaluations.known_seconds(asked.replace(strengths=(0.0, 0.5, 1.0)), workspace)["crows_pairs"]
    assert curve == pytest.approx(base + 2 * (seconds["crows_pairs"] - base))  # base once, tuned twice; 0 is base
    assert not (workspace.cache / "scores").exists()  # what was measured is no evaluation's
    assert list((workspace.cache / "evaluation_speeds").glob(".measuring-*")) == []
    with pytest.raises(EvaluationError, match="Nothing could be measured: No items of bbq"):
        evaluations.estimate_seconds(asked.replace(benchmarks=("bbq",)), workspace)


def test_starting_needs_no_engine_in_this_process(asked, workspace):
    script = (
        "import sys, json; from biasdpo import evaluations; from biasdpo.workspace import open_workspace\n"
        "request = evaluations.EvaluationConfig.from_json(json.loads(sys.argv[1]))\n"
        "evaluations.known_seconds(request, open_workspace(sys.argv[2]))\n"
        "print(sorted({'torch', 'llama_cpp', 'transformers', 'peft'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, json.dumps(asked.to_json()), str(workspace.root)]
    assert subprocess.run(command, cwd=detached.ROOT, capture_output=True, text=True, check=True).stdout == "[]\n"
