"""Our trainer against TRL 1.16's DPOTrainer: SmolLM2 on BiasDPO rows, on the CPU.

    python -m tests.perf.train [--dataset FILE] [--pairs 32] [--batch 8] [--rounds 2] [--steps 30] [--threads 2] [--scaling]

Both train a fresh LoRA on the same token rows in the same order for one epoch, in fp32, with the same seed and threads, and with
TRL's defaults but for `gradient_checkpointing=False, bf16=False, use_cpu=True` (saved nothing, logged every step). Each arm runs
in a process of its own, in turn (A B A B ...). Timed from the loaded model and the token rows to the last step, so ours
holds the reference pass, with an empty cache. Peak memory: the process's peak resident set from there on.
Prints one JSON object:

 batch_N           with --batch: medians over the rounds; "ratio" is samples a second, ours by TRL's
 batch_1           --steps pairs, one a step, at --steps-learning-rate: the same, and the losses of both at every step, with
                   their largest difference
 trl_precomputed   TRL with precompute_ref_log_probs=True; trl_defaults: TRL's true defaults (checkpointing, bf16); one run each
 scaling           with --scaling: ours on 250, 500 and 1000 rows, seconds and tokens, and seconds a row and a token
                   relative to those of all runs together (1: perfectly linear)
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from biasdpo import models
from biasdpo.backends.hf_loading import hf_copy, load_tokenizer
from biasdpo.data import splits
from biasdpo.workspace import Workspace
from tests.perf.measuring import in_own_process, options

ARMS = ("ours", "trl", "trl_precomputed", "trl_defaults")
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
SCALING = (250, 500, 1000)


def run_arm(arm: str, rows_file: Path, model_folder: Path, batch: int, threads: int, learning_rate: float) -> dict[str, Any]:
    """Train one arm in this process; seconds, losses, peak memory."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    from training import reference
    from training.trainer import TokenizedDPOTrainer

    class OnTokenRows(DPOTrainer):  # type: ignore[misc]  # trl has no types
        """TRL's trainer, on rows that are tokenized already."""

        def _prepare_dataset(self, dataset: Any, *_args: Any, **_kwargs: Any) -> Any:
            return dataset

    torch.set_num_threads(threads)
    rows = json.loads(rows_file.read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = load_tokenizer(model_folder)
    plain: dict[str, Any] = {} if arm == "trl_defaults" else {"gradient_checkpointing": False, "bf16": False}
    with tempfile.TemporaryDirectory() as scratch:
        arguments = DPOConfig(
            output_dir=scratch,
            use_cpu=True,
            num_train_epochs=1,
            per_device_train_batch_size=batch,
            learning_rate=learning_rate,
            precompute_ref_log_probs=arm == "trl_precomputed",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **plain,
        )
        trainer_class = TokenizedDPOTrainer if arm == "ours" else OnTokenRows
        reset_peak()
        started, processor_started = time.perf_counter(), time.process_time()
        trainer = trainer_class(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
        )
        if arm == "ours":
            cache = reference.open_cache(Path(scratch), "0" * 64, "cpu", threads)
            trainer.use_reference(cache, lambda _done, _total: None)
        trainer.train()
        seconds, processor_seconds = time.perf_counter() - started, time.process_time() - processor_started
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": seconds, "processor_seconds": processor_seconds, "losses": losses, "peak_mb": peak_mb()}


def reset_peak() -> None:
    """Let the kernel forget this process's peak so far (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_mb() -> float:
    """Peak resident set since `reset_peak`, MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").split("\n")
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


def start_arm(
    arm: str,
    rows: list[Any],
    folder: Path,
    model_folder: Path,
    batch: int,
    args: argparse.Namespace,
    learning_rate: float | None = None,
) -> dict[str, Any]:
    """Run one arm in a process of its own; `learning_rate`: another than --learning-rate."""
    rows_file = folder / "rows.json"
    rows_file.write_text(json.dumps(rows), encoding="utf-8")
    found = in_own_process(
        "tests.perf.train",
        *("--arm", arm, "--rows", rows_file, "--model", model_folder, "--batch", batch, "--threads", args.threads),
        *("--learning-rate", learning_rate or args.learning_rate),
        OMP_NUM_THREADS=str(args.threads),
        HF_HUB_OFFLINE="1",
        HF_DATASETS_CACHE=str(folder / "hf"),
    )
    print(f"{arm}: {len(rows)} pairs by {batch}, {found['seconds']:.1f} s, {found['peak_mb']:.0f} MB", file=sys.stderr)
    return found


def compared(results: dict[str, list[dict[str, Any]]], pairs: int) -> dict[str, Any]:
    """Medians of each arm, and ours by TRL's."""

    def median(arm: str, key: str) -> float:
        return statistics.median(result[key] for result in results[arm])

    return {
        "pairs": pairs,
        "seconds": {arm: round(median(arm, "seconds"), 2) for arm in results},
        "samples_per_second": {arm: round(pairs / median(arm, "seconds"), 3) for arm in results},
        "ratio": round(median("trl", "seconds") / median("ours", "seconds"), 2),
        "ratio_of_processor_seconds": round(median("trl", "processor_seconds") / median("ours", "processor_seconds"), 2),
        "peak_mb": {arm: round(median(arm, "peak_mb")) for arm in results},
    }


def token_counts(rows: list[Any]) -> dict[str, int]:
    """Tokens of the rows as they are packed (the prompt once), and as TRL lays them out (twice)."""
    prompts = sum(len(row["prompt_ids"]) for row in rows)
    completions = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    return {"prompt_once": prompts + completions, "prompt_twice": 2 * prompts + completions}


def scaling(rows: list[Any], folder: Path, model_folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    runs = []
    for count in SCALING:
        result = start_arm("ours", rows[:count], folder, model_folder, args.batch, args)
        runs.append({"rows": count, "tokens": token_counts(rows[:count])["prompt_once"], "seconds": round(result["seconds"], 1)})
    total = sum(run["seconds"] for run in runs)
    for run in runs:
        for unit in ("rows", "tokens"):
            mean = total / sum(other[unit] for other in runs)
            run[f"seconds_by_{unit}_relative"] = round(run["seconds"] / run[unit] / mean, 3)
    return runs


def main() -> None:
    args = options(
        __doc__, dataset=Path("../shared/data/biasdpo.jsonl"), pairs=32, batch=8, rounds=2, steps=30, threads=2, scaling=False,
        learning_rate=1e-6,  # TRL's default
        steps_learning_rate=1e-4,  # with losses that stay near log 2, as at TRL's default, anything would agree
        arm=str, rows=Path, model=Path,  # of the processes that this one starts
    )  # fmt: skip
    if args.arm:
        print(json.dumps(run_arm(args.arm, args.rows, args.model, args.batch, args.threads, args.learning_rate)))
        return

    from training.rows import tokenize

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        spec = models.find("smollm2")
        model_folder = hf_copy(spec, Workspace(folder))
        pairs = splits.load_file(args.dataset)
        rows = [row.to_trl() for row in tokenize(pairs, load_tokenizer(model_folder), spec.template, 1024).rows]
        random.Random(0).shuffle(rows)
        report: dict[str, Any] = {"model": spec.id, "threads": args.threads, "lora": LORA, "learning_rate": args.learning_rate}
        if args.scaling:
            report["scaling"] = scaling(rows, folder, model_folder, args)
        else:
            some = rows[: args.pairs]
            results: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
            for _ in range(args.rounds):
                for arm in results:
                    results[arm].append(start_arm(arm, some, folder, model_folder, args.batch, args))
            report[f"batch_{args.batch}"] = compared(results, len(some)) | {"tokens": token_counts(some)}
            few = rows[: args.steps]
            singles = {arm: [start_arm(arm, few, folder, model_folder, 1, args, args.steps_learning_rate)] for arm in results}
            ours, theirs = (singles[arm][0]["losses"] for arm in ("ours", "trl"))
            report["batch_1"] = compared(singles, len(few)) | {
                "learning_rate": args.steps_learning_rate,
                "losses": {"ours": ours, "trl": theirs},
                "largest_difference_of_losses": max(abs(a - b) for a, b in zip(ours, theirs, strict=True)),
            }
            for arm in ARMS[2:]:
                result = start_arm(arm, some, folder, model_folder, args.batch, args)
                report[arm] = {"seconds": round(result["seconds"], 2), "peak_mb": round(result["peak_mb"])}
        print(json.dumps(report))


if __name__ == "__main__":
    main()
