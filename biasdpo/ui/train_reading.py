"""What the page reads of a run's folder, beside its status: origin, config, results. A folder that is half written or damaged
shows what it has."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from biasdpo import models
from biasdpo.errors import BiasDPOError
from biasdpo.run_config import RunConfig, load_json
from biasdpo.run_folder import ACTIVE, RunFolder, Status
from biasdpo.runs import Run
from biasdpo.ui.measured import mapping, read_or_none
from biasdpo.workspace import ASSETS

SEED_SET = ASSETS / "seed_pairs.jsonl"


@dataclass(frozen=True)
class SeenRun:
    """A run as its folder shows it now.

    config    None where config.json is missing or can't be read
    origin    of the data: hash, counts, confounds; {} where unknown
    held_out  the final results on the held-out pairs; {} where there are none
    """

    folder: RunFolder
    status: Status
    config: RunConfig | None
    origin: dict[str, Any]
    held_out: dict[str, Any]

    @property
    def id(self) -> str:
        return self.folder.id

    @property
    def active(self) -> bool:
        return self.status.state in ACTIVE

    @property
    def has_adapter(self) -> bool:
        return (self.folder.adapter / "adapter_model.safetensors").is_file()

    @property
    def model(self) -> str:
        """The base model's title."""
        return model_title(self.config.model) if self.config else "–"

    @property
    def data(self) -> str:
        """The sources' names, in short."""
        return ", ".join(source_title(name) for name in self.config.datasets) if self.config else "–"

    @property
    def started_at(self) -> str:
        """UTC, ISO 8601; "" where unknown."""
        return str(self.origin.get("started_at", ""))

    @property
    def accuracy(self) -> float | None:
        """Held-out reward accuracy: the final one, else the best so far."""
        final = self.held_out.get("reward_accuracy")
        return final if isinstance(final, float | int) else self.status.best_accuracy

    @property
    def held_none_out(self) -> bool:
        """Whether the run is known to have kept no pair from training."""
        return not self.held_out and self.origin.get("held_out_longer_baseline", "unknown") is None

    @property
    def baseline(self) -> float | None:
        """The accuracy of picking the longer completion on the held-out pairs."""
        value = self.origin.get("held_out_longer_baseline", self.held_out.get("reward_accuracy_of_picking_the_longer"))
        return float(value) if isinstance(value, float | int) else None


def see(run: Run) -> SeenRun:
    """Read what there is."""
    folder = run.folder
    try:
        config = load_json(folder.config)
    except BiasDPOError:
        config = None
    metrics = mapping(mapping(read_or_none(folder.adapter / "provenance.json")).get("metrics"))
    return SeenRun(folder, run.status, config, mapping(read_or_none(folder.origin)), mapping(metrics.get("held_out")))


def model_title(name: str) -> str:
    """A catalog model's title, else the last part of a path or the Hub id."""
    known = models.catalog().get(name)
    if known is not None:
        return known.title
    return Path(name).name if name.startswith(("/", "~", ".")) else name


def source_title(source: str) -> str:
    """A data source for people: never a folder of this machine."""
    if source == str(SEED_SET):
        return "seed set"
    path = Path(source)
    if path.name == "dataset.jsonl" and path.parent.parent.name == "runs":
        return f"data of run {path.parent.name}"
    return source if source.startswith("hub:") else path.name


def differing(configs: dict[str, RunConfig]) -> dict[str, dict[str, Any]]:
    """The settings that are not the same in all of these configs: {setting: {run: value}}."""
    names = [field.name for field in fields(RunConfig)]
    table = {name: {run: getattr(config, name) for run, config in configs.items()} for name in names}
    return {name: values for name, values in table.items() if len({repr(value) for value in values.values()}) > 1}


def changed(config: RunConfig) -> dict[str, Any]:
    """The settings of a config that are not the defaults."""
    default = RunConfig()
    return {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != getattr(default, f.name)}


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder; what goes away meanwhile counts nothing."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue
    return total


def seconds_since(moment: str) -> float | None:
    """Since a UTC time in ISO 8601; None where there is none."""
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()
    except (ValueError, TypeError):
        return None
