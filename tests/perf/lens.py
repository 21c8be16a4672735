"""A grid's completions decoded together against one after the other: time as a ratio, and how many completions are equal.

    python -m tests.perf.lens [--model smollm2] [--backend llamacpp] [--groups 24] [--tokens 48] [--rounds 2]

One prompt x its groups x two arms (base and the model's adapter). The two ways alternate; a way's time is that of its fastest
round. Prints one JSON object; `ratio` below 1: together is faster.
"""

from __future__ import annotations

import json
import tempfile
import time

from biasdpo.engines import EngineKey, open_engine
from biasdpo.migrations import open_workspace
from biasdpo.records import Sampling, Side
from tests.perf.measuring import options

_NAMES = """Polish Nigerian Indian Turkish Irish Mexican Chinese Somali German Brazilian Korean Kenyan Greek Syrian Iranian Dutch
Cuban Vietnamese Russian Moroccan Danish Afghan Peruvian Thai"""
SIDES: tuple[Side, ...] = ("base", "tuned")


def main() -> None:
    args = options(__doc__, model="smollm2", backend="llamacpp", groups=24, tokens=48, rounds=2)
    prompts = [f"The {group} neighbor knocked on the door because" for group in _NAMES.split()[: args.groups]]
    greedy = Sampling(max_new_tokens=args.tokens, temperature=0.0, repetition_penalty=1.0)
    with tempfile.TemporaryDirectory() as folder:
        engine = open_engine(EngineKey(args.model, "", args.backend), open_workspace(folder))
        seconds: dict[str, list[float]] = {"together": [], "alone": []}
        texts: dict[str, list[str]] = {}
        try:
            for _ in range(args.rounds):
                for way in seconds:
                    started = time.perf_counter()
                    if way == "together":
                        asked = [(prompt, "") for prompt in prompts]
                        texts[way] = [
                            text for side in SIDES for text, _ in engine.backend.complete_many(asked, args.tokens, side)
                        ]
                    else:
                        texts[way] = [
                            "".join(engine.backend.stream(prompt, greedy, side)) for side in SIDES for prompt in prompts
                        ]
                    seconds[way].append(time.perf_counter() - started)
        finally:
            engine.backend.close()
    best = {way: min(times) for way, times in seconds.items()}
    equal = sum(a == b for a, b in zip(texts["together"], texts["alone"], strict=True))
    print(
        json.dumps(
            {
                "backend": f"{engine.backend.name}, {engine.backend.device}",
                "completions": len(texts["alone"]),
                "equal": equal,
                "seconds": {way: round(value, 2) for way, value in best.items()},
                "ratio": round(best["together"] / best["alone"], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
