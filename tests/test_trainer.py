"""Our DPO trainer: TRL's losses, gradients and metrics for less work; the KL term on plain text; what falls back, and says so."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.tiny_trainer import build_tiny_trainer, save_neox

ROWS = [
    {"prompt_ids": [40, 41, 42], "chosen_ids": [50, 51, 2], "rejected_ids": [60, 2]},
    {"prompt_ids": [40, 41], "chosen_ids": [70], "rejected_ids": [80, 81, 82, 83, 84, 85, 86, 87, 88, 89, 90, 91, 2]},
    {"prompt_ids": [44], "chosen_ids": [2], "rejected_ids": [90, 91, 2]},
    {"prompt_ids": [40, 41, 45, 46], "chosen_ids": [71, 72, 73, 74, 75, 76, 2], "rejected_ids": [92, 2]},
]
TEXTS = [[30, 31, 32, 33, 34], [40, 41], [50]]


@pytest.fixture(scope="module")
def torch():
    import torch

    return torch


@pytest.fixture(params=["tiny_llama", "tiny_phi"])
def folder(request):
    return request.getfixturevalue(request.param)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# The pairs


def test_training_goes_as_trls(folder, tmp_path, torch):
    """Every step's loss and metrics, and the LoRA at the end, over several steps that change the policy."""
    logs, adapters = {}, {}
    for way in ("ours", "trl"):
        trainer = build_tiny_trainer(folder, tmp_path / way, ROWS, way=way, batch=2, num_train_epochs=3, eval_rows=ROWS)
        trainer.train()
        trainer.evaluate()
        logs[way] = [
            {name: value for name, value in entry.items() if "second" not in name and "runtime" not in name}
            for entry in trainer.state.log_history
        ]
        adapters[way] = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(logs["ours"]) == 6 + 1 + 1  # steps, summary, evaluation
    assert {"loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logits/rejected", "entropy", "num_tokens"} <= set(
        logs["trl"][0]
    )
    for ours, theirs in zip(logs["ours"], logs["trl"], strict=True):
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            if name != "total_flos":  # TRL counts them from the padded batch
                assert ours[name] == pytest.approx(value, abs=2e-3, rel=1e-3), name
    assert abs(logs["trl"][5]["loss"] - logs["trl"][0]["loss"]) > 0.01
    for name, parameter in adapters["trl"].items():
        assert torch.allclose(adapters["ours"][name], parameter, atol=1e-3), name


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "apo_zero", "sft"])
def test_gradients_of_each_loss_type_are_trls(folder, tmp_path, torch, loss_type):
    gradients = {}
    for way in ("ours", "trl"):
        trainer = build_tiny_trainer(
            folder, tmp_path, ROWS, way=way, batch=4, trained=0.05, loss_type=[loss_type], beta=0.3, label_smoothing=0.2
        )
        trainer.compute_loss(trainer.model.train(), trainer.data_collator(ROWS)).backward()
        gradients[way] = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    largest = max(gradient.abs().max().item() for gradient in gradients["trl"].values())
    assert largest > 1e-3
    for name, gradient in gradients["trl"].items():
        assert torch.allclose(gradients["ours"][name], gradient, atol=1e-4 * largest), name


@pytest.mark.parametrize("batch", [1, 4])
def test_the_first_loss_is_that_of_no_margin_in_bf16_too(folder, tmp_path, batch):
    from training.trainer import ReferenceCache

    notes: list[str] = []
    trainer = build_tiny_trainer(folder, tmp_path, ROWS, batch=batch, bf16=True, note=notes.append)
    trainer.use_reference(ReferenceCache(tmp_path / "cache.json"), lambda _done, _total: None)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-4)  # -log(1/2)
    assert notes == ["The reference is computed in every step: at low precision both are to be rounded alike"]


def test_another_architecture_is_trained_trls_way_and_says_so(tmp_path, tiny_llama):
    from training.trainer import ReferenceCache

    folder = save_neox(tmp_path / "neox", tiny_llama)
    notes: list[str] = []
    runs = {}
    for way in ("ours", "trl"):
        trainer = build_tiny_trainer(
            folder, tmp_path / way, ROWS, way=way, batch=2, note=notes.append, num_train_epochs=2, targets=["query_key_value"]
        )
        if way == "ours":
            trainer.use_reference(ReferenceCache(tmp_path / "cache.json"), lambda _done, _total: None)
        trainer.train()
        runs[way] = losses(trainer)
    assert len(notes) == 1
    assert "TRL's own way" in notes[0]
    assert "GPTNeoXForCausalLM is neither LlamaForCausalLM nor PhiForCausalLM" in notes[0]
    assert runs["ours"] == pytest.approx(runs["trl"], abs=1e-4)


def test_a_packed_model_generates_as_before(folder, tmp_path, torch):
    """Probes complete prompts with the very model that is trained, a batch padded at the left among them."""
    texts = []
    for way in ("ours", "trl"):
        model = build_tiny_trainer(folder, tmp_path, ROWS, way=way, trained=0.05).model.eval()
        ids = torch.tensor([[2, 2, 40, 41], [40, 41, 42, 43]])
        mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
        texts.append(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False).tolist())
    assert texts[0] == texts[1]


def test_checkpoints_resume_to_the_same_losses(tiny_llama, tmp_path):
    from training.trainer import ReferenceCache

    def build(name, **settings):
        trainer = build_tiny_trainer(
            tiny_llama,
            tmp_path / name,
            ROWS,
            num_train_epochs=2,
            text_kl_weight=0.5,
            anchor_texts=TEXTS,
            save_strategy="steps",
            save_steps=3,
            **settings,
        )
        trainer.use_reference(ReferenceCache(tmp_path / "cache.json"), lambda _done, _total: None)
        return trainer

    whole = build("whole")
    whole.train()
    resumed = build("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert len(losses(whole)) == 8
    assert losses(resumed) == losses(whole)  # to the last digit; the first three come with the checkpoint


# The KL term on plain text


@pytest.fixture
def policies(folder):
    """The same PeftModel twice, with an adapter that changes something: as it is, and taught to compute packed rows."""
    from tests.test_packing import load

    return load(folder)


@pytest.fixture
def accelerator(torch):
    from contextlib import nullcontext

    return SimpleNamespace(unwrap_model=lambda model: model, device=torch.device("cpu"), autocast=nullcontext)


def text_kls():
    from training.losses import packed_text_kl, padded_text_kl

    return padded_text_kl, packed_text_kl


def test_text_kl_is_the_mean_over_real_tokens(torch, policies, accelerator):
    by_hand = []
    with torch.no_grad():
        for text in TEXTS:  # one by one: no padding that could leak in
            ids = torch.tensor([text])
            q = policies[0](input_ids=ids).logits[0].log_softmax(-1)
            with policies[0].disable_adapter():
                p = policies[0](input_ids=ids).logits[0].log_softmax(-1)
            by_hand += (p.exp() * (p - q)).sum(-1).tolist()
    assert len(by_hand) == 8
    for policy, text_kl in zip(policies, text_kls(), strict=True):
        kl = text_kl(policy, TEXTS, accelerator)
        assert kl.item() == pytest.approx(sum(by_hand) / 8, rel=1e-4)
        assert kl.item() > 1e-3


def test_gradients_of_text_kl_are_those_of_autograd(torch, policies, accelerator):
    for policy, text_kl in zip(policies, text_kls(), strict=True):
        text_kl(policy, TEXTS, accelerator).backward()
    theirs = {name: p.grad for name, p in policies[0].named_parameters() if p.requires_grad}
    for name, parameter in policies[1].named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, theirs[name], atol=1e-4 * theirs[name].abs().max().item()), name


def test_text_kl_is_zero_without_an_update_and_pulls_back_with_one(torch, policies, accelerator):
    for policy, text_kl in zip(policies, text_kls(), strict=True):
        optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=1e-3)
        before = text_kl(policy, TEXTS, accelerator)
        before.backward()
        optimizer.step()
        assert text_kl(policy, TEXTS, accelerator).item() < before.item()
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
        assert text_kl(policy, TEXTS, accelerator).item() == pytest.approx(0.0, abs=1e-6)  # policy and base are one


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_the_loss_is_trls_plus_weight_times_kl(tiny_llama, tmp_path, weight):
    ours, trls = (
        build_tiny_trainer(tiny_llama, tmp_path, ROWS, way=way, trained=0.05, text_kl_weight=weight, anchor_texts=TEXTS)
        for way in ("ours", "trl")
    )
    loss, plain = (t.compute_loss(t.model.train(), t.data_collator(ROWS[:2])).item() for t in (ours, trls))
    kl = ours._metrics["train"]["text_kl"]
    if weight == 0.0:
        assert kl == []
        assert loss == pytest.approx(plain, abs=1e-5)
    else:
        assert kl[0] > 1e-3
        assert loss == pytest.approx(plain + 2.0 * kl[0], abs=1e-5)


def test_texts_are_drawn_by_step_and_batch_whatever_was_logged(tiny_llama, tmp_path):
    """Two batches a step: two draws, the same ones where the metrics were cleared, as they are by a log line or a restart."""
    texts = [[i] for i in range(10_000)]
    one, two = (build_tiny_trainer(tiny_llama, tmp_path, ROWS, text_kl_weight=1.0, anchor_texts=texts) for _ in range(2))
    drawn = []
    for step in range(3):
        one.state.global_step = step
        drawn += [one._draw_texts(f"{step}-{one._batch_of_step()}") for _ in range(2)]
        one._metrics["train"]["text_kl"].append(0.0)
    two.state.global_step = 2
    assert [two._draw_texts(f"2-{two._batch_of_step()}") for _ in range(2)] == drawn[4:]
    assert len({str(texts) for texts in drawn}) == 6


def test_anchor_texts_are_within_max_length_and_none_without_a_weight(tiny_llama):
    from biasdpo.backends.hf_loading import encode_text, load_tokenizer
    from biasdpo.config import TrainConfig
    from biasdpo.data.pairs import PreferencePair
    from training.finish import anchor_texts

    tokenizer = load_tokenizer(tiny_llama)
    pair = PreferencePair("Who is it? " * 20, "", "Nobody.")
    whole = encode_text(tokenizer, pair.prompt)
    assert len(whole) > 16
    config = TrainConfig(max_length=16, text_kl_weight=0.1)
    assert anchor_texts([pair], tokenizer, config) == [whole[:16]]  # and no empty one
    assert anchor_texts([pair], tokenizer, TrainConfig(max_length=16, text_kl_weight=0.0)) == []
