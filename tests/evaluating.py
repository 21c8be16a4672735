"""A small evaluation that is scored in a second or two: a random model, rows of our own, a result by hand."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from biasdpo import evaluations
from biasdpo.evaluations import Evaluation, EvaluationConfig
from biasdpo.workspace import Workspace

_WAIT_SECONDS = 120


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


def wait(started: Evaluation, workspace: Workspace, condition: Callable[[Evaluation], bool]) -> Evaluation:
    """The evaluation once the condition holds."""
    end = time.monotonic() + _WAIT_SECONDS
    while time.monotonic() < end:
        now = evaluations.find(started.id, workspace)
        if condition(now):
            return now
        time.sleep(0.02)
    log = started.files.log
    raise AssertionError(f"still {evaluations.find(started.id, workspace)}; {log.read_text()[-2000:] if log.is_file() else ''}")


def ended(evaluation: Evaluation) -> bool:
    return not evaluation.is_active


def under_way(evaluation: Evaluation) -> bool:
    """Scoring, with something scored; or ended already."""
    return ended(evaluation) or any(0 < one.done < one.total for one in evaluation.progress)


def request(model: Path, adapter: Path, data_dir: Path, **changes: Any) -> EvaluationConfig:
    values = {"model": str(model), "adapter": str(adapter), "benchmarks": ("crows_pairs",), "data_dir": str(data_dir)}
    return EvaluationConfig(**(values | changes))
