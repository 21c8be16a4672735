"""What is to be exported, and how; checked before anything is read or written."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from biasdpo import models
from biasdpo.errors import ConfigError, ModelError
from biasdpo.gguf.quantize import require_known
from biasdpo.gguf.write import source_path
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.workspace import Workspace

Format = Literal["lora", "merged"]
Source = Literal["auto", "hf", "gguf"]
FORMATS: tuple[Format, ...] = get_args(Format)
SOURCES: tuple[Source, ...] = get_args(Source)

DEFAULT_QUANTIZATION = "Q8_0"
MOST_PAIRS = 64
"""Held-out pairs that are scored before and after, where no other number is asked for."""


@dataclass(frozen=True)
class ExportConfig:
    """One export. Names are those of the command line.

    run            id of a finished run, whose adapter is exported; "" where `adapter` names one
    adapter        a shipped adapter's id, a run's, a PEFT folder, or "none": the model alone
    model          the base model; "" is the one that the adapter names
    quantization   of a merged file; "" is DEFAULT_QUANTIZATION. A LoRA GGUF is not quantized
    source         what a merged file is made from: "hf", the Hugging Face folder; "gguf", the base GGUF; "auto": the first of
                   them that is here
    pairs          held-out pairs at most, on which reward accuracy is measured before and after; 0: none
    threads        CPU threads; None: as many as there are cores
    """

    out: Path
    format: Format
    run: str = ""
    adapter: str = ""
    model: str = ""
    quantization: str = ""
    source: Source = "auto"
    pairs: int = MOST_PAIRS
    threads: int | None = None

    def checked(self) -> ExportConfig:
        """This request with its quantization named, or a ConfigError that says what is wrong with it."""
        if self.format not in FORMATS:
            raise ConfigError(f"An export's format is {' or '.join(FORMATS)}: got {self.format!r}; choose one")
        if self.source not in SOURCES:
            raise ConfigError(f"A merged file's source is {', '.join(SOURCES)}: got {self.source!r}; choose one")
        if bool(self.run) == bool(self.adapter):
            raise ConfigError("An export is of a run or of an adapter: name one of them, with --run or --adapter (or none)")
        if self.adapter == "none":
            if self.format == "lora":
                raise ConfigError("--format lora needs an adapter, got none: name one with --adapter or --run")
            if not self.model:
                raise ConfigError("--adapter none exports a model alone: name it with --model")
        if not isinstance(self.pairs, int) or isinstance(self.pairs, bool) or self.pairs < 0:
            raise ConfigError(f"pairs must be a whole number from 0: got {self.pairs!r}; 0 measures no reward accuracy")
        if self.threads is not None and (not isinstance(self.threads, int) or not 1 <= self.threads <= 1024):
            raise ConfigError(f"threads must be a whole number from 1 to 1024: got {self.threads!r}; leave it out for all cores")
        if self.out.is_dir():
            raise ConfigError(f"An export is one file: got the folder {self.out}; name a file in it, e.g. model.gguf")
        if self.format == "lora":
            if self.quantization:
                raise ConfigError(f"A LoRA GGUF is not quantized: got {self.quantization}; leave it out, or export merged")
            return self
        chosen = self.quantization or DEFAULT_QUANTIZATION
        require_known(chosen, keep=self.source != "hf")
        return replace(self, quantization=chosen)

    def resolved(self, workspace: Workspace) -> tuple[ModelSpec, AdapterSpec | None]:
        """The model and the adapter that are meant. Raises AdapterError or ModelError where they are not here."""
        if self.run:
            adapter: AdapterSpec | None = models.from_run(workspace, self.run)
        else:
            adapter = models.find_adapter(self.adapter, models.catalog()["smollm2"], workspace)
        name = self.model or (adapter.model if adapter is not None else "")
        if not name:
            raise ConfigError(f"{self.adapter or self.run} does not say which model it was made for: name it with --model")
        spec = models.find(name)
        if spec.gguf_path is not None and self.out.resolve() == spec.gguf_path.resolve():
            raise ConfigError(f"{self.out} is the base model's own file: name another --out")
        if adapter is not None:
            models.check_fits(adapter, spec)
        if self.format == "merged":
            source_path(spec, self.quantization, self.source)
        elif spec.gguf_path is None:
            raise ModelError(
                f"{spec.title} has no GGUF file here, which a LoRA GGUF is made for: name a .gguf with --model, or export merged"
            )
        return spec, adapter

    def absolute(self) -> ExportConfig:
        """The same for a process whose working folder is another."""
        named = {"out": self.out.expanduser().resolve(), "model": _absolute(self.model, names_a_model=True)}
        return replace(self, adapter=_absolute(self.adapter, names_a_model=False), **named)  # type: ignore[arg-type]

    def command(self, workspace: Workspace) -> list[str]:
        """`python -m biasdpo export` of this request, of this very Python."""
        flags = {
            "--run": self.run,
            "--adapter": self.adapter,
            "--model": self.model,
            "--format": self.format,
            "--quantization": self.quantization,
            "--source": self.source if self.format == "merged" else "",
            "--pairs": str(self.pairs),
            "--threads": "" if self.threads is None else str(self.threads),
            "--out": str(self.out),
            "--workspace": str(workspace.root),
        }
        given = [f"{flag}={value}" for flag, value in flags.items() if value]  # one word each: a value may begin with a dash
        return [sys.executable, "-m", "biasdpo", "export", *given, "--json"]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "out": str(self.out)}


def _absolute(name: str, *, names_a_model: bool) -> str:
    """A path as another process finds it; an id as it is, as `models.find` and `find_adapter` tell them apart."""
    path = Path(name).expanduser()
    if not name or (names_a_model and name in models.catalog()):
        return name
    is_path = path.is_dir() or path.suffix == ".gguf" or path.is_absolute()
    if not names_a_model and "/" not in name and not name.startswith("~"):
        return name  # a known id comes first
    return str(path.resolve()) if is_path else name
