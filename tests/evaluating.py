"""Evaluations for tests: a random model and items of our own, scored in a second or two; and a backend without a model."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from biasdpo.config import EvaluationConfig
from biasdpo.engines import Engine
from biasdpo.errors import PromptError
from biasdpo.jobs.job import Job, JobFolder, read_job
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.records import Likelihood, Side
from tests.lora_factory import write_lora
from tests.run_line import TIMEOUT_SECONDS, wait_for


class FakeBackend:
    """Log-probability: minus the text's length, of which an adapter takes half of its strength. A token a character.

    computed   (side, text, strength) of every request; calls: of `loglikelihood`
    seconds    that a request takes, by which `clock` is moved on
    """

    name, device = "fake", "CPU, 2 threads"

    def __init__(self, template: Any = None, seconds: float = 0.0, clock: Any = None) -> None:
        self.template, self.seconds = template, seconds
        self.clock = clock or SimpleNamespace(now=0.0)
        self.computed: list[tuple[Side, str, float]] = []
        self.calls = 0

    def loglikelihood(self, requests: Sequence[Any], side: Side, *, strength: float = 1.0) -> list[Likelihood]:
        texts = [request.continuation if hasattr(request, "continuation") else request.text for request in requests]
        if (longest := max(map(len, texts))) > 100:
            raise PromptError(f"A text of {longest} tokens does not fit the context of 100: shorten it")
        self.calls += 1
        self.computed += [(side, text, strength) for text in texts]
        self.clock.now += self.seconds * len(texts)
        scale = 1.0 if side == "base" else 1 - 0.5 * strength
        return [Likelihood(-scale * len(text), len(text)) for text in texts]


def fake_engine(spec: ModelSpec, folder: Path, backend: Any) -> Engine:
    """An engine with a random adapter and a backend of the test's own."""
    return Engine(spec, AdapterSpec("mine", write_lora(folder / "mine", layers=1), "smollm2"), backend)


def write_items(data_dir: Path, pairs: int) -> Path:
    """Items of crows_pairs and of perplexity."""
    lines = [
        {"sent_more": f"The {word} of town {i} was late.", "sent_less": f"A {word} in town {i} was early.", "bias_type": word}
        for i in range(pairs)
        for word in [("age", "religion")[i % 2]]
    ]
    write_rows(data_dir / "crows_pairs" / "rows.jsonl", lines)
    write_rows(data_dir / "real_toxicity_prompts" / "nontoxic.jsonl", [{"prompt": {"text": f"Sun {i} rose."}} for i in range(6)])
    return data_dir


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_files(folder: Path, files: dict[str, Any]) -> Path:
    """Files by name: text, bytes, a list of JSONL rows, or one JSON object."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list | dict):
            content = "".join(json.dumps(row) + "\n" for row in (content if isinstance(content, list) else [content]))
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def stop_midway(folder: JobFolder) -> Job:
    """The job, stopped by SIGSTOP where something but not everything is scored.

    Its worker runs 20 ms at a time, so that it can't finish between two looks, however busy the machine is.
    """
    job = wait_for(folder, lambda job: "biasdpo.jobs.worker" in psutil.Process(job.status.pid).cmdline())
    worker, end = psutil.Process(job.status.pid), time.monotonic() + TIMEOUT_SECONDS
    while not any(0 < one.done < one.total for one in job.status.progress):
        assert job.is_active, f"{job.status}; {folder.log_tail(30)}"
        assert time.monotonic() < end, f"still {job.status} after {TIMEOUT_SECONDS} s"
        worker.resume()
        time.sleep(0.02)
        worker.suspend()
        if job.status.phase == "scoring":
            time.sleep(0.3)  # for the clock to reach the next status: the worker limits how often it writes one
        job = read_job(folder)
    return job


def request(model: Path, adapter: Path | str, data_dir: Path, **changes: Any) -> EvaluationConfig:
    values: dict[str, Any] = {
        "model": str(model),
        "adapter": str(adapter),
        "benchmarks": ("crows_pairs",),
        "data_dir": str(data_dir),
    }
    return EvaluationConfig(**(values | changes))
