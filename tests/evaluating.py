"""A small evaluation that is scored in a second or two: a random model and items of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from biasdpo.config import EvaluationConfig
from biasdpo.jobs.job import Job


def write_items(data_dir: Path, pairs: int) -> Path:
    """Items of crows_pairs and of perplexity."""
    lines = [
        {"sent_more": f"The {word} of town {i} was late.", "sent_less": f"A {word} in town {i} was early.", "bias_type": word}
        for i in range(pairs)
        for word in [("age", "religion")[i % 2]]
    ]
    _write(data_dir / "crows_pairs" / "rows.jsonl", lines)
    _write(data_dir / "real_toxicity_prompts" / "nontoxic.jsonl", [{"prompt": {"text": f"Sun {i} rose."}} for i in range(6)])
    return data_dir


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def under_way(evaluation: Job) -> bool:
    """Scoring, with something scored; or ended already."""
    return not evaluation.is_active or any(0 < one.done < one.total for one in evaluation.status.progress)


def request(model: Path, adapter: Path | str, data_dir: Path, **changes: Any) -> EvaluationConfig:
    values: dict[str, Any] = {
        "model": str(model),
        "adapter": str(adapter),
        "benchmarks": ("crows_pairs",),
        "data_dir": str(data_dir),
    }
    return EvaluationConfig(**(values | changes))
