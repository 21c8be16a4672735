"""The training data of a run: its sources as one row per pair, split by prompt, and stored in the run's folder.

`resolve` reads the data once; `RunData.write` stores dataset.jsonl and split.json; everything after that uses `read_snapshot`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import orjson

from biasdpo.config import TrainConfig
from biasdpo.data.health import Confounds, measure
from biasdpo.data.importing import HUB, convert_source
from biasdpo.data.journal import Journal
from biasdpo.data.near_duplicates import NearDuplicates, normalize
from biasdpo.data.pairs import Derived, PreferencePair, derive, longer_baseline, pair_of_row
from biasdpo.errors import ConfigError, DatasetError, plural
from biasdpo.models import AdapterSpec
from biasdpo.workspace import ASSETS, Workspace, read_json, replacing, sha256_of, write_json

# Sources: a file, `hub:OWNER/NAME`, or `workspace` (the journal)

WORKSPACE = "workspace"
SEED_PAIRS = str(ASSETS / "seed_pairs.jsonl")


def load(sources: Iterable[str], workspace: Workspace) -> list[PreferencePair]:
    """Load the rows of all sources in order: files that `dataset import` reads, `hub:OWNER/NAME`, or `workspace`."""
    rows: list[PreferencePair] = []
    for source in sources:
        rows += load_journal(workspace) if source == WORKSPACE else load_file(source)
    return rows


def load_file(source: str | Path) -> list[PreferencePair]:
    """Load all rows of a file or of `hub:OWNER/NAME`.

    Unlike in an import, the first bad row is a DatasetError with file, line and reason: nobody would see what a run leaves out.
    """
    converted = convert_source(source)
    if converted.bad:
        first = converted.bad[0]
        raise DatasetError(f"{source}:{first.line}: {first.reason}; fix or drop the row")
    return [PreferencePair(j.prompt, j.chosen, j.rejected, j.category) for j in converted.judgments if not j.repeat_of]


def load_journal(workspace: Workspace) -> list[PreferencePair]:
    """Load the journal's trainable rows. A bad line is a DatasetError."""
    journal = open_journal(workspace)
    return [pair_of_row(row, f"{journal.path}, judgment {row['id']}") for row in trainable(journal)]


def open_journal(workspace: Workspace) -> Journal:
    """Read the workspace's journal. If it is missing, or has a bad line, that is a DatasetError."""
    path = workspace.preferences
    if not path.is_file():
        raise DatasetError(
            f"No preference pairs in the workspace yet ({path} is missing): judge some in the app, or train on a file with "
            "--dataset FILE.jsonl"
        )
    journal = Journal(path).refresh()
    if journal.bad_lines:
        first = journal.bad_lines[0]
        raise DatasetError(f"{path}:{first.line}: {first.reason}; fix or drop the line (`dataset validate` lists all bad lines)")
    return journal


def trainable(journal: Journal) -> list[dict[str, Any]]:
    """The journal's rows that a run may use: `preferred`, not retracted, and not hidden repeats."""
    return [row for row in journal.standing() if row["verdict"] == "preferred" and not row["repeat_of"]]


# Weights: how often an epoch contains a pair


def weighted(pairs: Sequence[PreferencePair], weights: Sequence[float], seed: int) -> list[PreferencePair]:
    """The rows of an epoch: a pair of weight 2 twice, half of the pairs of weight 0.5, a pair of weight 1.5 once or twice.

    Which pairs a fraction selects depends on the seed and the pair's id alone, the same in each epoch and for any order.
    """
    counts = [math.floor(weight) for weight in weights]
    fractions = [weight - count for weight, count in zip(weights, counts, strict=True)]
    for fraction in sorted(set(fractions) - {0.0}):
        some = [i for i in range(len(pairs)) if fractions[i] == fraction]
        drawn = sorted((hashlib.sha256(f"{seed}-{pairs[i].pair_id}".encode()).digest(), i) for i in some)
        for _, i in drawn[: round(fraction * len(drawn))]:
            counts[i] += 1
    return [pair for pair, count in zip(pairs, counts, strict=True) for _ in range(count)]


# Splitting: near-duplicate prompts are never on both sides, and rows added later move none


@dataclass(frozen=True)
class Split:
    """`dropped`: pairs on neither side, since their prompt is a near-duplicate of prompts on both."""

    train: tuple[PreferencePair, ...]
    held_out: tuple[PreferencePair, ...]
    dropped: tuple[PreferencePair, ...] = ()

    @classmethod
    def of_sides(cls, pairs: Sequence[PreferencePair], sides: Iterable[bool | None]) -> Split:
        """Split pairs by whether each is held out; None is dropped."""
        parts: dict[bool | None, list[PreferencePair]] = {False: [], True: [], None: []}
        for pair, side in zip(pairs, sides, strict=True):
            parts[side].append(pair)
        return cls(*map(tuple, parts.values()))


def split(rows: Sequence[PreferencePair], held_out_share: float = 0.1) -> Split:
    """Split by prompt: in the order of the rows, a prompt follows its earlier near-duplicates, or else its hash.

    So rows appended later change nothing for those before them. The share is met on average, not exactly.
    """
    sides: list[bool | None] = []  # by prompt number
    indexed = NearDuplicates().add_all([row.prompt for row in rows])
    for row, (number, near) in zip(rows, indexed, strict=True):
        if number == len(sides):
            near_sides = {sides[other] for other in near} - {None}
            hashed = not near_sides and is_held_out(row.prompt, held_out_share)
            sides.append(None if len(near_sides) > 1 else near_sides.pop() if near_sides else hashed)
    return Split.of_sides(rows, [sides[number] for number, _near in indexed])


def is_held_out(prompt: str, held_out_share: float) -> bool:
    """Whether a prompt without near-duplicates is held out: its hash decides."""
    digest = hashlib.sha256(normalize(prompt).encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < held_out_share * 2**64


# A run's data, resolved once


@dataclass(frozen=True)
class Mixture:
    """A summary of a run's data.

    pairs_train     distinct pairs to train on
    rows_per_epoch  rows in an epoch: each training pair as often as its weight says
    pairs_held_out  pairs kept from training
    rows_read       rows of all sources; `repeats` of them repeat another row, and `contradictions` pairs were chosen as often one
                    way as the other and are left out
    dropped         pairs left out to prevent leakage between the two sides of the split
    per_source      (source, rows read)
    confounds       of the rows of an epoch
    """

    pairs_train: int
    rows_per_epoch: int
    pairs_held_out: int
    rows_read: int
    repeats: int
    contradictions: int
    dropped: int
    per_source: tuple[tuple[str, int], ...]
    confounds: Confounds
    train_longer_baseline: float | None
    held_out_longer_baseline: float | None


@dataclass(frozen=True)
class RunData:
    """A run's data.

    derived     one row per pair, however many sources contain it, and what was left out
    weights     one for each of these pairs: the largest among the sources that contain it
    per_source  (source, rows read), in order
    epoch       the training rows of one epoch
    """

    derived: Derived
    weights: tuple[float, ...]
    per_source: tuple[tuple[str, int], ...]
    split: Split
    epoch: tuple[PreferencePair, ...]
    held_out_share: float

    @property
    def rows_read(self) -> int:
        return sum(rows for _source, rows in self.per_source)

    def write(self, folder: Path) -> str:
        """Write dataset.jsonl and split.json into a run's folder; return the SHA-256 of dataset.jsonl."""
        sha256 = write_dataset(self.derived.pairs, folder / DATASET, self.weights)
        _write_split(folder, self.split, self.held_out_share, sha256)
        return sha256

    def mixture(self) -> Mixture:
        return Mixture(
            pairs_train=len(self.split.train),
            rows_per_epoch=len(self.epoch),
            pairs_held_out=len(self.split.held_out),
            rows_read=self.rows_read,
            repeats=self.derived.repeats,
            contradictions=self.derived.contradictions,
            dropped=len(self.split.dropped),
            per_source=self.per_source,
            confounds=replace(measure(self.epoch), exact_duplicates=0),  # a pair repeated by its weight is none
            train_longer_baseline=longer_baseline(self.epoch),
            held_out_longer_baseline=longer_baseline(self.split.held_out),
        )

    def provenance(self) -> dict[str, Any]:
        """The provenance of a run's data, besides the hash."""
        mixture = self.mixture()
        return {
            "dataset_files": [public_name(source) for source, _rows in mixture.per_source],
            "dataset_rows": {
                "read": mixture.rows_read,
                "pairs": len(self.derived.pairs),
                "repeats": mixture.repeats,
                "contradictions": mixture.contradictions,
                "bridging": mixture.dropped,
                "per_epoch": mixture.rows_per_epoch,
            },
            "confounds": asdict(mixture.confounds) | {"annotators": []},  # pseudonyms stay in the workspace
            "train_longer_baseline": mixture.train_longer_baseline,
            "held_out_longer_baseline": mixture.held_out_longer_baseline,
        }


def resolve(config: TrainConfig, workspace: Workspace) -> RunData:
    """Read and split a run's data. Raises ConfigError if none is named, DatasetError if there is nothing to train on."""
    if not config.datasets:
        raise ConfigError("No data to train on: name some with --dataset FILE.jsonl, hub:OWNER/NAME or workspace")
    rows: list[PreferencePair] = []
    weights: dict[str, float] = {}
    per_source = []
    for source, weight in zip(config.datasets, config.dataset_weights or [1.0] * len(config.datasets), strict=True):
        read = load([source], workspace)
        for row in read:
            weights[row.pair_id] = max(weight, weights.get(row.pair_id, 0.0))
        rows += read
        per_source.append((source, len(read)))
    derived = derive(rows)
    parts = split(derived.pairs, config.held_out_share)
    epoch = tuple(weighted(parts.train, [weights[pair.pair_id] for pair in parts.train], config.seed))
    if not epoch:
        names = ", ".join(map(public_name, config.datasets))
        raise DatasetError(
            f"{names}: no pairs to train on ({plural(len(rows), 'row')} read, {len(parts.held_out)} held out, "
            f"{derived.contradictions} contradict each other); add rows or lower held_out_share"
        )
    of_pairs = tuple(weights[pair.pair_id] for pair in derived.pairs)
    return RunData(derived, of_pairs, tuple(per_source), parts, epoch, config.held_out_share)


def mixture_of(config: TrainConfig, workspace: Workspace) -> Mixture:
    """The data that a run of this config would train on; read again only when a file has changed."""
    counted = TrainConfig(**{name: getattr(config, name) for name in ("datasets", "dataset_weights", "held_out_share", "seed")})
    files = [workspace.preferences if name == WORKSPACE else Path(name) for name in config.datasets]
    return _mixture(counted, workspace, tuple(file.stat().st_mtime_ns if file.is_file() else 0 for file in files))


@lru_cache(16)
def _mixture(config: TrainConfig, workspace: Workspace, _written: tuple[int, ...]) -> Mixture:
    return resolve(config, workspace).mixture()


def public_name(source: str) -> str:
    """A source without folders of this machine: of a path, the file's name."""
    return source if source.startswith(HUB) else Path(source).name


def source_title(source: str) -> str:
    """A source for people: never a folder of this machine."""
    if source in (SEED_PAIRS, WORKSPACE):
        return "Seed pairs" if source == SEED_PAIRS else "Your judgments"
    path = Path(source)
    is_snapshot = path.name == DATASET and path.parent.parent.name == "runs"
    return f"Data of {path.parent.name}" if is_snapshot else public_name(source)


def data_title(config: TrainConfig) -> str:
    return ", ".join(map(source_title, config.datasets))


# A run's data, as stored in its folder

DATASET, SPLIT = "dataset.jsonl", "split.json"


@dataclass(frozen=True)
class Snapshot:
    """A run's stored data. `weights`: by pair id."""

    pairs: tuple[PreferencePair, ...]
    weights: dict[str, float]
    split: Split
    sha256: str

    def epoch(self, seed: int) -> tuple[PreferencePair, ...]:
        """The training rows of one epoch, in the pairs' order."""
        return tuple(weighted(self.split.train, [self.weights[pair.pair_id] for pair in self.split.train], seed))


def write_dataset(pairs: Sequence[PreferencePair], path: Path, weights: Sequence[float] = ()) -> str:
    """Write pairs as canonical JSONL (fixed columns, sorted keys, UTF-8); return its SHA-256.

    Weights, one per pair, become a column `weight` unless all are 1.
    """
    has_weights = any(weight != 1 for weight in weights)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for i, pair in enumerate(pairs):
            row = {"pair_id": pair.pair_id, **asdict(pair)} | ({"weight": float(weights[i])} if has_weights else {})
            file.write(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n")
    return sha256_of(path)


def _write_split(folder: Path, parts: Split, held_out_share: float, sha256: str) -> None:
    value = {
        "format": 1,
        "held_out": [pair.pair_id for pair in parts.held_out],
        "dropped": [pair.pair_id for pair in parts.dropped],
        "held_out_share": held_out_share,
        "dataset_sha256": sha256,
    }
    write_json(folder / SPLIT, value)


def read_snapshot(folder: Path, held_out_share: float | None = None) -> Snapshot:
    """Read a run's dataset.jsonl and split.json. A missing, damaged or changed file is an error.

    Runs of version 0.1 have no split.json: for them the split is derived, as training derived it then, with `held_out_share` or
    else the share in the run's config.json.
    """
    pairs, weights = _read_dataset(folder / DATASET)
    sha256 = sha256_of(folder / DATASET)
    if not (folder / SPLIT).exists():
        share = _configured_share(folder) if held_out_share is None else held_out_share
        return Snapshot(pairs, weights, split(pairs, share), sha256)
    try:
        stored = read_json(folder / SPLIT)
        recorded, held_out, dropped = stored["dataset_sha256"], set(stored["held_out"]), set(stored["dropped"])
    except (KeyError, TypeError) as exc:
        raise DatasetError(f"{folder / SPLIT} is damaged ({exc!r}): restore it from a backup, or start a new run") from exc
    if recorded != sha256:
        raise DatasetError(f"{folder / DATASET} was changed after the run was started: start a new run on the data you want")
    sides = [None if pair.pair_id in dropped else pair.pair_id in held_out for pair in pairs]
    return Snapshot(pairs, weights, Split.of_sides(pairs, sides), sha256)


def write_split(folder: Path) -> bool:
    """Write the split.json of a run that has none (version 0.1); False if it has one, or no dataset.jsonl."""
    if (folder / SPLIT).exists() or not (folder / DATASET).is_file():
        return False
    snapshot = read_snapshot(folder)
    _write_split(folder, snapshot.split, _configured_share(folder), snapshot.sha256)
    return True


def _read_dataset(path: Path) -> tuple[tuple[PreferencePair, ...], dict[str, float]]:
    pairs, weights = [], {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as exc:
        raise DatasetError(f"Can't read {path}: {exc.strerror or exc}; restore it from a backup, or start a new run") from exc
    for number, line in enumerate(lines, start=1):
        try:
            row = orjson.loads(line)
            pair = pair_of_row(row, f"{path}:{number}")
            weights[pair.pair_id] = float(row.get("weight", 1.0))
        except (ValueError, TypeError) as exc:
            raise DatasetError(f"{path}:{number}: {exc}; restore it from a backup, or start a new run") from exc
        pairs.append(pair)
    return tuple(pairs), weights


def _configured_share(folder: Path) -> float:
    config = read_json(folder / "config.json")
    share = config.get("held_out_share") if isinstance(config, dict) else None
    if not isinstance(share, int | float):
        raise DatasetError(f"{folder / 'config.json'} has no held_out_share, so the run's split is unknown: start a new run")
    return float(share)


# Pairs that an adapter never saw


def held_out_pairs(adapter: AdapterSpec, workspace: Workspace, limit: int = 64) -> list[PreferencePair]:
    """Pairs that an adapter's training never saw (`unseen_by`), at most `limit`, evenly spaced; [] if none are known."""
    pairs, _ = unseen_by(adapter, workspace)
    count = min(limit, len(pairs))
    return [pairs[i * len(pairs) // count] for i in range(count)]


def unseen_by(adapter: AdapterSpec, workspace: Workspace) -> tuple[Sequence[PreferencePair], str]:
    """Pairs that an adapter's training never saw, and what they are; () if none are known.

    For a run of this workspace: the pairs it held out. A shipped adapter comes without its training data, so its own held-out
    pairs are known only if it was trained on the shipped seed pairs; otherwise all seed pairs are unseen.
    """
    snapshot = _snapshot_of(adapter, workspace)
    if snapshot is not None:
        return snapshot.split.held_out, f"held-out pairs of run {adapter.id}"
    if adapter.folder.parent != ASSETS / "adapters":
        return (), ""
    pairs = load_file(ASSETS / "seed_pairs.jsonl")
    files = read_json(adapter.folder / "provenance.json").get("dataset_files", [])
    if "seed_pairs.jsonl" in files:
        return split(pairs, adapter.held_out_share or 0.0).held_out, f"held-out seed pairs of {adapter.id}"
    of = f" of {', '.join(files)}" if files else ""
    return pairs, f"seed pairs; the pairs{of} that {adapter.id} held out are not shipped"


def unseen(pairs: Sequence[PreferencePair], adapter: AdapterSpec | None, workspace: Workspace) -> tuple[PreferencePair, ...]:
    """The pairs that an adapter's training held out.

    By the stored split if the adapter's run is in this workspace and was trained on some of these pairs. Otherwise by the split
    that a run with the adapter's share (or the default one) would make.
    """
    snapshot = _snapshot_of(adapter, workspace) if adapter is not None else None
    if snapshot is not None and not snapshot.weights.keys().isdisjoint(pair.pair_id for pair in pairs):
        held_out = {pair.pair_id for pair in snapshot.split.held_out}
        return tuple(pair for pair in pairs if pair.pair_id in held_out)
    recorded = adapter.held_out_share if adapter is not None else None
    return split(pairs, TrainConfig().held_out_share if recorded is None else recorded).held_out


def own_sources(adapter: AdapterSpec, workspace: Workspace) -> list[str]:
    """What an adapter was trained on, as sources: its run's snapshot. The seed pairs if that is not in this workspace."""
    return [SEED_PAIRS if _snapshot_of(adapter, workspace) is None else str(adapter.folder.parent / DATASET)]


def load_named(sources: Iterable[str], workspace: Workspace) -> list[tuple[PreferencePair, str]]:
    """One row per pair of all sources, each with the name of the first source that has it."""
    rows: list[PreferencePair] = []
    names: dict[str, str] = {}
    for source in sources:
        more = load([source], workspace)
        rows += more
        names = {pair.pair_id: Path(source).name for pair in more} | names
    return [(pair, names[pair.pair_id]) for pair in derive(rows).pairs]


def trained_ids(adapter: AdapterSpec, workspace: Workspace) -> frozenset[str] | None:
    """Ids of the pairs that an adapter was trained on; None if that is not known."""
    snapshot = _snapshot_of(adapter, workspace)
    if snapshot is not None:
        return frozenset(pair.pair_id for pair in snapshot.split.train)
    if adapter.folder.parent != ASSETS / "adapters":
        return None
    seed = {pair.pair_id for pair in load_file(SEED_PAIRS)}
    return frozenset(seed - {pair.pair_id for pair in unseen_by(adapter, workspace)[0]})


def _snapshot_of(adapter: AdapterSpec, workspace: Workspace) -> Snapshot | None:
    """The stored data of the run of this workspace that made an adapter; None for other adapters."""
    folder = adapter.folder.parent
    dataset = folder / DATASET
    if folder.parent != workspace.runs or not dataset.is_file() or sha256_of(dataset) != adapter.dataset_sha256:
        return None
    return read_snapshot(folder, adapter.held_out_share)
