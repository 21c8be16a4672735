"""The steps since the last log line, kept with each checkpoint: a run stopped between two log lines logs as one that was not."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import StoppingCriteria, TrainerCallback

from biasdpo.backends.base import ShownText
from biasdpo.backends.hf_loading import encode_prompt, end_tokens
from biasdpo.chat import PromptTemplate
from biasdpo.config import TrainConfig
from biasdpo.errors import BiasDPOError, RunError
from biasdpo.jobs.job import (
    MEMORY_WORDS,
    THREAD_WORDS,
    JobFolder,
    State,
    Status,
    checkpoint_step,
    is_at_memory_limit,
    memory_kills,
)
from biasdpo.workspace import read_json, replacing, write_json

# --- status: What the training process says of itself: status.json, and whether it was asked to stop


class StoppedError(Exception):
    """The run was asked to stop while it was not between two training steps."""


class StatusWriter:
    """status.json, written by the main process alone, but for a failure, which any process reports.

    may_leave   whether the process may end at any moment and nothing is lost: until its first step begins
    """

    def __init__(self, folder: JobFolder, *, rank: int = 0, processes: int = 1) -> None:
        self.folder = folder
        self.rank = rank
        self.processes = processes
        self.stops = False  # whether a stop was seen, which all processes see at the same place
        self.status = Status("running", pid=os.getpid(), pid_created=psutil.Process().create_time())
        self.may_leave = True
        self._lock = threading.RLock()  # `leave` is another thread's

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def begin(self) -> None:
        """Take over from the launcher; what was known of the steps stays."""
        with suppress(BiasDPOError):
            before = self.folder.read_status()
            self.status = replace(self.status, step=before.step, total_steps=before.total_steps, device=before.device)
        self.status = replace(self.status, phase="loading the libraries", memory_kills=memory_kills())
        with self._lock:
            if self.is_main:
                self.folder.write_status(self.status)

    def update(self, **changes: Any) -> None:
        with self._lock:
            self.status = replace(self.status, **changes)
            if self.is_main and not self._another_ended():
                self.folder.write_status(self.status)

    def note(self, text: str) -> None:
        """Tell the user something, in the log and in the status."""
        if self.is_main:
            print(text, flush=True)
        self.update(notes=(*self.status.notes, text))

    def end(self, state: State, error: str = "") -> None:
        """The last word. A disk so full that it can't be written leaves it to the log."""
        with self._lock:
            self.may_leave = False
            last = replace(self.status, state=state, phase="", error=error, eta_seconds=0.0 if state == "finished" else None)
            self.status = last
            if (not self.is_main and state != "failed") or self._another_ended():
                return
            try:
                self.folder.write_last_status(last)
            except OSError as exc:
                print(f"status.json could not be written ({exc}): {state} {error}", file=sys.stderr, flush=True)

    def _another_ended(self) -> bool:
        """Whether a process has said why it failed, or that the run was stopped: what the others say after it is of the
        connection that it broke."""
        return self.processes > 1 and self.ended_state() in ("failed", "stopped")

    def ended_state(self) -> State | None:
        """The state that status.json shows; None where it can't be read."""
        with suppress(BiasDPOError):
            return self.folder.read_status().state
        return None

    # Stopping

    def stay(self) -> None:
        """The first step begins: from here on a stop saves a checkpoint, and nobody leaves."""
        with self._lock:
            self.may_leave = False

    def leave(self) -> None:
        """End this process at once, stopped, whatever its main thread does; after `stay` or `end` nothing happens."""
        with self._lock:  # for good: the main thread writes nothing any more
            if not self.may_leave:
                return
            self.end("stopped")
            os._exit(0)

    def stop_requested(self) -> bool:
        """Whether to stop. With several processes all must ask at the same place: they agree on what the main one sees."""
        if self.processes == 1:
            self.stops = self.folder.stop_request.exists()
            return self.stops
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():  # before that nobody may leave the others alone
            seen = [self.folder.stop_request.exists()]
            distributed.broadcast_object_list(seen, src=0)
            self.stops = seen[0]
        return self.stops

    def check_stop(self) -> None:
        """Raise StoppedError where a stop was asked for; a place that all processes pass."""
        if self.stop_requested():
            raise StoppedError

    def check_stop_alone(self) -> None:
        """The same, where the main process works and no other waits for it."""
        if self.folder.stop_request.exists():
            raise StoppedError


# --- best: Evaluations while a run trains: the adapter of the best one is kept, early stopping, and none i


ACCURACY, MARGIN = "eval_rewards/accuracies", "eval_rewards/margins"


class EndedEarly(Exception):  # noqa: N818 (no error)
    """A resumed run has nothing left to train: it was at its last step, or early stopping had ended it."""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation on the held-out pairs. `accuracy`: of their implicit rewards; `margin`: mean, nats."""

    step: int
    accuracy: float
    margin: float


def evaluations(folder: JobFolder) -> list[Evaluation]:
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

    def __init__(self, trainer: Any, writer: StatusWriter, config: TrainConfig) -> None:
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

    def __init__(self, writer: StatusWriter, config: TrainConfig) -> None:
        self.writer = writer
        self.config = config

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        if state.global_step and (state.global_step >= state.max_steps or is_enough(self.writer.folder, self.config)):
            raise EndedEarly


def is_enough(folder: JobFolder, config: TrainConfig) -> bool:
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


def save_tensors(folder: JobFolder, step: int, tensors: dict[str, torch.Tensor]) -> None:
    """best/step-N.safetensors, whole or not at all."""
    with replacing(folder.best / f"step-{step}.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def load_tensors(folder: JobFolder, step: int) -> dict[str, torch.Tensor]:
    path = folder.best / f"step-{step}.safetensors"
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except Exception as exc:  # safetensors has an error of its own, which is no OSError
        raise RunError(f"The adapter of the best evaluation, {path}, can't be read ({exc}): start a new run") from exc
    return tensors


def prune(folder: JobFolder) -> None:
    """Delete from best/ what no checkpoint can need: for each of them, and for now, the best so far is kept."""
    found = evaluations(folder)
    horizons = [*map(checkpoint_step, folder.whole_checkpoints()), max((e.step for e in found), default=0)]
    needed = {best.step for step in horizons if (best := best_of([e for e in found if e.step <= step])) is not None}
    for file in folder.best.glob("step-*.safetensors"):
        if int(file.stem.removeprefix("step-")) not in needed:
            file.unlink()


def choice(folder: JobFolder, config: TrainConfig, last_step: int) -> tuple[int, str]:
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


# --- callbacks: What the training process writes into its run folder step by step: metrics.jsonl, speed.jsonl,


# What depends on the clock, and is no metric of the run.
CLOCK_KEYS = ("runtime", "samples_per_second", "steps_per_second", "jit_compilation_time")


class FolderCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    """Keeps the run folder up to date, and ends the training where a stop is asked for."""

    def __init__(self, writer: StatusWriter) -> None:
        self.writer = writer
        self.started_at = 0.0
        self.started_step = 0
        self.step_began_at = 0.0
        self.step_seconds = 0.0  # of the steps since the last line of speed.jsonl, without what is done between them
        self.tokens: float | None = None

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        self.started_at, self.started_step = time.monotonic(), state.global_step
        self.writer.update(phase="training", step=state.global_step, total_steps=state.max_steps, eta_seconds=None)

    def on_step_begin(self, _args: Any, _state: Any, _control: Any, **_kwargs: Any) -> None:
        self.writer.stay()
        self.step_began_at = time.monotonic()

    def on_step_end(self, _args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        now = time.monotonic()
        self.step_seconds += now - self.step_began_at
        done = state.global_step - self.started_step
        eta = round((now - self.started_at) / max(done, 1) * (state.max_steps - state.global_step), 1)
        self.writer.update(phase="training", step=state.global_step, total_steps=state.max_steps, eta_seconds=eta)
        if state.global_step >= state.max_steps:
            control.should_save = True  # whatever save_steps: a stop or a fault while it is scored is not to lose the training
        if self.writer.stop_requested():
            control.should_training_stop = True
            control.should_save = True
            control.should_evaluate = False  # a resumed run makes up for it

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, Any] | None = None, **_kwargs: Any) -> None:
        if logs is None or not ("loss" in logs or "eval_loss" in logs):
            return  # the closing summary: run times, which differ from run to run
        for key, name in (("loss", "loss"), ("grad_norm", "gradient of the loss"), ("eval_loss", "held-out loss")):
            # A gradient that is no number makes the weights none: no checkpoint may be saved after it.
            if not math.isfinite(float(logs.get(key, 0.0))):
                raise RunError(
                    f"The {name} became {logs[key]} at step {state.global_step}: start a new run with a lower "
                    "learning_rate, or with precision fp32; the checkpoints before it are kept"
                )
        if not self.writer.is_main:
            return
        folder = self.writer.folder
        append_json(folder.metrics, {"step": state.global_step, **without_clock(logs)})
        if "loss" in logs:
            self._log_speed(state.global_step, logs.get("num_tokens"))

    def _log_speed(self, step: int, tokens: float | None) -> None:
        """`tokens`: seen so far, all processes together."""
        if tokens is not None and self.tokens is not None and self.step_seconds > 0:
            speed = round((tokens - self.tokens) / self.step_seconds, 1)
            seconds = round(time.monotonic() - self.started_at, 2)
            append_json(self.writer.folder.speed, {"step": step, "tokens_per_second": speed, "seconds": seconds})
            self.writer.update(tokens_per_second=speed)
        self.tokens, self.step_seconds = tokens, 0.0


def without_clock(logs: dict[str, Any]) -> dict[str, Any]:
    """A line's metrics, without how long they took."""
    return {key: value for key, value in logs.items() if not key.endswith(CLOCK_KEYS)}


def append_json(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def cut_after(folder: JobFolder, step: int) -> None:
    """Drop what was written past `step`, which a resumed run writes again: of metrics, speed and probes."""
    for path, rows in (
        (folder.metrics, folder.read_metrics()),
        (folder.speed, folder.read_speed()),
        (folder.probes, folder.read_probes()),
    ):
        if path.is_file():
            with replacing(path) as temporary:
                kept = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows if row["step"] <= step)
                temporary.write_text("".join(kept), encoding="utf-8")


# --- faults: What went wrong in a training process, as one line of cause and remedy


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = (
    "No space left on device", "Disk quota exceeded", "File too large", "os error 28", "os error 27",
    "PytorchStreamWriter failed", "unexpected pos", "iostream error",  # torch.save, which hides the reason
)  # fmt: skip
# What gloo and NCCL say to a process that waits for another one, which is gone.
_CONNECTION_WORDS = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "NCCL error: remote")


def cause_and_remedy(exc: BaseException, log: str = "the run's log.txt") -> str:
    """One line for people. `log`: where its traceback is."""
    if isinstance(exc, BiasDPOError):
        return str(exc)
    text = str(exc)
    of_memory = isinstance(exc, MemoryError) or type(exc).__name__ == "OutOfMemoryError"
    if of_memory or any(words in text for words in MEMORY_WORDS) or is_at_memory_limit():
        return (
            "Out of memory: start a new run with a lower batch_size (and gradient_accumulation raised as much) or max_length, or "
            "free memory and resume; the checkpoints are kept"
        )
    if any(words in text for words in THREAD_WORDS):
        return (
            "Out of memory or of processes, since no thread could be started: free memory, lower `threads`, or raise the limit "
            "of processes (ulimit -u), then resume; the checkpoints are kept"
        )
    if (isinstance(exc, OSError) and exc.errno in _FULL) or any(words in text for words in _FULL_WORDS):
        return "The disk is full: free some space, then resume the run; its checkpoints are kept"
    if any(words in text for words in _CONNECTION_WORDS):
        return (
            "Another of the run's processes ended without a word, as it does when it is killed or the machine runs out of "
            f"memory: resume the run, or start a new one with fewer num_processes; {log} has more"
        )
    first_line = (text.strip() or type(exc).__name__).split("\n")[0]
    return f"{type(exc).__name__}: {first_line[:300]}; the whole story is in {log}"


# --- probe: The live probe: a few fixed prompts, completed by the policy so far beside the base, every so m


MAX_NEW_TOKENS = 60


class ProbeCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    """Writes probes.jsonl: one line a prompt at step 0, every `every` steps and at the last."""

    def __init__(
        self,
        trainer: Any,
        writer: StatusWriter,
        tokenizer: Any,
        template: PromptTemplate,
        prompts: list[dict[str, str]],
        every: int,
    ) -> None:
        self.trainer = trainer
        self.writer = writer
        self.tokenizer = tokenizer
        self.template = template
        self.prompts = prompts
        self.every = every
        self.base: list[str] | None = None

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        if self._is_due(state):
            if state.global_step not in {row["step"] for row in self.writer.folder.read_probes()}:
                self._probe(state.global_step)
            self.writer.check_stop()  # by every process, whatever it read in a file that another writes

    def on_step_end(self, _args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        if self._is_due(state) and not self.writer.stops:
            self._probe(state.global_step)
            if self.writer.stop_requested():  # the others wait here, and a probe that was cut short belongs to this step
                control.should_training_stop = True
                control.should_save = True
                control.should_evaluate = False

    def _is_due(self, state: Any) -> bool:
        return bool(state.global_step % self.every == 0) or bool(state.global_step >= state.max_steps)

    def _probe(self, step: int) -> None:
        """A stop cuts it short, and nothing is written: a resumed run makes up for it."""
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
        ids = encode_prompt(self.tokenizer, self.template, prompt)
        device = self.trainer.accelerator.device
        in_mixed_precision = nullcontext() if device.type == "cpu" else self.trainer.accelerator.autocast()
        with torch.no_grad(), in_mixed_precision:
            out = self.trainer.model.generate(
                input_ids=torch.tensor([ids], device=device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=device),
                do_sample=False,
                max_new_tokens=MAX_NEW_TOKENS,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                eos_token_id=sorted(end_tokens(self.trainer.model, self.tokenizer, self.template)),
                stopping_criteria=[_Stop(self.writer, alone=not self.trainer.is_fsdp_enabled)],
            )
        text: str = self.tokenizer.decode(out[0][len(ids) :], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return ShownText(self.template).add(text, final=True)[0]


class _Stop(StoppingCriteria):  # type: ignore[misc]  # transformers is not followed
    """Looks for a stop request at every token."""

    def __init__(self, writer: StatusWriter, *, alone: bool) -> None:
        self.check = writer.check_stop_alone if alone else writer.check_stop

    def __call__(self, input_ids: Any, _scores: Any, **_kwargs: Any) -> Any:
        self.check()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


# --- stop watch: Stops a run in the stretches in which its main thread can't look for a request: while libraries


GRACE_SECONDS = 3.0
LOOK_SECONDS = 0.2


def watch(writer: StatusWriter) -> None:
    """Start the thread. It ends this process with `os._exit`: not for a process that has other work."""
    threading.Thread(target=_watch, args=(writer,), name="stop-watch", daemon=True).start()


def _watch(writer: StatusWriter) -> None:
    asked_at: float | None = None
    while writer.may_leave:
        time.sleep(LOOK_SECONDS)
        if not writer.folder.stop_request.exists():
            asked_at = None
            continue
        asked_at = asked_at or time.monotonic()
        # The main process first, which says that it was stopped: else it would take the others' end for a fault.
        if time.monotonic() - asked_at >= GRACE_SECONDS if writer.is_main else writer.ended_state() == "stopped":
            writer.leave()


# --- window: The steps since the last log line, kept with each checkpoint: a run stopped between two log lin


FILE = "window.json"


def save_window(trainer: Any, checkpoint: Path) -> None:
    """Write checkpoint/window.json, by every process: their losses are averaged, as the log line would average them."""
    loss = trainer.accelerator.gather(trainer._tr_loss.detach().reshape(1)).mean().item()
    if trainer.args.should_save:
        window = {
            "loss": loss,  # summed over the steps
            "logged_at_step": trainer._globalstep_last_logged,
            "tokens": trainer._total_train_tokens,  # since the run's start; TRL would count them anew
            "metrics": trainer._metrics["train"],
        }
        write_json(checkpoint / FILE, window)


class WindowCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    """Gives a resumed trainer the window of its checkpoint back. Checkpoints of earlier versions hold none."""

    def __init__(self, trainer: Any, checkpoint: Path | None) -> None:
        self.trainer = trainer
        self.checkpoint = checkpoint

    def on_train_begin(self, _args: Any, _state: Any, _control: Any, **_kwargs: Any) -> None:
        if self.checkpoint is None or not (self.checkpoint / FILE).is_file():
            return
        window = read_json(self.checkpoint / FILE)
        self.trainer._tr_loss += torch.tensor(window["loss"], device=self.trainer._tr_loss.device)  # 0.0 until here
        self.trainer._globalstep_last_logged = window["logged_at_step"]
        self.trainer._total_train_tokens = window["tokens"]
        self.trainer._metrics["train"].update(window["metrics"])
