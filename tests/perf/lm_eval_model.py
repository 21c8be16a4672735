"""lm-evaluation-harness's own `hf` model as a process that scores on demand: what `evaluate` and `lm_eval_parity` compare with.

    LM_EVAL_PYTHON tests/perf/lm_eval_model.py MODEL_FOLDER ADAPTER_FOLDER|none THREADS

Run by an interpreter that has lm_eval (it is no requirement of ours), with nothing of this project. Reads requests, one JSON
object a line, and answers each with one:

    {"side": "base"|"tuned", "batch_size": N, "pairs": [[context, continuation], …]}  -> {"seconds", "logps"}
    {"yaml": "bbq/….yaml", "docs": FILE}  -> {metric: value}

A task is what the installed lm_eval's own files say it is, but that its documents come from a JSONL file instead of the Hub.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def score(models: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    from lm_eval.api.instance import Instance

    model = models[asked["side"]]
    model.batch_size_per_gpu = asked["batch_size"]
    instances = [Instance("loglikelihood", {}, tuple(pair), i) for i, pair in enumerate(asked["pairs"])]
    started_at = time.perf_counter()
    found = model.loglikelihood(instances, disable_tqdm=True)
    return {"seconds": time.perf_counter() - started_at, "logps": [logp for logp, _ in found]}


def evaluate(models: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / asked["yaml"])
    split = config.get("test_split") or config["validation_split"]
    config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {split: asked["docs"]}}}
    config.pop("tag", None)
    models["base"].batch_size_per_gpu = 8
    found = lm_eval.simple_evaluate(models["base"], tasks=[ConfigurableTask(config=config)], bootstrap_iters=0)
    results = found["results"][config["task"]]
    return {key.split(",")[0]: value for key, value in results.items() if isinstance(value, int | float)}


def main() -> None:
    import torch
    from lm_eval.models.huggingface import HFLM

    folder, adapter, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    options = {"device": "cpu", "dtype": "float32"}
    models = {"base": HFLM(pretrained=folder, **options)}
    if adapter != "none":
        models["tuned"] = HFLM(pretrained=folder, peft=adapter, **options)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print("answer " + json.dumps((evaluate if "yaml" in asked else score)(models, asked)), flush=True)


# What talks to it


class LmEval:
    """lm-evaluation-harness's `hf` model on the CPU in float32, base and tuned. Use it as a context."""

    def __init__(self, python: str, folder: Path, adapter: Path | None, threads: int) -> None:
        command = [python, __file__, str(folder), "none" if adapter is None else str(adapter), str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        self._read("ready")

    def ask(self, **asked: Any) -> dict[str, Any]:
        """One request, as above."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._read("answer ").removeprefix("answer "))
        return answer

    def _read(self, beginning: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # lm_eval prints of its own
            if line.startswith(beginning):
                return line
        raise SystemExit(f"lm_eval's process ended (status {self._process.wait()}): is lm_eval installed for that interpreter?")

    def __enter__(self) -> LmEval:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def has_lm_eval(python: str) -> bool:
    """Whether an interpreter can import lm_eval."""
    check = "import importlib.util, sys; sys.exit(importlib.util.find_spec('lm_eval') is None)"
    try:
        return subprocess.run([python, "-c", check], check=False).returncode == 0
    except OSError:
        return False


if __name__ == "__main__":
    main()
