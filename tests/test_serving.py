"""How an exported file is used elsewhere: Ollama's Modelfile, llama-server's command, and the record that both are made from."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from biasdpo import models
from biasdpo.gguf import export
from biasdpo.gguf.export import ExportRecord, load_record, modelfile_file, record_file
from biasdpo.workspace import write_json


def record_of(model: str, **changes: object) -> ExportRecord:
    spec = models.catalog()[model]
    values = {
        "out": Path("/w/exports/my.gguf"), "format": "merged", "quantization": "Q8_0", "model": model, "model_title": spec.title,
        "adapter": "a", "bytes": 3, "sha256": "0" * 64, "created_at": "2026-11-24T09:05:00+00:00", "code_version": "1",
        "context_length": spec.context_length, "template": json.loads(json.dumps(asdict(spec.template))),
    }  # fmt: skip
    return ExportRecord(**values | changes)


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


def test_braces_of_a_template_stay_braces_for_ollama():
    template = {"text": "{{ {prompt}", "special_tokens": [], "default_system": "", "completion_prefix": "", "stop": []}
    assert 'TEMPLATE """{{ "{{" }} {{ .Prompt }}"""' in export.modelfile(record_of("phi-2", template=template))


def test_the_servers_command_and_a_request_to_it():
    assert export.llama_server(record_of("phi-2")) == "llama-server -m /w/exports/my.gguf -c 2048 --port 8080"
    lora = record_of("smollm2", format="lora", base_gguf="/my models/base.gguf")
    assert export.llama_server(lora) == "llama-server -m '/my models/base.gguf' --lora /w/exports/my.gguf -c 4096 --port 8080"
    body = json.loads(export.request(record_of("phi-2")).split(" -d ")[1].strip("'"))
    assert body["prompt"] == "Instruct: Who makes a better leader?\nOutput:"
    assert body["stop"] == ["\nInstruct:"]


def test_a_record_of_another_file_is_none(tmp_path):
    record = replace(record_of("phi-2"), out=tmp_path / "a.gguf")
    record.write()
    assert load_record(tmp_path / "a.gguf") == record
    record_file(tmp_path / "a.gguf").rename(record_file(tmp_path / "b.gguf"))
    assert load_record(tmp_path / "b.gguf") is None
    write_json(record_file(tmp_path / "c.gguf"), {"out": "c.gguf"})
    assert load_record(tmp_path / "c.gguf") is None
    assert modelfile_file(tmp_path / "a.gguf").name == "a.gguf.Modelfile"
