"""What the second side adds to the process's memory: one copy of the weights.

    python -m tests.perf.memory

Opens the embedded model base-only and with an adapter, each in a process of its own, runs both sides once, and compares
the processes' proportional set sizes (Pss) with llama.cpp's own figures for the tuned side's KV cache and compute buffers
plus the adapter. Linux only. Prints one JSON object, MiB.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.perf.measuring import in_own_process

ALLOWANCE_MIB = 16.0


def measure(gguf: Path, lora: Path | None, model_id: str, context_length: int, tokens: int) -> dict[str, Any]:
    """In a process of its own: open, write a few tokens on each side.

    Returns, in bytes, Pss before and after, and by llama.cpp's log the buffers of opening, all buffers, and what was repacked.
    """
    import llama_cpp
    import psutil

    from biasdpo import models
    from biasdpo.backends import llamacpp
    from biasdpo.records import Sampling

    lines: list[str] = []
    llamacpp._log = llama_cpp.llama_log_callback(lambda _level, text, _data: lines.append(text.decode("utf-8", "replace")))

    def sizes(named: str) -> list[float]:
        return [float(size) * 2**20 for size in re.findall(rf"(?:{named}) size =\s*([\d.]+) MiB", "".join(lines))]

    before = psutil.Process().memory_full_info().pss
    backend = llamacpp.open_llamacpp(gguf, models.catalog()[model_id].template, lora, context_length)
    buffers = "KV buffer|compute buffer|output buffer"
    opening, repacked = sizes(buffers), sizes(r"CPU_(?:REPACK|AMX)\S* model buffer")
    for side in ("base", "tuned") if lora else ("base",):
        for _ in backend.stream("Why?", Sampling(tokens), side):  # type: ignore[arg-type]
            pass
    pss = psutil.Process().memory_full_info().pss
    backend.close()
    return {"before": before, "pss": pss, "opening": opening, "buffers": sizes(buffers), "repacked": sum(repacked)}


def main() -> None:
    from biasdpo import models
    from biasdpo.gguf import write
    from tests.lora_factory import write_lora

    gguf = models.find("smollm2").gguf_path
    assert gguf is not None
    with tempfile.TemporaryDirectory() as folder:
        adapter = models.AdapterSpec("random", write_lora(Path(folder) / "random", rank=16), "smollm2")
        lora = write.lora(adapter, gguf, Path(folder) / "lora.gguf")
        rounds = [
            [in_own_process("tests.perf.memory", "--measure", gguf, file, "smollm2", 4096, 8) for file in ("none", lora)]
            for _ in range(5)
        ]
        adapter_bytes = lora.stat().st_size
    base, both = sorted(rounds, key=lambda pair: pair[1]["pss"] - pair[0]["pss"])[len(rounds) // 2]
    added, buffers = both["pss"] - base["pss"], sum(both["buffers"]) - sum(base["buffers"])
    allowed = buffers + adapter_bytes + ALLOWANCE_MIB * 2**20
    figures = {"base_only_pss": base["pss"], "both_sides_pss": both["pss"], "added": added, "tuned_buffers": buffers}
    figures |= {"adapter": adapter_bytes, "allowed": allowed, "weights": gguf.stat().st_size}
    mib = {f"{name}_mib": round(value / 2**20, 1) for name, value in figures.items()}
    print(json.dumps({**mib, "added_to_allowed_ratio": round(added / allowed, 3)}))


if __name__ == "__main__":
    if "--measure" in sys.argv:
        base_file, lora_file, name, length, count = sys.argv[-5:]
        found = measure(Path(base_file), None if lora_file == "none" else Path(lora_file), name, int(length), int(count))
        print(json.dumps(found))
    else:
        main()
