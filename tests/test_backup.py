"""Backup, restore and verification of a workspace."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from biasdpo.data.journal import append, append_all
from biasdpo.data.splits import write_dataset
from biasdpo.jobs.job import JobFolder
from biasdpo.workspace import Workspace, read_json, sha256_of, write_json
from tests.commands import Done, run
from tests.journal_worker import judgment
from tests.run_folders import write_run


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def used(workspace: Workspace) -> JobFolder:
    """A finished run in a workspace with judgments."""
    write_json(workspace.root / "version.json", {"format": 2})
    append_all(workspace, [judgment("a", number) for number in range(3)])
    folder = write_run(workspace.root, "one", steps=10)
    write_dataset([], folder.snapshot)
    record = read_json(folder.record)
    record["resolved"]["data"]["dataset_sha256"] = sha256_of(folder.snapshot)
    write_json(folder.record, record)
    provenance = folder.adapter / "provenance.json"
    write_json(provenance, read_json(provenance) | {"adapter_sha256": sha256_of(folder.adapter / "adapter_model.safetensors")})
    return folder


def verify(root: Path) -> Done:
    return run("workspace", "verify", "--workspace", root)


def test_round_trip(used: JobFolder, tmp_path: Path) -> None:
    root, archive, new = used.workspace.root, tmp_path / "b.tar.gz", tmp_path / "new"
    for name in (".jobs/queue", "cache/scores/x.jsonl", "runs/one/.reserve", "preferences.jsonl.lock"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/linked.json").write_text("{}")
    (root / "evaluations").symlink_to(tmp_path / "disk")
    (root / "runs/loop").symlink_to(root)
    with (root / "preferences.jsonl").open("ab") as file:
        file.write(b'{"id": "torn')  # set aside first
    expected = files(root) | {"evaluations/linked.json": b"{}"}
    expected = {name: data for name, data in expected.items() if not name.startswith((".", "cache/")) and "/." not in name}
    del expected["preferences.jsonl.lock"]

    archive.write_text("an older backup")
    assert run("workspace", "backup", archive, "--workspace", root).returncode == 0
    assert run("workspace", "restore", archive, "--workspace", new).returncode == 0
    expected |= {name: (root / name).read_bytes() for name in ("preferences.jsonl", "preferences.jsonl.torn")}
    assert files(new) == expected
    assert (archive.stat().st_mode & 0o777, new.stat().st_mode & 0o777) == (0o600, 0o700)
    assert verify(new).returncode == 0
    append(Workspace(new), judgment("a", 9))
    assert "is not an empty folder" in run("workspace", "restore", archive, "--workspace", new).error

    assert run("workspace", "backup", archive, "--without", "none", "--workspace", root).returncode == 0
    with tarfile.open(archive) as tar:
        assert {*tar.getnames()} == {*expected, "cache/scores/x.jsonl"}
    assert "outside of the workspace" in run("workspace", "backup", root / "b.tar.gz", "--workspace", root).error


def test_the_journal_grows_while_it_is_backed_up(used: JobFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, add = used.workspace.preferences.read_bytes(), tarfile.TarFile.addfile

    def add_late(tar: tarfile.TarFile, member: tarfile.TarInfo, content: io.BufferedReader) -> None:
        if member.name == "preferences.jsonl":
            append(used.workspace, judgment("late", 1))  # the lock is free by then
        elif member.name.endswith("status.json"):
            write_json(used.status_file, {"replaced": "x" * 5000})
        add(tar, member, content)

    status = used.status_file.read_bytes()
    monkeypatch.setattr(tarfile.TarFile, "addfile", add_late)
    assert run("workspace", "backup", tmp_path / "b.tar.gz", "--workspace", used.workspace.root).returncode == 0
    with tarfile.open(tmp_path / "b.tar.gz") as tar:
        found = {name: tar.extractfile(name).read() for name in ("preferences.jsonl", "runs/one/status.json")}
    assert found == {"preferences.jsonl": before, "runs/one/status.json": status}


@pytest.mark.parametrize(
    ("name", "kind", "target"),
    [
        ("../evil", tarfile.REGTYPE, ""),
        ("runs/../../evil", tarfile.REGTYPE, ""),
        ("/tmp/evil", tarfile.REGTYPE, ""),
        ("evil", tarfile.SYMTYPE, "/etc/passwd"),
        ("evil", tarfile.SYMTYPE, "version.json"),
        ("evil", tarfile.LNKTYPE, "version.json"),
        ("evil", tarfile.FIFOTYPE, ""),
    ],
)
def test_a_hostile_archive_is_refused(tmp_path: Path, name: str, kind: bytes, target: str) -> None:
    hostile, inside = tmp_path / "h.tar.gz", tmp_path / "in"
    inside.mkdir()
    with tarfile.open(hostile, "w:gz") as tar:
        for member_name, member_kind in (("version.json", tarfile.REGTYPE), (name, kind)):
            member = tarfile.TarInfo(member_name)
            member.type, member.linkname, content = member_kind, target, b'{"format": 2}'
            member.size = len(content) if member_kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(content))
    assert "h.tar.gz" in run("workspace", "restore", hostile, "--workspace", inside / "new").error
    assert [*inside.rglob("*")] == [inside / "new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["h.tar.gz", "in"]


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_what_is_no_backup_is_refused(used: JobFolder, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "b.tar.gz"
    run("workspace", "backup", file, "--workspace", used.workspace.root)
    file.write_bytes(file.read_bytes()[:-2000] if content is None else content)
    assert "nothing was written" in run("workspace", "restore", file, "--workspace", tmp_path / "new").error
    assert [*(tmp_path / "new").iterdir()] == []


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


FAULTS = {
    "adapter/adapter_model.safetensors": (flip, "SHA-256 is not the recorded one"),
    "dataset.jsonl": (lambda path: path.write_text("{}\n"), "SHA-256 is not the recorded one"),
    "status.json": (lambda path: path.write_text("{"), "status.json is damaged"),
    "job.json": (Path.unlink, "job.json is missing"),
    "adapter/provenance.json": (lambda path: path.write_text("[]"), "missing or damaged"),
    "adapter/": (lambda path: (path / "adapter_model.safetensors").unlink(), "missing or damaged"),
    "../../version.json": (lambda path: path.write_text('{"format": 99}'), "has format 99"),
    "../../": (lambda path: [(path / "preferences.jsonl").unlink(), (path / "preferences.jsonl").mkdir()], "Can't read"),
    "../../preferences.jsonl": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "line 3: incomplete"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_verify_finds_each_fault(used: JobFolder, name: str) -> None:
    root = used.workspace.root
    assert (verify(root).returncode, verify(root).stdout) == (0, f"{root}: no faults found\n")
    damage, message = FAULTS[name]
    damage((used.path / name).resolve())
    found = verify(root)
    assert (found.returncode, found.stdout.count("\n"), found.stderr) == (1, 1, "")
    assert message in found.stdout


def test_verify_reads_every_line_of_the_journal(used: JobFolder, tmp_path: Path) -> None:
    path = used.workspace.preferences
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first, b"half\n", *rest, first]))
    found = verify(used.workspace.root)
    assert found.returncode == 1
    assert [line.partition(": ")[0] for line in found.stdout.splitlines()] == [f"{path}, line 2", f"{path}, line 5"]
    assert "id 'a-0' as in line 1" in found.stdout
    assert "No file" in verify(tmp_path / "none").stdout
    assert not (tmp_path / "none").exists()
