"""A small workspace as version 0.1 left it, written by hand; as a script, upgrades that are killed between file operations.

    python -m tests.old_workspace SOURCE FOLDER

copies SOURCE to FOLDER, upgrades it in a process that is killed before its n-th file operation, upgrades it again, and compares
the result with that of an upgrade that was not killed; for n = 1, 2, ... until nothing is left to kill. Prints the largest n.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from biasdpo.migrations import open_workspace
from tests.lora_factory import write_lora

DEAD = {"pid": 2**31 - 2, "pid_created": 1.0}
AT = "2026-11-30T09:22:51+00:00"
TEXTS = [(f"Is a{i} more b{i} than c{i}?", f"Neither of the {i}.", f"They are worse {i}!") for i in range(40)]
PAIRS = [{"category": "gender", "prompt": p, "chosen": c, "rejected": r} for p, c, r in TEXTS]
SHA256 = "c" * 64  # of the data, where nothing reads it


def write_workspace(root: Path, model: str = "smollm2") -> Path:
    """Two runs, four evaluations, exports of all kinds, judgments; `model`: what the runs train."""
    root.mkdir(parents=True)
    rows = [{"id": f"j{i}", "created_at": AT, "verdict": "preferred", **pair} for i, pair in enumerate(PAIRS[:3])]
    rows.append({"id": "j3", "created_at": AT, "verdict": "retracted", "retracts": "j0", **PAIRS[0]})
    write(root / "preferences.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for run_id, state in (("done", "finished"), ("halted", "stopped")):
        write_run(root / "runs" / run_id, state, model)
    write(root / "runs" / "halted" / "stop", "")
    write(root / "runs" / "done" / "note.txt", "the good one")
    write_lora(root / "runs" / "done" / "adapter", layers=1, rank=1, base_model="smollm2")
    provenance = {"model": model, "run_id": "done", "dataset_sha256": SHA256, "config": {"held_out_share": 0.2}}
    write(root / "runs" / "done" / "adapter" / "provenance.json", provenance)
    write_evaluation(root, "crows-1", "finished", has_result=True)
    write_evaluation(root, "crows-2", "cancelled", has_result=True, model=str(root / "exports" / "smol.gguf"))
    write(root / "evaluations" / "crows-2.stop", "")
    write_evaluation(root, "crows-3", "failed", error="No data: get it")
    write_evaluation(root, "crows-4", "running")
    write(root / "evaluations" / "by-hand.json", result())
    write_export(root / "exports", "smol.gguf")
    write_export(root / "exports", "lost.gguf")
    (root / "exports" / "lost.gguf").unlink()
    write(root / "exports" / "foreign.gguf", "GGUF")
    write_unfinished(root / "exports" / ".export-typed.gguf", is_job=False)
    write_export(root / "runs" / "done" / "export", "smol.gguf")
    write_unfinished(root / "runs" / "done" / "export" / ".export-big.gguf", is_job=True)
    for litter in ("runs/.queue-cpu", "runs/.lock-cpu", "evaluations/.changing.lock"):
        write(root / litter, "")
    return root


def write(path: Path, content: Any) -> None:
    """A text, or a JSON file of another value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_run(folder: Path, state: str, model: str, **status: Any) -> None:
    config = {"model": model, "datasets": ["/gone/pairs.jsonl"], "held_out_share": 0.2, "max_steps": 2, "batch_size": 2}
    write(folder / "config.json", config | {"rank": 2, "save_steps": 1, "gradient_accumulation": 1, "threads": 1})
    rows = {"read": 40, "pairs": 40, "repeats": 0, "contradictions": 0, "bridging": 0, "per_epoch": 32}
    snapshot = "".join(json.dumps(pair, sort_keys=True) + "\n" for pair in PAIRS)
    sha256 = hashlib.sha256(snapshot.encode()).hexdigest()
    origin = {"dataset_sha256": sha256, "dataset_files": ["pairs.jsonl"], "dataset_rows": rows, "probe_prompts": []}
    origin |= {"command": "the page", "code_version": "0.1.0 (56e7a1a)", "started_at": AT}
    write(folder / "origin.json", origin)
    write(folder / "status.json", {"state": state, **DEAD, "step": 2, "total_steps": 2, "notes": ["40 pairs"], **status})
    write(folder / "dataset.jsonl", snapshot)
    write(folder / "train.log", "=== start: 2026-11-30T09:22:51Z\npython -m training\n")
    write(folder / "metrics.jsonl", '{"step": 1, "loss": 0.69}\n')


def write_evaluation(root: Path, name: str, state: str, *, has_result: bool = False, model: str = "smollm2", **more: Any) -> None:
    stem = root / "evaluations" / name
    request = {"model": model, "adapter": "smollm2-biasdpo", "backend": "auto", "benchmarks": ["crows_pairs"], "limit": 12}
    request |= {"seed": 0, "strengths": [1.0], "data_dir": "", "dataset": "", "samples": None, "max_new_tokens": None}
    write(Path(f"{stem}.request.json"), request | {"toxicity_scorer": ""})
    progress = [{"name": "crows_pairs", "done": 3, "total": 12}]
    status = {"state": state, **DEAD, "device": "cpu", "queued": 5.0, "progress": progress, "seconds_left": None, "error": ""}
    write(Path(f"{stem}.status.json"), status | {"expected": {}, "started_at": AT, **more})
    write(Path(f"{stem}.log"), "scoring\n")
    if has_result:
        write(Path(f"{stem}.json"), result(interrupted=state == "cancelled"))


def result(*, interrupted: bool = False) -> dict[str, Any]:
    provenance = {"model": "smollm2", "adapter": "smollm2-biasdpo", "strength": 1.0, "backend": "llamacpp", "seed": 0}
    return {"benchmarks": {}, "provenance": provenance | {"interrupted": interrupted, "code_version": "0.1.0"}}


def write_export(folder: Path, name: str) -> None:
    request = {"out": f"/gone/{name}", "format": "merged", "run": "", "adapter": "smollm2-biasdpo", "model": "smollm2"}
    record = {"out": name, "format": "merged", "quantization": "Q8_0", "model": "smollm2", "model_title": "SmolLM2", "bytes": 4}
    record |= {"adapter": "smollm2-biasdpo", "sha256": SHA256, "created_at": AT, "code_version": "0.1.0", "command": "export"}
    write(folder / f"{name}.json", record | {"request": request | {"quantization": "Q8_0", "source": "auto", "pairs": 4}})
    write(folder / f"{name}.Modelfile", f"FROM ./{name}\n")
    write(folder / name, "GGUF")


def write_unfinished(folder: Path, *, is_job: bool, **status: Any) -> None:
    name = folder.name.removeprefix(".export-")
    request = {"out": f"/gone/{name}", "format": "merged", "run": "done", "adapter": "", "model": "", "quantization": "Q8_0"}
    write(folder / "status.json", {"state": "running", **DEAD, "is_job": is_job, "started_at": AT, "request": request, **status})
    write(folder / "export.log", "writing\n")
    write(folder / name, "half of a GGUF")


def tree(root: Path) -> dict[str, bytes | None]:
    """The content of each file, None of a folder; without locks."""
    paths = [path for path in root.rglob("*") if path.parts[len(root.parts)] != ".jobs"]
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in paths}


def kill_before(operation: int, root: Path) -> None:
    """Have this process killed before its n-th operation that changes a file below `root`."""
    left = operation

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if not any(str(argument).startswith(str(root)) for argument in arguments):
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main(source: Path, root: Path) -> None:
    from biasdpo import migrations  # noqa: F401 (imported before the forks)
    from biasdpo.data import splits  # noqa: F401

    expected = None
    for operation in range(10**6):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(source, root)
        if child := os.fork():
            status = os.waitpid(child, 0)[1]
        else:
            kill_before(operation, root)
            open_workspace(root)
            os._exit(0)
        open_workspace(root)
        expected = expected or tree(root)  # the first is never killed
        assert tree(root) == expected, f"killed before operation {operation}: {set(tree(root).items()) ^ set(expected.items())}"
        if operation and status == 0:
            print(operation)
            return
        assert status == (signal.SIGKILL if operation else 0)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
