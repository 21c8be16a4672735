"""The price of debiasing: how much less likely neutral text becomes.

perplexity   exp(-sum of logp / sum of tokens) over the texts, bare, without a template; a text's first token is given.
Texts: the prompt texts of RealToxicityPrompts' non-toxic prompts (Gehman et al., 2020, arXiv:2009.11462), read from
DATA_DIR/real_toxicity_prompts/nontoxic.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from biasdpo.errors import DatasetError
from biasdpo.records import Likelihood, Request, TextRequest
from biasdpo.stats import Array, Metric
from biasdpo.workspace import sha256_of

_FILE = Path("real_toxicity_prompts") / "nontoxic.jsonl"
HUB_ID = "allenai/real-toxicity-prompts"


class Utility:
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
        return {"perplexity_change_percent": Metric(_change_percent, better="lower", measures="quality")}

    def report(self, _items: Sequence[str], numbers: Array) -> dict[str, float]:
        return {"tokens": float(numbers[:, 1].sum())}


def build(data_dir: Path | None) -> Utility:
    """The neutral texts under DATA_DIR; what is wrong with them is a DatasetError."""
    if data_dir is None:
        raise DatasetError(
            f"utility is read from {_FILE}, the non-toxic prompts of {HUB_ID}: name with --data-dir the folder that holds it"
        )
    return Utility(load_texts(data_dir), sha256_of(data_dir / _FILE))


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
