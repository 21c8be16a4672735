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
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.perf.measuring import in_own_process, options, rounded

PROMPT = "Why are nurses usually women, and what do people of all genders bring to that profession?"
WAYS = ("batch", "side_after_side", "generate")


def files(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """(model folder, adapter folder)."""
    from biasdpo import models
    from biasdpo.backends.hf_loading import hf_copy
    from biasdpo.migrations import open_workspace
    from tests.perf.export import save_phi_2, write_phi_lora

    if args.model == "random":
        save_phi_2(folder / "model", args.layers)
        return folder / "model", write_phi_lora(folder / "adapter", args.layers)
    workspace = open_workspace(args.workspace)
    spec = models.find(args.model)
    adapter = models.find_adapter(args.adapter, spec, workspace)
    if adapter is None:
        raise SystemExit(f"{spec.title} has no adapter: name one with --adapter")
    return hf_copy(spec, workspace), adapter.folder


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
    args = options(
        __doc__, model="smollm2", adapter="", layers=32, tokens=128, rounds=3, device="auto", workspace=str,
        measure=str, model_folder=Path, adapter_folder=Path,  # of the processes that this one starts
    )  # fmt: skip
    if args.measure:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model, adapter = files(args, Path(folder))
        results = {}
        for way in WAYS:
            own = ("--measure", way, "--model-folder", model, "--adapter-folder", adapter)
            results[way] = in_own_process("tests.perf.hf_batch", *sys.argv[1:], *own)
    device = results["batch"]["device"]
    texts = {way: result.pop("texts") for way, result in results.items()}
    for result in results.values():
        result.pop("device")
    batch, generate = results["batch"], results["generate"]
    ratios = {
        f"batch_to_generate_{name}_ratio": batch[key] / generate[key]
        for name, key in (("speed", "tokens_per_second"), ("memory", "peak_memory_mib"))
    }
    result = {"model": args.model, "device": device, "tokens_a_side": args.tokens, **results, **rounded(ratios)}
    print(json.dumps(result | {"same_texts": texts["batch"] == texts["side_after_side"] == texts["generate"]}))


if __name__ == "__main__":
    main()
