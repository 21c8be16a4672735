"""Our DPO trainer: TRL's losses, gradients and metrics for less work; the terms it adds; what falls back, and says so."""

from __future__ import annotations

import pytest
import torch

from biasdpo.config import TrainConfig
from biasdpo.errors import ConfigError
from tests.tiny_trainer import ROWS, TEXTS, build_tiny_trainer, losses_of, save_neox
from training import losses
from training.packing import Branches
from training.reference import ReferenceCache
from training.trainer import Round, rounds


def build_both(folder, output, rows=ROWS, **settings):
    return [build_tiny_trainer(folder, output / str(ours), rows, ours=ours, **settings) for ours in (True, False)]


def first_loss(trainer, rows=ROWS, train=True):
    return trainer.compute_loss(trainer.model.train(train), trainer.data_collator(rows))


@pytest.fixture(params=["tiny_llama", "tiny_phi"])
def folder(request):
    return request.getfixturevalue(request.param)


# The pairs


def test_training_goes_as_trls(folder, tmp_path):
    """Every step's loss and metrics, and the LoRA at the end, over several steps that change the policy."""
    logs, adapters = [], []
    for trainer in build_both(folder, tmp_path, batch=2, num_train_epochs=3, eval_rows=ROWS):
        trainer.train()
        trainer.evaluate()
        logs.append(trainer.state.log_history)
        adapters.append({name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad})
    assert len(logs[0]) == 6 + 1 + 1  # steps, summary, evaluation
    assert {"loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logits/rejected", "num_tokens"} <= set(logs[1][0])
    for ours, theirs in zip(*logs, strict=True):
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            if name == "rewards/accuracies" and theirs["rewards/margins"] == 0:
                value = 0.5  # to TRL, a tie is a miss
            # TRL counts total_flos from the padded batch.
            if name != "total_flos" and "second" not in name and "runtime" not in name:
                assert ours[name] == pytest.approx(value, abs=2e-3, rel=1e-3), name
    assert abs(logs[1][5]["loss"] - logs[1][0]["loss"]) > 0.01
    for name, parameter in adapters[1].items():
        assert torch.allclose(adapters[0][name], parameter, atol=1e-3), name


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "apo_zero", "sft"])
def test_gradients_of_each_loss_type_are_trls(tiny_llama, tmp_path, loss_type):
    settings = {"batch": 4, "trained": 0.05, "loss_type": [loss_type], "beta": 0.3, "label_smoothing": 0.2}
    gradients = []
    for trainer in build_both(tiny_llama, tmp_path, **settings):
        first_loss(trainer).backward()
        gradients.append({name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad})
    largest = max(gradient.abs().max().item() for gradient in gradients[1].values())
    assert largest > 1e-3
    for name, gradient in gradients[1].items():
        assert torch.allclose(gradients[0][name], gradient, atol=1e-4 * largest), name


@pytest.mark.parametrize("batch", [1, 4])
def test_the_first_loss_is_that_of_no_margin_in_bf16_too(folder, tmp_path, batch):
    notes: list[str] = []
    trainer = build_tiny_trainer(folder, tmp_path, ROWS, batch=batch, bf16=True, max_steps=1, note=notes.append)
    trainer.use_reference(ReferenceCache(tmp_path / "cache.json"), lambda _done, _total: None)
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(0.6931, abs=1e-4)  # -log(1/2)
    assert notes == ["The reference is computed in every step: at low precision policy and reference must be rounded alike"]


def test_another_architecture_is_trained_trls_way_and_says_so(tmp_path, tiny_llama):
    notes: list[str] = []
    neox = save_neox(tmp_path / "neox", tiny_llama)
    ours, theirs = build_both(neox, tmp_path, batch=2, note=notes.append, num_train_epochs=2, targets=["query_key_value"])
    ours.use_reference(ReferenceCache(tmp_path / "cache.json"), lambda _done, _total: None)
    for trainer in (ours, theirs):
        trainer.train()
    assert losses_of(ours) == pytest.approx(losses_of(theirs), abs=1e-4)
    [note] = notes
    assert "TRL's own way" in note
    assert "GPTNeoXForCausalLM is neither LlamaForCausalLM nor PhiForCausalLM" in note
    with pytest.raises(ConfigError, match="ending_weight can't be used with this model: GPTNeoX"):
        build_tiny_trainer(neox, tmp_path, ROWS, targets=["query_key_value"], terms={"counterfactual": 1.0})


def test_a_packed_model_generates_as_before(folder, tmp_path):
    """Probes complete prompts with the very model that is trained; here a batch padded on the left."""
    texts = []
    for trainer in build_both(folder, tmp_path, trained=0.05):
        ids = torch.tensor([[2, 2, 40, 41], [40, 41, 42, 43]])
        mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
        model = trainer.model.eval()
        texts.append(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False).tolist())
    assert texts[0] == texts[1]


def test_checkpoints_resume_to_the_same_losses(tiny_llama, tmp_path):
    settings = {"num_train_epochs": 2, "terms": {"text_kl": 0.5, "texts": TEXTS}, "save_strategy": "steps", "save_steps": 3}
    trainers = [build_tiny_trainer(tiny_llama, tmp_path / name, ROWS, **settings) for name in ("whole", "resumed")]
    for trainer, checkpoint in zip(trainers, (None, str(tmp_path / "whole" / "checkpoint-3")), strict=True):
        trainer.use_reference(ReferenceCache(tmp_path / "cache.json"), lambda _done, _total: None)
        trainer.train(resume_from_checkpoint=checkpoint)
    whole, resumed = map(losses_of, trainers)
    assert len(whole) == 8
    assert resumed == whole  # to the last digit; the first three come with the checkpoint


# The terms beside DPO's


@pytest.mark.parametrize(
    ("terms", "names"),
    [
        ({}, {}),
        ({"text_kl": 2.0, "texts": TEXTS}, {"text_kl": 2.0}),
        ({"everyday": 2.0, "answers": [Branches((5, 6), ((40, 41, 2),)), Branches((7,), ((42,),))]}, {"everyday_kl": 2.0}),
        ({"counterfactual": 2.0, "question": 0.5}, {"counterfactual_kl": 2.0, "question_loss": 0.5}),
        ({"ending": 3.0}, {"ending_kl": 3.0}),
    ],
    ids=["none", "text", "everyday", "counterfactual", "ending"],
)
def test_the_loss_is_trls_plus_the_weighted_terms(tiny_llama, tmp_path, monkeypatch, terms, names):
    monkeypatch.setattr(losses, "MAX_NEW_TOKENS", 12)
    ours, theirs = build_both(tiny_llama, tmp_path, batch=2, trained=0.05, terms=terms)
    plain, loss = first_loss(theirs, ROWS[:2]).item(), first_loss(ours, ROWS[:2]).item()
    metrics = {name: ours._metrics["train"][name][0] for name in names}
    assert loss == pytest.approx(plain + sum(weight * metrics[name] for name, weight in names.items()), abs=1e-5)
    assert all(value > 1e-6 for value in metrics.values())
    assert first_loss(ours, ROWS[:2], train=False).item() == pytest.approx(plain, abs=1e-5)  # not in evaluations
    if "ending" in terms:  # only in every fourth step
        assert 0 < ours._metrics["train"]["written_tokens"][0] <= 12
        for step, expected in ((3, plain), (4, loss)):
            ours.state.global_step = step
            assert first_loss(ours, ROWS[:2]).item() == pytest.approx(expected, abs=1e-5)


def test_base_answers_everyday_prompts_once(tiny_llama, tmp_path, monkeypatch):
    """Greedy, as base alone would; the next run finds the answers, and other prompts are answered anew."""
    monkeypatch.setattr(losses, "MAX_NEW_TOKENS", 6)
    prompts, file, asked = [(5, 6, 7), (8, 9)], tmp_path / "cache" / "everyday.json", []
    one, two = (build_tiny_trainer(tiny_llama, tmp_path, ROWS, trained=0.05, terms={"everyday": 1.0, "end": 2}) for _ in range(2))
    one.use_everyday(prompts, file, lambda done, total: asked.append((done, total)))
    two.use_everyday(prompts, file, lambda *_: pytest.fail("answered again"))
    assert one._terms.answers == two._terms.answers
    base = one.model.get_base_model().eval()
    for answer, prompt in zip(one._terms.answers, prompts, strict=True):
        with one.model.disable_adapter():
            written = base.generate(
                input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=2
            )
        assert (answer.prompt, answer.completions) == (prompt, (tuple(written[0, len(prompt) :].tolist()),))
    one.use_everyday(prompts[:1], file, lambda done, total: asked.append((done, total)))
    assert asked == [(0, 2), (0, 1)]
    assert one.train().training_loss > 0
    assert one.state.log_history[0]["everyday_kl"] > 0


def test_draws_depend_on_step_and_batch_alone(tiny_llama, tmp_path, monkeypatch):
    """Two batches a step: two draws, and the same ones in a trainer that starts at that step, as a resumed one does."""
    drawn: list[list[list[int]]] = []
    monkeypatch.setattr(losses, "packed_text_kl", lambda _model, texts, _accelerator: drawn.append(texts) or torch.zeros(()))
    terms = {"text_kl": 1.0, "texts": [[i] for i in range(10_000)]}
    one, two = (build_tiny_trainer(tiny_llama, tmp_path, ROWS, terms=terms) for _ in range(2))
    for trainer, steps in ((one, range(3)), (two, [2])):
        for step in steps:
            trainer.state.global_step = step
            for _batch in range(2):
                trainer._extra_terms(trainer.model, {})
    assert drawn[6:] == drawn[4:6]
    assert len({str(texts) for texts in drawn}) == 6


def test_anchor_texts_are_within_max_length_and_none_without_a_weight(tiny_llama):
    from biasdpo.backends.hf_loading import encode_text, load_tokenizer
    from biasdpo.data.pairs import PreferencePair
    from training.rows import anchor_texts

    tokenizer = load_tokenizer(tiny_llama)
    pair = PreferencePair("Who is it? " * 20, "", "Nobody.")
    whole = encode_text(tokenizer, pair.prompt)
    assert len(whole) > 16
    assert anchor_texts([pair], tokenizer, TrainConfig(max_length=16, text_kl_weight=0.1)) == [whole[:16]]  # and no empty one
    assert anchor_texts([pair], tokenizer, TrainConfig(max_length=16, text_kl_weight=0.0)) == []


# Evaluations in rounds


def test_rounds_by_hand():
    assert rounds(7, 3, 1, 0) == [Round(range(0, 3), 3), Round(range(3, 6), 3), Round(range(6, 7), 1)]
    # 11 rows, 2 x 3 at once: rows 0 to 5; then 2 each of 6 to 9; then row 10, by both.
    assert rounds(11, 3, 2, 0) == [Round(range(0, 3), 6), Round(range(6, 8), 4), Round(range(10, 11), 1)]
    assert rounds(11, 3, 2, 1) == [Round(range(3, 6), 6), Round(range(8, 10), 4), Round(range(10, 11), 1)]


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 7, 16, 31])
def test_every_row_counts_once(count, batch_size, processes):
    by_process = [rounds(count, batch_size, processes, rank) for rank in range(processes)]
    for at_once in zip(*by_process, strict=True):  # as many rounds for each
        assert len({len(round_.rows) for round_ in at_once}) == 1  # of as many rows
        assert 1 <= len(at_once[0].rows) <= batch_size
        different = {row for round_ in at_once for row in round_.rows}
        assert {round_.pairs for round_ in at_once} == {len(different)}
    assert sum(round_.pairs for round_ in by_process[0]) == count
    assert {row for own in by_process for round_ in own for row in round_.rows} == set(range(count))


def test_a_tie_counts_half_in_an_evaluation(tiny_llama, tmp_path):
    same = [{"prompt_ids": [40 + i], "chosen_ids": [50, i + 3], "rejected_ids": [50, i + 3]} for i in range(5)]
    found = build_tiny_trainer(tiny_llama, tmp_path, ROWS, trained=0.05, eval_rows=same, batch=2).evaluate()
    assert found["eval_rewards/accuracies"] == 0.5


@pytest.mark.parametrize("batch", [2, 4])
def test_an_evaluation_is_a_mean_over_pairs(tiny_llama, tmp_path, batch):
    """Three pairs in twos: TRL's mean of the batches' means would count the third pair twice. Its own, pair by pair, is right."""
    ours, theirs = (
        build_tiny_trainer(tiny_llama, tmp_path, ROWS, ours=ours, batch=size, trained=0.05, eval_rows=ROWS[:3]).evaluate()
        for ours, size in ((True, batch), (False, 1))
    )
    per_pair = [key for key in theirs if "reward" in key or "logps" in key or key == "eval_loss"]
    assert len(per_pair) == 7  # the loss, four of rewards, two of logps
    for key in per_pair:
        assert ours[key] == pytest.approx(theirs[key], abs=1e-4), key
    assert abs(theirs["eval_rewards/margins"]) > 1e-3
