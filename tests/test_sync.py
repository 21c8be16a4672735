"""Labels on the Hub: what is acknowledged is there, nothing is there twice, whatever fails or is killed, and it comes back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from biasdpo.data import sync
from biasdpo.data.journal import append, append_all, edit, journal_of, undo, withdraw
from biasdpo.data.sync import HubSync
from biasdpo.migrations import open_workspace
from biasdpo.records import Judgment
from biasdpo.workspace import Workspace
from tests.app_process import free_port, running_app, start_app, wait_for_page
from tests.commands import run
from tests.hub import Hub, running_hub
from tests.journal_worker import judgment

ROOT = Path(__file__).resolve().parent.parent
BUCKET, DATASET = "bucket:ana/labels", "dataset:ana/labels"
QUICK = {"POLL_SECONDS": 0.02, "GATHER_SECONDS": 0.05, "COMMIT_SECONDS": 0.0, "FIRST_RETRY_SECONDS": 0.1}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub(tmp_path / "hub") as running:
        running.use(monkeypatch)
        for name, seconds in QUICK.items():
            monkeypatch.setattr(sync, name, seconds)
        yield running


def started(workspace: Workspace, target: str = DATASET) -> HubSync:
    return sync.start(workspace, target)


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def finish(running: HubSync) -> None:
    """Wait until everything is sent, then stop."""
    wait_until(lambda: running.state().unsent == 0 and not running.state().reason and bool(running.state().sent))
    running.close(10)


def on_hub(hub: Hub, target: str = DATASET) -> list[str]:
    """The ids of all rows on the Hub, as often as they are there."""
    kind, _, name = target.partition(":")
    files = hub.repository(kind, name).files
    return [
        json.loads(line)["id"] for path in files if path.endswith(".jsonl") for line in hub.read(kind, name, path).splitlines()
    ]


def stored(workspace: Workspace) -> list[str]:
    return [row["id"] for row in journal_of(workspace).refresh().standing()]


@pytest.mark.parametrize("target", [BUCKET, DATASET])
def test_rows_withdrawals_and_edits_reach_a_private_place_and_an_empty_workspace(
    hub: Hub, workspace: Workspace, tmp_path: Path, target: str
) -> None:
    append_all(workspace, [judgment("kim", n) for n in range(12)])
    first = started(workspace, target)
    wait_until(lambda: first.is_sent("kim-11"))
    append(workspace, judgment("lee", 1))
    undo(workspace, "kim-3", "0" * 16, "kim")
    edited = edit(workspace, ["kim-4"], {"note": "seen"})
    finish(first)

    kind, _, name = target.partition(":")
    assert hub.repository(kind, name).private
    assert sorted(on_hub(hub, target)) == sorted(journal_of(workspace).rows)
    sizes = [len(hub.read(kind, name, path).splitlines()) for path in sorted(hub.repository(kind, name).files) if "/" in path]
    assert sizes == [12, 4]  # batches, not rows

    other = open_workspace(tmp_path / "other")
    second = started(other, target)
    wait_until(lambda: len(journal_of(other).refresh().rows) == 16)
    assert other.preferences.read_bytes() == workspace.preferences.read_bytes()
    assert edited[0] in stored(other)
    second.close(10)
    assert len(on_hub(hub, target)) == 16


@pytest.mark.parametrize(
    ("what", "method", "path", "options"),
    [
        ("refuse", "POST", "/commit/", {"status": 500, "times": 2}),
        ("refuse", "POST", "/api/repos/create", {"status": 403, "times": 2}),
        ("drop", "POST", "/commit/", {"times": 2}),
        ("cut", "POST", "/commit/", {"times": 3}),
        ("cut", "POST", "/api/repos/create", {}),
        ("twice", "POST", "/commit/", {"times": 2}),
        ("slow", "POST", "/commit/", {"seconds": 1.0, "times": 2}),
        ("cut", "POST", "/batch", {"times": 2}),
        ("refuse", "POST", "/batch", {"status": 400, "times": 2}),
        ("twice", "POST", "/batch", {"times": 2}),
    ],
)
def test_faults_lose_nothing_and_store_nothing_twice(
    hub: Hub, workspace: Workspace, what: str, method: str, path: str, options: dict[str, float]
) -> None:
    target = BUCKET if path == "/batch" else DATASET
    hub.fault(what, method, path, **options)  # type: ignore[arg-type]
    append(workspace, judgment("kim", 1))
    running = started(workspace, target)
    wait_until(lambda: any(fault.times == 0 for fault in hub.faults) or running.is_sent("kim-1"))
    append(workspace, judgment("kim", 2))
    finish(running)
    assert sorted(on_hub(hub, target)) == ["kim-1", "kim-2"]


def test_the_state_names_what_is_unsent_and_why(hub: Hub, workspace: Workspace) -> None:
    hub.users.clear()
    append_all(workspace, [judgment("kim", 1), judgment("kim", 2)])
    running = started(workspace)
    wait_until(lambda: "HF_TOKEN" in running.state().reason)
    state = running.state()
    assert (state.sent, state.unsent) == (0, 2)
    assert running.state().age_seconds > state.age_seconds > 0
    hub.users["hf_of_ana"] = "ana"
    finish(running)
    assert running.state().unsent == 0


def test_two_replicas(hub: Hub, workspace: Workspace, tmp_path: Path) -> None:
    others = open_workspace(tmp_path / "others")
    one, two = started(workspace), started(others)
    for number in range(5):
        append(workspace, judgment("one", number))
        append(others, judgment("two", number))
        wait_until(lambda number=number: one.is_sent(f"one-{number}"))
    append_all(workspace, [judgment("both", 1)])
    append_all(others, [judgment("both", 1)])
    finish(one)
    finish(two)
    ids = {f"{name}-{number}" for name in ("one", "two") for number in range(5)} | {"both-1"}
    assert set(on_hub(hub)) == ids
    for again in (workspace, others, open_workspace(tmp_path / "third")):  # at their next start
        running = started(again)
        wait_until(lambda again=again: {*journal_of(again).refresh().rows} == ids)
        finish(running)
        assert sorted(stored(again)) == sorted(ids)


def test_foreign_files_public_places_and_deleted_files_are_named(hub: Hub, workspace: Workspace) -> None:
    hub.create("dataset", "ana/labels", private=False)
    hub.write("dataset", "ana/labels", "README.md", b"Labels")
    for number in range(9):
        hub.write("dataset", "ana/labels", f"data/train-{number}.csv", b"a,b\n")
    append_all(workspace, [judgment("kim", 1), judgment("kim", 2)])
    finish(started(workspace))
    repository = hub.repository("dataset", "ana/labels")
    (own,) = (path for path in repository.files if path.startswith("verdicts/"))
    line = hub.read("dataset", "ana/labels", own).splitlines()[0]
    damaged = "verdicts/20260101T000000000000Z-0123456789abcdef.jsonl"
    hub.write("dataset", "ana/labels", damaged, line.replace(b"kim-1", b"kim-9") + b"\nnot a row\n")
    running = started(workspace)
    wait_until(lambda: "kim-9" in stored(workspace))
    finish(running)
    notes = "\n".join(running.state().notes)
    assert "dataset:ana/labels is public" in notes
    assert "data/train-0.csv, " in notes
    assert "data/train-4.csv and 4 more" in notes  # a line, however many there are
    assert damaged in notes
    assert "README.md" not in notes

    del repository.files[own]  # somebody erased it: not sent again
    running = started(workspace)
    wait_until(lambda: "1 of its files" in "".join(running.state().notes))
    append(workspace, judgment("kim", 10))
    finish(running)
    assert sorted(on_hub_rows(hub, damaged)) == ["kim-10"]


def on_hub_rows(hub: Hub, without: str) -> list[str]:
    files = [path for path in hub.repository("dataset", "ana/labels").files if path.startswith("verdicts/") and path != without]
    return [json.loads(line)["id"] for path in files for line in hub.read("dataset", "ana/labels", path).splitlines()]


# Killed


WORKER = """
import os, sys, time
from biasdpo.data import journal, sync
from biasdpo.migrations import open_workspace
from biasdpo.records import Judgment
from tests.journal_worker import judgment

root, target, step, count = sys.argv[1:]
for name, seconds in QUICK.items():
    setattr(sync, name, seconds)
calls = 0


def dying(function, when, at):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if (calls, when) == (at, "before"):
            os._exit(9)
        result = function(*args, **kwargs)
        if calls == at:
            os._exit(9)
        return result

    return call


if step:
    owner, name, when, at = step.split()
    owner = {"HubFiles": sync.HubFiles, "HubSync": sync.HubSync, "sync": sync}[owner]
    setattr(owner, name, dying(getattr(owner, name), when, int(at)))
workspace = open_workspace(root)
running = sync.start(workspace, target)
rows = journal.journal_of(workspace).refresh().rows
for number in range(sum(row.startswith("kim") for row in rows), int(count)):
    journal.append(workspace, judgment("kim", number))
    while number == 3 and not running.is_sent("kim-3"):  # so that there are two batches
        time.sleep(0.01)
    time.sleep(0.03)
with open(root + "/acks", "ab", buffering=0) as acks:
    known = set()
    while len(known) <= int(count):
        for row in list(journal.journal_of(workspace).rows):
            if running.is_sent(row) and row not in known:
                known.add(row)
                acks.write(row.encode() + b"\\n")
        time.sleep(0.01)
""".replace("QUICK", str(QUICK))
STEPS = [  # and at which call of it
    *(f"{name} {when}" for name in ("HubFiles create", "HubFiles sizes", "HubFiles fetch") for when in ("before 1", "after 1")),
    *(f"{name} {when}" for name in ("sync append_all", "sync replacing", "sync _file_of") for when in ("before 1", "after 1")),
    *(f"{name} {when}" for name in ("HubFiles change", "HubSync _acknowledge") for when in ("before 1", "after 1", "after 2")),
]


def work(hub: Hub, workspace: Workspace, target: str, step: str, count: int) -> subprocess.Popen[bytes]:
    """A process that stores kim-0 to kim-`count - 1`, and writes down what is acknowledged; it dies at a step."""
    command = [sys.executable, "-c", WORKER, str(workspace.root), target, step, str(count)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | hub.environment())


def put_there_before(tmp_path: Path, target: str) -> None:
    earlier = open_workspace(tmp_path / "earlier")
    append(earlier, judgment("lee", 1))
    finish(started(earlier, target))


def check_acknowledged(hub: Hub, workspace: Workspace, target: str) -> None:
    acks = workspace.root / "acks"
    assert {*(acks.read_text().split() if acks.exists() else ())} <= {*on_hub(hub, target)}


@pytest.mark.parametrize("step", STEPS)
def test_killed_between_two_steps(hub: Hub, workspace: Workspace, tmp_path: Path, step: str) -> None:
    put_there_before(tmp_path, DATASET)
    assert work(hub, workspace, DATASET, step, 8).wait(60) == 9
    check_acknowledged(hub, workspace, DATASET)
    assert work(hub, workspace, DATASET, "", 8).wait(60) == 0
    assert sorted(on_hub(hub)) == sorted(stored(workspace)) == [*(f"kim-{n}" for n in range(8)), "lee-1"]


def test_killed_at_any_time(hub: Hub, workspace: Workspace, tmp_path: Path) -> None:
    put_there_before(tmp_path, BUCKET)
    for delay in (0.9, 1.1, 1.3, 1.6):
        process = work(hub, workspace, BUCKET, "", 40)
        time.sleep(delay)
        process.kill()
        process.wait()
        check_acknowledged(hub, workspace, BUCKET)
    assert work(hub, workspace, BUCKET, "", 40).wait(60) == 0
    assert sorted(on_hub(hub, BUCKET)) == sorted([*(f"kim-{n}" for n in range(40)), "lee-1"])


# Erased


def by(annotator: str, number: int) -> Judgment:
    return replace(judgment(annotator, number), annotator=annotator)


@pytest.mark.parametrize("target", [BUCKET, DATASET])
def test_erased_from_the_files_on_the_hub(hub: Hub, workspace: Workspace, tmp_path: Path, target: str) -> None:
    kind, _, name = target.partition(":")
    append_all(workspace, [by("kim", 1), by("lee", 1)])
    running = started(workspace, target)
    wait_until(lambda: running.is_sent("lee-1"))
    append(workspace, by("kim", 2))
    wait_until(lambda: running.is_sent("kim-2"))
    withdraw(workspace, ["kim-1"])
    withdraw(workspace, ["lee-1"], "kim")
    finish(running)

    hub.fault("refuse", "POST", "/batch" if kind == "bucket" else "/commit/", status=400)
    done = run("dataset", "erase", "--annotator", "kim", "--yes", "--workspace", workspace.root)
    assert f"3 rows removed from {workspace.preferences}" in done.stdout
    assert f"Not reached: {target}: the Hub refused it with status 400" in done.stdout
    assert "kim-1" in on_hub(hub, target)
    assert not any(b"kim" in path.read_bytes() for path in (workspace.cache / "sync").rglob("*") if path.is_file())

    done = run("dataset", "erase", "--annotator", "kim", "--yes", "--json", "--workspace", workspace.root)
    assert json.loads(done.stdout) == {"removed": 0, "removed_from_hub": {target: 3}, "remaining": []}
    assert sorted(on_hub(hub, target)) == ["lee-1", "retracts-lee-1"]
    contents = [hub.content(file) for commit in hub.repository(kind, name).commits for file in commit.files.values()]
    assert not any(b"kim" in content for content in contents)  # nor in the history
    error = run("dataset", "erase", "--annotator", "kim", "--yes", "--workspace", workspace.root).error
    assert "Nothing by 'kim'" in error

    for again in (workspace, open_workspace(tmp_path / "other")):
        finish(started(again, target))
        assert sorted(journal_of(again).refresh().rows) == ["lee-1", "retracts-lee-1"]
    assert sorted(on_hub(hub, target)) == ["lee-1", "retracts-lee-1"]


def test_nothing_here_and_the_hub_out_of_reach_is_an_error(hub: Hub, workspace: Workspace) -> None:
    hub.users.clear()
    done = run("dataset", "erase", "--annotator", "kim", "--sync", DATASET, "--yes", "--workspace", workspace.root)
    assert "dataset:ana/labels: the Hub does not accept the token: run `hf auth login`" in done.error
    assert "Run this command again" in done.error


def test_erased_on_the_hub_alone(hub: Hub, workspace: Workspace, tmp_path: Path) -> None:
    append_all(workspace, [by("kim", 1), by("lee", 1)])
    finish(started(workspace))
    done = run("dataset", "erase", "--annotator", "kim", "--sync", DATASET, "--yes", "--workspace", tmp_path / "laptop")
    assert done.stdout == f"1 row removed from {DATASET}\n"
    finish(started(workspace))  # a replica that has the row still does not bring it back
    assert on_hub(hub) == ["lee-1"]


# The app


def health(url: str) -> dict[str, object]:
    with urllib.request.urlopen(url + "healthz", timeout=5) as answer:
        return dict(json.loads(answer.read()))


def test_what_is_left_is_sent_at_sigterm(hub: Hub, workspace: Workspace) -> None:
    port = free_port()
    process = start_app(workspace.root, port, "--sync", DATASET, **hub.environment())
    try:
        url = f"http://127.0.0.1:{port}/"
        wait_for_page(url, process, workspace.root / "app.log")
        wait_until(lambda: "BiasDPO is at" in (workspace.root / "app.log").read_text())
        for number in range(3):
            append(workspace, judgment("kim", number))
        wait_until(lambda: health(url)["unsent"] == 3 or health(url)["sent"] == 3)
        process.send_signal(signal.SIGTERM)
        append(workspace, judgment("kim", 3))
        assert process.wait(15) == 0
    finally:
        process.kill()
    assert sorted(on_hub(hub)) == [f"kim-{n}" for n in range(4)]
    assert "not saved" not in (workspace.root / "app.log").read_text()


def test_sigterm_before_the_page_waits_for_it_is_a_clean_end(workspace: Workspace) -> None:
    script = f"""
import app, os, signal, sys
app.serve_workspace = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
sys.exit(app.main(["--workspace", {str(workspace.root)!r}, "--port", "{free_port()}"]))
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60).returncode == 0


def test_the_app_starts_without_the_hub_and_a_variable_names_the_target_as_on_a_space(workspace: Workspace) -> None:
    offline = {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_any", "NO_PROXY": "*"}
    append(workspace, judgment("kim", 1))
    with running_app(workspace.root, BIASDPO_SYNC=DATASET, **offline) as url:
        log = workspace.root / "app.log"
        wait_until(lambda: "Labels are kept here only, since dataset:ana/labels: the Hub can't be reached" in log.read_text())
        assert health(url)["unsent"] == 1
    assert "1 row not saved to dataset:ana/labels" in log.read_text()
    assert "hf_any" not in log.read_text()


@pytest.mark.parametrize(
    ("target", "environment", "message"),
    [
        ("ana/labels", {}, "sync must be bucket:OWNER/NAME or dataset:OWNER/NAME: got 'ana/labels'"),
        ("model:ana/labels", {}, "got 'model:ana/labels'"),
        ("bucket:labels", {}, "got 'bucket:labels'"),
        ("dataset:ana/la--bels", {}, "can't be the name of a repository: Cannot have -- or .."),
        (
            DATASET,
            {"HF_TOKEN": ""},
            "dataset:ana/labels needs a Hub token that may write there, and there is none: run `hf auth login`",
        ),
    ],
)
def test_bad_input_is_one_line(hub: Hub, workspace: Workspace, target: str, environment: dict[str, str], message: str) -> None:
    process = start_app(workspace.root, free_port(), "--sync", target, **hub.environment() | environment)
    assert process.wait(60) == 2
    (line,) = (workspace.root / "app.log").read_text().splitlines()
    assert message in line
