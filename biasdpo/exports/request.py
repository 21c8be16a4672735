"""An export's config, made definite: which model, which adapter, which file."""

from __future__ import annotations

import sys
from pathlib import Path

from biasdpo import config, models
from biasdpo.config import DEFAULT_QUANTIZATION
from biasdpo.config import ExportFormat as Format
from biasdpo.config import ExportSource as Source
from biasdpo.errors import ConfigError, ModelError
from biasdpo.gguf.write import source_path
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.workspace import Workspace

__all__ = ["DEFAULT_QUANTIZATION", "MOST_PAIRS", "ExportConfig", "Format", "Source"]

MOST_PAIRS = config.ExportConfig.settings()["pairs"].default


class ExportConfig(config.ExportConfig):
    """`config.ExportConfig`, resolved and as a command."""

    def resolved(self, workspace: Workspace) -> tuple[ModelSpec, AdapterSpec | None]:
        """The model and the adapter that are meant. Raises AdapterError or ModelError where they are not here."""
        if self.out.is_dir():
            raise ConfigError(f"An export is one file: got the folder {self.out}; name a file in it, e.g. model.gguf")
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
        """The same for a process in another working folder."""
        return self.replace(
            out=self.out.expanduser().resolve(),
            model=_absolute(self.model, names_a_model=True),
            adapter=_absolute(self.adapter, names_a_model=False),
        )

    def command(self, workspace: Workspace) -> list[str]:
        """`python -m biasdpo export` of this config, by this Python."""
        return [sys.executable, "-m", "biasdpo", "export", *self.to_arguments(), f"--workspace={workspace.root}", "--json"]


def _absolute(name: str, *, names_a_model: bool) -> str:
    """A path as another process finds it; an id as it is, as `models.find` and `find_adapter` tell them apart."""
    path = Path(name).expanduser()
    if not name or (names_a_model and name in models.catalog()):
        return name
    is_path = path.is_dir() or path.suffix == ".gguf" or path.is_absolute()
    if not names_a_model and "/" not in name and not name.startswith("~"):
        return name  # a known id comes first
    return str(path.resolve()) if is_path else name
