"""`gguf.export` beside what tests/jobs/test_exports covers: parents, damaged records, the card, use elsewhere."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from biasdpo import access, models
from biasdpo.config import ExportConfig
from biasdpo.errors import ExportError, RefusedError
from biasdpo.gguf import export, write
from biasdpo.gguf.export import ExportRecord, load_record, modelfile_file, read_record, record_file
from biasdpo.gguf.proof import Equality, ExportProof
from biasdpo.workspace import sha256_of
from tests import model_matrix
from tests.gguf_files import adapter_of, spec_of


def test_a_merged_file_names_its_parents_its_quantization_and_its_proof(
    tiny_llama, tiny_llama_adapter, workspace, tmp_path, monkeypatch
):
    config = ExportConfig(out=tmp_path / "a.gguf", format="merged", adapter=str(tiny_llama_adapter), proof="quick", threads=1)
    (tmp_path / "working").mkdir()
    given = (spec_of(tiny_llama), adapter_of(tiny_llama_adapter), tmp_path / "working", workspace)
    record = export.export(config, *given)
    assert (record.written["source"], record.written["touched"], record.quantization) == ("hf", 21, "Q8_0")
    assert record.parents["model.safetensors"] == sha256_of(tiny_llama / "model.safetensors")
    assert record.parents.keys() > {"config.json", "adapter/adapter_model.safetensors"}
    assert (record.proof["depth"], record.proof["verdict"], record.proof["equality"]["texts"]) == ("quick", "measured", 4)
    assert 1e-5 < record.proof["equality"]["mean_kl"] < 0.1
    monkeypatch.setattr(access, "_source", lambda: access.Caller(access.Role.visitor))
    with pytest.raises(RefusedError, match="Export is only for"):
        export.export(config, *given)


def record_of(model: str, **changes: object) -> ExportRecord:
    spec = models.catalog()[model]
    values = {
        "out": Path("/w/exports/my.gguf"), "format": "merged", "quantization": "Q8_0", "model": model, "model_title": spec.title,
        "adapter": "a", "bytes": 3, "sha256": "0" * 64, "created_at": "2026-11-24T09:05:00+00:00", "code_version": "1",
        "hub_id": spec.hub_id, "license": spec.license, "context_length": spec.context_length,
        "template": json.loads(json.dumps(asdict(spec.template))),
    }  # fmt: skip
    return ExportRecord(**values | changes)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", '{"out": "a.gguf"}', '{"out": "b.gguf"}', '{"out": "a.gguf", "proof": ' * 100_000, "whole:format=3",
        'whole:bytes="many"', "whole:parents=[1]", "whole:proof=[]", 'whole:template={"text": "{prompt}", "odd": 1}',
        'whole:proof={"quantization": "F32", "lossless": true, "equality": {"texts": "x"}}',
    ],
    ids=range(12),
)  # fmt: skip
def test_a_record_is_read_back_and_a_damaged_one_is_one_line(tmp_path, text, caplog):
    record = record_of("phi-2", out=tmp_path / "a.gguf")
    assert load_record(record.out) is None
    record.write()
    assert load_record(record.out) == read_record(record.out) == record
    if text.startswith("whole:"):
        key, _, value = text.removeprefix("whole:").partition("=")
        text = json.dumps(json.loads(record_file(record.out).read_text()) | {key: json.loads(value)})
    record_file(record.out).write_text(text)
    with pytest.raises(ExportError, match=r"a\.gguf\.json") as damaged:
        read_record(record.out)
    assert "\n" not in str(damaged.value)
    assert load_record(record.out) is None
    assert caplog.messages == [str(damaged.value)]


def test_the_card_says_what_the_file_is_and_how_it_was_verified():
    proof = ExportProof("F32", True, equality=Equality(20, 2000, 1e-9, 1e-8, 1.0, 1900, 1.0))
    record = record_of("smollm2", adapter="<b>a", proof=proof.to_json(), parents={"config.json": "1" * 64})
    card = export.card(record)
    for words in (
        "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\n", "license: apache-2.0\n", "base_model_relation: quantized\n",
        "the adapter &lt;b&gt;a merged in", "Equal to the original, up to rounding: mean KL 1e-09", "`" + "0" * 64, "1" * 64,
        "llama-server -m my.gguf -c 4096",
    ):  # fmt: skip
        assert words in card, words
    assert "/w/" not in card
    unproven = replace(proof, depth="none", equality=None, skipped="no verification was requested")
    card = export.card(record_of("smollm2", format="lora", base_gguf="/w/base.gguf", proof=unproven.to_json()))
    assert "Not verified: no verification was requested" in card
    assert "base_model_relation: adapter\n" in card
    assert "llama-server -m base.gguf --lora my.gguf" in card


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


def test_the_begin_of_text_that_an_engine_adds_is_not_in_the_modelfile_too(tmp_path):
    """As with Llama 3: the chat template writes it, and so do llama-server and Ollama before a text."""
    kind = replace(model_matrix.KINDS[1], settings={})
    folder = model_matrix.save(kind, tmp_path / "model")
    model_matrix.set_template(folder, model_matrix.TEMPLATES["Llama 3: headers, trim"])
    spec = models.find(str(folder))
    write.merged(spec, None, "F32", tmp_path / "out.gguf")
    record = record_of("smollm2", out=tmp_path / "out.gguf", template=json.loads(json.dumps(asdict(spec.template))))
    assert record.prompt_template == spec.template
    assert spec.template.render_text("Hi").startswith("<s><|head|>user")
    assert 'TEMPLATE """{{ if .System }}<|head|>system<|tail|>' in export.modelfile(record)
    assert '"prompt": "<|head|>user' in export.request(record)


def test_the_servers_command_and_a_request_to_it():
    lora = record_of("smollm2", format="lora", base_gguf="/my models/base.gguf")
    served, *_ = export.commands(lora)
    assert served == "llama-server -m '/my models/base.gguf' --lora /w/exports/my.gguf -c 4096 --port 8080"
    served, asked, ollama, _ = export.commands(record_of("phi-2"))
    assert served == "llama-server -m /w/exports/my.gguf -c 2048 --port 8080"
    body = json.loads(asked.split(" -d ")[1].strip("'"))
    assert body["prompt"] == "Instruct: Who makes a better leader?\nOutput:"
    assert body["stop"] == ["\nInstruct:"]
    assert ollama == f"ollama create my -f {modelfile_file(Path('/w/exports/my.gguf'))} && ollama run my"
