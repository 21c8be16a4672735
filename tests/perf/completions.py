"""Whether an adapter only makes answers longer or evasive: both sides' completions of a data set's held-out prompts.

    python -m tests.perf.completions --dataset FILE [--model ID] [--adapter ID] [--limit N] [--max-new-tokens 160] [--out FILE]

Greedy, so the figures repeat. Prints one JSON object: mean tokens of each side (a completion that met the limit counts as the
limit), the share that ended by itself, the share of evasions (by the phrases of assets/evasions.txt), distinct word bigrams, and
the mean difference of tokens (tuned - base) with its 95 % bootstrap interval. --out keeps every completion, to be read. The same
prices on the prompts that come with us: `evaluate --benchmark utility_generation`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from biasdpo.benchmarks.utility import evades
from biasdpo.compare import stream_pair
from biasdpo.data import pairs, splits
from biasdpo.engines import EngineKey, open_engine
from biasdpo.evaluation import stats
from biasdpo.records import Completion, GenerationPair, Sampling
from biasdpo.workspace import open_workspace, write_json


def figures(completions: list[Completion]) -> dict[str, float]:
    texts = [completion.text for completion in completions]
    words = [re.findall(r"\w+", text.lower()) for text in texts]
    bigrams = [pair for text in words for pair in itertools.pairwise(text)]
    return {
        "mean_tokens": round(float(np.mean([completion.tokens for completion in completions])), 1),
        "ended_by_itself_share": round(float(np.mean([c.finish_reason == "end_of_text" for c in completions])), 3),
        "evasion_share": round(float(np.mean([evades(text) for text in texts])), 3),
        "distinct_bigrams": round(len(set(bigrams)) / max(len(bigrams), 1), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Length and evasions of both sides' completions.")
    parser.add_argument("--dataset", required=True, type=Path, metavar="FILE")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--adapter", default="smollm2-biasdpo")
    parser.add_argument("--limit", type=int, default=10_000)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--workspace")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    held_out = splits.split(pairs.derive(splits.load_file(args.dataset)).pairs, 0.1).held_out
    prompts = list(dict.fromkeys(pair.prompt for pair in held_out))[: args.limit]
    engine = open_engine(EngineKey(args.model, args.adapter), open_workspace(args.workspace))
    sampling = Sampling(args.max_new_tokens, temperature=0.0, repetition_penalty=1.0)
    left: list[Completion] = []
    right: list[Completion] = []
    try:
        for prompt in prompts:
            *_, pair = stream_pair(engine, prompt, sampling)
            assert isinstance(pair, GenerationPair)
            assert pair.right is not None
            left.append(pair.left)
            right.append(pair.right)
    finally:
        engine.backend.close()
    grown = np.array([b.tokens - a.tokens for a, b in zip(left, right, strict=True)], dtype=np.float64)
    difference = stats.bootstrap(grown[:, None], {"": stats.Metric()})[""]
    result: dict[str, Any] = {
        "prompts": len(prompts),
        "max_new_tokens": args.max_new_tokens,
        "base": figures(left),
        "tuned": figures(right),
        "difference_of_tokens": difference.to_json(),
    }
    print(json.dumps(result))
    if args.out:
        rows = [{"prompt": prompt, "base": a.text, "tuned": b.text} for prompt, a, b in zip(prompts, left, right, strict=True)]
        write_json(args.out, {**result, "completions": rows})


if __name__ == "__main__":
    main()
