"""benchmark x model -> result: both sides on the same items, intervals, paired differences, and what produced them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from biasdpo import __version__, models
from biasdpo.benchmarks.base import Benchmark
from biasdpo.benchmarks.results import Scored, correct, summarise
from biasdpo.engines import Engine
from biasdpo.errors import DatasetError
from biasdpo.records import Side, check_strength
from biasdpo.scores import Scores, open_scores, sha256_of_model
from biasdpo.scoring import score_items
from biasdpo.workspace import Workspace

_PACKAGES = {"llamacpp": ("llama-cpp-python",), "transformers": ("torch", "transformers", "peft")}  # by the backend's name


def run(
    engine: Engine,
    benchmarks: Sequence[Benchmark],
    *,
    strength: float = 1.0,
    limit: int | None = None,
    seed: int = 0,
    workspace: Workspace | None = None,
    on_item: Callable[[str, int, int], None] = lambda _name, _done, _total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Score the sides of an engine on each benchmark; return DESIGN's evaluation object. Without an adapter base stands alone.

    limit         items of each benchmark, drawn by `seed`; a larger limit's items hold a smaller one's
    seed          of the draw and of the bootstrap
    workspace     where likelihoods are kept; None: nowhere
    on_item       called with (benchmark, items done, items in all)
    should_stop   asked between items: what was scored until then is the result, marked as not comparable
    """
    check_strength(strength)
    parents = _parents(engine, workspace)
    sides = _open_sides(engine, strength, parents, workspace)
    results: dict[str, dict[str, Any]] = {}
    for benchmark in benchmarks:
        if not should_stop():
            results[benchmark.name] = _run_one(engine, sides, benchmark, strength, limit, seed, on_item, should_stop)
    correct(results)
    return {
        "benchmarks": results,
        "provenance": {
            **parents,
            "model": engine.spec.id,
            "adapter": "" if engine.adapter is None else engine.adapter.id,
            "backend": engine.backend.name,
            "strength": strength,
            "seed": seed,
            "limit": limit,
            "interrupted": should_stop(),
            "code_version": __version__,
        },
    }


def _run_one(
    engine: Engine,
    sides: dict[Side, Scores],
    benchmark: Benchmark,
    strength: float,
    limit: int | None,
    seed: int,
    on_item: Callable[[str, int, int], None],
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    chosen = draw(len(benchmark.items), limit, seed)
    if not chosen:
        raise DatasetError(f"{benchmark.name} has no items to score (limit {limit}): raise --limit or give more data")
    scored = score_items(
        engine.backend,
        sides,
        benchmark,
        chosen,
        strength=strength,
        on_done=lambda done: on_item(benchmark.name, done, len(chosen)),
        should_stop=should_stop,
    )
    kept, numbers, failures, done = scored.kept, scored.numbers, scored.failures, scored.done
    if not kept:
        first = f": the first failed with: {failures[0]['reason']}" if failures else ""
        raise DatasetError(f"{benchmark.name}: none of {done} items could be scored{first or ', since it was stopped at once'}")
    arrays = {side: np.array(values, dtype=np.float64) for side, values in numbers.items()}
    items = [benchmark.items[index] for index in kept]
    return {
        "n": len(kept),
        "n_failed": len(failures),
        "n_total": len(benchmark.items),
        "partial": done < len(benchmark.items),
        "not_comparable": _why_partial(done, len(benchmark.items), len(chosen)),
        "data_sha256": benchmark.data_sha256,
        **summarise(Scored(benchmark, items, arrays["base"], arrays.get("tuned")), seed),
        "failures": failures,
        "columns": list(benchmark.columns),
        "items": [
            {"index": index, **benchmark.describe(item), **{side: list(numbers[side][i]) for side in sides}}
            for i, (index, item) in enumerate(zip(kept, items, strict=True))
        ],
    }


def draw(n: int, limit: int | None, seed: int) -> list[int]:
    """Indices of at most `limit` of n items in ascending order, drawn without regard to their order in the file."""
    if limit is None or limit >= n:
        return list(range(n))
    shuffled = list(range(n))
    random.Random(seed).shuffle(shuffled)
    return sorted(shuffled[:limit])


def _why_partial(done: int, total: int, chosen: int) -> str:
    """Why a result must not be set beside others; "" where it may."""
    if done < chosen:
        return f"interrupted after {done:,} of {chosen:,} items"
    return f"limited to {done:,} of {total:,} items" if done < total else ""


def _open_sides(engine: Engine, strength: float, parents: dict[str, str], workspace: Workspace | None) -> dict[Side, Scores]:
    backend = engine.backend
    packages = next((names for name, names in _PACKAGES.items() if backend.name.startswith(name)), ())
    scorer = {
        "backend": backend.name,
        "device": backend.device.split(",")[0].split(" ")[0],  # "CPU", "cuda:0": the number of threads changes nothing
        "packages": {name: metadata.version(name) for name in packages},
        "model_sha256": parents["model_sha256"],
        "template": asdict(backend.template),
    }
    sides: dict[Side, Scores] = {"base": open_scores(workspace, {**scorer, "side": "base"})}
    if engine.adapter is not None:
        tuned = {"side": "tuned", "adapter_sha256": parents["adapter_sha256"], "strength": strength}
        sides["tuned"] = open_scores(workspace, {**scorer, **tuned})
    return sides


def _parents(engine: Engine, workspace: Workspace | None) -> dict[str, str]:
    """SHA-256 of the model's files and of the adapter's weights and configuration."""
    spec, adapter = engine.spec, engine.adapter
    files: list[Path] = []
    if engine.backend.name.startswith("llamacpp") or spec.hf_folder is None:
        files = [] if spec.gguf_path is None else [spec.gguf_path]
    else:
        files = sorted([*spec.hf_folder.glob("*.safetensors"), *spec.hf_folder.glob("*.json")])
    parents = {"model_sha256": sha256_of_model(files, workspace), "adapter_sha256": "", "adapter_config_sha256": ""}
    if adapter is not None:
        parents["adapter_sha256"] = models.adapter_sha256(adapter)
        parents["adapter_config_sha256"] = sha256_of_model([adapter.folder / "adapter_config.json"], None)
    return parents
