"""TRL's DPO trainer on rows that are tokenized already: the same loss, metrics and checkpoints for less work.

What differs from TRL 1.16, whose losses, metrics and loop are used:
1. A pair is computed as one packed row, the prompt once, without padding, and the vocabulary projection only on completion
   tokens (`training.packing`). For Llama and Phi; other models are trained TRL's way, and `note` says so.
2. The reference's log-probabilities are computed once, before the first step, and cached across runs (`training.reference`).
3. In `rewards/accuracies` a tie within rounding counts one half.
4. Terms beside DPO's loss (`training.losses`): KL to base on plain text, counterfactual KL, questions, endings.
5. A checkpoint holds no model card, but what was not logged yet (`training.resume`).
6. An evaluation's metrics are means over pairs, whatever the batch size and the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from transformers.trainer_utils import EvalLoopOutput
from trl import DPOTrainer

from biasdpo import rewards
from biasdpo.counterfactuals import Counterfactuals
from biasdpo.errors import ConfigError
from biasdpo.workspace import read_json, write_json
from training import losses
from training.packing import Branches, add_packed_forward, unpad, why_not_packed
from training.reference import Group, Logps, ReferenceCache, groups, row_key
from training.resume import save_unlogged

logger = logging.getLogger(__name__)

GENERATE_EVERY = 4  # steps between those in which the policy completes the batch's prompts, which takes as long as a step
ANSWERED_AT_ONCE = 32  # everyday prompts
_GROUPS_PER_SAVE = 16
_DRAWN_PER_PAIR = 2  # twins, and questions, that a step draws for each of its pairs


@dataclass(frozen=True)
class ExtraTerms:
    """Weights of the loss terms beside DPO's; 0: off.

    text_kl          of the KL to base on `texts`, of which each step draws a batch, by seed and step
    counterfactual   of the counterfactual KL, on twice as many twins as the batch has pairs
    question         of the question loss, on as many questions
    everyday         of the everyday KL, on half as many of `answers` as the batch has pairs
    ending           of the ending KL, on what the policy writes in every fourth step to the batch's prompts
    texts            token ids of plain texts
    answers          everyday prompts with base's answers, token ids
    end              the token that ends a completion
    """

    text_kl: float = 0.0
    counterfactual: float = 0.0
    question: float = 0.0
    everyday: float = 0.0
    ending: float = 0.0
    texts: Sequence[list[int]] = ()
    answers: Sequence[Branches] = ()
    end: int = 0

    @property
    def need_packing(self) -> bool:
        return bool(self.counterfactual or self.question or self.everyday or self.ending)


class TokenizedDPOTrainer(DPOTrainer):  # type: ignore[misc]  # trl has no types
    """DPOTrainer on rows of `prompt_ids`, `chosen_ids`, `rejected_ids`, with a LoRA adapter.

    note   called with one line when a slower path must be taken
    """

    control: Any

    def __init__(
        self, *args: Any, terms: ExtraTerms | None = None, note: Callable[[str], None] = logger.info, **kwargs: Any
    ) -> None:
        self._terms = terms or ExtraTerms()
        self._templates = Counterfactuals() if self._terms.counterfactual or self._terms.question else None
        self._note = note
        self._batch_in_step = (-1, 0)  # a step, and how many of its batches were computed
        self._reference: ReferenceCache | None = None
        self._on_reference: Callable[[int, int], None] = lambda _done, _total: None
        super().__init__(*args, **kwargs)
        base_model = self.model.get_base_model()
        reason = "its weights are sharded across processes" if self._is_sharded() else why_not_packed(base_model)
        self.is_packed = not reason
        if reason and self._terms.need_packing:
            raise ConfigError(
                "counterfactual_weight, question_weight, everyday_weight and ending_weight can't be used with this model: "
                f"{reason}; set them to 0"
            )
        if reason:
            note(f"The model is trained TRL's own way, about half as fast: {reason}")
        else:
            add_packed_forward(base_model)

    def _is_sharded(self) -> bool:
        whole = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        return self.accelerator.distributed_type not in whole

    def use_everyday(self, prompts: Sequence[tuple[int, ...]], file: Path, on_progress: Callable[[int, int], None]) -> None:
        """Let base answer everyday prompts (token ids), or find its answers in `file`, which is written for the next run.

        on_progress   called with (prompts answered, prompts in all)
        """
        key = hashlib.sha256(json.dumps([prompts, losses.MAX_NEW_TOKENS]).encode()).hexdigest()
        known = read_json(file) if file.exists() else {}
        if known.get("key") != key:
            answers: list[Branches] = []
            self.model.to(self.accelerator.device)
            for start in range(0, len(prompts), ANSWERED_AT_ONCE):
                on_progress(start, len(prompts))
                with self.model.disable_adapter():
                    batch = prompts[start : start + ANSWERED_AT_ONCE]
                    answers += losses.generate(self.model, batch, self._terms.end, self.accelerator)
            # An answer below the limit was ended by base, which is part of it.
            texts = [one.completions[0] for one in answers]
            known = {"key": key, "answers": [[*ids, self._terms.end][: losses.MAX_NEW_TOKENS] for ids in texts]}
            if self.accelerator.is_main_process:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, known)
        pairs = zip(prompts, known["answers"], strict=True)
        self._terms = replace(self._terms, answers=[Branches(prompt, (tuple(ids),)) for prompt, ids in pairs])

    # The reference

    def use_reference(self, cache: ReferenceCache, on_progress: Callable[[int, int], None]) -> None:
        """Compute the reference's log-probabilities of all rows now, or find them in `cache`, instead of in every step.

        on_progress   called with (rows done, rows to do) by each process at the same points; if it raises, what was computed so
                      far is kept

        In bf16 they stay in every step: the rounding of a number depends on its batch, by up to half a nat, so only in the
        policy's own batch are both rounded alike.
        """
        reason = ""
        if self._is_sharded():
            reason = "the model's weights are sharded across processes"
        elif self.args.bf16 or self.args.fp16 or self.model.get_base_model().dtype != torch.float32:
            reason = "at low precision policy and reference must be rounded alike"
        if reason:
            self._note(f"The reference is computed in every step: {reason}")
            return
        self._reference, self._on_reference = cache, on_progress
        self.precompute_ref_logps = True  # from now on, TRL reads them from the rows
        for name in ("train_dataset", "eval_dataset"):
            rows = getattr(self, name)
            if rows is not None:
                setattr(self, name, self._precompute_ref_logps(rows, name, 1))

    def _precompute_ref_logps(self, dataset: Any, _name: str, _batch_size: int) -> Any:
        """TRL's hook: the rows with `ref_chosen_logps` and `ref_rejected_logps`, from the cache or computed into it."""
        assert self._reference is not None
        keys = [row_key(row) for row in dataset]
        by_group = self._reference.load()
        in_groups = list(groups(dict(zip(keys, dataset, strict=True))))
        by_group |= self._compute_reference([group for group in in_groups if group.key not in by_group])
        by_row = {key: logps for group in in_groups for key, logps in zip(group.keys, by_group[group.key], strict=True)}
        chosen, rejected = zip(*(by_row[key] for key in keys), strict=True)
        return dataset.add_column("ref_chosen_logps", list(chosen)).add_column("ref_rejected_logps", list(rejected))

    def _compute_reference(self, missing: Sequence[Group]) -> dict[str, list[Logps]]:
        """Each process computes one group at a time; all get all results, and the main process saves them."""
        assert self._reference is not None
        computed: dict[str, list[Logps]] = {}
        unsaved: dict[str, list[Logps]] = {}
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        done, total = 0, sum(len(group.rows) for group in missing)
        was_training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(missing), processes):
                batch = missing[start : start + processes]
                gathered = dict(gather_object([(group.key, self._reference_logps(group)) for group in batch[rank : rank + 1]]))
                computed |= gathered
                unsaved |= gathered
                if self.accelerator.is_main_process and len(unsaved) >= _GROUPS_PER_SAVE:
                    self._reference.add(unsaved)
                    unsaved = {}
                done += sum(len(group.rows) for group in batch)
                self._on_reference(done, total)
        finally:
            self.model.train(was_training)
            if self.accelerator.is_main_process:
                self._reference.add(unsaved)
        return computed

    def _reference_logps(self, group: Group) -> list[Logps]:
        inputs = {name: tensor.to(self.accelerator.device) for name, tensor in self.data_collator(list(group.rows)).items()}
        chosen, rejected = self.compute_ref_log_probs(self.model, inputs)
        return list(zip(chosen.tolist(), rejected.tolist(), strict=True))

    # The loss

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        gathered: list[torch.Tensor] = []
        gather = self.accelerator.gather

        def gather_and_remember(tensor: torch.Tensor) -> torch.Tensor:
            gathered.append(gather(tensor))
            return gathered[-1]

        self.accelerator.gather = gather_and_remember
        try:
            result = super()._compute_loss(model, inputs, return_outputs)
        finally:
            del self.accelerator.gather
        # TRL gathers rewards, accuracies, margins and two logps, in this order; its accuracy calls a tie a miss.
        accuracy = rewards.reward_accuracy(gathered[-3].float().cpu(), self.beta)
        self._metrics["train" if self.model.training else "eval"]["rewards/accuracies"][-1] = accuracy
        if not self.model.training:
            return result
        extra = self._extra_terms(model, inputs)
        return (result[0] + extra, result[1]) if return_outputs else result + extra

    def _extra_terms(self, model: Any, inputs: Any) -> torch.Tensor:
        """The weighted sum of the terms beside DPO's, (). What is drawn depends only on seed, step and batch, so that a resumed
        run draws what an uninterrupted one would."""
        terms, metrics, step = self._terms, self._metrics["train"], self.state.global_step
        batch_in_step = self._batch_in_step[1] if self._batch_in_step[0] == step else 0
        self._batch_in_step = (step, batch_in_step + 1)
        batch = f"{self.args.seed}-{step}-{batch_in_step}"
        total = torch.zeros((), device=self.accelerator.device)

        def add(name: str, weight: float, loss: torch.Tensor) -> None:
            nonlocal total
            metrics[name].append(loss.item())
            total = total + weight * loss

        if terms.text_kl:
            text_kl = losses.packed_text_kl if self.is_packed else losses.padded_text_kl
            add("text_kl", terms.text_kl, text_kl(model, self._draw_texts(batch), self.accelerator))
        if terms.everyday:
            count = min(max(1, self.args.per_device_train_batch_size // 2), len(terms.answers))
            drawn = random.Random(f"everyday-{batch}-{self.accelerator.process_index}").sample(terms.answers, count)
            add("everyday_kl", terms.everyday, losses.answer_kl(model, drawn, self.accelerator))
        if self._templates is not None:
            draw = random.Random(f"counterfactuals-{batch}-{self.accelerator.process_index}")
            count = _DRAWN_PER_PAIR * self.args.per_device_train_batch_size
            if terms.counterfactual:
                twins = [losses.encode_twins(self._templates.twins(draw), self.processing_class) for _ in range(count)]
                add("counterfactual_kl", terms.counterfactual, losses.counterfactual_kl(model, twins, self.accelerator))
            if terms.question:
                questions = [self._templates.question(draw) for _ in range(count)]
                loss, accuracy = losses.question_loss(model, questions, self.processing_class, self.accelerator)
                add("question_loss", terms.question, loss)
                metrics["question_accuracy"].append(accuracy)
        if terms.ending and step % GENERATE_EVERY == 0:
            labels = torch.where(inputs["completion_mask"].bool(), inputs["input_ids"], -100)
            prompts = [pair.prompt for pair in unpad(inputs["input_ids"], inputs["attention_mask"], labels)]
            written = losses.generate(model, prompts, terms.end, self.accelerator)
            add("ending_kl", terms.ending, losses.ending_kl(model, written, terms.end, self.accelerator))
            metrics["written_tokens"].append(sum(len(one.completions[0]) for one in written) / len(written))
        return total

    def _draw_texts(self, batch: str) -> list[list[int]]:
        """This process's share of as many texts as all processes have pairs."""
        processes = self.accelerator.num_processes
        count = min(self.args.per_device_train_batch_size * processes, len(self._terms.texts))
        drawn = random.Random(batch).sample(self._terms.texts, count)
        return drawn[self.accelerator.process_index :: processes] or drawn

    # TRL's other hooks

    def _prepare_dataset(self, dataset: Any, *_args: Any, **_kwargs: Any) -> Any:
        return dataset

    def create_model_card(self, *_args: Any, **_kwargs: Any) -> None:
        """Writes none: the run's own provenance says more."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # First: the checkpoint is complete once trainer_state.json is written, which comes last.
        save_unlogged(self, Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
        super()._save_checkpoint(model, trial)

    def evaluation_loop(self, dataloader: Any, *_args: Any, metric_key_prefix: str = "eval", **_kwargs: Any) -> EvalLoopOutput:
        """TRL's metrics and the loss as means over pairs: each round counts as often as it has pairs."""
        rows, accelerator, metrics = dataloader.dataset, self.accelerator, self._metrics["eval"]
        model = self._wrap_model(self.model, training=False)
        if not accelerator._models:  # evaluated before it was trained
            model = accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        loss_sum = 0.0
        accelerator.gather_for_metrics = accelerator.gather  # it would truncate the last batch as in training
        try:
            shares = accelerator.num_processes, accelerator.process_index
            for round_ in rounds(len(rows), self.args.per_device_eval_batch_size, *shares):
                batch = self.data_collator([rows[i] for i in round_.rows])
                loss, _logits, _labels = self.prediction_step(model, batch, prediction_loss_only=True)
                loss_sum += accelerator.gather(loss.detach().reshape(1)).mean().item() * round_.pairs
                for values in metrics.values():
                    values += values[-1:] * (round_.pairs - 1)  # TRL takes the mean of a list
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        finally:
            del accelerator.gather_for_metrics
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": loss_sum / len(rows)}, len(rows))


# Held-out rows divided among processes


@dataclass(frozen=True)
class Round:
    """What one process computes while the others compute theirs.

    rows    numbers of its rows
    pairs   different rows of all processes together
    """

    rows: range
    pairs: int


def rounds(count: int, batch_size: int, processes: int, rank: int) -> list[Round]:
    """Rows 0 … count - 1 in rounds of at most `batch_size` rows a process: full batches first, then equal parts of the rest.

    Fewer rows than processes are computed by every process, whose equal numbers change no mean.
    """
    found: list[Round] = []
    start = 0
    while start < count:
        each = min(batch_size, (count - start) // processes)
        if each:
            first = start + rank * each
            found.append(Round(range(first, first + each), each * processes))
        else:
            rows = range(start, min(start + batch_size, count))
            found.append(Round(rows, len(rows)))
        start += found[-1].pairs
    return found
