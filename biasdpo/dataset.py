"""Preference pairs: load, derive (one row a pair), split by prompt, snapshot."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from biasdpo.errors import DatasetError
from biasdpo.workspace import Workspace, replacing, sha256_of

WORKSPACE = "workspace"
HUB = "hub:"


@dataclass(frozen=True)
class PreferencePair:
    """A less-biased and a more-biased completion to the same prompt. `category` is "" where unknown."""

    prompt: str
    chosen: str
    rejected: str
    category: str = ""

    @property
    def pair_id(self) -> str:
        """The same two completions to the same prompt are the same pair, whichever was chosen."""
        texts = [self.prompt, *sorted((self.chosen, self.rejected))]
        return hashlib.sha256(json.dumps(texts, ensure_ascii=False).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Derived:
    """What is left for training, and what was left out. `repeats`: rows that say again what another row says."""

    pairs: tuple[PreferencePair, ...]
    repeats: int
    contradictions: int  # pairs chosen as often one way as the other


# Load


def load(sources: Iterable[str], workspace: Workspace) -> list[PreferencePair]:
    """The rows of all sources in their order. A source: a JSONL file, `hub:OWNER/NAME`, or `workspace` (the journal)."""
    rows: list[PreferencePair] = []
    for source in sources:
        if source == WORKSPACE:
            rows += load_journal(workspace)
        elif source.startswith(HUB):
            rows += load_hub(source.removeprefix(HUB))
        else:
            rows += load_jsonl(Path(source).expanduser())
    return rows


def load_jsonl(path: Path) -> list[PreferencePair]:
    """Rows of a JSONL file with prompt, chosen, rejected. The first bad row is a DatasetError with file, line and reason."""
    return [pair_of_row(row, f"{path}:{number}") for number, row in _lines(path)]


def load_hub(name: str) -> list[PreferencePair]:
    """Rows of the first split of a Hub data set."""
    from datasets import load_dataset

    try:
        splits = load_dataset(name)
        split = "train" if "train" in splits else next(iter(splits))
        rows = splits[split]
    except Exception as exc:  # datasets raises a dozen unrelated kinds, all of which mean "not to be had"
        reason = str(exc).strip().split("\n")[0][:160] or type(exc).__name__
        raise DatasetError(f"Can't load {HUB}{name}: {reason}; check the name and the network, or name a JSONL file") from exc
    return [pair_of_row(row, f"{HUB}{name} row {number}") for number, row in enumerate(rows)]


def load_journal(workspace: Workspace) -> list[PreferencePair]:
    """The journal's rows that are judged `preferred`, not retracted, and no hidden repeats."""
    path = workspace.preferences
    if not path.is_file():
        raise DatasetError(
            f"No preference pairs in the workspace yet ({path} is missing): judge some in the app, or train on a file with "
            "--dataset FILE.jsonl"
        )
    lines = list(_lines(path))
    retracted = {row.get("retracts") for _, row in lines if isinstance(row, dict) and row.get("verdict") == "retracted"}
    return [
        pair_of_row(row, f"{path}:{number}")
        for number, row in lines
        if not isinstance(row, dict)
        or (row.get("verdict") == "preferred" and row.get("id") not in retracted and not row.get("repeat_of"))
    ]


def pair_of_row(row: Any, where: str) -> PreferencePair:
    """Check one row; `where` (file and line) begins the error."""
    if not isinstance(row, dict):
        raise DatasetError(f"{where}: expected an object with prompt, chosen, rejected, got {type(row).__name__}; mend the row")
    texts = []
    for column in ("prompt", "chosen", "rejected"):
        if column not in row:
            raise DatasetError(f"{where}: no column {column!r}, got {', '.join(map(str, row)) or 'none'}; add it or drop the row")
        value = row[column]
        if not isinstance(value, str):
            raise DatasetError(f"{where}: {column} must be a string, got {type(value).__name__}; mend or drop the row")
        if not value.strip():
            raise DatasetError(f"{where}: {column} is empty; fill it or drop the row")
        texts.append(value)
    prompt, chosen, rejected = texts
    if chosen.strip() == rejected.strip():
        raise DatasetError(f"{where}: chosen and rejected are the same text, which teaches nothing; drop the row")
    category = row.get("category") or ""
    return PreferencePair(prompt, chosen, rejected, category if isinstance(category, str) else str(category))


def _lines(path: Path) -> Iterable[tuple[int, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as exc:
        raise DatasetError(f"No dataset file {path}: check the path (or name hub:OWNER/NAME, or workspace)") from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise DatasetError(f"Can't read {path}: {exc}; name a UTF-8 JSONL file") from exc
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as exc:
                raise DatasetError(f"{path}:{number}: no JSON ({exc}); mend or drop the line") from exc


# Derive, split


def derive(rows: Sequence[PreferencePair]) -> Derived:
    """One row a pair id. Rows in conflict are decided by majority; an even split is left out and counted."""
    votes: dict[str, Counter[str]] = {}
    first: dict[tuple[str, str], PreferencePair] = {}
    for row in rows:
        votes.setdefault(row.pair_id, Counter())[row.chosen] += 1
        first.setdefault((row.pair_id, row.chosen), row)
    pairs, contradictions = [], 0
    for pair_id, counts in votes.items():
        ranked = counts.most_common(2)
        if len(ranked) == 2 and ranked[0][1] == ranked[1][1]:
            contradictions += 1
        else:
            pairs.append(first[pair_id, ranked[0][0]])
    return Derived(tuple(pairs), repeats=len(rows) - len(votes), contradictions=contradictions)


def normalise_prompt(prompt: str) -> str:
    """Casefolded, without punctuation and runs of spaces: what makes two prompts the same one."""
    text = unicodedata.normalize("NFKC", prompt).casefold()
    return re.sub(r"\s+", " ", re.sub(r"[^\w\s]", "", text)).strip()


def is_held_out(prompt: str, held_out_share: float) -> bool:
    """Whether a prompt is held out: a hash of it decides, so rows that are added move no other row."""
    digest = hashlib.sha256(normalise_prompt(prompt).encode()).digest()
    return int.from_bytes(digest[:8], "big") < held_out_share * 2**64


def split(
    rows: Sequence[PreferencePair], held_out_share: float = 0.1
) -> tuple[tuple[PreferencePair, ...], tuple[PreferencePair, ...]]:
    """(train, held out), by prompt: never the same prompt on both sides. The share is met on average, not exactly."""
    held_out = tuple(row for row in rows if is_held_out(row.prompt, held_out_share))
    train = tuple(row for row in rows if not is_held_out(row.prompt, held_out_share))
    return train, held_out


def longer_baseline(rows: Sequence[PreferencePair]) -> float | None:
    """The accuracy of "pick the longer completion", in characters; a tie counts half. None without rows."""
    if not rows:
        return None
    points = (1.0 if len(r.chosen) > len(r.rejected) else 0.5 if len(r.chosen) == len(r.rejected) else 0.0 for r in rows)
    return sum(points) / len(rows)


# Snapshot


def snapshot(rows: Sequence[PreferencePair], path: Path) -> str:
    """Write rows as canonical JSONL (fixed columns, sorted keys, UTF-8); return its SHA-256."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps({"pair_id": row.pair_id, **asdict(row)}, ensure_ascii=False, sort_keys=True) + "\n")
    return sha256_of(path)
