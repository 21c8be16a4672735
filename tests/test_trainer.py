"""The KL term on plain text: its value by hand, its gradient, and that it holds the model near its base."""

from __future__ import annotations

from types import SimpleNamespace

import pytest


@pytest.fixture(scope="module")
def torch():
    import torch

    return torch


@pytest.fixture
def policy(torch, tiny_llama):
    """A PeftModel whose adapter changes something."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return peft


@pytest.fixture
def accelerator(torch):
    from contextlib import nullcontext

    return SimpleNamespace(unwrap_model=lambda model: model, device=torch.device("cpu"), autocast=nullcontext)


TEXTS = [[30, 31, 32, 33, 34], [40, 41], [50]]


def test_text_kl_is_the_mean_over_real_tokens(torch, policy, accelerator):
    from training.trainer import text_kl

    by_hand = []
    with torch.no_grad():
        for text in TEXTS:  # one by one: no padding that could leak in
            ids = torch.tensor([text])
            q = policy(input_ids=ids).logits[0].log_softmax(-1)
            with policy.disable_adapter():
                p = policy(input_ids=ids).logits[0].log_softmax(-1)
            by_hand += (p.exp() * (p - q)).sum(-1).tolist()
    kl = text_kl(policy, TEXTS, accelerator)
    assert len(by_hand) == 8
    assert kl.item() == pytest.approx(sum(by_hand) / 8, rel=1e-4)
    assert kl.item() > 1e-3


def test_text_kl_is_zero_without_an_update_and_pulls_back_with_one(torch, policy, accelerator):
    from training.trainer import text_kl

    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.05)
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
def test_the_loss_is_trls_plus_weight_times_kl(torch, tiny_llama, tmp_path, weight):
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from training.trainer import TokenisedDPOTrainer

    rows = [{"prompt_ids": [40, 41, 42], "chosen_ids": [50, 51, 2], "rejected_ids": [60, 2]}] * 2
    trainer = TokenisedDPOTrainer(
        text_kl_weight=weight,
        anchor_texts=TEXTS,
        model=AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            activation_checkpointing=False,
            bf16=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    trainer.model.train()
    batch = trainer.data_collator(rows)
    plain = DPOTrainer._compute_loss(trainer, trainer.model, batch, False)
    ours = trainer._compute_loss(trainer.model, batch, False)
    kl = trainer._metrics["train"]["text_kl"]
    if weight == 0.0:
        assert kl == []
        assert ours.item() == pytest.approx(plain.item(), abs=1e-5)
    else:
        assert kl[0] > 1e-3
        assert ours.item() == pytest.approx(plain.item() + 2.0 * kl[0], abs=1e-5)
