"""The store at 100 and at 100,000 rows: does it grow well?

    python -m tests.perf.dataset [--rows 100000] [--rounds 7] [--appends 300] [--folder DIR]

Prints one JSON object. Appends alternate between a journal of 100 rows and one of --rows in the same folder's file system, each
fsynced; p50 and p99 are medians over the rounds, in milliseconds, and the ratio is that of the two p99 (target: at most 1.5).
A process's first append reads the journal's ids and is given apart. Then seconds, the best of five, by the clock and of the
processor (which differ where other work runs beside): `stats` of the whole journal, read from disk (target: 3), of prompts of
twelve random words and of prompts that all begin alike; a query of the table (target: 0.3; the slowest of four); and the
confound meter when it first sees the journal, and after one append.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from biasdpo.data.health import Meter
from biasdpo.data.journal import Journal, append, append_all, new_judgment
from biasdpo.data.summary import Query, query, stats
from biasdpo.records import Judgment, JudgmentMeta
from biasdpo.workspace import Workspace
from tests.perf.measuring import options

SAMPLING = '{"max_new_tokens": 160, "repetition_penalty": 1.1, "seed": 7, "temperature": 0.7, "top_k": 40, "top_p": 0.9}'
SMALL = 100


def judgments(count: int, seed: int, opening: str = "") -> Iterator[Judgment]:
    """Distinct prompts of about twelve words, completions of 20 to 50, four categories, three annotators."""
    rng = random.Random(seed)
    vocabulary = [f"word{i}" for i in range(20_000)]
    for number in range(count):
        left = rng.choice(["base", "tuned"])
        yield new_judgment(
            f"{opening}{' '.join(rng.choices(vocabulary, k=11 - opening.count(' ')))} {seed}x{number}?",
            " ".join(rng.choices(vocabulary, k=rng.randint(20, 50))),
            " ".join(rng.choices(vocabulary, k=rng.randint(20, 50))),
            category=rng.choice(["gender", "race", "religion", "other"]),
            target_group=f"group {rng.randrange(30)}",
            annotator=rng.choice(["ada", "ben", "cy"]),
            meta=JudgmentMeta("smollm2", "smollm2-biasdpo", "llamacpp", SAMPLING, 7, left, rng.choice(["base", "tuned"]), 3.2),
        )


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def best_of_five(name: str, *actions: Callable[[], object]) -> dict[str, float]:
    """Seconds by the clock and of the processor: the fastest of five, of the slowest action."""
    clock, processor = 0.0, 0.0
    for action in actions:
        times = []
        for _ in range(5):
            started = time.process_time()
            times.append((seconds(action), time.process_time() - started))
        clock, processor = max(clock, min(t[0] for t in times)), max(processor, min(t[1] for t in times))
    return {f"{name}_seconds": round(clock, 3), f"{name}_processor_seconds": round(processor, 3)}


def appends(folder: Path, large: Workspace, rows: int, rounds: int, count: int) -> dict[str, float]:
    """p50 and p99 of appends in milliseconds, one to the small journal and one to the large, in turn."""
    found: dict[str, list[float]] = {}
    for number in range(rounds):
        small = Workspace(folder / f"small{number}")
        small.root.mkdir()
        append_all(small, judgments(SMALL, seed=1000 + number))
        times: dict[int, list[float]] = {SMALL: [], rows: []}
        for i, judgment in enumerate(judgments(2 * count, seed=2000 + number)):
            size, workspace = ((SMALL, small), (rows, large))[i % 2]
            times[size].append(1000 * seconds(lambda w=workspace, j=judgment: append(w, j)))  # type: ignore[misc]
        for size, values in times.items():
            for percent in (50, 99):
                found.setdefault(f"append_p{percent}_ms_at_{size}", []).append(float(np.percentile(values, percent)))
    medians = {name: round(statistics.median(values), 3) for name, values in found.items()}
    return medians | {"append_p99_ratio": round(medians[f"append_p99_ms_at_{rows}"] / medians[f"append_p99_ms_at_{SMALL}"], 3)}


def main() -> None:
    args = options(__doc__, rows=100_000, rounds=7, appends=300, folder=Path)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        large, alike, source = (Workspace(folder / name) for name in ("large", "alike", "source"))
        for workspace in (large, alike, source):
            workspace.root.mkdir()
        append_all(alike, judgments(args.rows, seed=1, opening="Why do so many people think that "))
        # As a running app has it: written by others before, so that the first append has ids to read.
        append_all(source, judgments(args.rows, seed=0))
        source.preferences.rename(large.preferences)
        first = seconds(lambda: append(large, next(judgments(1, seed=3))))
        result: dict[str, object] = {"rows": args.rows, "first_append_seconds": round(first, 3)}
        result |= appends(folder, large, args.rows, args.rounds, args.appends)
        result |= best_of_five("stats", lambda: stats(large))
        result |= best_of_five("stats_of_prompts_alike", lambda: stats(alike))
        journal = Journal(large.preferences).refresh()
        queries = [
            Query(),
            Query("word77 word1"),
            Query("nowhere", state="standing"),
            Query(category="race", annotator="ada", verdict="preferred", state="standing"),
        ]
        result |= best_of_five("table_query", *(lambda wanted=wanted: query(journal, wanted) for wanted in queries))  # type: ignore[misc]
        result |= best_of_five("meter_first", lambda: Meter().refresh(journal))
        meter = Meter()
        meter.refresh(journal)
        refreshes = []
        for judgment in judgments(50, seed=4):
            append(large, judgment)
            refreshes.append(1000 * seconds(lambda: meter.refresh(journal.refresh())))
        result["meter_refresh_ms_after_one_append"] = round(statistics.median(refreshes), 2)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
