"""Evaluations while a run trains: the adapter of the best one is kept, early stopping, and none is missed by a resumed run.

What is best is read off metrics.jsonl, so that a run that was stopped or killed and resumed chooses as one that was not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from biasdpo.errors import RunError
from biasdpo.run_config import RunConfig
from biasdpo.run_folder import RunFolder, checkpoint_step
from biasdpo.workspace import replacing
from training.status import StatusWriter

ACCURACY, MARGIN = "eval_rewards/accuracies", "eval_rewards/margins"


class EndedEarly(Exception):  # noqa: N818 (no error)
    """A resumed run has nothing left to train: it was at its last step, or early stopping had ended it."""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation on the held-out pairs. `accuracy`: of their implicit rewards; `margin`: mean, nats."""

    step: int
    accuracy: float
    margin: float


def evaluations(folder: RunFolder) -> list[Evaluation]:
    """The evaluations of metrics.jsonl, by step."""
    return [Evaluation(row["step"], row[ACCURACY], row[MARGIN]) for row in folder.read_metrics() if ACCURACY in row]


def best_of(found: Sequence[Evaluation]) -> Evaluation | None:
    """The highest accuracy; of equals the larger margin, then the earlier step."""
    return max(found, key=lambda e: (e.accuracy, e.margin, -e.step), default=None)


def evaluations_without_gain(found: Sequence[Evaluation]) -> int:
    """How many evaluations came after the one that first reached the highest accuracy."""
    if not found:
        return 0
    first = max(range(len(found)), key=lambda i: (found[i].accuracy, -i))
    return len(found) - 1 - first


class BestCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    """Keeps the tensors of the best evaluation in best/, and ends the training where early stopping says so."""

    def __init__(self, trainer: Any, writer: StatusWriter, config: RunConfig) -> None:
        self.trainer = trainer
        self.writer = writer
        self.config = config

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        step, found = state.global_step, evaluations(self.writer.folder)
        due = step > 0 and (step % self.config.eval_every == 0 or step >= state.max_steps)
        if due and step not in {evaluation.step for evaluation in found}:
            self.trainer.evaluate()

    def on_step_end(self, _args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        if state.global_step >= state.max_steps and not self.writer.stops:
            control.should_evaluate = True

    def on_prediction_step(self, _args: Any, _state: Any, _control: Any, **_kwargs: Any) -> None:
        self.writer.update(phase="evaluating on the held-out pairs")
        self.writer.check_stop()

    def on_evaluate(self, _args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        state_dict = adapter_tensors(self.trainer.model)  # by every process: their parts may have to be gathered
        if self.writer.is_main:
            best = best_of(evaluations(self.writer.folder))
            if best is not None and best.step == state.global_step:
                save_tensors(self.writer.folder, best.step, state_dict)
            if best is not None:
                self.writer.update(best_step=best.step, best_accuracy=best.accuracy)
        if self.writer.processes > 1:
            torch.distributed.barrier()  # the others read the line that the main process has written
        self.writer.update(phase="training")
        if is_enough(self.writer.folder, self.config):
            control.should_training_stop = True
            control.should_save = True

    def on_save(self, _args: Any, _state: Any, _control: Any, **_kwargs: Any) -> None:
        if self.writer.is_main:
            prune(self.writer.folder)


class EndCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    """Ends a resumed run that has nothing left to train, before the trainer takes a step too many. Must be the last callback:
    the others make up for an evaluation or a probe first."""

    def __init__(self, writer: StatusWriter, config: RunConfig) -> None:
        self.writer = writer
        self.config = config

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        if state.global_step and (state.global_step >= state.max_steps or is_enough(self.writer.folder, self.config)):
            raise EndedEarly


def is_enough(folder: RunFolder, config: RunConfig) -> bool:
    """Whether early stopping ends the run."""
    limit = config.early_stopping
    return bool(limit) and evaluations_without_gain(evaluations(folder)) >= limit


def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The adapter of a PeftModel, whole, in the precision it is trained in."""
    state = get_peft_model_state_dict(model)
    return {name: _whole(tensor.detach()).cpu().contiguous() for name, tensor in state.items()}


def _whole(tensor: Any) -> torch.Tensor:
    """A tensor that is shared out among processes, gathered."""
    whole: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def save_tensors(folder: RunFolder, step: int, tensors: dict[str, torch.Tensor]) -> None:
    """best/step-N.safetensors, whole or not at all."""
    with replacing(folder.best / f"step-{step}.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def load_tensors(folder: RunFolder, step: int) -> dict[str, torch.Tensor]:
    path = folder.best / f"step-{step}.safetensors"
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except Exception as exc:  # safetensors has an error of its own, which is no OSError
        raise RunError(f"The adapter of the best evaluation, {path}, can't be read ({exc}): start a new run") from exc
    return tensors


def prune(folder: RunFolder) -> None:
    """Delete from best/ what no checkpoint can need: for each of them, and for now, the best so far is kept."""
    found = evaluations(folder)
    horizons = [*map(checkpoint_step, folder.whole_checkpoints()), max((e.step for e in found), default=0)]
    needed = {best.step for step in horizons if (best := best_of([e for e in found if e.step <= step])) is not None}
    for file in folder.best.glob("step-*.safetensors"):
        if int(file.stem.removeprefix("step-")) not in needed:
            file.unlink()


def choice(folder: RunFolder, config: RunConfig, last_step: int) -> tuple[int, str]:
    """Which step's adapter becomes the run's, and why, in one sentence."""
    found = [evaluation for evaluation in evaluations(folder) if evaluation.step <= last_step]
    best = best_of(found)
    if best is None:
        return last_step, f"step {last_step}, the last: the run was not evaluated while it trained"
    if config.keep == "last":
        return last_step, f"step {last_step}, the last, as the run's `keep` asks"
    last = found[-1]
    if best.step == last.step == last_step:
        return (
            best.step,
            f"step {best.step}, the last, held-out reward accuracy {best.accuracy:.2f}, the best of {len(found)} evaluations",
        )
    if best.accuracy == last.accuracy:
        than = f"the last had the same and a smaller margin ({last.margin:.3g} to {best.margin:.3g} nats)"
    else:
        than = f"the last had {last.accuracy:.2f}"
    return best.step, f"step {best.step} of {last_step}, held-out reward accuracy {best.accuracy:.2f}, {than}"
