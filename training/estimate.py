"""Measures what a run will take: a process that loads the run's model and trains on its median and longest rows.

    python -m training.estimate CONFIG.json ANSWER.json WORKSPACE

`biasdpo.jobs.estimate` starts it and reads ANSWER.json: the fields of an `Estimate`, or {"error": one line}. The steps are the
run's own, by its own trainer; a step's time is taken to be linear in its tokens. Nothing is written into the workspace but the
model's converted files, which are cached there anyway.
"""

from __future__ import annotations

import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from biasdpo.jobs.estimate import Estimate, free_memory_bytes, peak_resident_bytes, refusal_of
from biasdpo.jobs.job import JobFolder
from biasdpo.prompts import probe_prompts
from biasdpo.workspace import Workspace, write_json
from training.callbacks import ProbeCallback
from training.dpo import base_sha256, build_trainer, load_policy, trains_on_cpu
from training.finish import score_base_and_tuned
from training.reference import ReferenceCache, groups, open_cache, row_key
from training.rows import TokenRow, tokenize_run
from training.status import StatusWriter, cause_and_remedy
from training.trainer import GENERATE_EVERY

logger = logging.getLogger(__name__)

TIMED_BATCHES = 3  # of median length; their median counts
LAUNCH_SHARE = 0.5  # of the loading time, before it: the launcher loads torch too, but neither TRL nor the model
LAUNCHER_BYTES = 300_000_000  # resident, of `accelerate launch`
HEADROOM = 1.25  # of a CPU process: a whole run's peak over that of the batches timed here (SmolLM2: 2.85 to 2.27 GB)


@dataclass(frozen=True)
class Timed:
    """Seconds for a batch of so many tokens (prompt and both completions of its rows)."""

    tokens: int
    seconds: float


def linear(at: float, median: Timed, longest: Timed) -> float:
    """Seconds for a batch of `at` tokens, on the line through two timed ones; never negative."""
    if longest.tokens <= median.tokens:
        return median.seconds * at / max(median.tokens, 1)
    slope = max(0.0, (longest.seconds - median.seconds) / (longest.tokens - median.tokens))
    return max(0.0, median.seconds + slope * (at - median.tokens))


def main(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.WARNING)
    request, answer, root = map(Path, arguments)
    started_at = psutil.Process().create_time()
    try:
        estimate = measure(run_config.load_json(request), Workspace(root), answer.parent, started_at)
    except Exception as exc:
        logger.exception("The estimate failed")
        write_json(answer, {"error": cause_and_remedy(exc, "cache/estimates/last.log")})
        return 1
    write_json(answer, estimate.to_json())
    return 0


def measure(config: TrainConfig, workspace: Workspace, scratch: Path, started_at: float) -> Estimate:
    """Measure. `started_at`: of this process, seconds since 1970: loading is counted from there."""
    on_cpu = trains_on_cpu(config)
    device = "cpu" if on_cpu else torch.cuda.get_device_name()
    free = free_memory_bytes("cpu") if on_cpu else torch.cuda.mem_get_info()[0]
    free += psutil.Process().memory_info().rss if on_cpu else 0  # this process's own part counts as free
    if config.threads:
        torch.set_num_threads(config.threads)

    # The run's rows and model, and a trainer on the rows that are timed.
    data = splits.resolve(config, workspace)
    spec = models.find(config.model)
    model_folder = hf_copy(spec, workspace)
    tokenizer = load_tokenizer(model_folder)
    rows = tokenize_run(data.epoch, data.split.held_out, tokenizer, spec.template, config)
    model = load_policy(model_folder, config, use_cpu=on_cpu)
    by_length = sorted(rows.used, key=lambda row: row.tokens)
    median_rows, longest_rows = around_median(by_length, config.batch_size), by_length[-config.batch_size :]
    evaluated = around_median(sorted(rows.held_out.rows, key=lambda row: row.tokens), config.batch_size)
    timed = (*median_rows, *longest_rows)
    writer = StatusWriter(JobFolder(scratch / "run"), rank=1)  # which writes no status
    writer.folder.path.mkdir()
    timed_rows = replace(rows, used=timed, held_out=replace(rows.held_out, rows=evaluated))
    trainer = build_trainer(config, writer.folder, model, tokenizer, timed_rows, writer, use_cpu=on_cpu)
    loading = time.time() - started_at

    # The reference of the rows that the cache does not have.
    known = (base_sha256(spec), "cpu" if on_cpu else "cuda", torch.get_num_threads())
    cache = open_cache(workspace.cache / "reference", *known)
    unknown = tokens_unknown(cache, rows.used, rows.held_out.rows if config.eval_every else ())
    pass_started_at = time.perf_counter()
    trainer.use_reference(open_cache(scratch, *known), lambda _done, _total: None)
    reference = (time.perf_counter() - pass_started_at) * unknown / tokens_in((*timed, *evaluated))

    # Steps.
    trainer.create_optimizer()
    policy, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = config.gradient_accumulation  # set by the loop that is not run here

    def collated(dataset: Any, first: int, count: int) -> Any:
        return trainer.data_collator([dataset[first + i] for i in range(count)])

    def median_batch() -> None:
        """Forward and backward, of which a step has `gradient_accumulation`."""
        policy.train()
        trainer.training_step(policy, collated(trainer.train_dataset, 0, len(median_rows)))

    def longest_batch() -> None:
        policy.train()
        trainer.training_step(policy, collated(trainer.train_dataset, len(median_rows), len(longest_rows)))

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    trainer.state.global_step = 1  # a step in which the policy generates nothing
    longest = Timed(tokens_in(longest_rows), seconds_of(longest_batch, 1, 1))
    median = Timed(tokens_in(median_rows), seconds_of(median_batch, 0, TIMED_BATCHES))
    steps = config.steps_for(len(rows.used))
    per_batch = linear(tokens_in(rows.used) / len(rows.used) * min(config.batch_size, len(rows.used)), median, longest)
    if config.ending_weight:
        trainer.state.global_step = GENERATE_EVERY
        per_batch += max(0.0, seconds_of(median_batch, 0, 1) - median.seconds) / GENERATE_EVERY
    per_step = config.gradient_accumulation * per_batch + seconds_of(update, 1, 1)

    # Evaluations, probes, and the scoring at the end.
    share = tokens_in(rows.held_out.rows) / tokens_in(evaluated) if evaluated else 0.0  # all held-out rows per timed one
    prompts = probe_prompts(config)
    probe = ProbeCallback(trainer, writer, tokenizer, spec.template, prompts, config.probe_every)
    evaluations = probes = scoring = 0.0

    def evaluate() -> None:
        policy.eval()
        trainer.prediction_step(policy, collated(trainer.eval_dataset, 0, len(evaluated)), prediction_loss_only=True)

    def score() -> None:
        score_base_and_tuned(trainer.model, evaluated, batch_size=config.batch_size, on_batch=lambda _done: None)

    if evaluated and config.eval_every:
        evaluations = times(config.eval_every, steps) * share * seconds_of(evaluate, 0, 1) / config.num_processes
    if evaluated:
        scoring = share * seconds_of(score, 0, 1)
    if prompts:
        completions = len(prompts) * (1 + times(config.probe_every, steps))  # once by the base
        probes = completions * seconds_of(lambda: probe.complete(prompts[0]["prompt"]), 0, 1)
    parts = {
        "loading": loading * (1 + LAUNCH_SHARE),
        "reference": reference / config.num_processes,
        "training": steps * per_step,
        "evaluations": evaluations,
        "probes": probes,
        "scoring": scoring,
    }
    memory = peak_memory_bytes(config, on_cpu=on_cpu, free_before=free)
    refusal = refusal_of(memory, free, device)
    return Estimate(
        steps=steps,
        pairs_train=len(rows.train.rows),
        pairs_held_out=len(rows.held_out.rows),
        dropped=rows.train.dropped + rows.held_out.dropped,
        equal=rows.train.equal + rows.held_out.equal,
        cut=rows.train.cut + rows.held_out.cut,
        tokens_per_epoch=tokens_in(rows.train.rows),
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


def tokens_unknown(cache: ReferenceCache, *row_lists: Sequence[TokenRow]) -> int:
    """Tokens of the rows whose reference log-probabilities are not cached."""
    known = cache.load()
    found = (group for rows in row_lists for group in groups({row_key(row.to_trl()): row.to_trl() for row in rows}))
    return sum(len(row[name]) for group in found if group.key not in known for row in group.rows for name in row)


def peak_memory_bytes(config: TrainConfig, *, on_cpu: bool, free_before: int) -> int:
    """On a GPU what the allocator took; on a CPU the resident memory of all training processes and the launcher."""
    if not on_cpu:
        return int(free_before - torch.cuda.mem_get_info()[0])
    return int(peak_resident_bytes() * HEADROOM) * config.num_processes + LAUNCHER_BYTES


def times(every: int, steps: int) -> int:
    """How often something happens that is done every `every` steps and at the last."""
    return math.ceil(steps / every)


def tokens_in(rows: Sequence[TokenRow]) -> int:
    return sum(row.tokens for row in rows)


def around_median(by_length: Sequence[TokenRow], count: int) -> tuple[TokenRow, ...]:
    """The `count` rows in the middle."""
    first = max(0, (len(by_length) - count) // 2)
    return tuple(by_length[first : first + count])


def seconds_of(work: Callable[[], object], warm_up: int, times: int) -> float:
    """The median time of `work`, after `warm_up` calls that do not count."""
    seconds = []
    for _ in range(warm_up + times):
        started_at = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started_at)
    return statistics.median(seconds[warm_up:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
