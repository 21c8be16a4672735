"""The outcome of a training run in words: an accuracy always has its interval, and the size of the change stands beside it."""

from __future__ import annotations

import math
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from biasdpo.config import TrainConfig
from biasdpo.data import splits
from biasdpo.data.health import wilson
from biasdpo.errors import WorkspaceError, plural
from biasdpo.jobs.job import Job
from biasdpo.workspace import read_json

# KL(base || tuned) in nats per token: below the first the texts rarely differ; the shipped adapter, whose do, has 0.5.
_HARDLY, _SOMEWHAT = 0.02, 0.2


def held_out_metrics(job: Job) -> dict[str, Any]:
    """The final metrics on the held-out pairs; {} while there are none."""
    return recorded_metrics(job.folder.adapter)


def recorded_metrics(adapter: Path) -> dict[str, Any]:
    """The metrics on the held-out pairs in an adapter's record; {} without them."""
    with suppress(WorkspaceError, AttributeError):
        found = read_json(adapter / "provenance.json").get("metrics", {}).get("held_out")
        return {name: value for name, value in (found or {}).items() if isinstance(value, int | float)}
    return {}


def held_out_pairs(job: Job) -> int:
    """How many pairs a run holds out from training; 0 where unknown."""
    with suppress(WorkspaceError, AttributeError, TypeError):
        return len(read_json(job.folder.split).get("held_out", ()))
    return 0


def accuracy_text(accuracy: float, pairs: int) -> str:
    """An accuracy with its 95% Wilson interval: "0.81 [0.62, 0.91]"."""
    if pairs < 1:
        return ""
    low, high = wilson(accuracy * pairs, pairs)
    return f"{accuracy:.2f} [{low:.2f}, {high:.2f}]"


def best_accuracy(job: Job) -> str:
    """The final held-out accuracy, else the best so far, with its interval; "" where there is none."""
    final = held_out_metrics(job)
    if final.get("reward_accuracy") is not None:
        return accuracy_text(final["reward_accuracy"], final.get("pairs", 0))
    return "" if job.status.best_accuracy is None else accuracy_text(job.status.best_accuracy, held_out_pairs(job))


def outcome(held_out: Mapping[str, Any]) -> str:
    """A finished run in one sentence, from its `held_out_metrics`."""
    accuracy, pairs = held_out.get("reward_accuracy"), held_out.get("pairs", 0)
    if accuracy is None or not pairs:
        return "No pairs were held out, so the result was not measured: set a held-out share of 0.1 or more in the next run."
    of = plural(pairs, "held-out pair")
    parts = [f"Reward accuracy {accuracy_text(accuracy, pairs)} on {of}{_against_chance(accuracy, pairs, held_out)}"]
    kl, margin = held_out.get("kl_base_to_tuned_nats_per_token"), held_out.get("reward_margin_nats")
    if kl is not None:
        how = "hardly changes" if kl < _HARDLY else "slightly changes" if kl < _SOMEWHAT else "clearly changes"
        parts.append(f"the adapter {how} the model: KL {kl:.2g} nats per token")
    elif margin is not None:
        parts.append(f"mean reward margin {margin:.2g} nats")
    return "; ".join(parts) + "."


def _against_chance(accuracy: float, pairs: int, held_out: Mapping[str, Any]) -> str:
    """Other explanations of the accuracy, if any."""
    low, high = wilson(accuracy * pairs, pairs)
    longer = held_out.get("reward_accuracy_of_picking_the_longer")
    if high < 0.5:
        return ", worse than chance"
    if low <= 0.5:
        return ", which chance can explain"
    if longer is not None and longer >= low:
        return f", not clearly better than always choosing the longer completion ({longer:.2f})"
    return ""


def pairs_needed(held_out_share: float) -> int:
    """The fewest pairs of which enough are held out that a perfect score can't be chance (95%): four."""
    held_out = next(n for n in range(1, 100) if wilson(n, n)[0] > 0.5)
    return math.ceil(held_out / held_out_share) if held_out_share > 0 else 1


_METRICS = {
    "Reward margin (nats)": "reward_margin_nats",
    "KL (nats per token)": "kl_base_to_tuned_nats_per_token",
    "Length-normalized accuracy, base": "length_normalised_accuracy_base",
    "Length-normalized accuracy, tuned": "length_normalised_accuracy_tuned",
}


def run_table(jobs: Sequence[Job]) -> dict[str, Any]:
    """A table of runs, one column each: results, then data and settings, of several runs those that differ."""
    metrics = [held_out_metrics(job) for job in jobs]
    found = [(job.config, job.record.origin()) for job in jobs]
    results = {
        "State": [str(job.state).capitalize() for job in jobs],
        "Steps": [f"{job.status.step:,}" for job in jobs],
        "Reward accuracy (held-out)": [best_accuracy(job) for job in jobs],
    } | {label: [f"{one[key]:.3g}" if one.get(key) is not None else "" for one in metrics] for label, key in _METRICS.items()}
    more = {
        "Model": ["" if config is None else Path(config.model).name for config, _ in found],
        "Data": ["" if config is None else splits.data_title(config) for config, _ in found],
        "Pairs": [str((origin.get("dataset_rows") or {}).get("pairs", "")) for _, origin in found],
        "Hash of the data": [str(origin.get("dataset_sha256", ""))[: 64 if len(jobs) == 1 else 8] for _, origin in found],
        "Code": [origin["code_version"] for _, origin in found],
        "Command": [origin["command"] for _, origin in found],
    }
    for name, one in TrainConfig.settings().items():
        if name not in ("model", "datasets"):
            more[one.label] = ["" if config is None else one.format(getattr(config, name)) for config, _ in found]
    rows = results | {label: values for label, values in more.items() if len(jobs) == 1 or len(set(values)) > 1}
    shown = [[label, *values] for label, values in rows.items() if any(values)]
    return {"headers": ["", *(job.id for job in jobs)], "data": shown}


def pack_run(job: Job) -> Path:
    """Write a .zip of a run's adapter, a PEFT folder, with the run's config, metrics and probes beside it; in the cache."""
    folder = job.folder
    folder.workspace.cache.mkdir(exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix="run-", dir=folder.workspace.cache)) / f"{job.id}.zip"
    with zipfile.ZipFile(path, "w") as packed:
        for file in [*sorted(folder.adapter.iterdir()), folder.config, folder.metrics, folder.probes]:
            if file.is_file():
                packed.write(file, f"{job.id}/{file.name}")
    return path
