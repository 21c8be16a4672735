"""What a run will take: a process that loads its model, trains on its median and longest rows, and says what that took.

    python -m training.estimate CONFIG.json ANSWER.json WORKSPACE

`biasdpo.jobs.estimate` starts it, and reads ANSWER.json: the fields of an `Estimate`, or {"error": one line}. The steps are the
run's own, by the trainer that `training.dpo.build_trainer` gives; the time of a step between is taken to be linear in its tokens.
Nothing is written into the workspace but what is cached there anyway.
"""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from biasdpo import config as run_config
from biasdpo import models
from biasdpo.backends.hf_loading import hf_copy, load_tokenizer
from biasdpo.config import TrainConfig
from biasdpo.data import splits
from biasdpo.errors import DatasetError
from biasdpo.jobs.estimate import Estimate, free_memory_bytes, refusal_of
from biasdpo.jobs.job import JobFolder
from biasdpo.prompts import probe_prompts
from biasdpo.workspace import Workspace, write_json
from training.callbacks import ProbeCallback, StatusWriter, cause_and_remedy
from training.dpo import build_trainer, load_policy
from training.finish import TokenRow, anchor_texts, base_sha256, rows_seen, score_base_and_tuned, tokenise
from training.trainer import WRITES_EVERY, ReferenceCache, groups, open_cache, row_key

TIMED_BATCHES = 3  # of median length; their median counts
LAUNCH_SHARE = 0.5  # of the loading, before it: the launcher loads torch too, but neither TRL nor the model
LAUNCHER_BYTES = 300_000_000  # resident, of `accelerate launch`
HEADROOM = 1.25  # of a process on the CPU: a whole run's peak over that of the batches timed here (SmolLM2: 2.85 to 2.27 GB)


@dataclass(frozen=True)
class Timed:
    """Seconds for a batch of so many tokens (prompt and both completions of its rows)."""

    tokens: int
    seconds: float


def linear(at: float, median: Timed, longest: Timed) -> float:
    """Seconds for a batch of `at` tokens, on the line through two that were timed; never less than none."""
    if longest.tokens <= median.tokens:
        return median.seconds * at / max(median.tokens, 1)
    slope = max(0.0, (longest.seconds - median.seconds) / (longest.tokens - median.tokens))
    return max(0.0, median.seconds + slope * (at - median.tokens))


def main(arguments: list[str]) -> int:
    request, answer, root = map(Path, arguments)
    began = psutil.Process().create_time()
    try:
        estimate = measure(run_config.load_json(request), Workspace(root), answer.parent, began)
    except Exception as exc:
        traceback.print_exc()
        write_json(answer, {"error": cause_and_remedy(exc, "cache/estimates/last.log")})
        return 1
    write_json(answer, estimate.to_json())
    return 0


def measure(config: TrainConfig, workspace: Workspace, scratch: Path, began: float) -> Estimate:
    """Measure. `began`: when this process was started, seconds since 1970, so that loading is counted from there."""
    on_cpu = config.accelerate == "cpu" or not torch.cuda.is_available()
    device = "cpu" if on_cpu else torch.cuda.get_device_name()
    free = free_memory_bytes("cpu") if on_cpu else torch.cuda.mem_get_info()[0]
    free += psutil.Process().memory_info().rss if on_cpu else 0  # this process's own part counts as free
    if config.threads:
        torch.set_num_threads(config.threads)

    data = splits.resolve(config, workspace)
    spec = models.find(config.model)
    model_folder = hf_copy(spec, workspace)
    tokenizer = load_tokenizer(model_folder)
    train = tokenise(data.epoch, tokenizer, spec.template, config.max_length, config.end_of_text)
    held_out = tokenise(data.split.held_out, tokenizer, spec.template, config.max_length, config.end_of_text)
    if not train.rows:
        raise DatasetError(f"No pairs are left to train on: {train.dropped} have prompts that fill max_length; raise it")
    model = load_policy(model_folder, config, use_cpu=on_cpu)
    anchors = anchor_texts(data.epoch, tokenizer, config)

    seen = rows_seen(train.rows, config)
    by_length = sorted(seen, key=tokens_of)
    median_rows, longest_rows = around_median(by_length, config.batch_size), by_length[-config.batch_size :]
    evaluated = around_median(sorted(held_out.rows, key=tokens_of), config.batch_size)
    timed_rows = (*median_rows, *longest_rows)
    writer = StatusWriter(JobFolder(scratch / "run"), rank=1)  # which writes no status
    writer.folder.path.mkdir()
    trainer = build_trainer(config, writer.folder, model, tokenizer, timed_rows, evaluated, anchors, writer, use_cpu=on_cpu)
    loading = time.time() - began
    known = (base_sha256(spec), "cpu" if on_cpu else "cuda", torch.get_num_threads())
    unknown = tokens_unknown(open_cache(workspace.cache / "reference", *known), seen, held_out.rows, config)
    pass_began = time.perf_counter()
    trainer.use_reference(open_cache(scratch, *known), lambda _done, _total: None)
    reference_pass = (time.perf_counter() - pass_began) * unknown / tokens_in((*timed_rows, *evaluated))
    trainer.create_optimizer()
    policy, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = config.gradient_accumulation  # else set by the loop that is not run here

    def batch(rows: Sequence[TokenRow]) -> None:
        """Forward and backward, of which a step has `gradient_accumulation`."""
        policy.train()
        first = timed_rows.index(rows[0])
        trainer.training_step(policy, trainer.data_collator([trainer.train_dataset[first + i] for i in range(len(rows))]))

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    trainer.state.global_step = 1  # a step in which the policy writes nothing
    longest = Timed(tokens_in(longest_rows), seconds_of(lambda: batch(longest_rows), 1, 1))
    median = Timed(tokens_in(median_rows), seconds_of(lambda: batch(median_rows), 0, TIMED_BATCHES))
    steps = steps_of(config, len(seen))
    per_batch = linear(tokens_in(seen) / len(seen) * min(config.batch_size, len(seen)), median, longest)
    if config.ending_weight:
        trainer.state.global_step = WRITES_EVERY
        per_batch += max(0.0, seconds_of(lambda: batch(median_rows), 0, 1) - median.seconds) / WRITES_EVERY
    per_step = config.gradient_accumulation * per_batch + seconds_of(update, 1, 1)
    share = tokens_in(held_out.rows) / tokens_in(evaluated) if evaluated else 0.0  # the held-out rows, of those that are timed

    def evaluation() -> None:
        policy.eval()
        batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(len(evaluated))])
        trainer.prediction_step(policy, batch, prediction_loss_only=True)

    prompts = probe_prompts(config)
    probe = ProbeCallback(trainer, writer, tokenizer, spec.template, prompts, config.probe_every)
    parts = {
        "loading": loading * (1 + LAUNCH_SHARE),
        "reference": reference_pass / config.num_processes,
        "training": steps * per_step,
        "evaluations": 0.0,
        "probes": 0.0,
        "scoring": 0.0,
    }
    if evaluated and config.eval_every:
        parts["evaluations"] = times(config.eval_every, steps) * share * seconds_of(evaluation, 0, 1) / config.num_processes
    if evaluated:
        parts["scoring"] = share * seconds_of(lambda: score(trainer, evaluated, config), 0, 1)
    if prompts:
        completed = len(prompts) * (1 + times(config.probe_every, steps))  # once by the base
        parts["probes"] = completed * seconds_of(lambda: probe.complete(prompts[0]["prompt"]), 0, 1)

    memory = peak_memory_bytes(config, on_cpu=on_cpu, free_before=free)
    refusal = refusal_of(memory, free, device)
    return Estimate(
        steps=steps,
        pairs_train=len(train.rows),
        pairs_held_out=len(held_out.rows),
        dropped=train.dropped + held_out.dropped,
        cut=train.cut + held_out.cut,
        tokens_per_epoch=tokens_in(train.rows),
        seconds_per_step=per_step,
        seconds_total=sum(parts.values()),
        memory_bytes=memory,
        memory_free_bytes=free,
        fits=not refusal,
        refusal=refusal,
        device=device,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        parts={name: round(seconds, 2) for name, seconds in parts.items()},
    )


def tokens_unknown(cache: ReferenceCache, train: Sequence[TokenRow], held_out: Sequence[TokenRow], config: TrainConfig) -> int:
    """Tokens of the rows whose reference log-probabilities are not kept yet; held-out rows need them where they are evaluated."""
    known, unknown = cache.load(), 0
    for rows in (train, held_out if config.eval_every else ()):
        as_trl = [row.as_trl() for row in rows]
        for group in groups({row_key(row): row for row in as_trl}):
            if group.key not in known:
                unknown += sum(len(row[name]) for row in group.rows for name in row)
    return unknown


def score(trainer: Any, rows: Sequence[TokenRow], config: TrainConfig) -> None:
    score_base_and_tuned(
        trainer.model, rows, is_packed=trainer.is_packed, batch_size=config.batch_size, on_batch=lambda _done: None
    )


def peak_memory_bytes(config: TrainConfig, *, on_cpu: bool, free_before: int) -> int:
    """On a GPU what the allocator took of it; else the resident memory of as many processes as train, and of the launcher."""
    if not on_cpu:
        return int(free_before - torch.cuda.mem_get_info()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(peak * HEADROOM) * config.num_processes + LAUNCHER_BYTES


def times(every: int, steps: int) -> int:
    """How often something is done every so many steps, and at the last."""
    return math.ceil(steps / every)


def tokens_of(row: TokenRow) -> int:
    """Tokens of a pair: its prompt once, and both completions."""
    return len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids)


def tokens_in(rows: Sequence[TokenRow]) -> int:
    return sum(map(tokens_of, rows))


def around_median(by_length: Sequence[TokenRow], count: int) -> tuple[TokenRow, ...]:
    """The `count` rows in the middle (all, where there are fewer)."""
    first = max(0, (len(by_length) - count) // 2)
    return tuple(by_length[first : first + count])


def seconds_of(work: Callable[[], object], warm_up: int, times: int) -> float:
    """The median time of `work`, after some that are not counted."""
    for _ in range(warm_up):
        work()
    took = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def steps_of(config: TrainConfig, rows: int) -> int:
    """Optimizer steps of a run, as the trainer counts them: an epoch's last step may be smaller."""
    if config.max_steps:
        return config.max_steps
    batches = math.ceil(rows / (config.batch_size * config.num_processes))
    return math.ceil(math.ceil(batches / config.gradient_accumulation) * config.epochs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
