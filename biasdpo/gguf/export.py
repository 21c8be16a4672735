"""One export, from beginning to end: write to a temporary name, prove, rename, record."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from biasdpo.chat import PromptTemplate
from biasdpo.errors import ExportError, WorkspaceError
from biasdpo.gguf import write
from biasdpo.gguf.proof import ExportProof, held_out_pairs, prove
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.records import Sampling
from biasdpo.workspace import Workspace, read_json, refuse_on_public_space, replacing, sha256_of, write_json


@dataclass(frozen=True)
class ExportRecord:
    """The record beside an exported file.

    out              the file; its folder is where the record lies
    model, adapter   ids of the parents; adapter "none": the model alone
    base_gguf        path of the GGUF that a LoRA GGUF is loaded onto; "" where merged
    parents          SHA-256 of what it was made from, by name: the adapter's weights and config, the model's files, the data set
    written          what the writer says: source, tensors, those that fell back to another type
    seconds          of writing and of the proof
    proof            the proof of equality; `export_proof.ExportProof` reads it
    request          what was asked for, as absolute paths
    template         of the prompt, and `context_length` in tokens: what a server must know to prompt it as here
    """

    out: Path
    format: str
    quantization: str
    model: str
    model_title: str
    adapter: str
    bytes: int
    sha256: str
    created_at: str
    code_version: str
    run_id: str = ""
    base_gguf: str = ""
    command: str = ""
    context_length: int = 0
    parents: dict[str, str] = field(default_factory=dict)
    written: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    proof: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)
    template: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt_template(self) -> PromptTemplate:
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in self.template.items()
        }
        return PromptTemplate(**values)

    def to_json(self) -> dict[str, Any]:
        """The object of `export --json`."""
        return {**asdict(self), "out": str(self.out)}

    def write(self) -> None:
        """Write it beside its file."""
        write_json(record_file(self.out), {**self.to_json(), "out": self.out.name})


def record_file(out: Path) -> Path:
    return out.with_name(f"{out.name}.json")


def modelfile_file(out: Path) -> Path:
    return out.with_name(f"{out.name}.Modelfile")


def load_record(out: Path) -> ExportRecord | None:
    """The record of an exported file; None where there is none, or it is damaged or of another file."""
    known = {one.name for one in fields(ExportRecord)}
    try:
        values = read_json(record_file(out))
        if not isinstance(values, dict) or values.get("out") != out.name:
            return None
        return ExportRecord(**{name: value for name, value in values.items() if name in known} | {"out": out})
    except (WorkspaceError, TypeError):
        return None


@dataclass(frozen=True)
class ExportRequest:
    """One resolved export. `recorded`: what was asked for, as the record keeps it."""

    out: Path
    format: str
    model: ModelSpec
    adapter: AdapterSpec | None
    quantization: str = ""
    source: Literal["auto", "hf", "gguf"] = "auto"
    pairs: int = 64
    threads: int | None = None
    command: str = ""
    code_version: str = ""
    recorded: dict[str, Any] = field(default_factory=dict)


class UnprovenError(ExportError):
    """The written file failed its proof."""

    def __init__(self, message: str, proof: ExportProof) -> None:
        super().__init__(message)
        self.proof = proof


# --- serving: How an exported file is used elsewhere: llama-server, and Ollama's Modelfile


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


Tell = Callable[[float, str], None]


def _quiet(_share: float, _phase: str) -> None:
    pass


def export(request: ExportRequest, folder: Path, workspace: Workspace, progress: Tell = _quiet) -> ExportRecord:
    """Write a GGUF in the working folder `folder`, prove it, rename it to `request.out`, and record it.

    `folder` must be on the disk of `request.out`, and the caller's to delete.
    """
    refuse_on_public_space("Export")
    spec, adapter, tell = request.model, request.adapter, progress
    file = folder / request.out.name
    is_lora = request.format == "lora"
    writing = 0.05 if is_lora else 0.6  # its share of all; the proof has the rest but a hundredth
    began = time.monotonic()
    tell(0.0, "writing the file")
    written: dict[str, Any] = {}
    if is_lora:
        assert adapter is not None
        assert spec.gguf_path is not None
        write.lora(adapter, spec.gguf_path, file)
    else:
        written = write.merged(
            spec,
            adapter,
            request.quantization,
            file,
            source=request.source,
            threads=request.threads,
            on_progress=lambda share, what: tell(writing * share, what),
        ).to_json()
    wrote = time.monotonic()
    tell(writing, "proving it equal")
    proof = prove(
        spec.gguf_path if is_lora and spec.gguf_path is not None else file,
        file if is_lora else None,
        spec,
        adapter,
        workspace,
        pairs=held_out_pairs(adapter, workspace, limit=request.pairs) if adapter is not None and request.pairs else [],
        threads=request.threads,
        on_progress=lambda share, what: tell(writing + (0.99 - writing) * share, what),
    )
    if proof.passed is False:
        raise UnprovenError(f"{request.out.name} was deleted, since its proof failed: {'; '.join(proof.failures)}", proof)
    proven = time.monotonic()
    tell(0.99, "naming and recording it")
    record = ExportRecord(
        out=request.out,
        format=request.format,
        quantization=request.quantization,
        model=spec.id,
        model_title=spec.title,
        adapter="none" if adapter is None else adapter.id,
        bytes=file.stat().st_size,
        sha256=sha256_of(file),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        code_version=request.code_version,
        run_id="" if adapter is None else adapter.run_id,
        base_gguf=str(spec.gguf_path) if is_lora else "",
        command=request.command,
        context_length=spec.context_length,
        parents=_parents(request, spec, adapter, written.get("source", "")),
        written={name: value for name, value in written.items() if name != "path"},
        seconds={"writing": round(wrote - began, 1), "proof": round(proven - wrote, 1)},
        proof=proof.to_json(),
        request=request.recorded,
        template=asdict(spec.template),
    )
    _name(file, record)
    tell(1.0, "done")
    return record


def _name(file: Path, record: ExportRecord) -> None:
    """Put the proven file under its name, and its record and Modelfile beside it."""
    out = record.out
    try:
        with file.open("rb") as written:
            os.fsync(written.fileno())
        file.replace(out)
        handle = os.open(out.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        record.write()
        with replacing(modelfile_file(out)) as temporary:
            temporary.write_text(modelfile(record), encoding="utf-8")
    except OSError as exc:
        raise WorkspaceError(f"Can't write {out}: {exc.strerror or exc}; make room there, then export again") from exc


def _parents(request: ExportRequest, spec: ModelSpec, adapter: AdapterSpec | None, source: str) -> dict[str, str]:
    """SHA-256 by name of what the file was made from."""
    files: dict[str, Path] = {}
    if adapter is not None:
        files |= {f"adapter/{path.name}": path for path in (adapter.weights, adapter.folder / "adapter_config.json")}
    if request.format == "lora" or source == "gguf":
        files |= {path.name: path for path in [spec.gguf_path] if path is not None}
    elif spec.hf_folder is not None:
        files |= {path.name: path for path in sorted(spec.hf_folder.glob("*.safetensors"))}
        files |= {path.name: path for path in [spec.hf_folder / "config.json"]}
    parents = {name: sha256_of(path) for name, path in files.items()}
    return parents | ({"dataset.jsonl": adapter.dataset_sha256} if adapter is not None and adapter.dataset_sha256 else {})
