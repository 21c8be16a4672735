"""Both sides of a pair in one batch against two separate `generate` calls: tokens a second, and memory.

    python -m tests.perf.hf_batch [--model ID] [--adapter ID|PATH] [--tokens 128] [--rounds 3] [--device auto]

On the device that is there (a GPU, else the CPU; it is named in the result). Three ways to write both completions of one
prompt, greedy, none of them ended before its last token, each in a process of its own: `batch`, our backend with both sides in
one batch; `side_after_side`, our backend without; `generate`, transformers' generate() with PEFT's adapter on, then off.
A way's speed is that of its fastest round; memory is the GPU's peak by torch, or on a CPU the process's peak resident
memory (weights that it mapped included). Prints one JSON object.

--model random: random weights with the shapes of Phi-2's config, but for its --layers, where no model is at hand.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

PROMPT = "Why are nurses usually women, and what do people of all genders bring to that profession?"
WAYS = ("batch", "side_after_side", "generate")


def files(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """(model folder, adapter folder)."""
    from biasdpo import models
    from biasdpo.backends.hf_loading import hf_copy
    from biasdpo.workspace import open_workspace

    if args.model == "random":
        return save_random_phi(folder, args.layers), folder / "adapter"
    workspace = open_workspace(args.workspace)
    spec = models.find(args.model)
    adapter = models.find_adapter(args.adapter, spec, workspace)
    if adapter is None:
        raise SystemExit(f"{spec.title} has no adapter: name one with --adapter")
    return hf_copy(spec, workspace), adapter.folder


def save_random_phi(folder: Path, layers: int) -> Path:
    import torch
    from transformers import PhiConfig, PhiForCausalLM

    from tests import tiny_models

    small = tiny_models.save_tiny_phi(folder / "small")
    config = PhiConfig(
        vocab_size=51200, hidden_size=2560, intermediate_size=10240, num_hidden_layers=layers, num_attention_heads=32,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    PhiForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).write_bytes((small / name).read_bytes())
    with torch.device("meta"):
        shapes = {
            name: tuple(p.shape) for name, p in PhiForCausalLM(config).named_parameters() if ".layers." in name and p.ndim == 2
        }
    write_adapter(folder / "adapter", shapes)
    return folder / "model"


def write_adapter(folder: Path, shapes: dict[str, tuple[int, ...]], rank: int = 16) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir()
    rng = np.random.default_rng(0)
    factors = {}
    for name, (out, into) in shapes.items():
        module = "base_model.model." + name.removesuffix(".weight")
        factors[f"{module}.lora_A.weight"] = (rng.standard_normal((rank, into)) / np.sqrt(into)).astype(np.float32)
        factors[f"{module}.lora_B.weight"] = (rng.standard_normal((out, rank)) * 0.02).astype(np.float32)
    save_file(factors, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-2] for name in shapes})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "", "r": rank, "lora_alpha": rank}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))


def backend_writer(args: argparse.Namespace, model: Path, adapter: Path, template: Any) -> tuple[Callable[[], list[str]], str]:
    """(writes both completions and returns them, the device for people)."""
    from biasdpo.backends.hf import open_transformers
    from biasdpo.records import Sampling, Side

    backend = open_transformers(
        model, replace(template, stop=()), adapter, 2048, device=args.device, batch_sides=args.measure == "batch"
    )
    backend._ends = frozenset()  # nothing ends a completion but the limit
    sampling = Sampling(args.tokens, temperature=0.0, repetition_penalty=1.0)

    def write() -> list[str]:
        texts = {"base": "", "tuned": ""}

        def read(side: Side) -> None:
            texts[side] = "".join(backend.stream(PROMPT, sampling, side))

        threads = [threading.Thread(target=read, args=(side,)) for side in ("base", "tuned")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return list(texts.values())

    return write, backend.device


def generate_writer(args: argparse.Namespace, model: Path, adapter: Path, template: Any) -> tuple[Callable[[], list[str]], str]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from biasdpo.backends.hf_loading import Placement, choose_device, encode_prompt, load_tokenizer

    device = choose_device(args.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device)
    peft_model = PeftModel.from_pretrained(base, str(adapter)).eval()
    peft_model.generation_config.eos_token_id = None  # nothing ends a completion but the limit
    tokenizer = load_tokenizer(model)
    ids = torch.tensor([encode_prompt(tokenizer, template, PROMPT)], device=device)

    def generate() -> str:
        written = peft_model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=args.tokens, pad_token_id=0
        )
        text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(template.bare(text))

    def write() -> list[str]:
        with torch.inference_mode():
            tuned = generate()
            with peft_model.disable_adapter():
                return [generate(), tuned]

    return write, Placement(device).describe()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: load, write once to warm up, then the rounds."""
    import resource

    import torch

    from biasdpo import models

    template = (models.catalog()["phi-2"] if args.model == "random" else models.find(args.model)).template
    writer = generate_writer if args.measure == "generate" else backend_writer
    write, device = writer(args, args.model_folder, args.adapter_folder, template)
    texts = write()
    seconds = []
    for _ in range(args.rounds):
        started_at = time.perf_counter()
        if write() != texts:
            raise SystemExit(f"{args.measure}: greedy texts differ from round to round")
        seconds.append(time.perf_counter() - started_at)
    if torch.cuda.is_available() and not device.startswith("CPU"):
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    return {
        "tokens_per_second": round(2 * args.tokens / min(seconds), 2),
        "peak_memory_mib": round(peak / 2**20, 1),
        "device": device,
        "texts": texts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Both sides in one batch against two generate calls.")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--adapter", default="")
    parser.add_argument("--layers", type=int, default=32, help="of the random model")
    parser.add_argument("--tokens", type=int, default=128, help="that each side writes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workspace")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--model-folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--adapter-folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model, adapter = files(args, Path(folder))
        results = {}
        for way in WAYS:
            command = [sys.executable, "-m", "tests.perf.hf_batch", *sys.argv[1:], "--measure", way]
            command += ["--model-folder", str(model), "--adapter-folder", str(adapter)]
            results[way] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    device = results["batch"]["device"]
    texts = {way: result.pop("texts") for way, result in results.items()}
    for result in results.values():
        result.pop("device")
    reference = results["generate"]
    print(
        json.dumps(
            {
                "model": args.model,
                "device": device,
                "tokens_a_side": args.tokens,
                **results,
                "batch_to_generate_speed_ratio": round(results["batch"]["tokens_per_second"] / reference["tokens_per_second"], 3),
                "batch_to_generate_memory_ratio": round(results["batch"]["peak_memory_mib"] / reference["peak_memory_mib"], 3),
                "same_texts": texts["batch"] == texts["side_after_side"] == texts["generate"],
            }
        )
    )


if __name__ == "__main__":
    main()
