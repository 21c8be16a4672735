"""One export, from beginning to end: write to a temporary name, prove, rename, record."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from biasdpo import runs
from biasdpo.chat import PromptTemplate
from biasdpo.errors import ExportError, WorkspaceError
from biasdpo.exports.record import ExportRecord, modelfile_file
from biasdpo.exports.request import ExportConfig
from biasdpo.exports.unfinished import Progress, fsync_folder, unfinished_export
from biasdpo.gguf import write
from biasdpo.gguf.proof import ExportProof, held_out_pairs, prove
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.records import Sampling
from biasdpo.workspace import Workspace, refuse_on_public_space, replacing, sha256_of

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


# --- exporting: One export, from beginning to end: write to a temporary name, prove, rename, record


Tell = Callable[[float, str], None]


def _quiet(_share: float, _phase: str) -> None:
    pass


def export(request: ExportConfig, workspace: Workspace, on_progress: Tell = _quiet) -> ExportRecord:
    """Write `request.out`, prove it equal to what it was made from, put it under its name, and record what it is.

    on_progress   called with the share that is done, from 0 to 1, and what is done now
    Raises RefusedError on a public Space, ConfigError, ModelError or AdapterError for what can't be exported, ExportError where
    it could not be written or its proof failed. Then nothing is under the final name (or the file that was there before).
    """
    refuse_on_public_space("Export")
    request = request.absolute()
    with unfinished_export(request.out, request.to_json()) as progress:
        spec, adapter = request.resolved(workspace)

        def tell(share: float, phase: str) -> None:
            progress(share, phase)
            on_progress(share, phase)

        return _export(request, spec, adapter, workspace, progress, tell)


def _export(
    request: ExportConfig, spec: ModelSpec, adapter: AdapterSpec | None, workspace: Workspace, progress: Progress, tell: Tell
) -> ExportRecord:
    file = progress.unfinished.file
    is_lora = request.format == "lora"
    writing = 0.05 if is_lora else 0.6  # its share of all; the proof has the rest but a hundredth
    began = time.monotonic()
    tell(0.0, "writing the file")
    written: dict[str, Any] = {}
    if is_lora:
        assert adapter is not None
        assert spec.gguf_path is not None  # `resolved` has seen to both
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
    _refuse_unproven(proof, request, progress)
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
        code_version=runs.code_version(),
        run_id="" if adapter is None else adapter.run_id,
        base_gguf=str(spec.gguf_path) if is_lora else "",
        command=runs.shown_command(sys.argv[1:]),
        context_length=spec.context_length,
        parents=_parents(request, spec, adapter, written.get("source", "")),
        written={name: value for name, value in written.items() if name != "path"},
        seconds={"writing": round(wrote - began, 1), "proof": round(proven - wrote, 1)},
        proof=proof.to_json(),
        request=request.to_json(),
        template=asdict(spec.template),
    )
    _name(file, record)
    tell(1.0, "done")
    return record


def _refuse_unproven(proof: ExportProof, request: ExportConfig, progress: Progress) -> None:
    if proof.passed is False:
        progress.proof = proof.to_json()
        raise ExportError(f"{request.out.name} was thrown away, since its proof failed: {'; '.join(proof.failures)}")


def _name(file: Path, record: ExportRecord) -> None:
    """Put the proven file under its name, and its record and Modelfile beside it."""
    out = record.out
    try:
        with file.open("rb") as written:
            os.fsync(written.fileno())
        file.replace(out)
        fsync_folder(out.parent)
        record.write()
        with replacing(modelfile_file(out)) as temporary:
            temporary.write_text(modelfile(record), encoding="utf-8")
    except OSError as exc:
        raise WorkspaceError(f"Can't write {out}: {exc.strerror or exc}; make room there, then export again") from exc


def _parents(request: ExportConfig, spec: ModelSpec, adapter: AdapterSpec | None, source: str) -> dict[str, str]:
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
