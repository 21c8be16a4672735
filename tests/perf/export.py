"""Phi-2's full size through the export, and base + tuned side by side from what it wrote.

    python -m tests.perf.export [--folder DIR] [--quantization Q4_K_M] [--threads 2] [--tokens 24] [--repetitions 3]

Random weights under Phi-2's exact config (2.78 B parameters, bf16, two shards; the tokenizer is laid out like Phi-2's); about
14 GB of disk in DIR. Linux only. Prints one JSON object:

 export   the adapter-less export in a process of its own: its peak of anonymous memory (/proc/PID/smaps_rollup, "Anonymous", ten
          times a second: mapped files are not in it), seconds, and seconds for each GB of the folder; and what lies in the target
          folder after a SIGKILL while it writes and while it quantizes (nothing under the final name)
 memory   of a process that opens the file with a random adapter and writes on both sides: what it added to the process's Pss,
          against 1.05 of the file, plus llama.cpp's own figures for both sides' KV caches and buffers, plus the adapter
 speed    tokens/s of both sides together against two bare `llama_cpp.Llama`s in turn, the faster of 1 and 2 threads each;
          medians of alternating rounds
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from biasdpo.gguf import write
from biasdpo.models import AdapterSpec, ModelSpec, catalog
from tests.lora_factory import write_lora
from tests.perf.measuring import in_own_process, options, rounded
from tests.phi_like import ROWS, save_tokenizer

PHI_2 = {
    "architectures": ["PhiForCausalLM"],
    "model_type": "phi",
    "vocab_size": ROWS,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-05,
    "partial_rotary_factor": 0.4,
    "rope_theta": 10000.0,
    "qk_layernorm": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # config.json of microsoft/phi-2, as far as it says what is computed
CONTEXT_LENGTH = 2048
RANK = 16


def shapes(layers: int = 32) -> dict[str, tuple[int, ...]]:
    """Phi-2's tensors, as its safetensors hold them."""
    import torch
    from transformers import PhiConfig, PhiForCausalLM

    with torch.device("meta"):
        model = PhiForCausalLM(PhiConfig.from_dict({**PHI_2, "num_hidden_layers": layers}))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def save_phi_2(folder: Path, layers: int = 32) -> None:
    """Write the random model, tensor by tensor: normal of standard deviation 0.02, norms near one."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    names = list(shapes(layers).items())
    middle = len(names) // 2
    index: dict[str, str] = {}
    for number, part in enumerate((names[:middle], names[middle:]), start=1):
        file = folder / f"model-{number:05}-of-00002.safetensors"
        header, offset = {}, 0
        for name, shape in part:
            size = 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
            index[name] = file.name
            offset += size
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        with file.open("wb") as stream:
            stream.write(len(encoded).to_bytes(8, "little") + encoded)
            for name, shape in part:
                values = 0.02 * rng.standard_normal(shape, dtype=np.float32) + (name.endswith("layernorm.weight"))
                stream.write((values.astype("<f4", copy=False).view("<u4") >> 16).astype("<u2").tobytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    end = save_tokenizer(folder)
    ids = {f"{name}_token_id": end for name in ("bos", "eos", "pad")}
    (folder / "config.json").write_text(json.dumps({**PHI_2, **ids, "num_hidden_layers": layers}))


def spec_of(folder: Path | None, gguf: Path | None) -> ModelSpec:
    known = {"id": "phi-2-random", "title": "random Phi-2", "hub_id": "", "context_length": CONTEXT_LENGTH}
    return replace(catalog()["phi-2"], **known, hf_folder=folder, gguf_path=gguf)  # type: ignore[arg-type]


# Export


def export_here(folder: Path, out: Path, quantization: str, threads: int) -> dict[str, Any]:
    return asdict(write.merged(spec_of(folder, None), None, quantization, out, threads=threads))


@contextmanager
def exporting(folder: Path, out: Path, args: argparse.Namespace) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.perf.export", "--here", str(folder), str(out), args.quantization, str(args.threads)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def anonymous_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * int(re.findall(r"^Anonymous:\s+(\d+) kB", text, re.MULTILINE)[0])


def measure_export(folder: Path, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    gigabytes = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9
    peak, started = 0, time.monotonic()
    with exporting(folder, out, args) as process:
        while process.poll() is None:
            try:
                peak = max(peak, anonymous_bytes(process.pid))
            except (OSError, IndexError):  # it has just ended
                break
            time.sleep(0.1)
        written = json.loads(process.communicate()[0])
    seconds = time.monotonic() - started
    return {
        "peak_anonymous_gb": round(peak / 1e9, 3),
        "seconds": round(seconds, 1),
        "folder_gb": round(gigabytes, 2),
        "seconds_per_gb": round(seconds / gigabytes, 1),
        "file_gb": round(out.stat().st_size / 1e9, 3),
        "fallbacks": written["fallbacks"],
    }


def left_by_a_kill(folder: Path, out: Path, args: argparse.Namespace, begun: Callable[[Path], bool]) -> list[str]:
    """What lies in the target's folder after a SIGKILL as soon as `begun`; names."""
    with exporting(folder, out, args) as process:
        while process.poll() is None and not begun(out.parent):
            time.sleep(0.05)
        assert process.poll() is None, "the export ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = sorted(out.parent.iterdir())
    for path in left:  # gigabytes
        path.unlink()
    return [path.name for path in left]


def sizes(folder: Path) -> list[int]:
    """Of the temporary files: the one that is quantized, and what it is quantized to."""
    return [0, 0, *sorted(file.stat().st_size for file in folder.iterdir())]


# Side by side


def measure_speed(gguf: Path, lora: Path, args: argparse.Namespace) -> dict[str, Any]:
    from tests.perf import compare

    measured = compare.race(spec_of(None, gguf), gguf, lora, CONTEXT_LENGTH, args.tokens, args.repetitions)
    speeds = compare.medians(measured, "tokens_per_second")
    fastest = max(compare.BARE, key=speeds.__getitem__)
    ratio = round(speeds["ours"] / speeds[fastest], 3)
    return {"tokens_per_second": rounded(speeds, 2), "fastest_bare": fastest, "ratio": ratio}


def main() -> None:
    args = options(__doc__, folder=Path, quantization="Q4_K_M", threads=2, tokens=24, repetitions=3)
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        root = Path(temporary)
        folder, out = root / "phi-2", root / "export" / "phi-2.gguf"
        save_phi_2(folder)
        out.parent.mkdir()
        killed = {
            "writing": left_by_a_kill(folder, out, args, lambda where: sizes(where)[-1] > 5e8),
            "quantizing": left_by_a_kill(folder, out, args, lambda where: sizes(where)[-2] > 1e8),
        }
        export = measure_export(folder, out, args)
        export["left_after"] = sorted(file.name for file in out.parent.iterdir())
        adapter = write_phi_lora(root / "adapter")
        lora = write.lora(AdapterSpec("random", adapter, ""), out, root / "lora.gguf")
        memory = in_own_process("tests.perf.memory", "--measure", out, lora, "phi-2", CONTEXT_LENGTH, 4)
        added = memory["pss"] - memory["before"]
        # Output, KV and compute buffers of the base side; the tuned side's are the same, the canary's are gone again.
        buffers = 2 * sum(memory["opening"][:3])
        allowed = 1.05 * out.stat().st_size + buffers + lora.stat().st_size
        speed = measure_speed(out, lora, args)
    gigabytes = {"added_gb": added, "allowed_gb": allowed, "buffers_gb": buffers, "repacked_gb": memory["repacked"]}
    result: dict[str, Any] = {"quantization": args.quantization, "threads": args.threads}
    result |= {"parameters": sum(int(np.prod(shape)) for shape in shapes().values())}
    result |= {"export": {**export, "left_by_a_kill_while": killed}}
    result |= {"memory": {**rounded({name: size / 1e9 for name, size in gigabytes.items()}), "ratio": round(added / allowed, 3)}}
    print(json.dumps(result | {"speed": speed}))


def write_phi_lora(folder: Path, layers: int = 32) -> Path:
    """A random adapter of the attention's matrices."""
    width = (PHI_2["hidden_size"],) * 2
    modules = {f"self_attn.{name}": width for name in ("q_proj", "k_proj", "v_proj", "dense")}
    return write_lora(folder, shapes=modules, layers=layers, rank=RANK, alpha=2 * RANK, base_model="")  # type: ignore[arg-type]


if __name__ == "__main__":
    if "--here" in sys.argv:
        source, target, quantization, threads = sys.argv[-4:]
        print(json.dumps(export_here(Path(source), Path(target), quantization, int(threads))))
    else:
        main()
