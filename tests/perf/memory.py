"""What the second side adds to the process's memory: one copy of the weights.

    python -m tests.perf.memory

Opens the embedded model base-only and with an adapter, each in a process of its own, runs both sides once, and compares
the processes' proportional set sizes (Pss) with llama.cpp's own figures for the tuned side's KV cache and compute buffers
plus the adapter. Linux only. Prints one JSON object, MiB.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ALLOWANCE_MIB = 16.0


def measure(lora: str) -> dict[str, Any]:
    """In a process of its own: open, write a few tokens on each side, read Pss and llama.cpp's log."""
    import llama_cpp
    import psutil

    from biasdpo import models
    from biasdpo.backends import llamacpp
    from biasdpo.records import Sampling

    lines: list[str] = []
    llamacpp._log = llama_cpp.llama_log_callback(lambda _level, text, _data: lines.append(text.decode("utf-8", "replace")))
    spec = models.find("smollm2")
    assert spec.gguf_path is not None
    backend = llamacpp.open_llamacpp(spec.gguf_path, spec.template, Path(lora) if lora else None, 4096)
    for side in ("base", "tuned") if lora else ("base",):
        for _ in backend.stream("Why?", Sampling(8), side):  # type: ignore[arg-type]
            pass
    pss = psutil.Process().memory_full_info().pss / 2**20
    sizes = [
        float(size) for size in re.findall(r"(?:KV buffer|compute buffer|output buffer) size =\s*([\d.]+) MiB", "".join(lines))
    ]
    backend.close()
    return {"pss": pss, "buffers": sum(sizes), "sizes": sizes}


def main() -> None:
    from biasdpo import models
    from biasdpo.gguf import write
    from biasdpo.models import AdapterSpec
    from tests.lora_factory import write_lora

    spec = models.find("smollm2")
    assert spec.gguf_path is not None
    with tempfile.TemporaryDirectory() as folder:
        adapter = AdapterSpec("random", write_lora(Path(folder) / "random", rank=16), "smollm2")
        lora = write.lora(adapter, spec.gguf_path, Path(folder) / "lora.gguf")

        def run(argument: str) -> dict[str, Any]:
            command = [sys.executable, "-m", "tests.perf.memory", "--measure", argument]
            return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

        rounds = [(run(""), run(str(lora))) for _ in range(5)]
        adapter_mib = lora.stat().st_size / 2**20
    base, both = sorted(rounds, key=lambda pair: pair[1]["pss"] - pair[0]["pss"])[len(rounds) // 2]
    added = both["pss"] - base["pss"]
    buffers = both["buffers"] - base["buffers"]
    allowed = buffers + adapter_mib + ALLOWANCE_MIB
    print(
        json.dumps(
            {
                "base_only_pss_mib": round(base["pss"], 1),
                "both_sides_pss_mib": round(both["pss"], 1),
                "added_mib": round(added, 1),
                "tuned_buffers_mib": round(buffers, 1),
                "adapter_mib": round(adapter_mib, 1),
                "allowed_mib": round(allowed, 1),
                "added_to_allowed_ratio": round(added / allowed, 3),
                "weights_mib": round(spec.gguf_path.stat().st_size / 2**20, 1),
            }
        )
    )


if __name__ == "__main__":
    if "--measure" in sys.argv:
        print(json.dumps(measure(sys.argv[-1])))
    else:
        main()
