"""The pairs of `preference`: of whatever is named, those that the adapter's training never saw."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from biasdpo import dataset
from biasdpo.benchmarks.preference import Preference
from biasdpo.dataset import PreferencePair
from biasdpo.errors import ConfigError, DatasetError
from biasdpo.evaluations.request import RUN, WORKSPACE
from biasdpo.export_proof import held_out_pairs
from biasdpo.models import AdapterSpec
from biasdpo.run_config import RunConfig
from biasdpo.workspace import Workspace, sha256_of


def preference(source: str, adapter: AdapterSpec | None, workspace: Workspace) -> Preference:
    """The held-out pairs of a JSONL file, of the `workspace`, or of the adapter's `run`.

    Raises ConfigError where nothing is named, DatasetError where nothing is held out.
    """
    if not source:
        raise ConfigError("preference needs the pairs: name with --dataset the file that was trained on, workspace or run")
    if source == RUN:
        return _of_run(adapter, workspace)
    rows = dataset.load([WORKSPACE], workspace) if source == WORKSPACE else dataset.load_jsonl(Path(source))
    pairs = dataset.derive(rows).pairs
    share = RunConfig.held_out_share if adapter is None or adapter.held_out_share is None else adapter.held_out_share
    held_out = dataset.split(pairs, share).held_out
    if not held_out:
        raise DatasetError(
            f"No pairs to score: of the {len(pairs)} in {Path(source).name} the run held none out (held_out_share {share:g}), "
            "and those it was trained on prove nothing; train again with held_out_share 0.1 or more, or score another benchmark"
        )
    return Preference(held_out, _sha256_of_pairs(held_out) if source == WORKSPACE else sha256_of(Path(source)))


def _of_run(adapter: AdapterSpec | None, workspace: Workspace) -> Preference:
    if adapter is None:
        raise ConfigError("--dataset run is what the adapter was trained on, and there is none: name a file, or workspace")
    pairs = held_out_pairs(adapter, workspace, limit=10**9)
    if not pairs:
        raise DatasetError(
            f"No pairs to score: what {adapter.id} was trained on is not in this workspace, or nothing of it was held out; name "
            "a file with --dataset"
        )
    return Preference(pairs, _sha256_of_pairs(pairs))


def _sha256_of_pairs(pairs: Sequence[PreferencePair]) -> str:
    """Of what is scored: the journal grows, and so do its bytes."""
    lines = "".join(json.dumps([pair.prompt, pair.chosen, pair.rejected]) + "\n" for pair in pairs)
    return hashlib.sha256(lines.encode()).hexdigest()
