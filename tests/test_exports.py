"""Exports: what is asked for, the files that one leaves, jobs that fail, are killed or cancelled."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from biasdpo import exports, models
from biasdpo.cli import main
from biasdpo.errors import AdapterError, ConfigError, ExportError, ModelError, RefusedError
from biasdpo.exports import ExportConfig, jobs
from biasdpo.exports.record import load_record
from biasdpo.exports.unfinished import ExportStatus, Unfinished
from biasdpo.gguf import export as exporting
from biasdpo.gguf.write import lora as real_lora
from biasdpo.model_files import gguf_value, open_gguf
from biasdpo.workspace import Workspace, sha256_of
from tests import tiny_models

_WAIT_SECONDS = 120


@pytest.fixture
def lora(tiny_llama_gguf: Path, tiny_llama_adapter: Path, workspace: Workspace) -> ExportConfig:
    """An adapter as a LoRA GGUF, the quickest export there is."""
    out = workspace.root / "exports" / "tiny.gguf"
    return ExportConfig(out=out, format="lora", adapter=str(tiny_llama_adapter), model=str(tiny_llama_gguf), pairs=0, threads=1)


def leftovers(request: ExportConfig) -> list[str]:
    folder = request.out.parent
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def wait(out: Path, condition: Callable[[exports.Export | None], bool]) -> exports.Export | None:
    end = time.monotonic() + _WAIT_SECONDS
    while time.monotonic() < end:
        export = exports.poll(out)
        if condition(export):
            return export
        time.sleep(0.05)
    log = Unfinished.of(out).log
    raise AssertionError(f"still {exports.poll(out)}; {log.read_text()[-2000:] if log.is_file() else 'no log'}")


def alive(status: ExportStatus) -> bool:
    try:
        process = psutil.Process(status.pid)
        same = abs(process.create_time() - status.pid_created) < 1
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# What is asked for


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "gguf"}, "format must be one of lora, merged: got 'gguf'"),
        ({"source": "web"}, "source must be one of auto, hf, gguf: got 'web'"),
        ({"run": "first"}, "needs either a run or an adapter"),
        ({"adapter": ""}, "needs either a run or an adapter"),
        ({"adapter": "none"}, "format lora needs an adapter: got none"),
        ({"adapter": "none", "format": "merged", "model": ""}, "name it with --model"),
        ({"quantization": "F16"}, "A LoRA GGUF is not quantized: got F16"),
        ({"format": "merged", "quantization": "Q3"}, "quantization must be one of F32, .*got 'Q3'"),
        ({"format": "merged", "quantization": "keep", "source": "hf"}, "quantization keep needs a base GGUF"),
        ({"pairs": -1}, "pairs must be a whole number from 0 to 1000000000: got -1"),
        ({"threads": 0}, "threads must be a whole number from 1 to 1024: got 0"),
    ],
)
def test_what_does_not_go_together_is_one_line(lora, workspace, changes, words):
    with pytest.raises(ConfigError, match=words):
        exports.export(lora.replace(**changes), workspace)
    assert leftovers(lora) == []


def test_files_that_can_not_be_the_outcome_are_refused(lora, workspace, tiny_llama, tiny_llama_gguf, tmp_path):
    with pytest.raises(ConfigError, match="got the folder"):
        exports.export(lora.replace(out=tmp_path), workspace)
    whole = tiny_llama_gguf.read_bytes()
    with pytest.raises(ConfigError, match="is the base model's own file"):
        exports.export(lora.replace(out=tiny_llama_gguf), workspace)
    assert tiny_llama_gguf.read_bytes() == whole
    with pytest.raises(ModelError, match="has no GGUF file here"):
        exports.export(lora.replace(model=str(tiny_llama)), workspace)


def test_an_adapter_of_another_model_is_refused_before_anything_is_written(lora, workspace, tiny_phi_adapter):
    with pytest.raises(AdapterError, match="was made for another base model"):
        exports.start(lora.replace(adapter=str(tiny_phi_adapter)), workspace)
    assert leftovers(lora) == []


def test_a_request_becomes_the_command_that_means_it(lora, workspace, monkeypatch):
    wanted = lora.replace(format="merged", quantization="Q4_K_M", source="gguf", pairs=7, threads=3)
    command = wanted.command(workspace)
    asked: list[object] = []
    monkeypatch.setattr(exports, "export", lambda config, at, _show: asked.append((config, at.root)) or exit(0))
    with pytest.raises(SystemExit):
        main(command[3:])
    assert asked == [(wanted, workspace.root)]


def test_only_paths_are_made_absolute(monkeypatch, tmp_path):
    (tmp_path / "my" / "lora").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    request = ExportConfig(out=Path("x.gguf"), format="lora", adapter="my/lora", model="base.gguf").absolute()
    assert (request.out, request.adapter, request.model) == (
        tmp_path / "x.gguf", str(tmp_path / "my" / "lora"), str(tmp_path / "base.gguf")
    )  # fmt: skip
    named = ExportConfig(out=Path("x.gguf"), format="lora", adapter="smollm2-biasdpo", model="smollm2").absolute()
    assert (named.adapter, named.model) == ("smollm2-biasdpo", "smollm2")


# One export, here


def test_an_export_leaves_file_record_and_modelfile(lora, workspace, tiny_llama_adapter, tiny_llama_gguf):
    told: list[tuple[float, str]] = []
    record = exports.export(lora, workspace, lambda share, phase: told.append((share, phase)))
    assert leftovers(lora) == ["tiny.gguf", "tiny.gguf.Modelfile", "tiny.gguf.json"]
    assert gguf_value(open_gguf(lora.out), "general.type") == "adapter"
    assert load_record(lora.out).to_json() == json.loads(json.dumps(record.to_json()))
    assert record.sha256 == sha256_of(lora.out)
    assert record.bytes == lora.out.stat().st_size
    assert record.parents["adapter/adapter_model.safetensors"] == sha256_of(tiny_llama_adapter / "adapter_model.safetensors")
    assert record.parents[tiny_llama_gguf.name] == sha256_of(tiny_llama_gguf)
    assert record.proof["passed"] is True
    assert record.proof["equality"]["mean_kl"] <= 1e-5
    assert record.prompt_template == models.find(str(tiny_llama_gguf)).template
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    with pytest.raises(ExportError, match="exists already"):
        exports.start(lora, workspace)
    export = exports.find("exports/tiny.gguf", workspace)
    assert export.state == "finished"
    with pytest.raises(ExportError, match="nothing to cancel"):
        exports.cancel(export)
    exports.delete(export)
    assert leftovers(lora) == []
    assert exports.list_exports(workspace) == []


def test_a_failed_proof_leaves_what_was_there(lora, workspace, tiny_llama, tmp_path, monkeypatch):
    other = tiny_models.write_adapter(tmp_path / "other", tiny_llama, seed=5)
    wrong = replace(models.find_adapter(str(other), models.catalog()["smollm2"], workspace), id="other")
    lora.out.parent.mkdir(parents=True)
    lora.out.write_bytes(b"the one before")
    with monkeypatch.context() as patch:  # a writer that writes another adapter than it was given
        patch.setattr(exporting.write, "lora", lambda _adapter, base, out: real_lora(wrong, base, out))
        with pytest.raises(ExportError, match=r"tiny.gguf was thrown away, since its proof failed: .*mean KL"):
            exports.export(lora, workspace)
    assert lora.out.read_bytes() == b"the one before"
    assert leftovers(lora) == ["tiny.gguf"]


def test_on_a_public_space_nothing_is_exported_started_or_deleted(lora, workspace, monkeypatch):
    lora.out.parent.mkdir(parents=True)
    lora.out.write_bytes(b"GGUF")
    export = exports.poll(lora.out)
    monkeypatch.setenv("SPACE_ID", "someone/space")
    for action in (
        lambda: exports.export(lora.replace(out=lora.out.with_name("a.gguf")), workspace),
        lambda: exports.start(lora.replace(out=lora.out.with_name("a.gguf")), workspace),
        lambda: exports.delete(export),
    ):
        with pytest.raises(RefusedError, match="switched off on a public Space"):
            action()
    assert leftovers(lora) == ["tiny.gguf"]


# Jobs


def test_a_job_is_shown_while_it_works_and_killed_leaves_no_file_and_makes_room_for_the_next(lora, workspace):
    export = exports.start(lora, workspace)
    assert export.state == "running"
    assert export.status.pid != os.getpid()
    assert [one.out for one in exports.list_exports(workspace)] == [lora.out]
    with pytest.raises(ExportError, match=r"tiny.gguf is being exported: wait for it, or cancel it"):
        exports.start(lora.replace(out=lora.out.with_name("second.gguf")), workspace)
    with pytest.raises(ExportError, match="cancel it first"):
        exports.delete(export)
    os.kill(export.status.pid, signal.SIGKILL)
    killed = wait(lora.out, lambda one: not one.is_active)
    assert killed.state == "interrupted"
    assert "as it does when it is killed" in killed.status.error
    assert not lora.out.exists()
    other = Unfinished.of(lora.out.with_name("other.gguf"))
    other.path.mkdir()
    other.write_status(replace(killed.status, state="running"))
    (other.path / "half").mkdir()
    for folder in (other.path, other.path / "half", killed.unfinished.path):
        (folder / "half.gguf").write_bytes(b"gigabytes")  # as the writer would have left them
    assert exports.poll(other.out).state == "interrupted"
    exports.export(lora, workspace)
    assert [path.name for path in other.path.iterdir()] == ["status.json"]
    assert exports.poll(lora.out).state == "finished"
    assert not killed.unfinished.path.exists()


def test_a_cancelled_job_leaves_nothing(lora, workspace):
    export = exports.start(lora, workspace)
    exports.cancel(export)
    assert not alive(export.status)
    assert leftovers(lora) == []
    assert exports.list_exports(workspace) == []


def test_a_job_that_fails_says_why_and_can_be_deleted(lora, workspace, tiny_llama_gguf, tmp_path):
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(tiny_llama_gguf.read_bytes())
    export = exports.start(lora.replace(model=str(damaged)), workspace)
    with damaged.open("r+b") as file:  # it is read a second after this, at the earliest
        file.truncate(damaged.stat().st_size // 2)
    failed = wait(lora.out, lambda one: not one.is_active)
    assert failed.state == "failed"
    assert "damaged.gguf" in failed.status.error
    assert "\n" not in failed.status.error
    assert not lora.out.exists()
    assert failed.status.request["model"] == str(damaged)
    assert export.started_at == failed.started_at
    exports.delete(failed)
    assert leftovers(lora) == []


def test_an_export_by_hand_that_fails_leaves_nothing_to_see(lora, workspace, monkeypatch):
    def full(*_given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting.write, "lora", full)
    with pytest.raises(OSError, match="No space left"):
        exports.export(lora, workspace)
    assert leftovers(lora) == []


def test_what_another_process_is_writing_is_left_alone(lora, workspace):
    me = psutil.Process(os.getppid())
    folder = Unfinished.of(lora.out)
    folder.path.mkdir(parents=True)
    folder.write_status(ExportStatus("running", me.pid, me.create_time(), "writing"))
    with pytest.raises(ExportError, match=r"tiny.gguf is being exported already"):
        exports.export(lora, workspace)
    assert folder.read_status().state == "running"


def test_damaged_files_are_listed_as_what_they_are(workspace):
    folder = workspace.root / "exports"
    folder.mkdir()
    (folder / "mine.gguf").write_bytes(b"GGUF")
    (folder / "mine.gguf.json").write_text("{")
    (folder / ".export-x.gguf").mkdir()
    (folder / ".export-x.gguf" / "status.json").write_text('{"state": "odd"}')
    (export,) = exports.list_exports(workspace)
    assert (export.state, export.record, export.out.name) == ("finished", None, "mine.gguf")
    with pytest.raises(ExportError, match=r"No export '\.\./mine\.gguf'"):
        exports.find("../mine.gguf", workspace)


def test_names(workspace):
    folder = exports.folder_for(None, workspace)
    assert folder == workspace.root / "exports"
    assert exports.free_name("my run/Q8_0", folder) == "my-run-Q8_0.gguf"
    folder.mkdir()
    (folder / "a.gguf").touch()
    assert exports.free_name("a", folder) == "a-2.gguf"
    for bad in ("../a.gguf", "a", ".a.gguf", "a b.gguf", "x" * 97 + ".gguf"):
        with pytest.raises(ConfigError, match="An export's name is"):
            jobs.check_name(bad)
