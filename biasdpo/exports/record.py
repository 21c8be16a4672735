"""FILE.json: what an exported file is, what it was made from, and how it was proven."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from biasdpo.chat import PromptTemplate
from biasdpo.errors import ExportError, WorkspaceError
from biasdpo.workspace import read_json, write_json


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


def remove_files(out: Path) -> None:
    """Delete an exported file and what lies beside it, the file first. Raises ExportError where it can't be deleted."""
    try:
        for path in (out, record_file(out), modelfile_file(out)):
            path.unlink(missing_ok=True)
    except OSError as exc:
        raise ExportError(f"Can't delete {out}: {exc.strerror or exc}; make its folder writable, then try again") from exc
