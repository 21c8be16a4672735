"""Held-out pairs, scored without and with the adapter, as one completion after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(params=["tiny_llama", "tiny_phi"])
def policy(request: pytest.FixtureRequest) -> Any:
    """A PeftModel whose adapter changes something, with the packed forward."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    from training.packing import add_packed_forward

    folder: Path = request.getfixturevalue(request.param)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    add_fused_lm_head(base)
    add_packed_forward(base)
    return model


def test_scores_are_those_of_one_completion_after_the_other(policy: Any) -> None:
    import torch

    from training.finish import score_base_and_tuned
    from training.rows import TokenRow

    draw = np.random.default_rng(0)
    rows = [TokenRow(*(draw.integers(30, 300, size).tolist() for size in sizes)) for sizes in ((5, 3, 9), (2, 7, 1), (12, 4, 4))]

    def by_hand(completions: str) -> tuple[list[float], float]:
        logps, kl = [], 0.0
        with torch.no_grad():
            for row in rows:
                ids, start = row.prompt_ids + getattr(row, completions), len(row.prompt_ids)
                tuned = policy(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
                with policy.disable_adapter():
                    base = policy(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
                logps.append(sum(float(tuned[i, token]) for i, token in enumerate(ids[start:])))
                kl += float((base.exp() * (base - tuned)).sum())
        return logps, kl

    policy.eval()
    (chosen, kl), (rejected, _) = by_hand("chosen_ids"), by_hand("rejected_ids")
    policy.train()
    done: list[int] = []
    scores = score_base_and_tuned(policy, rows, batch_size=2, on_batch=done.append)
    assert done == [2, 3]
    np.testing.assert_allclose(scores.tuned, [chosen, rejected], atol=1e-3)
    assert scores.kl == pytest.approx(kl / 14, abs=1e-4)  # tokens of the chosen completions: 3 + 7 + 4
    assert np.abs(scores.base - scores.tuned).min() > 0.01
    assert scores.lengths.tolist() == [[3, 7, 4], [9, 1, 4]]
    assert policy.training
