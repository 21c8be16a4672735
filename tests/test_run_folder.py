"""A run's files as they are read while a process writes them, or after one that was killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from biasdpo import run_folder
from biasdpo.errors import RunError
from biasdpo.run_folder import RunFolder, Status


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def test_lines_half_written_and_torn_are_left_out(folder: RunFolder) -> None:
    assert (folder.read_metrics(), folder.read_speed(), folder.read_probes()) == ([], [], [])
    folder.metrics.write_bytes(b'{"step": 1}\n{"step": 2, "lo\n[3]\n{"step": 4}\n{"step": 5}')
    assert folder.read_metrics() == [{"step": 1}, {"step": 4}]
    folder.probes.write_bytes('{"step": 1, "tuned": "Ä"}\n'.encode() + b'{"tuned": "\xc3')
    assert folder.read_probes() == [{"step": 1, "tuned": "Ä"}]


def test_of_an_endless_file_the_end_is_read(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "MAX_LINES_BYTES", 1000)
    folder.metrics.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1000)))
    read = folder.read_metrics()
    assert read[-1] == {"step": 999}
    assert 50 < len(read) < 100  # a line has 14 bytes


def test_the_tail_of_a_log(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder.log_tail(5) == ""
    folder.log.write_bytes(b"one\ntwo\nstep 1\rstep 2\rstep 3\n\x1b[31mred\x1b[0m \xff bell\x07\n")
    assert folder.log_tail(3) == "two\nstep 3\nred � bell"
    assert folder.log_tail(0) == ""
    monkeypatch.setattr(run_folder, "MAX_TAIL_BYTES", 100)
    folder.log.write_text("x" * 10_000 + "\nlast\n")
    assert folder.log_tail(10).splitlines()[-1] == "last"
    assert len(folder.log_tail(10)) <= 100


def test_a_status_of_another_version_is_read(folder: RunFolder) -> None:
    folder.write_status(Status("queued", waits_for="other", notes=("a", "b")))
    values = json.loads(folder.status_file.read_text())
    assert (values["waits_for"], values["best_step"], values["device"]) == ("other", None, "")
    del values["waits_for"]  # as an earlier version wrote it
    folder.status_file.write_text(json.dumps(values | {"unheard_of": 1}))
    assert folder.read_status().waits_for == ""
    assert folder.read_status().notes == ("a", "b")
    folder.status_file.write_text("[]")
    with pytest.raises(RunError, match="holds no run status"):
        folder.read_status()


def test_whole_checkpoints_by_step(folder: RunFolder) -> None:
    assert folder.last_checkpoint() is None
    for step, state in ((9, '{"global_step": 9}'), (10, '{"global_step": 10}'), (11, "{"), (12, None)):
        checkpoint = folder.checkpoints / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        if state is not None:
            (checkpoint / "trainer_state.json").write_text(state)
    assert [run_folder.checkpoint_step(path) for path in folder.whole_checkpoints()] == [9, 10]
