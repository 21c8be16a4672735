"""What happens around training steps: the run's files are written, the best evaluation's adapter is kept, probes are completed.

Why transformers' `load_best_model_at_end` and `EarlyStoppingCallback` are not used: docs/architecture.md.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from biasdpo.backends.base import ShownText
from biasdpo.backends.hf_loading import encode_prompt, end_tokens
from biasdpo.chat import PromptTemplate
from biasdpo.config import TrainConfig
from biasdpo.errors import RunError, plural
from biasdpo.jobs.job import JobFolder
from biasdpo.workspace import replacing
from training.status import StatusWriter, StoppedError

logger = logging.getLogger(__name__)

# Metrics, speed, status

_CLOCK_KEYS = ("runtime", "samples_per_second", "steps_per_second", "jit_compilation_time")  # differ from run to run
_MUST_BE_FINITE = {"loss": "loss", "grad_norm": "gradient of the loss", "eval_loss": "held-out loss"}
_SUMMARY = ("loss", "grad_norm", "rewards/margins", "eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")


@dataclass(eq=False)
class FolderCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Keeps the run's folder up to date, and ends the training when a stop is requested or its time is up."""

    writer: StatusWriter
    max_minutes: float = 0.0
    started_at: float = 0.0
    started_step: int = 0
    step_started_at: float = 0.0
    step_seconds: float = 0.0  # of the steps since the last line of speed.jsonl, without what happens between steps
    tokens: float | None = None

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        self.started_at, self.started_step = time.monotonic(), state.global_step
        self.writer.update(phase="training", step=state.global_step, total_steps=state.max_steps, eta_seconds=None)

    def on_step_begin(self, _args: Any, _state: Any, _control: Any, **_kwargs: Any) -> None:
        self.writer.forbid_exit()
        self.step_started_at = time.monotonic()

    def on_step_end(self, _args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        now = time.monotonic()
        self.step_seconds += now - self.step_started_at
        done = state.global_step - self.started_step
        eta = round((now - self.started_at) / max(done, 1) * (state.max_steps - state.global_step), 1)
        self.writer.update(phase="training", step=state.global_step, total_steps=state.max_steps, eta_seconds=eta)
        if state.global_step >= state.max_steps:
            control.should_save = True  # whatever save_steps is: a stop or a fault while scoring must not lose the training
        if self.writer.stop_requested():
            save_and_stop(control)
        elif state.global_step < state.max_steps and self.writer.is_late(self.max_minutes):
            self.writer.note(f"max_minutes ended the training at step {state.global_step:,} of {state.max_steps:,}")
            control.should_training_stop = control.should_save = True

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, Any] | None = None, **_kwargs: Any) -> None:
        line = metrics_line(state.global_step, logs or {})
        for key, name in _MUST_BE_FINITE.items():
            # A gradient that is not finite spoils the weights: no checkpoint may be saved after it.
            if not math.isfinite(float((line or {}).get(key, 0.0))):
                raise RunError(
                    f"The {name} became {(line or {})[key]} at step {state.global_step}: start a new run with a lower "
                    "learning_rate, or with precision fp32; the checkpoints before it are kept"
                )
        if line and self.writer.is_main:
            append_json(self.writer.folder.metrics, line)
            summary = ", ".join(f"{name} {line[name]:.4g}" for name in _SUMMARY if name in line)
            logger.info("step %d of %d: %s", state.global_step, state.max_steps, summary)
            if "loss" in line:
                self._log_speed(state.global_step, line.get("num_tokens"))

    def _log_speed(self, step: int, tokens: float | None) -> None:
        """`tokens`: trained on so far, all processes together."""
        if tokens is not None and self.tokens is not None and self.step_seconds > 0:
            speed = round((tokens - self.tokens) / self.step_seconds, 1)
            seconds = round(time.monotonic() - self.started_at, 2)
            append_json(self.writer.folder.speed, {"step": step, "tokens_per_second": speed, "seconds": seconds})
            self.writer.update(tokens_per_second=speed)
        self.tokens, self.step_seconds = tokens, 0.0


def save_and_stop(control: Any) -> None:
    """End the training after this step with a checkpoint. A resumed run makes up for the evaluation."""
    control.should_training_stop = True
    control.should_save = True
    control.should_evaluate = False


def metrics_line(step: int, logs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The line of metrics.jsonl for what the Trainer logs; None for its closing summary, which holds only times."""
    if "loss" not in logs and "eval_loss" not in logs:
        return None
    return {"step": step} | {key: value for key, value in logs.items() if not key.endswith(_CLOCK_KEYS)}


def append_json(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


# The best evaluation and early stopping

ACCURACY, MARGIN = "eval_rewards/accuracies", "eval_rewards/margins"
_ROUNDING = 1e-4  # of an accuracy, and of a margin in nats


@dataclass(frozen=True)
class Evaluation:
    """An evaluation on the held-out pairs. `accuracy`: of their implicit rewards; `margin`: mean, nats."""

    step: int
    accuracy: float
    margin: float

    def is_better_than(self, other: Evaluation) -> bool:
        if abs(self.accuracy - other.accuracy) > _ROUNDING:
            return self.accuracy > other.accuracy
        return self.margin > other.margin + _ROUNDING


def read_evaluations(folder: JobFolder, up_to_step: int | None = None) -> list[Evaluation]:
    """The evaluations of metrics.jsonl, by step; damaged lines are skipped (a resume repairs them)."""
    rows = [row for row in folder.read_metrics() if ACCURACY in row and MARGIN in row and isinstance(row.get("step"), int)]
    found = [Evaluation(row["step"], row[ACCURACY], row[MARGIN]) for row in rows]
    return [evaluation for evaluation in found if up_to_step is None or evaluation.step <= up_to_step]


def best_evaluation(found: Sequence[Evaluation]) -> Evaluation | None:
    """The highest accuracy; of equals the margin that is larger beyond rounding, then the earlier step."""
    best: Evaluation | None = None
    for evaluation in sorted(found, key=lambda e: e.step):
        if best is None or evaluation.is_better_than(best):
            best = evaluation
    return best


def evaluations_without_gain(found: Sequence[Evaluation]) -> int:
    """How many evaluations came after the one that first reached the highest accuracy."""
    accuracies = [evaluation.accuracy for evaluation in found]
    return len(found) - 1 - accuracies.index(max(accuracies)) if found else 0


class EndedEarly(Exception):  # noqa: N818 (no error)
    """A resumed run has nothing left to train: it was at its last step, or early stopping had ended it."""


@dataclass(eq=False)
class BestCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Keeps the adapter of the best evaluation, and ends the training when early stopping says so."""

    trainer: Any
    writer: StatusWriter
    config: TrainConfig

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        step = state.global_step
        due = step > 0 and (step % self.config.eval_every == 0 or step >= state.max_steps)
        if due and step not in {evaluation.step for evaluation in read_evaluations(self.writer.folder)}:
            self.trainer.evaluate()  # which a stop had prevented

    def on_step_end(self, _args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        if (state.global_step >= state.max_steps or control.should_training_stop) and not self.writer.stopping:
            control.should_evaluate = True

    def on_prediction_step(self, _args: Any, _state: Any, _control: Any, **_kwargs: Any) -> None:
        self.writer.update(phase="evaluating on the held-out pairs")
        self.writer.check_stop()

    def on_evaluate(self, _args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        tensors = adapter_tensors(self.trainer.model)  # by every process: their parts may have to be gathered
        if self.writer.is_main:
            best = best_evaluation(read_evaluations(self.writer.folder))
            assert best is not None
            if best.step == state.global_step and self.config.keep == "best":
                save_best(self.writer.folder, best.step, tensors)
            self.writer.update(best_step=best.step, best_accuracy=best.accuracy)
        if self.writer.processes > 1:
            torch.distributed.barrier()  # the others read the line that the main process has written
        self.writer.update(phase="training")
        if is_stopped_early(self.writer.folder, self.config):
            control.should_training_stop = True
            control.should_save = True

    def on_save(self, _args: Any, _state: Any, _control: Any, **_kwargs: Any) -> None:
        if self.writer.is_main:
            prune_best(self.writer.folder)


@dataclass(eq=False)
class EndCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Ends a resumed run that has nothing left to train before the Trainer takes a step too many. Must be the last callback: the
    others make up for an evaluation or a probe first."""

    writer: StatusWriter
    config: TrainConfig

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        if state.global_step and (state.global_step >= state.max_steps or is_stopped_early(self.writer.folder, self.config)):
            raise EndedEarly


def is_stopped_early(folder: JobFolder, config: TrainConfig) -> bool:
    """Whether early stopping ends the run."""
    return bool(config.early_stopping) and evaluations_without_gain(read_evaluations(folder)) >= config.early_stopping


def choose_step(folder: JobFolder, config: TrainConfig, last_step: int) -> tuple[int, str]:
    """Which step's adapter becomes the run's, and why, in one sentence."""
    found = read_evaluations(folder, last_step)
    best = best_evaluation(found)
    if best is None:
        return last_step, f"step {last_step}, the last: the run was not evaluated while it trained"
    if config.keep == "last":
        return last_step, f"step {last_step}, the last, as the run's `keep` asks"
    last, step = found[-1], f"step {best.step}"
    if best.step == last_step:
        return (
            best.step,
            f"{step}, the last, held-out reward accuracy {best.accuracy:.2f}, the best of {plural(len(found), 'evaluation')}",
        )
    if last.step == last_step and not best.is_better_than(last):
        return (
            last_step,
            f"step {last_step}, the last: no evaluation has a better held-out reward accuracy than its {last.accuracy:.2f}",
        )
    compared = f"the last had {last.accuracy:.2f}"
    if best.accuracy == last.accuracy:
        compared = f"the last had the same and a smaller margin ({last.margin:.3g} to {best.margin:.3g} nats)"
    return best.step, f"{step} of {last_step}, held-out reward accuracy {best.accuracy:.2f}, {compared}"


def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The adapter of a PeftModel in the precision it is trained in; tensors sharded across processes are gathered."""
    tensors = {}
    for name, tensor in get_peft_model_state_dict(model).items():
        whole = tensor.detach()
        whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
        tensors[name] = whole.cpu().contiguous()
    return tensors


def save_best(folder: JobFolder, step: int, tensors: dict[str, torch.Tensor]) -> None:
    """Write best/step-N.safetensors atomically."""
    with replacing(folder.best / f"step-{step}.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def load_best(folder: JobFolder, step: int) -> dict[str, torch.Tensor]:
    path = folder.best / f"step-{step}.safetensors"
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except Exception as exc:  # safetensors has an error of its own, which is no OSError
        raise RunError(f"The adapter of the best evaluation, {path}, can't be read ({exc}): start a new run") from exc
    return tensors


def prune_best(folder: JobFolder) -> None:
    """Delete from best/ what no resume can need: the best evaluation as of each checkpoint, and as of now, is kept."""
    found = read_evaluations(folder)
    steps = [int(path.name.rpartition("-")[2]) for path in folder.checkpoints.glob("checkpoint-*")]
    steps.append(max((evaluation.step for evaluation in found), default=0))
    bests = (best_evaluation([evaluation for evaluation in found if evaluation.step <= step]) for step in steps)
    needed = {f"step-{best.step}" for best in bests if best is not None}
    for file in folder.best.glob("step-*.safetensors"):
        if file.stem not in needed:
            file.unlink()


# Probes

MAX_NEW_TOKENS = 60


@dataclass(eq=False)
class ProbeCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Writes probes.jsonl: the completions of a few fixed prompts by base and the policy so far, one line a prompt, at step 0,
    every `every` steps and at the last."""

    trainer: Any
    writer: StatusWriter
    tokenizer: Any
    template: PromptTemplate
    prompts: Sequence[dict[str, str]]
    every: int
    base: list[str] | None = None

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        if self._is_due(state):
            if state.global_step not in {row["step"] for row in self.writer.folder.read_probes()}:
                self._probe(state.global_step)
            self.writer.check_stop()  # by every process, whatever it read in a file that another writes

    def on_step_end(self, _args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        if self._is_due(state) and not self.writer.stopping:
            self._probe(state.global_step)
            if self.writer.stop_requested():  # the others wait here; an interrupted probe belongs to this step
                save_and_stop(control)

    def _is_due(self, state: Any) -> bool:
        return bool(state.global_step % self.every == 0) or bool(state.global_step >= state.max_steps)

    def _probe(self, step: int) -> None:
        """Complete the prompts. A stop interrupts it, and nothing is written: a resumed run makes up for it."""
        if not (self.writer.is_main or self.trainer.is_fsdp_enabled):
            return
        phase = self.writer.status.phase
        self.writer.update(phase="completing the probe's prompts")
        model = self.trainer.model
        was_training = model.training
        model.eval()
        try:
            if self.base is None:
                with model.disable_adapter():
                    self.base = [self.complete(prompt["prompt"]) for prompt in self.prompts]
            tuned = self.base if step == 0 else [self.complete(prompt["prompt"]) for prompt in self.prompts]
        except StoppedError:
            return
        finally:
            model.train(was_training)
            self.writer.update(phase=phase)
        if self.writer.is_main:
            for prompt, base, text in zip(self.prompts, self.base, tuned, strict=True):
                append_json(self.writer.folder.probes, {"step": step, **prompt, "base": base, "tuned": text})

    def complete(self, prompt: str) -> str:
        """The policy's greedy completion, as the Compare tab would show it."""

        def check_stop(row: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:  # at every token
            (self.writer.check_stop if self.trainer.is_fsdp_enabled else self.writer.check_stop_alone)()
            return torch.zeros(len(row), dtype=torch.bool, device=row.device)

        ids = encode_prompt(self.tokenizer, self.template, prompt)
        ends = sorted(end_tokens(self.trainer.model, self.tokenizer, self.template))
        device = self.trainer.accelerator.device
        mixed_precision = nullcontext() if device.type == "cpu" else self.trainer.accelerator.autocast()
        with torch.no_grad(), mixed_precision:
            out = self.trainer.model.generate(
                input_ids=torch.tensor([ids], device=device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=device),
                do_sample=False,
                max_new_tokens=MAX_NEW_TOKENS,
                pad_token_id=ends[0],  # of one row: never used
                eos_token_id=ends,
                stopping_criteria=[check_stop],
            )
        text: str = self.tokenizer.decode(out[0][len(ids) :], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return ShownText(self.template).add(text, final=True)[0]
