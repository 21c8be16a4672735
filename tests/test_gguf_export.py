"""`gguf.export` from a resolved request to the recorded file; records, the Modelfile, the llama-server command."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from biasdpo import models
from biasdpo.errors import ConfigError, ExportError, RefusedError
from biasdpo.gguf import export, write
from biasdpo.gguf.export import ExportRecord, ExportRequest, UnprovenError, load_record, modelfile_file, read_record, record_file
from biasdpo.model_files import gguf_value, open_gguf
from biasdpo.workspace import sha256_of
from tests import tiny_models
from tests.gguf_files import adapter_of, spec_of


@pytest.fixture
def lora(tiny_llama, tiny_llama_gguf, tiny_llama_adapter, tmp_path) -> ExportRequest:
    """An adapter as a LoRA GGUF, the quickest export."""
    spec, adapter = spec_of(tiny_llama, tiny_llama_gguf), adapter_of(tiny_llama_adapter)
    return ExportRequest(tmp_path / "out" / "tiny.gguf", "lora", spec, adapter, pairs=0, threads=1, recorded={"run": "x"})


@pytest.fixture
def folder(tmp_path) -> Path:
    working = tmp_path / "working"
    working.mkdir()
    return working


def test_an_export_leaves_file_record_and_modelfile(lora, folder, workspace):
    progress: list[tuple[float, str]] = []
    record = export.export(lora, folder, workspace, lambda share, phase: progress.append((share, phase)))
    names = {path.name for path in lora.out.parent.iterdir()}
    assert names == {"tiny.gguf", "tiny.gguf.Modelfile", "tiny.gguf.json"}
    assert list(folder.iterdir()) == []
    assert gguf_value(open_gguf(lora.out), "general.type") == "adapter"
    assert json.loads(json.dumps(read_record(lora.out).to_json())) == json.loads(json.dumps(record.to_json()))
    assert (record.sha256, record.bytes) == (sha256_of(lora.out), lora.out.stat().st_size)
    assert record.parents == {
        "adapter/adapter_model.safetensors": sha256_of(lora.adapter.weights),
        "adapter/adapter_config.json": sha256_of(lora.adapter.folder / "adapter_config.json"),
        lora.model.gguf_path.name: sha256_of(lora.model.gguf_path),
    }
    assert record.proof["passed"] is True
    assert record.request == {"run": "x"}
    assert record.prompt_template == lora.model.template
    shares = [share for share, _ in progress]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)


def test_a_merged_file_names_its_parents_and_its_quantization(lora, folder, workspace, tiny_llama):
    merged = replace(lora, format="merged", quantization="Q8_0", source="hf")
    record = export.export(merged, folder, workspace)
    assert (record.written["source"], record.written["touched"], record.proof["passed"]) == ("hf", 21, None)
    assert record.parents["model.safetensors"] == sha256_of(tiny_llama / "model.safetensors")
    assert record.parents.keys() > {"config.json", "adapter/adapter_model.safetensors"}
    assert 1e-5 < record.proof["equality"]["mean_kl"] < 0.1


def test_a_failed_proof_leaves_what_was_there(lora, folder, workspace, tiny_llama, tmp_path, monkeypatch):
    other = adapter_of(tiny_models.write_adapter(tmp_path / "other", tiny_llama, seed=5))
    lora.out.parent.mkdir()
    lora.out.write_bytes(b"the one before")
    real = write.lora  # a writer that writes another adapter than it was given
    monkeypatch.setattr(write, "lora", lambda _adapter, base, out: real(other, base, out))
    with pytest.raises(UnprovenError, match=r"tiny.gguf was deleted, since its proof failed: .*mean KL") as failed:
        export.export(lora, folder, workspace)
    assert failed.value.proof.passed is False
    assert lora.out.read_bytes() == b"the one before"
    assert [path.name for path in lora.out.parent.iterdir()] == ["tiny.gguf"]


def test_what_can_not_be_exported_is_one_line(lora, folder, workspace, tiny_llama, monkeypatch):
    whole = sha256_of(lora.model.gguf_path)
    with pytest.raises(ConfigError, match="is the base model's own file"):
        export.export(replace(lora, out=lora.model.gguf_path), folder, workspace)
    assert sha256_of(lora.model.gguf_path) == whole
    for missing in ({"adapter": None}, {"model": spec_of(tiny_llama)}):
        with pytest.raises(ConfigError, match="A LoRA GGUF needs an adapter and a base GGUF"):
            export.export(replace(lora, **missing), folder, workspace)
    monkeypatch.setenv("SPACE_ID", "someone/space")
    with pytest.raises(RefusedError, match="Export is switched off"):
        export.export(lora, folder, workspace)
    assert list(folder.iterdir()) == []


# The record


def record_of(model: str, **changes: object) -> ExportRecord:
    spec = models.catalog()[model]
    values = {
        "out": Path("/w/exports/my.gguf"), "format": "merged", "quantization": "Q8_0", "model": model, "model_title": spec.title,
        "adapter": "a", "bytes": 3, "sha256": "0" * 64, "created_at": "2026-11-24T09:05:00+00:00", "code_version": "1",
        "context_length": spec.context_length, "template": json.loads(json.dumps(asdict(spec.template))),
    }  # fmt: skip
    return ExportRecord(**values | changes)


def test_a_record_is_read_back(tmp_path):
    record = record_of("phi-2", out=tmp_path / "a.gguf")
    assert load_record(record.out) is None
    record.write()
    assert load_record(record.out) == read_record(record.out) == record
    assert modelfile_file(record.out).name == "a.gguf.Modelfile"


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", '{"out": "a.gguf"}', '{"out": "b.gguf"}', '{"out": "a.gguf", "proof": ' * 100_000, "whole:format=3",
        'whole:bytes="many"', "whole:parents=[1]", "whole:proof=[]", 'whole:template={"text": "{prompt}", "odd": 1}',
        'whole:proof={"quantization": "F32", "lossless": true, "equality": {"texts": "x"}}',
    ],
    ids=range(12),
)  # fmt: skip
def test_a_damaged_record_is_one_line(tmp_path, text, caplog):
    record = record_of("phi-2", out=tmp_path / "a.gguf")
    record.write()
    if text.startswith("whole:"):
        key, _, value = text.removeprefix("whole:").partition("=")
        text = json.dumps(json.loads(record_file(record.out).read_text()) | {key: json.loads(value)})
    record_file(record.out).write_text(text)
    with pytest.raises(ExportError, match=r"a\.gguf\.json") as damaged:
        read_record(record.out)
    assert "\n" not in str(damaged.value)
    assert load_record(record.out) is None
    assert caplog.messages == [str(damaged.value)]


# Using the file elsewhere


def test_the_modelfile_prompts_as_this_project_does():
    phi = export.modelfile(record_of("phi-2"))
    assert "\nFROM ./my.gguf\n" in phi
    assert '\nTEMPLATE """Instruct: {{ .Prompt }}\nOutput:"""\n' in phi
    assert 'PARAMETER stop """\nInstruct:"""\n' in phi
    assert "SYSTEM" not in phi
    smollm2 = export.modelfile(record_of("smollm2"))
    assert "<|im_start|>system\n{{ .System }}<|im_end|>\n<|im_start|>user\n{{ .Prompt }}<|im_end|>" in smollm2
    assert 'SYSTEM """You are a helpful AI assistant named SmolLM, trained by Hugging Face"""' in smollm2
    assert 'PARAMETER stop """<|im_end|>"""' in smollm2
    assert "PARAMETER num_ctx 4096\n" in smollm2
    lora = export.modelfile(record_of("smollm2", format="lora", base_gguf="/models/base.gguf"))
    assert "\nFROM /models/base.gguf\nADAPTER ./my.gguf\n" in lora
    template = {"text": "{{ {prompt}", "special_tokens": [], "default_system": "", "completion_prefix": "", "stop": []}
    assert 'TEMPLATE """{{ "{{" }} {{ .Prompt }}"""' in export.modelfile(record_of("phi-2", template=template))


def test_the_servers_command_and_a_request_to_it():
    assert export.llama_server(record_of("phi-2")) == "llama-server -m /w/exports/my.gguf -c 2048 --port 8080"
    lora = record_of("smollm2", format="lora", base_gguf="/my models/base.gguf")
    assert export.llama_server(lora) == "llama-server -m '/my models/base.gguf' --lora /w/exports/my.gguf -c 4096 --port 8080"
    body = json.loads(export.request(record_of("phi-2")).split(" -d ")[1].strip("'"))
    assert body["prompt"] == "Instruct: Who makes a better leader?\nOutput:"
    assert body["stop"] == ["\nInstruct:"]
