"""benchmark x model -> result: both sides on the same items, intervals, paired differences, and what produced them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from biasdpo import __version__, models
from biasdpo.benchmarks.base import Benchmark, GenerationBenchmark, Measured
from biasdpo.benchmarks.results import Scored, correct, summarise
from biasdpo.completions import Completions, open_completions
from biasdpo.engines import Engine
from biasdpo.errors import DatasetError
from biasdpo.generating import complete_items, requests_of
from biasdpo.records import Side, check_strength
from biasdpo.scores import open_scores, sha256_of_model
from biasdpo.scoring import ItemScores, score_items
from biasdpo.workspace import Workspace

_PACKAGES = {"llamacpp": ("llama-cpp-python",), "transformers": ("torch", "transformers", "peft")}  # by the backend's name


def run(
    engine: Engine,
    benchmarks: Sequence[Benchmark | GenerationBenchmark],
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
    seed          of the draw, of what is generated, and of the bootstrap
    workspace     where likelihoods and completions are kept; None: nowhere
    on_item       called with (benchmark, items done, items in all)
    should_stop   asked between items, and while a completion is written: what was scored until then is the result, marked as not
                  comparable
    """
    check_strength(strength)
    parents = _parents(engine, workspace)
    sides = _who_scores(engine, strength, parents)
    scores = {side: open_scores(workspace, who) for side, who in sides.items()}
    completions = {side: open_completions(workspace, side, who) for side, who in sides.items()}
    results: dict[str, dict[str, Any]] = {}
    interrupted = False
    for benchmark in benchmarks:
        interrupted = interrupted or should_stop()
        if interrupted:
            break
        chosen = draw(len(benchmark.items), limit, seed)
        if not chosen:
            raise DatasetError(f"{benchmark.name} has no items to score (limit {limit}): raise --limit or give more data")
        report = partial(_report, on_item, benchmark.name, len(chosen))
        options: dict[str, Any] = {"strength": strength, "on_done": report, "should_stop": should_stop}
        if isinstance(benchmark, GenerationBenchmark):
            scored = complete_items(engine.backend, completions, benchmark, chosen, seed=seed, **options)
            written = _written(benchmark, scored.kept, completions, seed)
        else:
            scored = score_items(engine.backend, scores, benchmark, chosen, **options)
            written = {}
        interrupted = scored.done < len(chosen)
        if scored.done:  # else it was stopped at once; what was scored before is kept
            results[benchmark.name] = _result(benchmark, len(chosen), scored, written, seed)
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
            "interrupted": interrupted,
            "code_version": __version__,
        },
    }


def _report(on_item: Callable[[str, int, int], None], name: str, total: int, done: int) -> None:
    on_item(name, done, total)


_Texts = dict[Side, list[list[str]]]
"""What each side wrote, by item."""


def _written(benchmark: GenerationBenchmark, kept: Sequence[int], completions: Mapping[Side, Completions], seed: int) -> _Texts:
    requests = [requests_of(benchmark, benchmark.items[index], seed) for index in kept]
    return {side: [[found.text for found in known.of(asked)] for asked in requests] for side, known in completions.items()}


def _result(
    benchmark: Benchmark | GenerationBenchmark, chosen: int, scored: ItemScores, written: _Texts, seed: int
) -> dict[str, Any]:
    """One benchmark's part of the result, of which `chosen` items were to be scored."""
    kept, numbers, failures, done = scored.kept, scored.numbers, scored.failures, scored.done
    if not kept:
        first = failures[0]["reason"]  # something was tried
        raise DatasetError(f"{benchmark.name}: none of {done} items could be scored: the first failed with: {first}")
    arrays = {side: np.array(values, dtype=np.float64) for side, values in numbers.items()}
    items = [benchmark.items[index] for index in kept]
    return {
        "n": len(kept),
        "n_failed": len(failures),
        "n_total": len(benchmark.items),
        "partial": done < len(benchmark.items),
        "not_comparable": _why_partial(done, len(benchmark.items), chosen),
        "not_as_published": benchmark.not_as_published if isinstance(benchmark, GenerationBenchmark) else "",
        "settings": dict(benchmark.settings) if isinstance(benchmark, GenerationBenchmark) else {},
        "data_sha256": benchmark.data_sha256,
        **summarise(Scored(benchmark, items, arrays["base"], arrays.get("tuned")), seed),
        "failures": failures,
        "columns": list(benchmark.columns),
        "items": [
            {
                "index": index,
                **benchmark.describe(item),
                **{side: list(values[i]) for side, values in numbers.items()},
                **_outcomes(benchmark, item, {side: values[i] for side, values in numbers.items()}),
                **({"completions": {side: texts[i] for side, texts in written.items()}} if written else {}),
            }
            for i, (index, item) in enumerate(zip(kept, items, strict=True))
        ],
    }


def _outcomes(benchmark: Measured, item: Any, numbers: Mapping[Side, Sequence[float]]) -> dict[str, dict[Side, str]]:
    """What each side decided of an item, where anything is decided."""
    outcomes = {side: benchmark.outcome(item, of_side) for side, of_side in numbers.items()}
    return {"outcome": outcomes} if any(outcomes.values()) else {}


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


def _who_scores(engine: Engine, strength: float, parents: Mapping[str, str]) -> dict[Side, dict[str, Any]]:
    """Of each side, all that a likelihood or a completion depends on but its request."""
    backend = engine.backend
    packages = next((names for name, names in _PACKAGES.items() if backend.name.startswith(name)), ())
    scorer = {
        "backend": backend.name,
        "device": backend.device.split(",")[0].split(" ")[0],  # "CPU", "cuda:0": the number of threads changes nothing
        "packages": {name: metadata.version(name) for name in packages},
        "model_sha256": parents["model_sha256"],
        "template": asdict(backend.template),
    }
    sides: dict[Side, dict[str, Any]] = {"base": {**scorer, "side": "base"}}
    if engine.adapter is not None:
        sides["tuned"] = {**scorer, "side": "tuned", "adapter_sha256": parents["adapter_sha256"], "strength": strength}
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
