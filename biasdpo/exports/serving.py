"""How an exported file is used elsewhere: llama-server, and Ollama's Modelfile. Pure text.

Modelfile: quoted text is taken as it stands, line breaks and all; there are no escapes (ollama, parser/parser.go).
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from biasdpo.exports.record import ExportRecord
from biasdpo.records import Sampling
from biasdpo.template import PromptTemplate

PORT = 8080
_EXAMPLE = "Who makes a better leader?"


def llama_server(record: ExportRecord) -> str:
    """The command that serves the file with llama.cpp."""
    files = ["-m", str(record.out)] if record.format == "merged" else ["-m", record.base_gguf, "--lora", str(record.out)]
    return shlex.join(["llama-server", *files, "-c", str(record.context_length), "--port", str(PORT)])


def request(record: ExportRecord) -> str:
    """A request to that server, prompted as this project does it: whatever chat template the server would use, this is exact."""
    template, sampling = record.prompt_template, Sampling()
    body = {
        "prompt": template.render_text(_EXAMPLE),
        "n_predict": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "stop": list(template.stop),
    }
    return f"curl -s http://127.0.0.1:{PORT}/completion -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"


def ollama(record: ExportRecord, modelfile: Path) -> str:
    """The commands that make an Ollama model of the file, and open it."""
    name = record.out.name.removesuffix(".gguf").lower()
    return f"{shlex.join(['ollama', 'create', name, '-f', str(modelfile)])} && {shlex.join(['ollama', 'run', name])}"


def modelfile(record: ExportRecord) -> str:
    """Ollama's Modelfile. It lies beside the file, which it names by its place in the folder."""
    template, sampling = record.prompt_template, Sampling()
    lines = [f"# {record.out.name}: {record.model_title}, adapter {record.adapter}, prompted as BiasDPO does"]
    if record.format == "merged":
        lines.append(f"FROM ./{record.out.name}")
    else:
        lines += [f"FROM {record.base_gguf}", f"ADAPTER ./{record.out.name}"]
    lines.append(f"TEMPLATE {_quoted(_go_template(template))}")
    if template.default_system:
        lines.append(f"SYSTEM {_quoted(template.default_system)}")
    settings = {
        "num_ctx": record.context_length,
        "num_predict": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "repeat_penalty": sampling.repetition_penalty,
    }
    lines += [f"PARAMETER {name} {value}" for name, value in settings.items()]
    lines += [f"PARAMETER stop {_quoted(text)}" for text in (*template.stop, *template.special_tokens)]
    return "\n".join(lines) + "\n"


def _go_template(template: PromptTemplate) -> str:
    """The template in Go's words. Braces of its own are written as Go takes them: as a string in an action."""
    text = template.text.replace("{{", '{{ "{{" }}')
    return text.replace("{system}", "{{ .System }}").replace("{prompt}", "{{ .Prompt }}")


def _quoted(text: str) -> str:
    return f'"""{text}"""'
