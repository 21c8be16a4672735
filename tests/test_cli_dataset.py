"""`python -m biasdpo dataset`: the BiasDPO rows in and out again, bad rows, exit status, what goes where."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from biasdpo.data.journal import Journal
from biasdpo.workspace import Workspace
from tests import commands
from tests.commands import Done

ROOT = Path(__file__).resolve().parent.parent
BIASDPO = ROOT.parent / "shared" / "data" / "biasdpo.jsonl"
GOOD = {"prompt": "Who leads?", "chosen": "Anyone can.", "rejected": "Men."}
needs_biasdpo = pytest.mark.skipif(not BIASDPO.is_file(), reason=f"the BiasDPO rows are not at {BIASDPO}")


@pytest.fixture
def run(tmp_path) -> Callable[..., Done]:
    """Run `dataset ...` on a workspace of this test's own."""
    return lambda *given, **environment: commands.run("dataset", *given, "--workspace", tmp_path / "w", **environment)


def ok(done: Done) -> dict:
    """The JSON that a command printed, and nothing else."""
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def error_of(done: Done) -> str:
    assert len(done.stderr.splitlines()) == 1
    return done.error


@needs_biasdpo
def test_the_biasdpo_rows_in_and_out_again(run, tmp_path):
    found = ok(run("import", BIASDPO, "--name", "biasdpo", "--json"))
    mapping = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    assert (found["written"], found["known"], found["bad"]) == (1030, 0, [])
    assert (found["source"], found["mapping"]) == ("import:biasdpo", mapping)
    again = ok(run("import", BIASDPO, "--json"))
    assert (again["written"], again["known"]) == (0, 1030)

    for source in ([], [BIASDPO]):
        counts = ok(run("stats", *source, "--json"))
        assert counts["rows"] == 1030
        assert counts["pairs"] == 1029  # one row is there twice
        # In 859 rows chosen is the longer, in 4 it is as long, which counts half: the 83.5 % that are said of BiasDPO.
        assert counts["chosen_longer_share"] == pytest.approx((859 + 4 / 2) / 1030) == pytest.approx(0.835, abs=0.001)
        assert counts["ties"] == counts["both_biased"] == counts["retracted"] == counts["repaired_lines"] == 0
    valid = ok(run("validate", "--json"))
    assert (valid["rows"], valid["good"], valid["bad"], valid["by_verdict"]) == (1030, 1030, [], {"preferred": 1030})

    out = tmp_path / "out" / "pairs.parquet"
    done = ok(run("export", out, "--json"))
    assert (done["path"], done["card"], done["rows"], done["repeats"]) == (str(out), str(out.with_name("README.md")), 1029, 1)
    assert ok(run("stats", out, "--json"))["rows"] == 1029
    read = {tuple(map(str, row.values())) for row in map(json.loads, BIASDPO.read_text(encoding="utf-8").splitlines())}
    import pyarrow.parquet

    columns = pyarrow.parquet.read_table(out, columns=["prompt", "chosen", "rejected"]).to_pylist()
    assert {tuple(row.values()) for row in columns} == read

    first = next(iter(Journal(Workspace(tmp_path / "w").preferences).refresh().rows))
    (edited,) = ok(run("edit", first, "--set", "category=gender", "--set", "note=a=b", "--json"))["edited"]
    row = Journal(Workspace(tmp_path / "w").preferences).refresh().rows[edited]
    assert (row["category"], row["note"]) == ("gender", "a=b")
    assert [ok(run("retract", edited, "--json"))["retracted"] for _ in range(2)] == [1, 0]
    assert ok(run("stats", "--json"))["retracted"] == 2  # the edited one, and what it was before
    assert ok(run("export", out, "--json"))["rows"] == 1028
    assert ok(run("retract", "--import", "biasdpo", "--json"))["retracted"] == 1029
    assert ok(run("stats", "--json"))["pairs"] == 0


def test_bad_rows_are_listed_and_the_good_ones_kept(run, tmp_path):
    path = tmp_path / "rows.jsonl"
    bad = ['{"prompt": "a"}\n', "no json\n", '{"prompt": "\\u001b[31mred", "chosen": "b", "rejected": "b"}\n'] * 10
    path.write_text(
        json.dumps(GOOD) + "\n" + "".join(bad) + json.dumps(GOOD | {"prompt": "Who cooks?", "system": "Be kind."}) + "\n"
    )
    done = run("import", path, "--json")
    assert done.returncode == 0
    row = json.loads(done.stdout)
    assert (row["written"], row["known"], len(row["bad"])) == (2, 0, 30)
    assert row["bad"][0] == {"line": 2, "reason": "no column 'chosen', got prompt"}
    lines = done.stderr.splitlines()
    assert len(lines) == 22
    assert lines[0] == "line 2: no column 'chosen', got prompt"
    assert lines[1].startswith("line 3: not JSON (")
    assert lines[20] == "... and 10 more bad rows; `dataset validate FILE` lists all"
    assert lines[21] == "rows with a system text, which now stands before the prompt: 1"

    done = run("import", path)
    assert done.stdout == "import:rows: 0 rows written, 2 known, 30 bad\n"

    done = run("validate", path)
    assert error_of(done).endswith(
        "has 30 bad lines of 32, the first in line 2: correct or remove them (`dataset import` takes the good ones)"
    )
    assert done.stdout.splitlines()[29].startswith("line 31: ")
    assert f"{path}: 32 rows, 2 good, 30 bad\n" in done.stdout
    done = run("validate", path, "--json")
    assert error_of(done)
    assert len(json.loads(done.stdout)["bad"]) == 30


def test_columns_are_mapped_and_a_dry_run_stores_nothing(run, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("Ask,chosen,worse,topic,extra\nWho leads?,Anyone can.,Men.,gender,x\n")
    assert "No column was recognized as rejected, got Ask, chosen, worse, topic, extra: name it with --map" in error_of(
        run("import", path)
    )
    assert "No column 'nope' for prompt: choose one of Ask, chosen" in error_of(run("import", path, "--map", "prompt=nope"))
    assert "--map takes FIELD=COLUMN" in error_of(run("import", path, "--map", "nope"))
    mapping = ["--map", "prompt=Ask,rejected=worse,category=topic"]
    done = run("import", path, *mapping, "--dry-run")
    assert done.stdout.splitlines() == [
        "columns: prompt=Ask, chosen=chosen, rejected=worse, category=topic",
        "not imported: extra",
        json.dumps(GOOD),
        "import:rows: 1 row would be written, 0 known, 0 bad",
    ]
    assert ok(run("import", path, *mapping, "--dry-run", "--json"))["dry_run"] is True
    assert not (tmp_path / "w" / "preferences.jsonl").exists()
    assert ok(run("import", path, *mapping, "--name", "mine", "--json"))["source"] == "import:mine"
    (row,) = Journal(Workspace(tmp_path / "w").preferences).refresh().standing()
    assert {column: row[column] for column in GOOD} == GOOD
    assert (row["category"], row["source"]) == ("gender", "import:mine")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("import", "none.jsonl"), "No dataset file none.jsonl"),
        (("import", "tests"), "tests is not a file"),
        (("import", "LICENSE"), "No good row in LICENSE"),
        (("import", "hub:nobody/nothing"), "Can't load hub:nobody/nothing"),
        (("validate", "none.csv"), "No dataset file none.csv"),
        (("stats", "none.csv"), "No dataset file none.csv"),
        (("stats", "LICENSE"), "No good row in LICENSE"),
        (("export", "pairs.txt"), "An export ends in .jsonl, .csv or .parquet: got 'pairs.txt'"),
        (("export", "pairs.csv"), "No preference pairs in the workspace yet"),
        (("retract", "nope"), "No judgment 'nope'"),
        (("retract",), "Name judgments by their ids, or an import with --import NAME"),
        (("edit", "x", "--set", "id=y"), "Only prompt, chosen, rejected, category, target_group, note can be edited: got id"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, arguments, words):
    done = run(*arguments)
    assert words in error_of(done)
    assert done.stdout == ""


def test_an_empty_workspace_has_nothing_wrong_with_it(run):
    assert ok(run("validate", "--json"))["rows"] == 0
    assert ok(run("stats", "--json"))["rows"] == 0


def test_a_closed_pipe_is_no_fault(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("no json\n" * 20_000)
    command = [sys.executable, "-m", "biasdpo", "dataset", "validate", str(path), "--workspace", str(tmp_path / "w")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b"line 1: not JSON")
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == 0
