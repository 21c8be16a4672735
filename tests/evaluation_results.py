"""Results as `evaluate.run` writes them, of numbers that are drawn instead of scored: for what only reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from biasdpo.benchmarks.base import Benchmark
from biasdpo.benchmarks.bbq import BBQ, Question
from biasdpo.benchmarks.crows_pairs import CrowsPairs, SentencePair
from biasdpo.benchmarks.preference import Preference
from biasdpo.benchmarks.stereoset import StereoSet, Triple
from biasdpo.benchmarks.utility import Utility
from biasdpo.data.pairs import PreferencePair
from biasdpo.evaluation.run import ItemNumbers, _benchmark_result, _brief, correct
from biasdpo.workspace import write_json

_CATEGORIES = ("gender", "race-color", "religion", "nationality")


def pairs(n: int) -> CrowsPairs:
    """Sentences of the tests' own, in the four categories by turns."""
    return CrowsPairs(
        [SentencePair(f"Group A is bad at task {i}.", f"Group B is bad at task {i}.", _CATEGORIES[i % 4]) for i in range(n)],
        "c0ffee" * 10,
    )


def result(n: int = 40, *, shift: float = -1.5, n_failed: int = 0, benchmarks: tuple[str, ...] = (), **provenance: Any) -> Any:
    """A result of n items of each benchmark. `shift`: nats that tuned takes from what is biased."""
    rng = np.random.default_rng(7)
    found: dict[str, Any] = {}
    for benchmark, base, tuned in _scored(n, shift, rng):
        if benchmarks and benchmark.name not in benchmarks:
            continue
        found[benchmark.name] = _part(benchmark, base, tuned, n_failed)
    correct(found)
    return {
        "benchmarks": found,
        "provenance": {
            "model_sha256": "3fa9c1d2" * 8,
            "adapter_sha256": "9d1c3fa9" * 8,
            "model": "smollm2",
            "adapter": "smollm2-biasdpo",
            "backend": "llamacpp",
            "strength": 1.0,
            "seed": 0,
            "limit": n,
            "interrupted": False,
            "code_version": "0.5.0",
            **provenance,
        },
    }


def with_curve(n: int = 40) -> Any:
    """The same at six strengths: the stronger, the less biased and the less fluent."""
    made = result(n, shift=-1.0, benchmarks=("crows_pairs", "utility"))
    curve = []
    for strength in (0.25, 0.5, 0.75, 1.0, 1.25, 1.5):
        at = result(n, shift=-strength, benchmarks=("crows_pairs", "utility"))
        curve.append({"strength": strength, "benchmarks": {name: _brief(part) for name, part in at["benchmarks"].items()}})
    return made | {"curve": curve}


def write_result(root: Path, name: str, made: Any) -> Path:
    """As the command line leaves it in a workspace."""
    file = root / "evaluations" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, made)
    return file


def _scored(n: int, shift: float, rng: np.random.Generator) -> list[tuple[Benchmark[Any], Any, Any]]:
    """(benchmark, base's numbers, tuned's)."""
    ones = np.ones((n, 1))
    preferred = np.concatenate([rng.normal(-60, 8, (n, 2)), rng.integers(20, 60, (n, 2)).astype(float), ones], axis=1)
    gained = np.concatenate([rng.normal(1, 1, (n, 1)), rng.normal(shift, 1, (n, 1)), np.zeros((n, 3))], axis=1)
    logps = rng.normal(-40, 4, (n, 1)) + np.concatenate([rng.normal(1.2, 1.5, (n, 1)), 0 * ones], axis=1)
    noise = rng.normal(0, 0.4, (n, 1))
    terms = (np.arange(n) % 5)[:, None].astype(float)
    three = rng.normal(-4, 0.5, (n, 3)) + np.array([0.3, 0.0, -0.8])
    three_tuned = three + rng.normal(0, 0.1, (n, 3)) + [[shift / 4, 0.0, 0.0]]
    tokens = rng.integers(6, 20, (n, 1)).astype(float)
    cost = rng.normal(-3, 0.3, (n, 1)) * tokens
    cost_tuned = cost * (1 + 0.01 * abs(shift)) + rng.normal(0, 0.05, (n, 1))
    ambiguous = (np.arange(n) % 2).astype(float)
    rows = [PreferencePair(f"Who leads, {i}?", f"Anybody can, {i}.", f"Men do, {i}.", _CATEGORIES[i % 3]) for i in range(n)]
    nurses = (f"The nurse is {{}} {i}." for i in range(n))
    triples = [
        Triple("", text.format("kind"), text.format("tough"), "The sky sits.", f"t{i % 5}", "profession", "intrasentence")
        for i, text in enumerate(nurses)
    ]
    texts = [f"A harmless sentence, number {i}." for i in range(n)]
    return [
        (Preference(rows, "beef" * 16), preferred, preferred + gained),
        (pairs(n), logps, logps + np.concatenate([shift + noise, noise / 4], axis=1)),
        (StereoSet(triples, "abcd" * 16), np.hstack([three, terms]), np.hstack([three_tuned, terms])),
        (BBQ([_question(i) for i in range(n)], "b00b" * 16), _answers(ambiguous, rng, 0.35), _answers(ambiguous, rng, 0.3)),
        (Utility(texts, "0123" * 16), np.hstack([cost, tokens]), np.hstack([cost_tuned, tokens])),
    ]


def _question(i: int) -> Question:
    unclear = bool(i % 2)
    return Question(
        context=f"Two people, {i}, met.",
        question="Who was rude?",
        groups=("The old man", "The young man"),
        right=None if unclear else i % 3 % 2,
        biased=0,
        ambiguous=unclear,
        category="Age" if i % 3 else "Religion",
    )


def _answers(ambiguous: Any, rng: np.random.Generator, biased_share: float) -> Any:
    """BBQ's numbers: ambiguous, right, names a group, biased, answer, three logps, has a biased answer."""
    n = len(ambiguous)
    names = (rng.random(n) < 0.8).astype(float)
    biased = names * (rng.random(n) < biased_share + 0.2).astype(float)
    right = np.where(ambiguous > 0, 1 - names, names * (rng.random(n) < 0.6))
    answer = np.where(names > 0, 1 - biased, 2)
    return np.stack([ambiguous, right, names, biased, answer, *rng.normal(-9, 1, (3, n)), np.ones(n)], axis=1)


def _part(benchmark: Benchmark[Any], base: Any, tuned: Any, n_failed: int) -> dict[str, Any]:
    n = len(benchmark.items)
    failures = [{"index": 900 + i, "reason": "the prompt is longer than the model's context"} for i in range(n_failed)]
    numbers: Any = {"base": base.tolist(), "tuned": tuned.tolist()}
    part = _benchmark_result(benchmark, n, ItemNumbers(list(range(n)), numbers, failures, n), {}, seed=0)
    return part | {"n_total": 10 * n, "partial": True, "not_comparable": f"limited to {n} of {10 * n} items"}
