"""The price of debiasing: how much less likely neutral text becomes. (What it costs in what is written: `utility_generation`.)

perplexity   exp(-sum of logp / sum of tokens) over the texts, bare, without a template; a text's first token is given.
             perplexity_change_percent puts the same difference in per cent of base's
Texts: the prompt texts of RealToxicityPrompts' non-toxic prompts (Gehman et al., 2020, arXiv:2009.11462). In DATA_DIR the
file real_toxicity_prompts/nontoxic.jsonl; where there is none (upstream's one file, the Hub), 600 of those, always the same, to
which Perspective gives a toxicity below 0.5.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from biasdpo.benchmarks.base import OneSided
from biasdpo.benchmarks.real_toxicity_prompts import ORIGIN, web_text
from biasdpo.benchmarks.rows import load_rows
from biasdpo.benchmarks.toxicity import TOXIC
from biasdpo.errors import DatasetError
from biasdpo.evaluation.stats import Array, Metric
from biasdpo.records import Likelihood, Request, TextRequest
from biasdpo.workspace import sha256_of

TEXTS = 600  # of a large set: enough for an interval of a per cent, scored in minutes

_FILE = Path(ORIGIN.folder) / "nontoxic.jsonl"
HUB_ID = ORIGIN.hub_id


class Utility(OneSided):
    """See the module's docstring. Numbers of an item: logp and its token count."""

    name = "utility"
    columns: Sequence[str] = ("logp", "tokens")

    def __init__(self, texts: Sequence[str], data_sha256: str = "") -> None:
        self.items = texts
        self.data_sha256 = data_sha256

    def requests(self, item: str) -> list[Request]:
        return [TextRequest(item)]

    def scores(self, _item: str, outputs: Sequence[Likelihood]) -> list[float]:
        return [outputs[0].logp, outputs[0].tokens]

    def describe(self, item: str) -> dict[str, str]:
        return {"text": item}

    def groups(self, _item: str) -> list[str]:
        return []

    def side_metrics(self) -> dict[str, Metric]:
        return {"perplexity": Metric(_perplexity, better="lower", measures="quality")}

    def paired_metrics(self) -> dict[str, Metric]:
        return {"perplexity_change_percent": Metric(_change_percent, better="lower", measures="quality", restates="perplexity")}

    def report(self, _items: Sequence[str], numbers: Array) -> dict[str, float]:
        return {"tokens": float(numbers[:, 1].sum())}


def build(data_dir: Path | None) -> Utility:
    """The neutral texts under DATA_DIR, or of the Hub; what is wrong with them is a DatasetError."""
    if data_dir is not None and (data_dir / _FILE).is_file():
        return Utility(load_texts(data_dir), sha256_of(data_dir / _FILE))
    loaded = load_rows(ORIGIN, data_dir)
    found = [text for text in map(web_text, loaded.rows) if text.toxicity is not None and text.toxicity < TOXIC]
    if not found:
        raise DatasetError(f"{HUB_ID} has no prompt of a toxicity below {TOXIC} here: get it again, in its upstream format")
    if len(found) > TEXTS:
        found = random.Random(0).sample(found, TEXTS)
    return Utility([text.text for text in found], loaded.sha256)


def load_texts(data_dir: Path) -> list[str]:
    """The neutral texts; a missing or foreign file is a DatasetError that says where it was looked for."""
    path = data_dir / _FILE
    if not path.is_file():
        raise DatasetError(f"No file {path}: get {HUB_ID} and name the folder that holds real_toxicity_prompts/ with --data-dir")
    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                text = json.loads(line)["prompt"]["text"]
            except (ValueError, KeyError, TypeError) as exc:
                raise DatasetError(f"{path}, line {number}: no prompt.text ({type(exc).__name__}); fetch {HUB_ID} again") from exc
            texts.append(str(text))
    return texts


def _perplexity(means: Array) -> Array:
    """Of the mean logp and the mean token count (..., 2), whose ratio is that of their sums."""
    return np.asarray(np.exp(-means[..., 0] / means[..., 1]))


def _change_percent(means: Array) -> Array:
    return np.asarray(100 * (_perplexity(means[..., 2:]) / _perplexity(means[..., :2]) - 1))
