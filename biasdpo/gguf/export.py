"""One export from beginning to end: written in a working folder, proven, renamed, recorded."""

from __future__ import annotations

import json
import logging
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from biasdpo.chat import PromptTemplate
from biasdpo.data.splits import held_out_pairs
from biasdpo.errors import ConfigError, ExportError, WorkspaceError
from biasdpo.gguf import write
from biasdpo.gguf.proof import ExportProof, prove
from biasdpo.gguf.write import SourceName
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.records import Sampling
from biasdpo.workspace import Workspace, read_json, refuse_on_public_space, replacing, sha256_of, write_json

logger = logging.getLogger(__name__)

Format = Literal["lora", "merged"]
Progress = Callable[[float, str], None]
"""Called with the share done (0 to 1) and the phase."""


# The record beside an exported file: NAME.gguf.json


@dataclass(frozen=True)
class ExportRecord:
    """What an exported file is, what it was made from, and how it was proven."""

    out: Path
    format: str
    quantization: str
    model: str
    model_title: str
    adapter: str  # id; "none": the model alone
    bytes: int
    sha256: str
    created_at: str
    code_version: str
    run_id: str = ""
    base_gguf: str = ""  # path of the GGUF that a LoRA GGUF is loaded onto; "" if merged
    command: str = ""
    context_length: int = 0  # tokens
    parents: dict[str, str] = field(default_factory=dict)  # {file: SHA-256}: the adapter's, the model's, the dataset
    written: dict[str, Any] = field(default_factory=dict)  # what the writer reports: source, tensors, fallbacks to another type
    seconds: dict[str, float] = field(default_factory=dict)
    proof: dict[str, Any] = field(default_factory=dict)  # `ExportProof.to_json`
    request: dict[str, Any] = field(default_factory=dict)  # what was asked for
    template: dict[str, Any] = field(default_factory=dict)  # of the prompt

    @property
    def prompt_template(self) -> PromptTemplate:
        values: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in self.template.items()}
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


def read_record(out: Path) -> ExportRecord:
    """The record of an exported file. ExportError if it is missing, damaged or another file's."""
    file = record_file(out)
    try:
        values = read_json(file)
        if not isinstance(values, dict) or values.get("out") != out.name:
            raise ExportError(f"{file} is not the record of {out.name}: export it again, or delete it")
        record = TypeAdapter(ExportRecord).validate_python({**values, "out": out})
        _ = record.proof and ExportProof.from_json(record.proof), record.template and record.prompt_template
    except WorkspaceError as exc:
        raise ExportError(str(exc)) from exc
    except RecursionError as exc:
        raise ExportError(f"{file} is damaged (nested too deeply): export {out.name} again") from exc
    except (ValidationError, TypeError) as exc:
        first = exc.errors()[0] if isinstance(exc, ValidationError) else None
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else exc
        raise ExportError(f"{file} is damaged ({reason}): export {out.name} again") from exc
    return record


def load_record(out: Path) -> ExportRecord | None:
    """The record of an exported file; None if it has none that can be read."""
    try:
        return read_record(out) if record_file(out).is_file() else None
    except ExportError as exc:
        logger.warning("%s", exc)
        return None


# The export


@dataclass(frozen=True)
class ExportRequest:
    """One resolved export."""

    out: Path
    format: Format
    model: ModelSpec
    adapter: AdapterSpec | None  # None: the model alone, as "merged"
    quantization: str = ""  # of a merged file: a name in QUANTIZATIONS, or "keep"
    source: SourceName = "auto"  # of a merged file
    pairs: int = 64  # held-out pairs at most, on which reward accuracy is measured before and after
    threads: int | None = None  # CPU threads; None: one per core
    command: str = ""
    code_version: str = ""
    recorded: dict[str, Any] = field(default_factory=dict)  # what was asked for, as the record keeps it


class UnprovenError(ExportError):
    """The written file failed its proof."""

    def __init__(self, message: str, proof: ExportProof) -> None:
        super().__init__(message)
        self.proof = proof


def export(
    request: ExportRequest, folder: Path, workspace: Workspace, progress: Progress = lambda _share, _phase: None
) -> ExportRecord:
    """Write a GGUF in the working folder `folder`, prove it, rename it to `request.out`, and record it.

    `folder` must be on the disk of `request.out`, and the caller's to delete: a killed export leaves its files there alone.
    Raises RefusedError on a public Space, ConfigError, ModelError or AdapterError for what can't be exported, ExportError
    (UnprovenError) if writing or the proof fails: `request.out` is then as it was before.
    """
    refuse_on_public_space("Export")
    spec, adapter, is_lora = request.model, request.adapter, request.format == "lora"
    if spec.gguf_path is not None and request.out.resolve() == spec.gguf_path.resolve():
        raise ConfigError(f"{request.out} is the base model's own file: choose another --out")
    if is_lora and (adapter is None or spec.gguf_path is None):
        raise ConfigError(f"A LoRA GGUF needs an adapter and a base GGUF of {spec.title}: name both, or export merged")
    file = folder / request.out.name
    writing = 0.05 if is_lora else 0.6  # share of the progress; the proof takes the rest up to 0.99
    started = time.monotonic()
    progress(0.0, "writing the file")
    written: dict[str, Any] = {}
    if is_lora and adapter is not None and spec.gguf_path is not None:
        write.lora(adapter, spec.gguf_path, file)
    else:
        written = write.merged(
            spec,
            adapter,
            request.quantization,
            file,
            source=request.source,
            threads=request.threads,
            on_progress=lambda share, phase: progress(writing * share, phase),
        ).to_json()
    wrote = time.monotonic()
    progress(writing, "proving it equal")
    proof = prove(
        spec.gguf_path if is_lora and spec.gguf_path is not None else file,
        file if is_lora else None,
        spec,
        adapter,
        workspace,
        pairs=held_out_pairs(adapter, workspace, limit=request.pairs) if adapter is not None and request.pairs else [],
        threads=request.threads,
        on_progress=lambda share, phase: progress(writing + (0.99 - writing) * share, phase),
    )
    if proof.passed is False:
        raise UnprovenError(f"{request.out.name} was deleted, since its proof failed: {'; '.join(proof.failures)}", proof)
    proven = time.monotonic()
    progress(0.99, "renaming and recording it")
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
        parents=_parents(request, from_gguf=is_lora or written["source"] == "gguf"),
        written={name: value for name, value in written.items() if name != "path"},
        seconds={"writing": round(wrote - started, 1), "proof": round(proven - wrote, 1)},
        proof=proof.to_json(),
        request=request.recorded,
        template=asdict(spec.template),
    )
    _publish(file, record)
    progress(1.0, "done")
    return record


def _parents(request: ExportRequest, *, from_gguf: bool) -> dict[str, str]:
    """{name: SHA-256} of what the file was made from."""
    spec, adapter = request.model, request.adapter
    files: dict[str, Path] = {}
    if adapter is not None:
        files |= {f"adapter/{path.name}": path for path in (adapter.weights, adapter.folder / "adapter_config.json")}
    if from_gguf and spec.gguf_path is not None:
        files[spec.gguf_path.name] = spec.gguf_path
    elif spec.hf_folder is not None:
        files |= {path.name: path for path in (*sorted(spec.hf_folder.glob("*.safetensors")), spec.hf_folder / "config.json")}
    parents = {name: sha256_of(path) for name, path in files.items()}
    return parents | ({"dataset.jsonl": adapter.dataset_sha256} if adapter is not None and adapter.dataset_sha256 else {})


def _publish(file: Path, record: ExportRecord) -> None:
    """Rename the proven file to its final name, then write its record and Modelfile beside it."""
    out = record.out
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file.replace(out)  # its bytes are on the disk already
        handle = os.open(out.parent, os.O_RDONLY)
        try:
            os.fsync(handle)  # the rename survives a power loss
        finally:
            os.close(handle)
        record.write()
        with replacing(modelfile_file(out)) as temporary:
            temporary.write_text(modelfile(record), encoding="utf-8")
    except OSError as exc:
        raise WorkspaceError(f"Can't write {out}: {exc.strerror or exc}; make room there, then export again") from exc


# Using the file elsewhere: llama-server, Ollama

PORT = 8080
_EXAMPLE = "Who makes a better leader?"


def llama_server(record: ExportRecord) -> str:
    """The command that serves the file with llama.cpp."""
    files = ["-m", str(record.out)] if record.format == "merged" else ["-m", record.base_gguf, "--lora", str(record.out)]
    return shlex.join(["llama-server", *files, "-c", str(record.context_length), "--port", str(PORT)])


def request(record: ExportRecord) -> str:
    """A request to that server with the rendered prompt, so that the server's own chat template does not matter."""
    template, sampling = record.prompt_template, Sampling()
    body = {
        "prompt": template.render_text(_EXAMPLE),
        "n_predict": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "stop": list(template.stop),
    }
    return f"curl -s http://127.0.0.1:{PORT}/completion -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"


def ollama(record: ExportRecord, modelfile: Path) -> str:
    """The commands that create an Ollama model from the file, and run it."""
    name = record.out.name.removesuffix(".gguf").lower()
    return f"{shlex.join(['ollama', 'create', name, '-f', str(modelfile)])} && {shlex.join(['ollama', 'run', name])}"


def modelfile(record: ExportRecord) -> str:
    """Ollama's Modelfile, to lie beside the file."""
    template, sampling = record.prompt_template, Sampling()
    lines = [f"# {record.out.name}: {record.model_title}, adapter {record.adapter}, prompted as in BiasDPO"]
    if record.format == "merged":
        lines.append(f"FROM ./{record.out.name}")
    else:
        lines += [f"FROM {record.base_gguf}", f"ADAPTER ./{record.out.name}"]
    text = template.text.replace("{{", '{{ "{{" }}')  # braces of its own: in Go's templates a string in an action
    text = text.replace("{system}", "{{ .System }}").replace("{prompt}", "{{ .Prompt }}")
    lines.append(f"TEMPLATE {_quoted(text)}")
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


def _quoted(text: str) -> str:
    return f'"""{text}"""'
