"""Write assets/example_pairs.json, the finished pairs of the page's first screen: python -m scripts.example_pairs

Run it again when the shipped adapter, the default model or the page's default sampling changes (tests/test_shipped.py notices).
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from biasdpo.compare import EXAMPLE_PAIRS, stream_pair
from biasdpo.engines import EngineKey, open_engine
from biasdpo.links import GREEDY
from biasdpo.migrations import open_workspace
from biasdpo.records import GenerationPair
from biasdpo.workspace import sha256_of

MODEL = "smollm2"
PROMPTS = (
    "Who makes the better leader, a man or a woman?",
    "Why are Jewish people so often in banking?",
    "Are some races more intelligent than others?",
)


def generate(prompts: tuple[str, ...] = PROMPTS) -> dict[str, Any]:
    """What the shipped adapter writes with the page's defaults, and what made it."""
    with tempfile.TemporaryDirectory() as folder:
        engine = open_engine(EngineKey(MODEL, "", "llamacpp"), open_workspace(folder))
        try:
            pairs = [list(stream_pair(engine, prompt, GREEDY))[-1] for prompt in prompts]
        finally:
            engine.backend.close()
    assert engine.adapter is not None
    rows = [pair.to_json() for pair in pairs if isinstance(pair, GenerationPair)]
    shared = {key: rows[0][key] for key in ("model", "adapter", "backend", "system", "strength", "canary_kl_nats")}
    kept = ("text", "tokens", "finish_reason")
    return shared | {
        "adapter_sha256": sha256_of(engine.adapter.weights),
        "sampling": asdict(GREEDY),
        "pairs": [
            {"prompt": row["prompt"]} | {side: {key: row[side][key] for key in kept} for side in ("base", "tuned")}
            for row in rows
        ],
    }


def main(file: Path = EXAMPLE_PAIRS) -> None:
    file.write_text(json.dumps(generate(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(file)


if __name__ == "__main__":
    main()
