"""TRL's DPO trainer on rows that are tokenised already: the same loss, metrics and checkpoints for less work.

Seven things differ from TRL 1.16; its losses, metrics and loop are its own.
1. A pair is computed as one packed row, the prompt once (`training.packing`), without padding, and the vocabulary projection
   on completion tokens alone (`training.packing`). For Llama and Phi; other models go TRL's way, and `note` says so.
2. The reference's log-probabilities are computed once, before the first step, and kept across runs (`training.trainer`).
3. `text_kl_weight` adds KL(base || policy) on bare text (no template), which is where an unanchored run gets more perplexed:
   DPO holds the policy near the reference only on the pairs' completions.
4. `counterfactual_weight` and `question_weight` add two terms that need no pairs (`training.losses`).
5. `ending_weight` adds a term that keeps completions as long as base's (`training.losses`).
6. A checkpoint holds no model card, and what was not logged yet (`training.callbacks`).
7. An evaluation's metrics are means over pairs, whatever the batch and the processes (`training.trainer`)."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from transformers.trainer_utils import EvalLoopOutput
from trl import DPOTrainer

from biasdpo.counterfactuals import Counterfactuals
from biasdpo.errors import ConfigError, WorkspaceError
from biasdpo.workspace import locked, read_json, write_json
from training import losses
from training.callbacks import save_window
from training.losses import counterfactual_kl, encode_twins, packed_text_kl, padded_text_kl, question_loss
from training.packing import add_packed_forward, unpad, why_not_packed

# --- reference: Log-probabilities of pairs under the reference, kept across runs: WORKSPACE/cache/reference/, o


FORMAT = 1  # raise it where the same pair would get other numbers
ROWS_A_GROUP = 8  # on average
TOKENS_A_GROUP = 2048  # that fill a group

Logps = tuple[float, float]  # chosen, rejected: summed over the completion's tokens, nats
Row = Mapping[str, Any]  # with the token ids `prompt_ids`, `chosen_ids`, `rejected_ids`


@dataclass(frozen=True)
class Group:
    """Rows that are computed together, and their `row_key`s, in the same order."""

    keys: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def key(self) -> str:
        return hashlib.sha256("".join(self.keys).encode()).hexdigest()


def groups(rows: Mapping[str, Row]) -> Iterator[Group]:
    """Share rows (by `row_key`) out among groups.

    The rows themselves say where a group ends, by their hash, so that one more row, or one fewer, changes its own group and
    leaves the others as they were, to be found.
    """
    keys: list[str] = []
    tokens = 0
    for key in sorted(rows):
        keys.append(key)
        tokens += sum(len(rows[key][name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        if int(key[-8:], 16) % ROWS_A_GROUP == 0 or tokens >= TOKENS_A_GROUP:
            yield Group(tuple(keys), tuple(rows[k] for k in keys))
            keys, tokens = [], 0
    if keys:
        yield Group(tuple(keys), tuple(rows[k] for k in keys))


def row_key(row: Row) -> str:
    """Hex SHA-256 of a row's token ids."""
    ids = [list(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


@dataclass(frozen=True)
class ReferenceCache:
    """The file that holds one base model's numbers: those of each group, by `Group.key`, in the order of its rows.

    path    WORKSPACE/cache/reference/NAME.json; NAME tells all on which the numbers depend, beside the tokens
    """

    path: Path

    def load(self) -> dict[str, list[Logps]]:
        """What is known. A file that is missing or damaged in any way knows nothing."""
        with suppress(WorkspaceError, KeyError, TypeError, ValueError):
            content = read_json(self.path)
            known = {
                str(key): [(float(chosen), float(rejected)) for chosen, rejected in logps]
                for key, logps in content["groups"].items()
            }
            numbers = [number for logps in known.values() for pair in logps for number in pair]
            if content["sha256"] == _checksum(known) and all(map(math.isfinite, numbers)):
                return known
        return {}

    def add(self, found: Mapping[str, list[Logps]]) -> None:
        """Keep more groups beside those that other runs may have added meanwhile."""
        if found:
            with locked(self.path):
                known = {**self.load(), **found}
                write_json(self.path, {"sha256": _checksum(known), "groups": known})


def open_cache(folder: Path, base_sha256: str, device: str, threads: int) -> ReferenceCache:
    """The cache of a base model, by its weights' hash, as it is computed in fp32 on `device` ("cpu", "cuda").

    `threads` counts on a CPU alone: they decide how sums are split up, hence last digits.
    """
    splitting = f"-{threads}-threads" if device == "cpu" else ""
    return ReferenceCache(folder / f"{base_sha256[:16]}-{device}{splitting}-v{FORMAT}.json")


def _checksum(known: Mapping[str, list[Logps]]) -> str:
    return hashlib.sha256(json.dumps(sorted(known.items())).encode()).hexdigest()


# --- rounds: Held-out rows shared out among processes, so that a mean over all of them is one, whatever the


@dataclass(frozen=True)
class Round:
    """What one process computes while the others compute theirs.

    rows    numbers of its rows
    pairs   different rows of all processes together
    """

    rows: range
    pairs: int


def rounds(count: int, batch_size: int, processes: int, rank: int) -> list[Round]:
    """Rows 0 … count - 1 in rounds of at most `batch_size` rows a process.

    Full batches first, then equal parts of what is left; fewer rows than processes are computed by every process, whose equal
    numbers change no mean.
    """
    at_once = batch_size * processes
    found = [_share(start, batch_size, processes, rank) for start in range(0, count - at_once + 1, at_once)]
    left = count % at_once
    start = count - left
    if each := left // processes:
        found.append(_share(start, each, processes, rank))
        start += each * processes
    return found + [
        Round(range(i, min(i + batch_size, count)), min(batch_size, count - i)) for i in range(start, count, batch_size)
    ]


def _share(start: int, each: int, processes: int, rank: int) -> Round:
    mine = start + rank * each
    return Round(range(mine, mine + each), each * processes)


# --- trainer: TRL's DPO trainer on rows that are tokenised already: the same loss, metrics and checkpoints fo


_GROUPS_A_SAVE = 16
WRITES_EVERY = 4  # steps between those in which the policy writes to the batch's prompts: it takes as long as a step
_DRAWN_PER_PAIR = 2  # twins, and questions, that a step draws for each of its pairs


class TokenisedDPOTrainer(DPOTrainer):  # type: ignore[misc]  # trl has no types
    """DPOTrainer on rows of `prompt_ids`, `chosen_ids`, `rejected_ids`, with a LoRA adapter.

    text_kl_weight   weight of the KL term; 0 leaves TRL's loss as it is
    anchor_texts     token ids of the bare texts; each step draws a batch of them, by seed and step
    counterfactual_weight, question_weight
                     weights of the counterfactual KL and the question loss; each step draws twice as many twins as it has
                     pairs, and as many questions as twins
    ending_weight    weight of the ending KL, over what the policy writes in every fourth step to its prompts
    note             is told, in one line, where the faster way can't be gone
    """

    control: Any

    def __init__(
        self,
        *args: Any,
        text_kl_weight: float = 0.0,
        anchor_texts: Sequence[list[int]] = (),
        counterfactual_weight: float = 0.0,
        question_weight: float = 0.0,
        ending_weight: float = 0.0,
        note: Callable[[str], None] = print,
        **kwargs: Any,
    ) -> None:
        self._text_kl_weight = text_kl_weight
        self._anchor_texts = anchor_texts
        self._counterfactual_weight, self._question_weight = counterfactual_weight, question_weight
        self._ending_weight = ending_weight
        self._counterfactuals = Counterfactuals() if counterfactual_weight or question_weight else None
        self._batches = (-1, 0)  # a step, and how many of its batches were computed
        self._note = note
        self._reference: ReferenceCache | None = None
        self._on_reference: Callable[[int, int], None] = lambda _done, _total: None
        super().__init__(*args, **kwargs)
        base_model = self.model.get_base_model()
        reason = "its weights are shared out among processes" if self._is_sharded() else why_not_packed(base_model)
        self.is_packed = not reason
        if reason:
            if self._counterfactuals is not None or ending_weight:
                raise ConfigError(
                    "counterfactual_weight, question_weight and ending_weight can't be used with this model: "
                    f"{reason}; set all three to 0"
                )
            note(f"The model is trained TRL's own way, about half as fast: {reason}")
        else:
            add_packed_forward(base_model)

    def use_reference(self, cache: ReferenceCache, on_progress: Callable[[int, int], None]) -> None:
        """Compute the reference's log-probabilities of all rows now, or find them in `cache`, instead of in every step.

        on_progress   told (rows done, rows to do) by each process, at the same rounds; what it raises ends the computing, and
                      what was computed is kept

        In bf16 they stay in every step, and `note` says so: a number's rounding depends on its batch, by up to half a nat, so
        only in the policy's own batch are both rounded alike.
        """
        reason = self._why_in_every_step()
        if reason:
            self._note(f"The reference is computed in every step: {reason}")
            return
        self._reference, self._on_reference = cache, on_progress
        self.precompute_ref_logps = True  # from now on, TRL reads them from the rows
        for name in ("train_dataset", "eval_dataset"):
            rows = getattr(self, name)
            if rows is not None:
                setattr(self, name, self._precompute_ref_logps(rows, name, 1))

    def _why_in_every_step(self) -> str:
        if self._is_sharded():
            return "the model's weights are shared out among processes"
        if self.args.bf16 or self.args.fp16 or self.model.get_base_model().dtype != torch.float32:
            return "at low precision both are to be rounded alike"
        return ""

    def _is_sharded(self) -> bool:
        whole = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        return self.accelerator.distributed_type not in whole

    # What TRL calls

    def _prepare_dataset(self, dataset: Any, *_args: Any, **_kwargs: Any) -> Any:
        return dataset

    def create_model_card(self, *_args: Any, **_kwargs: Any) -> None:
        """None: the run's own provenance says more."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # First: a checkpoint is whole where trainer_state.json is, which comes last.
        save_window(self, Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
        super()._save_checkpoint(model, trial)

    def evaluation_loop(self, dataloader: Any, *_args: Any, metric_key_prefix: str = "eval", **_kwargs: Any) -> EvalLoopOutput:
        """TRL's metrics and the loss, a round's as often as it has pairs. What is a mean over tokens stays one within a round."""
        rows, accelerator, metrics = dataloader.dataset, self.accelerator, self._metrics["eval"]
        model = self._wrap_model(self.model, training=False)
        if not accelerator._models:  # evaluated before it was trained
            model = accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        loss_sum = 0.0
        accelerator.gather_for_metrics = accelerator.gather  # TRL's counts are not to be cut as a training's last batch is
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

    def _precompute_ref_logps(self, dataset: Any, _name: str, _batch_size: int) -> Any:
        """The rows with `ref_chosen_logps` and `ref_rejected_logps`, from the cache or computed into it."""
        assert self._reference is not None
        keys = [row_key(row) for row in dataset]
        by_group = self._reference.load()
        in_groups = list(groups(dict(zip(keys, dataset, strict=True))))
        by_group |= self._compute_reference([group for group in in_groups if group.key not in by_group])
        by_row = {key: logps for group in in_groups for key, logps in zip(group.keys, by_group[group.key], strict=True)}
        chosen, rejected = zip(*(by_row[key] for key in keys), strict=True)
        return dataset.add_column("ref_chosen_logps", list(chosen)).add_column("ref_rejected_logps", list(rejected))

    def _compute_reference(self, missing: Sequence[Group]) -> dict[str, list[Logps]]:
        """In each round every process computes a group; all get all, and the main process keeps them."""
        assert self._reference is not None
        found: dict[str, list[Logps]] = {}
        unsaved: dict[str, list[Logps]] = {}
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        done, total = 0, sum(len(group.rows) for group in missing)
        was_training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(missing), processes):
                round_ = missing[start : start + processes]
                mine = round_[rank : rank + 1]
                computed = dict(gather_object([(group.key, self._reference_of(group)) for group in mine]))
                found |= computed
                unsaved |= computed
                if self.accelerator.is_main_process and len(unsaved) >= _GROUPS_A_SAVE:
                    self._reference.add(unsaved)
                    unsaved = {}
                done += sum(len(group.rows) for group in round_)
                self._on_reference(done, total)
        finally:
            self.model.train(was_training)
            if self.accelerator.is_main_process:
                self._reference.add(unsaved)
        return found

    def _reference_of(self, group: Group) -> list[Logps]:
        inputs = {name: tensor.to(self.accelerator.device) for name, tensor in self.data_collator(list(group.rows)).items()}
        chosen, rejected = self.compute_ref_log_probs(self.model, inputs)
        return list(zip(chosen.tolist(), rejected.tolist(), strict=True))

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        result = super()._compute_loss(model, inputs, return_outputs)
        if not self.model.training or not (self._text_kl_weight or self._counterfactuals or self._ending_weight):
            return result
        added = self._added_terms(model, f"{self.args.seed}-{self.state.global_step}-{self._batch_of_step()}")
        if self._ending_weight and self.state.global_step % WRITES_EVERY == 0:
            added = added + self._ending_term(model, inputs)
        if return_outputs:
            loss, outputs = result
            return loss + added, outputs
        return result + added

    def _added_terms(self, model: Any, batch: str) -> torch.Tensor:
        """The terms beside DPO's own, (). `batch` names the batch, and seeds what is drawn for it."""
        added = torch.zeros((), device=self.accelerator.device)
        metrics = self._metrics["train"]
        if self._text_kl_weight:
            text_kl = packed_text_kl if self.is_packed else padded_text_kl
            kl = text_kl(model, self._draw_texts(batch), self.accelerator)
            metrics["text_kl"].append(kl.item())
            added = added + self._text_kl_weight * kl
        if self._counterfactuals is not None:
            draw = random.Random(f"counterfactuals-{batch}-{self.accelerator.process_index}")
            count = _DRAWN_PER_PAIR * self.args.per_device_train_batch_size
            if self._counterfactual_weight:
                twins = [encode_twins(self._counterfactuals.twins(draw), self.processing_class) for _ in range(count)]
                kl = counterfactual_kl(model, twins, self.accelerator)
                metrics["counterfactual_kl"].append(kl.item())
                added = added + self._counterfactual_weight * kl
            if self._question_weight:
                questions = [self._counterfactuals.question(draw) for _ in range(count)]
                loss, accuracy = question_loss(model, questions, self.processing_class, self.accelerator)
                metrics["question_loss"].append(loss.item())
                metrics["question_accuracy"].append(accuracy)
                added = added + self._question_weight * loss
        return added

    def _ending_term(self, model: Any, inputs: Any) -> torch.Tensor:
        """The weighted ending KL on what the policy writes to a batch's prompts, ()."""
        labels = torch.where(inputs["completion_mask"].bool(), inputs["input_ids"], -100)
        prompts = [pair.prompt for pair in unpad(inputs["input_ids"], inputs["attention_mask"], labels)]
        end, metrics = self.processing_class.eos_token_id, self._metrics["train"]
        written = losses.write(model, prompts, end, self.accelerator)
        kl = losses.ending_kl(model, written, end, self.accelerator)
        metrics["ending_kl"].append(kl.item())
        metrics["written_tokens"].append(sum(len(one.completions[0]) for one in written) / len(written))
        return self._ending_weight * kl

    def _batch_of_step(self) -> int:
        """Which batch of its step this is. With the step it makes a draw of its own, so that a resumed run sees what an
        uninterrupted one would."""
        step, batch = self.state.global_step, self._batches[1] if self._batches[0] == self.state.global_step else 0
        self._batches = (step, batch + 1)
        return batch

    def _draw_texts(self, batch: str) -> list[list[int]]:
        """This process's share of as many texts as all processes have pairs."""
        draw = random.Random(batch)
        processes = self.accelerator.num_processes
        count = min(self.args.per_device_train_batch_size * processes, len(self._anchor_texts))
        drawn = draw.sample(self._anchor_texts, count)
        return drawn[self.accelerator.process_index :: processes] or drawn
