"""Exports: what is asked for, the files that one leaves, jobs that fail, are killed or stopped."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from biasdpo import cli, models
from biasdpo.config import ExportConfig
from biasdpo.errors import AdapterError, ConfigError, ExportError, JobError, ModelError
from biasdpo.gguf import export as exporting
from biasdpo.gguf.export import load_record
from biasdpo.gguf.write import lora as real_lora
from biasdpo.jobs import store, worker
from biasdpo.jobs.job import JobFolder, read_job
from biasdpo.jobs.resolve import command_of, resolve_export
from biasdpo.jobs.worker import run_export, unfinished_folder
from biasdpo.workspace import Workspace, sha256_of
from tests import tiny_models
from tests.gguf_files import metadata_of
from tests.run_line import ended, wait_for


def export(config: ExportConfig, workspace: Workspace):
    return run_export(config, workspace, lambda _share, _phase: None)


def leftovers(config: ExportConfig) -> list[str]:
    folder = config.out.parent
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


# What is asked for


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "gguf"}, "format .*got 'gguf'"),
        ({"source": "web"}, "source .*got 'web'"),
        ({"run": "first"}, "either a run or an adapter"),
        ({"adapter": ""}, "either a run or an adapter"),
        ({"adapter": "none"}, "format lora needs an adapter: got none"),
        ({"adapter": "none", "format": "merged", "model": ""}, "name it with --model"),
        ({"quantization": "F16"}, "A LoRA GGUF is not quantized: got F16"),
        ({"format": "merged", "quantization": "Q3"}, "quantization .*F32.*got 'Q3'"),
        ({"format": "merged", "quantization": "keep", "source": "hf"}, "quantization keep needs a base GGUF"),
        ({"pairs": -1}, "pairs .*got -1"),
        ({"threads": 0}, "threads .*1 to 1,?024: got 0"),
    ],
)
def test_what_does_not_go_together_is_one_line(lora, workspace, changes, words):
    with pytest.raises(ConfigError, match=words):
        export(lora.replace(**changes), workspace)
    assert leftovers(lora) == []


def test_files_that_can_not_be_the_outcome_are_refused(lora, workspace, tiny_llama, tiny_llama_gguf, tiny_phi_adapter, tmp_path):
    with pytest.raises(ConfigError, match="got the folder"):
        export(lora.replace(out=tmp_path), workspace)
    whole = tiny_llama_gguf.read_bytes()
    with pytest.raises(ConfigError, match="is the base model's own file"):
        export(lora.replace(out=tiny_llama_gguf), workspace)
    assert tiny_llama_gguf.read_bytes() == whole
    with pytest.raises(ModelError, match="has no GGUF file here"):
        export(lora.replace(model=str(tiny_llama)), workspace)
    with pytest.raises(AdapterError, match="was made for another base model"):
        store.start_export(lora.replace(adapter=str(tiny_phi_adapter)), workspace)
    for bad in ("a", ".a.gguf", "a b.gguf", "x" * 97 + ".gguf"):
        with pytest.raises(ConfigError, match=r"An export's name is|Export ids have"):
            store.start_export(lora.replace(out=Path(bad)), workspace)
    assert leftovers(lora) == []


def test_a_config_becomes_the_command_that_means_it(lora, workspace, monkeypatch):
    wanted = lora.replace(format="merged", quantization="Q4_K_M", source="gguf", pairs=7, threads=3)
    asked: list[object] = []

    def run_export(config: ExportConfig, at: Workspace, *_given: object) -> None:
        asked.extend((config, at.root))
        raise ExportError("no more is needed")

    monkeypatch.setattr(worker, "run_export", run_export)
    assert cli.main(command_of(wanted, workspace=workspace.root)[3:]) == 2
    assert asked == [wanted, workspace.root]


def test_only_paths_are_made_absolute(lora, workspace, monkeypatch, tiny_llama_adapter):
    monkeypatch.chdir(tiny_llama_adapter.parent)
    adapter = f"./{tiny_llama_adapter.name}"
    config, _, _ = resolve_export(lora.replace(out=Path("x.gguf"), adapter=adapter), workspace)
    assert (config.out, config.adapter) == (tiny_llama_adapter.parent / "x.gguf", str(tiny_llama_adapter))
    named, _, _ = resolve_export(
        ExportConfig(out=Path("x.gguf"), format="lora", adapter="smollm2-biasdpo", model="smollm2"), workspace
    )
    assert (named.adapter, named.model) == ("smollm2-biasdpo", "smollm2")


# One export, here


def test_an_export_leaves_file_record_and_modelfile(lora, workspace, tiny_llama_adapter, tiny_llama_gguf):
    told: list[tuple[float, str]] = []
    record = run_export(lora, workspace, lambda share, phase: told.append((share, phase)))
    assert leftovers(lora) == ["tiny.gguf", "tiny.gguf.Modelfile", "tiny.gguf.json", "tiny.gguf.md"]
    assert metadata_of(lora.out)["general.type"] == "adapter"
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
    # Written straight into the workspace's folder, it is listed and can be deleted.
    (listed,) = store.list_jobs(workspace)
    assert (listed.id, listed.kind, listed.state, listed.file) == ("tiny", "export", "finished", lora.out)
    with pytest.raises(JobError, match="nothing to stop"):
        store.stop_job("tiny", workspace)
    store.delete_job("tiny", workspace)
    assert (leftovers(lora), store.list_jobs(workspace)) == ([], [])


def test_a_failed_proof_leaves_what_was_there(lora, workspace, tiny_llama, tmp_path, monkeypatch):
    other = tiny_models.write_adapter(tmp_path / "other", tiny_llama, seed=5)
    wrong = replace(models.find_adapter(str(other), models.catalog()["smollm2"], workspace), id="other")
    lora.out.parent.mkdir(parents=True)
    lora.out.write_bytes(b"the one before")
    with monkeypatch.context() as patch:  # a writer that writes another adapter than it was given
        patch.setattr(exporting.write, "lora", lambda _adapter, base, out: real_lora(wrong, base, out))
        with pytest.raises(ExportError, match=r"tiny.gguf was deleted, since its verification failed: .*mean KL") as caught:
            export(lora, workspace)
    assert caught.value.proof.passed is False
    assert lora.out.read_bytes() == b"the one before"
    assert leftovers(lora) == ["tiny.gguf"]


def test_a_failing_export_and_what_killed_ones_left(lora, workspace, monkeypatch):
    lora.out.parent.mkdir(parents=True)
    other = lora.out.with_name(".export-killed.gguf")
    other.mkdir()
    (other / "half.gguf").write_bytes(b"gigabytes")  # as the writer would have left them

    def full(*_given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting.write, "lora", full)
    with pytest.raises(OSError, match="No space left"):
        export(lora, workspace)
    assert leftovers(lora) == []


def test_what_another_process_is_writing_is_left_alone(lora, workspace):
    with unfinished_folder(lora.out) as folder:
        (folder / "half.gguf").touch()
        with pytest.raises(ExportError, match=r"tiny.gguf is being exported already"):
            export(lora, workspace)
        assert (folder / "half.gguf").is_file()
    assert leftovers(lora) == []


# Jobs


def test_a_job_is_stopped_killed_and_resumed(lora, workspace):
    started = store.start_export(lora, workspace)
    folder = started.folder
    assert (started.id, started.state) == ("tiny", "queued")
    with pytest.raises(JobError, match="already exists"):
        store.start_export(lora, workspace)
    with pytest.raises(JobError, match="stop it first"):
        store.delete_job("tiny", workspace)
    running = wait_for(folder, lambda job: job.state == "running" or ended(job))
    stopped = store.stop_job("tiny", workspace)
    assert (stopped.state, stopped.error) == ("stopped", "")
    assert not psutil.pid_exists(running.status.pid) or psutil.Process(running.status.pid).status() == psutil.STATUS_ZOMBIE
    assert not [path for path in folder.path.rglob("*") if ".gguf" in path.name]

    os.kill(store.resume_job("tiny", workspace).status.pid, signal.SIGKILL)
    killed = wait_for(folder, ended)
    assert killed.state == "interrupted"
    assert "it was probably killed" in killed.error

    store.resume_job("tiny", workspace)
    done = wait_for(folder, ended)
    assert (done.state, done.error, done.file) == ("finished", "", folder.path / "tiny.gguf")
    assert load_record(done.file).proof["passed"] is True
    store.delete_job("tiny", workspace)
    assert leftovers(lora) == []


def test_a_job_that_fails_says_why(lora, workspace, tiny_llama_gguf, tmp_path):
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(tiny_llama_gguf.read_bytes())
    started = store.start_export(lora.replace(model=str(damaged)), workspace)
    with damaged.open("r+b") as file:  # it is read a second after this, at the earliest
        file.truncate(damaged.stat().st_size // 2)
    failed = wait_for(started.folder, ended)
    assert failed.state == "failed"
    assert "damaged.gguf" in failed.error
    assert "\n" not in failed.error
    assert not failed.file.exists()
    assert failed.config.model == str(damaged)


def test_ids_and_files_of_others(workspace):
    assert store.free_id("export", "my run/Q8_0.gguf", workspace) == "Q8_0"
    folder = workspace.root / "exports"
    folder.mkdir()
    (folder / "a.gguf").write_bytes(b"GGUF")
    (folder / "a.gguf.json").write_text("{")
    assert store.free_id("export", "a.gguf", workspace) == "a-2"
    (listed,) = store.list_jobs(workspace)
    assert (listed.id, listed.state, load_record(listed.file)) == ("a", "finished", None)
    JobFolder(folder / "a").path.mkdir()
    JobFolder(folder / "a").config.write_text("{}")
    assert {job.id for job in store.list_jobs(workspace)} == {"a", "a.gguf"}
    assert read_job(JobFolder(folder / "a")).state == "failed"
