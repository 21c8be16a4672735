"""What a run trains on: its sources, mixed, split, and measured for what they have in common beside their meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from biasdpo import data, prompts
from biasdpo.config import TrainConfig
from biasdpo.data import Confounds, PreferencePair, Split
from biasdpo.errors import ConfigError, DatasetError
from biasdpo.workspace import Workspace


@dataclass(frozen=True)
class Mixture:
    """What the page's confound meter shows of the chosen data.

    pairs_train     different pairs to train on
    rows_per_epoch  rows that an epoch sees: the training pairs, each as often as its weight says
    pairs_held_out  pairs kept from training, with all whose prompt is nearly one of theirs
    rows_read       rows of all sources; of them `repeats` say again what another row says, and `contradictions` pairs were chosen
                    as often one way as the other, and are left out
    bridging        pairs left out since their prompt is nearly one on either side of the split
    per_source      (source, rows read)
    confounds       of the rows that an epoch sees
    """

    pairs_train: int
    rows_per_epoch: int
    pairs_held_out: int
    rows_read: int
    repeats: int
    contradictions: int
    bridging: int
    per_source: tuple[tuple[str, int], ...]
    confounds: Confounds
    train_longer_baseline: float | None
    held_out_longer_baseline: float | None


@dataclass(frozen=True)
class RunData:
    """A run's pairs. `epoch`: the training rows that one epoch sees."""

    mixed: data.Mixed
    split: Split
    epoch: tuple[PreferencePair, ...]

    def write_snapshot(self, path: Path) -> str:
        """dataset.jsonl: every pair, with its weight where one is not 1; returns its SHA-256."""
        return data.snapshot(self.mixed.derived.pairs, path, self.mixed.weights)

    def mixture(self) -> Mixture:
        derived = self.mixed.derived
        confounds = data.measure(self.epoch)
        return Mixture(
            pairs_train=len(self.split.train),
            rows_per_epoch=len(self.epoch),
            pairs_held_out=len(self.split.held_out),
            rows_read=self.mixed.rows_read,
            repeats=derived.repeats,
            contradictions=derived.contradictions,
            bridging=len(self.split.bridging),
            per_source=self.mixed.per_source,
            confounds=replace(confounds, exact_duplicates=0),  # a pair that its weight repeats is none
            train_longer_baseline=data.longer_baseline(self.epoch),
            held_out_longer_baseline=data.longer_baseline(self.split.held_out),
        )

    def origin(self) -> dict[str, Any]:
        """What origin.json says of the data, beside its hash."""
        mixture = self.mixture()
        return {
            "dataset_files": [public_name(source) for source, _rows in mixture.per_source],
            "dataset_rows": {
                "read": mixture.rows_read,
                "pairs": len(self.mixed.derived.pairs),
                "repeats": mixture.repeats,
                "contradictions": mixture.contradictions,
                "bridging": mixture.bridging,
                "per_epoch": mixture.rows_per_epoch,
            },
            "confounds": asdict(mixture.confounds) | {"annotators": []},  # pseudonyms stay in the workspace
            "train_longer_baseline": mixture.train_longer_baseline,
            "held_out_longer_baseline": mixture.held_out_longer_baseline,
        }


def load(config: TrainConfig, workspace: Workspace) -> RunData:
    """Read and split a run's data. Raises ConfigError where none is named, DatasetError where none can be trained on."""
    if not config.datasets:
        raise ConfigError("No data to train on: name some with --dataset FILE.jsonl, hub:OWNER/NAME or workspace")
    mixed = data.mix(config.datasets, config.dataset_weights, workspace)
    parts = data.split(mixed.derived.pairs, config.held_out_share)
    weights = {pair.pair_id: weight for pair, weight in zip(mixed.derived.pairs, mixed.weights, strict=True)}
    epoch = rows_per_epoch(parts.train, weights, config.seed)
    if not epoch:
        names = ", ".join(map(public_name, config.datasets))
        raise DatasetError(
            f"{names}: no pairs to train on ({mixed.rows_read} rows read, {len(parts.held_out)} held out, "
            f"{mixed.derived.contradictions} contradict each other); add rows or lower held_out_share"
        )
    return RunData(mixed, parts, epoch)


def rows_per_epoch(train: Sequence[PreferencePair], weights: dict[str, float], seed: int) -> tuple[PreferencePair, ...]:
    """The training rows of an epoch, in the pairs' order; `weights` by pair id."""
    return tuple(data.weighted(train, [weights[pair.pair_id] for pair in train], seed))


def probe_prompts(config: TrainConfig) -> list[dict[str, str]]:
    """What the live probe asks ({prompt, category}): the config's prompts, else the first shipped one of each category that is
    trained on; none where there is no probe."""
    if not config.probe_every:
        return []
    chosen = [prompts.known(text) for text in config.probe_prompts]
    if not chosen:
        shipped = prompts.shipped()
        chosen = [next(p for p in shipped if p.category == category) for category in ("gender", "race", "religion")]
    return [{"prompt": prompt.text, "category": prompt.category} for prompt in chosen]


def public_name(source: str) -> str:
    """A data source without folders of this machine: of a path, the file's name stays."""
    return source if source.startswith(data.HUB) else Path(source).name
