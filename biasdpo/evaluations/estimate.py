"""How long an evaluation takes: measured on a short batch of each benchmark, and remembered.

The measured process is `python -m biasdpo evaluate … --measure`: what it scores is kept nowhere. Remembered in
WORKSPACE/cache/evaluation_speeds/KEY.json, one a benchmark: {"items", "base", "tuned"}, the latter in seconds an item.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from biasdpo import detached, models
from biasdpo.backends import choose_backend
from biasdpo.benchmarks.base import Benchmark, GenerationBenchmark
from biasdpo.engines import Engine
from biasdpo.errors import BiasDPOError, EvaluationError
from biasdpo.evaluation import results, run
from biasdpo.evaluations.request import EvaluationConfig
from biasdpo.evaluations.resolving import resolved
from biasdpo.workspace import Workspace, read_json, refuse_on_public_space, write_json

_FORMAT = 1  # of what is remembered; raise it where scoring's cost changes
_FIRST, _MORE = 2, 16  # items: the first ones warm the engine, and tell whether more can be afforded
_AFFORDED_SECONDS = 2.0


@dataclass(frozen=True)
class Speed:
    """One benchmark. `items` there are in all; `base` and `tuned`: seconds an item of that side, None: not measured."""

    items: int
    base: float
    tuned: float | None

    def seconds(self, limit: int | None, rounds: int) -> float | None:
        """Of so many items, base once and tuned so many times; None where that was not measured."""
        if rounds and self.tuned is None:
            return None
        items = self.items if limit is None else min(limit, self.items)
        return items * (self.base + rounds * (self.tuned or 0.0))


def known_seconds(request: EvaluationConfig, workspace: Workspace) -> dict[str, float | None]:
    """Seconds by benchmark (`EvaluationConfig.parts`), as remembered; None where it was not measured yet. Measures
    nothing, returns at once.

    Raises ModelError or AdapterError where what is named is not here.
    """
    spec = models.find(models.choose_auto()[0].id if request.model == "auto" else request.model)
    adapter = models.find_adapter(request.adapter, spec, workspace)
    rounds = 0 if adapter is None else len(results.order(request.strengths))
    speeds = {name: _remembered(_file_of(request, name, workspace)) for name in request.parts()}
    return {name: None if speed is None else speed.seconds(request.limit, rounds) for name, speed in speeds.items()}


def estimate_seconds(
    request: EvaluationConfig, workspace: Workspace, *, cancelled: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """Seconds by benchmark, where nothing is scored yet. What is not remembered is measured, in a process of its own: the model
    is loaded (seconds), a few items of each benchmark are scored.

    Raises RefusedError on a public Space, ConfigError, ModelError or AdapterError for what can't be evaluated, EvaluationError
    where it fails or is cancelled.
    """
    refuse_on_public_space("Evaluation")
    request, _ = resolved(request, workspace)
    unknown = [name for name, seconds in known_seconds(request, workspace).items() if seconds is None]
    if unknown:
        missing = tuple("perplexity" if name == "utility" else name for name in unknown)  # which stands for that one alone
        for name, speed in _measured(request.replace(benchmarks=missing), workspace, cancelled).items():
            write_json(_file_of(request, name, workspace), asdict(speed))
    return {name: seconds or 0.0 for name, seconds in known_seconds(request, workspace).items()}


def _measured(request: EvaluationConfig, workspace: Workspace, cancelled: Callable[[], bool]) -> dict[str, Speed]:
    folder = workspace.cache / "evaluation_speeds"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".measuring-", dir=folder) as scratch:
        answer, log = Path(scratch) / "speeds.json", Path(scratch) / "log"
        status = detached.run_until([*request.command(answer, workspace.root), "--measure"], log, cancelled)
        if status is None:
            raise EvaluationError("The estimate was cancelled: ask for it again")
        if not answer.is_file():
            lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").strip().split("\n")
            reason = lines[-1].removeprefix("biasdpo: ")[:400] or f"its process ended with status {status}"
            raise EvaluationError(f"Nothing could be measured: {reason}")
        return {name: Speed(**values) for name, values in read_json(answer).items()}


def measure(engine: Engine, benchmarks: Sequence[Benchmark | GenerationBenchmark]) -> dict[str, Any]:
    """`Speed` by benchmark, as JSON, on items drawn with seed 0. Nothing is kept."""
    alone = replace(engine, adapter=None)
    found = {}
    for benchmark in benchmarks:
        base = _seconds_an_item(alone, benchmark)
        tuned = None if engine.adapter is None else max(0.0, _seconds_an_item(engine, benchmark) - base)
        found[benchmark.name] = asdict(Speed(len(benchmark.items), base, tuned))
    return found


def _seconds_an_item(engine: Engine, benchmark: Benchmark | GenerationBenchmark) -> float:
    """From the first question whether to stop, which is asked when all is ready, to the last item."""
    for limit in (_FIRST, _MORE):
        times: list[float] = []
        done = 0

        def tell(_name: str, so_far: int, _total: int, times: list[float] = times) -> None:
            nonlocal done
            done = so_far
            times.append(time.monotonic())

        def asked(times: list[float] = times) -> bool:
            if not times:
                times.append(time.monotonic())
            return False

        run.run(engine, [benchmark], limit=limit, on_item=tell, should_stop=asked)
        if times[-1] - times[0] > _AFFORDED_SECONDS:
            break
    return (times[-1] - times[0]) / done


def _remembered(file: Path) -> Speed | None:
    try:
        return Speed(**read_json(file))
    except (BiasDPOError, TypeError):
        return None


def _file_of(request: EvaluationConfig, benchmark: str, workspace: Workspace) -> Path:
    """Where a benchmark's speed is remembered: by all that it depends on. All adapters cost the same; but of which pairs it held
    out depends what `preference` scores."""
    spec = models.find(models.choose_auto()[0].id if request.model == "auto" else request.model)
    adapter = models.find_adapter(request.adapter, spec, workspace)
    backend = choose_backend(spec, request.backend)
    files = [spec.gguf_path] if backend == "llamacpp" or spec.hf_folder is None else sorted(spec.hf_folder.glob("*.safetensors"))
    source = request.dataset if benchmark == "preference" else request.data_dir
    key = {
        "format": _FORMAT,
        "benchmark": benchmark,
        "source": str(Path(source).expanduser().resolve()) if "/" in source else source,
        "pairs_of": str(adapter.folder) if benchmark == "preference" and adapter is not None else "",
        "backend": backend,
        "generation": [request.samples, request.max_new_tokens, request.toxicity_scorer],
        "model": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file is not None],
        "machine": [platform.node(), platform.machine(), len(os.sched_getaffinity(0)), models.free_gpu_memory_gb() > 0],
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return workspace.cache / "evaluation_speeds" / f"{digest[:24]}.json"
