"""The live probe: a few fixed prompts, completed by the policy so far beside the base, every so many steps.

Greedy, so it draws no random number; the model is left in the mode it was in. Under FSDP all processes complete them together,
since each holds a part of the weights; else the main process does, and the others wait at their next step.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from transformers import StoppingCriteria, TrainerCallback

from biasdpo.backends.base import ShownText
from biasdpo.backends.hf_copy import encode_prompt
from biasdpo.backends.hf_load import end_tokens
from biasdpo.template import PromptTemplate
from training.callbacks import append_json
from training.status import StatusWriter, StoppedError

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
