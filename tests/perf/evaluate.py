"""Scoring benchmarks by likelihood, base plus tuned: how fast, against what one would use otherwise.

    python -m tests.perf.evaluate [--lm-eval-python PATH] [--items 100] [--threads N] [--parts 3] [--data-dir DIR]

The same items of four benchmarks (44 % CrowS-Pairs, 44 % StereoSet, 8 % BBQ, 4 % TruthfulQA), in parts; of each part ours and the
other take turns, and a ratio is the median over the parts. Prints one JSON object:

    transformers   ours against lm-evaluation-harness's own `hf` model (float32, its defaults, the best of three batch sizes; a
                   copy of the weights a side, as its users have it), and how far the log-probabilities are apart. Skipped where
                   PATH can't import lm_eval, which is no requirement of ours: `pip install lm-eval` in an environment of its own
    llamacpp       ours against two `llama_cpp.Llama(logits_all=True)`, one with the LoRA, that evaluate one text after the other
    from_cache     seconds of an evaluation, and of the same again

Loading is in none of the times. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from biasdpo import benchmarks, models
from biasdpo.backends import open_backend
from biasdpo.backends.base import Backend, log_softmax
from biasdpo.backends.hf_loading import hf_copy
from biasdpo.engines import Engine
from biasdpo.evaluation import run
from biasdpo.evaluation.run import AnswerCache, score_items
from biasdpo.gguf import write
from biasdpo.migrations import open_workspace
from biasdpo.records import ContinuationRequest, Side
from biasdpo.workspace import Workspace
from tests.bare import bare_llama
from tests.perf.lm_eval_model import LmEval, has_lm_eval
from tests.perf.measuring import options

SHARES = {"crows_pairs": 0.44, "stereoset": 0.44, "bbq": 0.08, "truthfulqa": 0.04}
SIDES: tuple[Side, Side] = ("base", "tuned")
BATCH_SIZES = (1, 8, 32)

Logps = dict[Side, list[float]]
Part = dict[str, list[int]]
"""Indices of items by benchmark."""


def parts_of(known: dict[str, Any], items: int, count: int) -> list[Part]:
    drawn = {name: run.draw(len(known[name].items), round(items * share), 0) for name, share in SHARES.items()}
    return [{name: indices[i::count] for name, indices in drawn.items()} for i in range(count)]


def pairs_of(known: dict[str, Any], part: Part) -> list[tuple[str, str]]:
    requests = [r for name, indices in part.items() for i in indices for r in known[name].requests(known[name].items[i])]
    assert all(isinstance(request, ContinuationRequest) for request in requests)
    return [(request.context, request.continuation) for request in requests]


def ours(backend: Backend, known: dict[str, Any], part: Part) -> tuple[float, Logps]:
    """(seconds, what was found)."""
    sides = {side: AnswerCache(side) for side in SIDES}
    started_at = time.perf_counter()
    for name, indices in part.items():
        assert not score_items(backend, sides, known[name], indices).failures
    seconds = time.perf_counter() - started_at
    requests = [ContinuationRequest(*pair) for pair in pairs_of(known, part)]
    return seconds, {side: [found.logp for found in scores.get(requests)] for side, scores in sides.items()}


def compared(mine: list[tuple[float, Logps]], other: list[tuple[float, Logps]], parts: list[Part]) -> dict[str, Any]:
    sizes = [sum(map(len, part.values())) for part in parts]
    ratios = [theirs[0] / own[0] for own, theirs in zip(mine, other, strict=True)]
    apart = [
        np.abs(np.subtract(own[1][side], theirs[1][side])).max()
        for own, theirs in zip(mine, other, strict=True)
        for side in SIDES
    ]
    return {
        "items": sum(sizes),
        "ours_items_per_second": round(statistics.median(n / s for n, (s, _) in zip(sizes, mine, strict=True)), 3),
        "other_items_per_second": round(statistics.median(n / s for n, (s, _) in zip(sizes, other, strict=True)), 3),
        "speed_ratio": round(statistics.median(ratios), 2),
        "speed_ratios": [round(ratio, 2) for ratio in ratios],
        "largest_difference_nats": float(f"{max(apart):.2g}"),
    }


def in_turn(
    parts: list[Part], mine: Callable[[Part], tuple[float, Logps]], other: Callable[[Part], tuple[float, Logps]]
) -> dict[str, Any]:
    """Each part by both, who goes first changing."""
    found: dict[int, list[tuple[float, Logps]]] = {0: [], 1: []}
    for number, part in enumerate(parts):
        for who in (0, 1) if number % 2 == 0 else (1, 0):
            found[who].append((mine, other)[who](part))
    return compared(found[0], found[1], parts)


def against_lm_eval(
    python: str, backend: Backend, known: dict[str, Any], parts: list[Part], folder: Path, adapter: Path, threads: int
) -> dict[str, Any]:
    with LmEval(python, folder, adapter, threads) as lm_eval:
        probe = pairs_of(known, {name: indices[:2] for name, indices in parts[0].items()})
        seconds = {size: lm_eval.ask(side="base", batch_size=size, pairs=probe)["seconds"] for size in BATCH_SIZES}
        best = min(seconds, key=lambda size: seconds[size])

        def theirs(part: Part) -> tuple[float, Logps]:
            found = {side: lm_eval.ask(side=side, batch_size=best, pairs=pairs_of(known, part)) for side in SIDES}
            return sum(answer["seconds"] for answer in found.values()), {side: a["logps"] for side, a in found.items()}

        return {"lm_eval_batch_size": best, **in_turn(parts, lambda part: ours(backend, known, part), theirs)}


def against_bare_llama(
    backend: Backend, known: dict[str, Any], parts: list[Part], gguf: Path, lora: Path, threads: int
) -> dict[str, Any]:
    options = {"threads": threads, "context_length": 512, "logits_all": True}
    with bare_llama(gguf, **options) as base, bare_llama(gguf, lora, **options) as tuned:

        def logps(llama: Any, part: Part) -> Iterator[float]:
            for context, continuation in pairs_of(known, part):
                given = llama.tokenize(context.encode(), add_bos=False) or [llama.token_bos()]
                tokens = llama.tokenize((context + continuation).encode(), add_bos=False)
                tokens = tokens if context else given + tokens
                llama.reset()
                llama.eval(tokens)
                rows = log_softmax(llama.scores[len(given) - 1 : len(tokens) - 1])
                yield float(rows[np.arange(len(rows)), tokens[len(given) :]].sum())

        def theirs(part: Part) -> tuple[float, Logps]:
            started_at = time.perf_counter()
            found: Logps = {"base": list(logps(base, part)), "tuned": list(logps(tuned, part))}
            return time.perf_counter() - started_at, found

        return in_turn(parts, lambda part: ours(backend, known, part), theirs)


def from_cache(engine: Engine, benchmark: Any, workspace: Workspace) -> dict[str, float]:
    seconds = []
    for _ in range(2):
        started_at = time.perf_counter()
        run.run(engine, [benchmark], limit=24, workspace=workspace)
        seconds.append(round(time.perf_counter() - started_at, 2))
    return {"seconds": seconds[0], "seconds_again": seconds[1]}


def main() -> None:
    threads, data_dir = psutil.cpu_count(logical=False) or 1, Path("../shared/benchmarks")
    args = options(__doc__, lm_eval_python="", items=100, parts=3, threads=threads, data_dir=data_dir)
    import torch

    torch.set_num_threads(args.threads)
    known: dict[str, Any] = {name: benchmarks.build(name, args.data_dir) for name in SHARES}
    parts = parts_of(known, args.items, args.parts)
    result: dict[str, Any] = {"model": "smollm2", "threads": args.threads}
    with tempfile.TemporaryDirectory() as place:
        workspace = open_workspace(place)
        spec = models.find("smollm2")
        adapter = models.find_adapter("", spec, workspace)
        assert adapter is not None
        assert spec.gguf_path is not None
        if has_lm_eval(args.lm_eval_python):
            backend = open_backend(spec, adapter, name="transformers", workspace=workspace)
            folder = hf_copy(spec, workspace)
            result["transformers"] = against_lm_eval(
                args.lm_eval_python, backend, known, parts, folder, adapter.folder, args.threads
            )
            backend.close()
        else:
            result["transformers"] = "skipped: name with --lm-eval-python an interpreter that has lm_eval"
        backend = open_backend(spec, adapter, name="llamacpp", workspace=workspace)
        backend.threads = args.threads  # type: ignore[attr-defined]
        lora = write.cached_lora(adapter, spec.gguf_path, workspace)
        result["llamacpp"] = against_bare_llama(backend, known, parts, spec.gguf_path, lora, args.threads)
        result["from_cache"] = from_cache(Engine(spec, adapter, backend), known["crows_pairs"], workspace)
        backend.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
