"""DPO's arithmetic: by hand, and against TRL's own trainer on a tiny model."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from biasdpo import rewards
from tests.byte_model import save_tiny_llama


def test_loss_without_any_margin_is_log_two() -> None:
    loss = rewards.dpo_loss([-10.0], [-20.0], [-10.0], [-20.0], beta=0.1)
    assert loss == pytest.approx([math.log(2)])  # the policy is the reference: -log(1/2) = 0.6931


def test_loss_by_hand() -> None:
    # chosen log-ratio -10 - -12 = 2, rejected -20 - -19 = -1; margin 0.5 * 3 = 1.5; -log(1 / (1 + e^-1.5)) = 0.20141
    assert rewards.dpo_loss([-10.0], [-20.0], [-12.0], [-19.0], beta=0.5) == pytest.approx([0.2014133])
    assert rewards.reward_margin([-10.0], [-20.0], [-12.0], [-19.0], beta=0.5) == pytest.approx([1.5])


def test_normalised_loss_by_hand() -> None:
    # log-ratios a token: 2 / 4 = 0.5 and -1 / 2 = -0.5; beta 2: margin 2; -log(1 / (1 + e^-2)) = 0.126928
    loss = rewards.dpo_norm_loss([-10.0], [-20.0], [-12.0], [-19.0], [4], [2], beta=2.0)
    assert loss == pytest.approx([0.1269280])


def test_log_sigmoid_at_both_ends() -> None:
    assert rewards.log_sigmoid([-1000.0, 0.0, 1000.0]) == pytest.approx([-1000.0, -math.log(2), 0.0])


def test_accuracies_count_a_tie_as_a_miss() -> None:
    assert rewards.reward_accuracy([0.1, 0.0, -0.1, 5.0]) == 0.5  # two of four above zero
    # a token: -10/10 = -1 against -4/2 = -2: right; -3/1 = -3 against -2/1 = -2: wrong; -2/2 against -1/1: a tie
    accuracy = rewards.length_normalised_accuracy([-10, -3, -2], [-4, -2, -1], [10, 1, 2], [2, 1, 1])
    assert accuracy == pytest.approx(1 / 3)


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm"])
def test_agrees_with_trl(tmp_path: Path, loss_type: str) -> None:
    """TRL's reported loss, margin and accuracy of one batch equal ours, computed from log-probabilities that we sum."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig

    from training.trainer import TokenisedDPOTrainer

    folder = save_tiny_llama(tmp_path / "model")
    rows = [
        {"prompt_ids": [40, 41, 42], "chosen_ids": [50, 51, 52, 53, 0], "rejected_ids": [60, 0]},
        {"prompt_ids": [43], "chosen_ids": [70, 0], "rejected_ids": [80, 81, 82, 0]},
    ]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    beta = 3.0
    trainer = TokenisedDPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(tmp_path / "out"),
            loss_type=[loss_type],
            beta=beta,
            per_device_train_batch_size=2,
            activation_checkpointing=False,
            bf16=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # zero at the start, where policy and reference are one
            torch.nn.init.normal_(parameter, std=0.5)

    def logp(completions: str, *, reference: bool) -> list[float]:
        sums = []
        for row in rows:
            ids = torch.tensor([row["prompt_ids"] + row[completions]])
            with torch.no_grad():
                adapter = trainer.model.disable_adapter() if reference else nullcontext()
                with adapter:
                    logits = trainer.model(input_ids=ids).logits
            logps = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            sums.append(logps[len(row["prompt_ids"]) - 1 :].sum().item())
        return sums

    batch = trainer.data_collator(rows)
    trl_loss = trainer.compute_loss(trainer.model, batch).item()
    policy = [logp(c, reference=False) for c in ("chosen_ids", "rejected_ids")]
    reference = [logp(c, reference=True) for c in ("chosen_ids", "rejected_ids")]
    if loss_type == "sigmoid":
        ours = rewards.dpo_loss(*policy, *reference, beta)
    else:
        ours = rewards.dpo_norm_loss(*policy, *reference, [5, 2], [2, 4], beta)
    margins = rewards.reward_margin(*policy, *reference, beta)
    assert np.abs(margins).min() > 1e-3  # else the comparison would show nothing
    assert ours.mean() == pytest.approx(trl_loss, abs=1e-4)
    logged = trainer._metrics["train"]
    assert margins.mean() == pytest.approx(logged["rewards/margins"][0], abs=1e-4)
    assert rewards.reward_accuracy(margins) == pytest.approx(logged["rewards/accuracies"][0])
    assert np.mean(policy[0]) == pytest.approx(logged["logps/chosen"][0], abs=1e-4)
