"""One export from beginning to end: written in a working folder, proven, renamed, recorded."""

from __future__ import annotations

import json
import logging
import os
import shlex
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from biasdpo.access import require_owner
from biasdpo.chat import ChatTemplate, PromptTemplate, template_from_json
from biasdpo.config import ExportConfig
from biasdpo.data.splits import held_out_pairs
from biasdpo.errors import ExportError, ModelError, WorkspaceError
from biasdpo.gguf import write
from biasdpo.gguf.proof import ExportProof, prove
from biasdpo.gguf.write import Progress
from biasdpo.model_card import LICENSES, plain
from biasdpo.model_files import adds_begin, gguf_parts, named_tokens, read_header, weight_files
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.records import Sampling
from biasdpo.workspace import Workspace, read_json, replacing, sha256_of, write_json

logger = logging.getLogger(__name__)


# The record beside an exported file: NAME.gguf.json


@dataclass(frozen=True)
class ExportRecord:
    """The record of an exported file: its contents, its parents, and its proof."""

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
    hub_id: str = ""  # of the model; "" if unknown
    license: str = ""  # of the model
    run_id: str = ""
    base_gguf: str = ""  # path of the GGUF that a LoRA GGUF is loaded onto; "" if merged
    command: str = ""
    context_length: int = 0  # tokens
    parents: dict[str, str] = field(default_factory=dict)  # {file: SHA-256}: the adapter's, the model's, the dataset
    written: dict[str, Any] = field(default_factory=dict)  # what the writer reports: source, tensors, fallbacks to another type
    seconds: dict[str, float] = field(default_factory=dict)
    proof: dict[str, Any] = field(default_factory=dict)  # `ExportProof.to_json`
    request: dict[str, Any] = field(default_factory=dict)  # the ExportConfig
    template: dict[str, Any] = field(default_factory=dict)  # of the prompt

    @property
    def prompt_template(self) -> PromptTemplate:
        return template_from_json(self.template)

    @property
    def adapter_name(self) -> str:
        """The adapter as `models.find_adapter` finds it again."""
        return str(self.request.get("run") or self.request.get("adapter") or self.adapter)

    def notes(self) -> list[str]:
        """Notes on the file other than its proof."""
        fallen = len(self.written.get("fallbacks") or ())
        what = f"{fallen:,} tensor{'s have' if fallen != 1 else ' has'} a larger type than {self.quantization}"
        return [f"{what}, since their widths don't fit it"] if fallen else []

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
    except (RecursionError, ValueError, TypeError) as exc:
        first = exc.errors()[0] if isinstance(exc, ValidationError) else None
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(exc) or type(exc).__name__
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


class UnprovenError(ExportError):
    """The written file failed its proof."""

    def __init__(self, message: str, proof: ExportProof) -> None:
        super().__init__(message)
        self.proof = proof


def export(
    config: ExportConfig,
    spec: ModelSpec,
    adapter: AdapterSpec | None,
    folder: Path,
    workspace: Workspace,
    *,
    command: str = "",
    code_version: str = "",
    on_progress: Progress = lambda _share, _phase: None,
) -> ExportRecord:
    """Write a GGUF in the working folder `folder`, prove it, rename it to `config.out`, and record it.

    config, spec, adapter   as `jobs.resolve.resolve_export` returns them
    folder                  on the disk of `config.out`, and the caller's to delete: a killed export leaves its files there alone
    Raises RefusedError for a visitor, ConfigError, ModelError or AdapterError for what can't be exported, ExportError
    (UnprovenError) if writing or the proof fails: `config.out` is then as it was before.
    """
    require_owner("Export")
    file = folder / config.out.name
    base = spec.gguf_path if config.format == "lora" else None
    writing = 0.6 if base is None else 0.05  # share of the progress; the proof takes the rest up to 0.99
    started = time.monotonic()
    on_progress(0.0, "writing the file")
    written: dict[str, Any] = {}
    if base is not None and adapter is not None:
        write.lora(adapter, base, file)
    else:
        written = {"quantization": config.quantization} | asdict(
            write.merged(
                spec,
                adapter,
                config.quantization,
                file,
                source=config.source,
                threads=config.threads,
                on_progress=lambda share, phase: on_progress(writing * share, phase),
            )
        )
    wrote = time.monotonic()
    on_progress(writing, "verifying the file")
    is_measured = adapter is not None and config.proof == "full" and config.pairs
    proof = prove(
        base or file,
        None if base is None else file,
        spec,
        adapter,
        workspace,
        depth=config.proof,
        pairs=held_out_pairs(adapter, workspace, limit=config.pairs) if adapter is not None and is_measured else None,
        threads=config.threads,
        on_progress=lambda share, phase: on_progress(writing + (0.99 - writing) * share, phase),
    )
    if proof.passed is False:
        raise UnprovenError(f"{config.out.name} was deleted, since its verification failed: {'; '.join(proof.failures)}", proof)
    proven = time.monotonic()
    on_progress(0.99, "renaming and recording it")
    record = ExportRecord(
        out=config.out,
        format=config.format,
        quantization=config.quantization,
        model=spec.id,
        model_title=spec.title,
        adapter="none" if adapter is None else adapter.id,
        bytes=file.stat().st_size,
        sha256=sha256_of(file),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        code_version=code_version,
        hub_id=spec.hub_id,
        license=spec.license,
        run_id="" if adapter is None else adapter.run_id,
        base_gguf="" if base is None else str(base),
        command=command,
        context_length=spec.context_length,
        parents=_parents(spec, adapter, from_gguf=base is not None or written["source"] == "gguf"),
        written=written,
        seconds={"writing": round(wrote - started, 1), "proof": round(proven - wrote, 1)},
        proof=proof.to_json(),
        request=config.to_json(),
        template=asdict(spec.template),
    )
    _publish(file, record)
    on_progress(1.0, "done")
    return record


def _parents(spec: ModelSpec, adapter: AdapterSpec | None, *, from_gguf: bool) -> dict[str, str]:
    """{name: SHA-256} of what the file was made from."""
    files: dict[str, Path] = {}
    if adapter is not None:
        files |= {f"adapter/{path.name}": path for path in (adapter.weights, adapter.folder / "adapter_config.json")}
    if from_gguf and spec.gguf_path is not None:
        files |= {part.name: part for part in gguf_parts(spec.gguf_path)}
    elif spec.hf_folder is not None:
        files |= {path.name: path for path in (*weight_files(spec.hf_folder), spec.hf_folder / "config.json")}
    parents = {name: sha256_of(path) for name, path in files.items()}
    return parents | ({"dataset.jsonl": adapter.dataset_sha256} if adapter is not None and adapter.dataset_sha256 else {})


def _publish(file: Path, record: ExportRecord) -> None:
    """Rename the proven file to its final name, then write beside it its record, Ollama's Modelfile and its model card."""
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
        for path, text in ((modelfile_file(out), modelfile(record)), (out.with_name(f"{out.name}.md"), card(record))):
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise WorkspaceError(f"Can't write {out}: {exc.strerror or exc}; make room there, then export again") from exc


# Using the file elsewhere: llama-server, Ollama

PORT = 8080
_EXAMPLE = "Who makes a better leader?"


def llama_server(record: ExportRecord, *, folders: bool = True) -> str:
    """The command that serves the file with llama.cpp. `folders`: with the paths of this machine."""
    paths = [record.out] if record.format == "merged" else [Path(record.base_gguf), record.out]
    files = [argument for flag, path in zip(("-m", "--lora"), paths, strict=False) for argument in (flag, path)]
    names = [str(file if folders or isinstance(file, str) else file.name) for file in files]
    return shlex.join(["llama-server", *names, "-c", str(record.context_length), "--port", str(PORT)])


def request(record: ExportRecord) -> str:
    """A request to that server with the rendered prompt, so that the server's own chat template does not matter."""
    template, sampling = record.prompt_template, Sampling()
    body = {
        "prompt": template.render_text(_EXAMPLE).removeprefix(_added_begin(record)),
        "n_predict": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "stop": list(template.stop),
    }
    return f"curl -s http://127.0.0.1:{PORT}/completion -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"


def ollama(record: ExportRecord, modelfile: Path) -> str:
    """The commands that create an Ollama model from the file, and run it."""
    name = record.out.name.removesuffix(".gguf").lower()
    return f"{shlex.join(['ollama', 'create', name, '-f', str(modelfile)])} && {shlex.join(['ollama', 'run', name])}"


def commands(record: ExportRecord) -> list[str]:
    """To serve the file with llama.cpp, ask that server, serve it with Ollama; and Ollama's Modelfile."""
    return [llama_server(record), request(record), ollama(record, modelfile_file(record.out)), modelfile(record)]


def modelfile(record: ExportRecord) -> str:
    """Ollama's Modelfile, to lie beside the file."""
    template, sampling = record.prompt_template, Sampling()
    lines = [f"# {record.out.name}: {record.model_title}, adapter {record.adapter}, prompted as in BiasDPO"]
    if record.format == "merged":
        lines.append(f"FROM ./{record.out.name}")
    else:
        lines += [f"FROM {record.base_gguf}", f"ADAPTER ./{record.out.name}"]
    text, specials = _ollama_template(template, _added_begin(record))
    if text:
        lines.append(f"TEMPLATE {_quoted(text)}")
    else:
        lines.append("# The model's chat template changes its messages, which Ollama's can't: use llama-server")
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
    lines += [f"PARAMETER stop {_quoted(text)}" for text in (*template.stop, *specials)]
    return "\n".join(lines) + "\n"


# Messages with characters that a template would have to change (JSON, HTML).
_SYSTEM, _PROMPT = ('\U000ffff0 "a"\'s <b>\n\U000ffff1', '\U000ffff2 "b"\'s <b>\n\U000ffff3')


def _ollama_template(template: PromptTemplate, begin: str) -> tuple[str, list[str]]:
    """(Ollama's template of a prompt with and without a system prompt, the special tokens in it); "" if it has no such form.
    `begin`: what the engine puts before each text by itself."""
    if isinstance(template, ChatTemplate):
        variants = [template.render_text(_PROMPT, _SYSTEM)] if template.has_system else []
        variants.append(template.render_text(_PROMPT))
        if any(_PROMPT not in text for text in variants) or (template.has_system and _SYSTEM not in variants[0]):
            return "", []
    else:
        variants = [template.text.replace("{system}", _SYSTEM).replace("{prompt}", _PROMPT)]
    found = {token: None for text in variants for token in template.special_tokens if token in text and token != begin}
    specials = list(found | ({template.end: None} if template.end else {}))
    # Braces of its own: in Go's templates a string in an action.
    texts = [text.removeprefix(begin).replace("{{", '{{ "{{" }}') for text in variants]
    texts = [text.replace(_SYSTEM, "{{ .System }}").replace(_PROMPT, "{{ .Prompt }}") for text in texts]
    return texts[0] if len(texts) == 1 else f"{{{{ if .System }}}}{texts[0]}{{{{ else }}}}{texts[1]}{{{{ end }}}}", specials


def _added_begin(record: ExportRecord) -> str:
    """The begin-of-text token that llama.cpp and Ollama put before a text; "" for none."""
    try:
        header = read_header(Path(record.base_gguf) if record.base_gguf else record.out)
    except ModelError:
        return ""
    return named_tokens(header).get("bos_token", "") if adds_begin(header) else ""


def _quoted(text: str) -> str:
    return f'"""{text}"""'


def card(record: ExportRecord) -> str:
    """The model card, in the Hub's format. Names no folder of this machine."""
    from huggingface_hub import ModelCardData

    proof, adapter = ExportProof.from_json(record.proof), plain(record.adapter)
    is_lora, has_adapter = record.format == "lora", record.adapter != "none"
    data = ModelCardData(
        base_model=record.hub_id or None,
        base_model_relation=("adapter" if is_lora else "quantized") if record.hub_id else None,
        license=LICENSES.get(record.license, "other"),
        tags=["gguf", "biasdpo", "dpo", "bias"],
        model_name=record.out.stem,
    )
    what = f"{record.quantization} of {plain(record.model_title)}{f', the adapter {adapter} merged in' if has_adapter else ''}"
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {record.out.name}",
        f"{f'The LoRA adapter {adapter} for {plain(record.model_title)}' if is_lora else what}, as a GGUF file.",
        f"## Verification\n\n{plain(proof.sentence())}.",
        "\n".join(f"- {plain(warning)}" for warning in proof.warnings),
        f"## Usage\n\n```\n{llama_server(record, folders=False)}\n```",
        f"## Provenance\n\nWritten {record.created_at} by BiasDPO {record.code_version}. SHA-256: `{record.sha256}`. Parents:",
        "\n".join(f"- {plain(name)}: `{sha256}`" for name, sha256 in record.parents.items()),
        "The adapter is meant to reduce bias in wording about people. It is not a safety filter and checks no facts."
        if has_adapter
        else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
