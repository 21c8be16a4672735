"""The ending KL, by hand on logits of unpacked rows, and in the trainer."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from tests.test_packing import load
from tests.tiny_trainer import build_tiny_trainer
from training import losses
from training.packing import Branches

END = 2
ROWS = [{"prompt_ids": [5, 6, 7], "chosen_ids": [40, 41, 42], "rejected_ids": [50, 51]}] * 2


@pytest.fixture
def accelerator():
    return SimpleNamespace(unwrap_model=lambda model: model, device=torch.device("cpu"), autocast=nullcontext)


def by_hand(policy, prompt, completions):
    """Each completion in a row of its own; q and p: how likely its end is at each of its places."""

    def ends(completion):
        logits = policy(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].softmax(-1)
        return logits[len(prompt) - 1 :, END]

    total = torch.zeros(())
    for completion in completions:
        q = ends(completion)
        with torch.no_grad(), policy.disable_adapter():
            p = ends(completion)
        assert len(q) == len(completion) + 1
        total = total + (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()
    return total / len(completions)


def test_ending_kl_and_gradient_are_autograds(tiny_llama, accelerator):
    plain, packed = load(tiny_llama)
    prompt, completions = (5, 6, 7), ((40, 41, 42), (50, 51))
    expected = by_hand(plain, prompt, completions)
    expected.backward()
    kl = losses.ending_kl(packed, [Branches(prompt, completions)], END, accelerator)
    kl.backward()
    assert kl.item() == pytest.approx(expected.item(), rel=1e-3)
    assert kl.item() > 0
    theirs = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.requires_grad}
    for name, parameter in packed.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, theirs[name], atol=1e-3 * theirs[name].abs().max().item()), name


def test_it_is_zero_where_the_policy_is_base(tiny_llama, accelerator):
    _, packed = load(tiny_llama)
    with torch.no_grad():
        for name, parameter in packed.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        assert losses.ending_kl(packed, [Branches((5, 6), ((40, 41),))], END, accelerator).item() == pytest.approx(0.0, abs=1e-7)


def test_what_the_policy_writes_is_what_it_writes_alone(tiny_llama, accelerator, monkeypatch):
    """Prompts of unlike length together as each alone, token by token; the end and what follows it left out."""
    monkeypatch.setattr(losses, "MAX_NEW_TOKENS", 12)
    plain, packed = load(tiny_llama)
    prompts = [(5, 6, 7, 8, 9), (40,)]

    def alone(prompt, end):
        row = list(prompt)
        while len(row) < len(prompt) + 12 and end not in row[len(prompt) :]:
            row.append(plain(input_ids=torch.tensor([row])).logits[0, -1].argmax().item())
        return tuple(token for token in row[len(prompt) :] if token != end)

    packed.train()
    whole = losses.write(packed, prompts, END, accelerator)
    assert packed.training
    assert [one.completions for one in whole] == [(alone(prompt, END),) for prompt in prompts]
    end = whole[0].completions[0][3]  # as if this token were the end
    cut = losses.write(packed, prompts, end, accelerator)
    assert [one.completions for one in cut] == [(alone(prompt, end),) for prompt in prompts]
    assert len(cut[0].completions[0]) <= 3


def test_the_loss_is_trls_plus_the_weighted_term_in_every_fourth_step(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "MAX_NEW_TOKENS", 12)
    weights = {"ending_weight": 3.0}
    ours, trls = (
        build_tiny_trainer(tiny_llama, tmp_path, ROWS, batch=2, way=way, trained=0.05, weights=weights) for way in ("ours", "trl")
    )
    plain = trls.compute_loss(trls.model.train(), trls.data_collator(ROWS)).item()

    def loss():
        return ours.compute_loss(ours.model.train(), ours.data_collator(ROWS)).item()

    first = loss()
    (kl,) = ours._metrics["train"]["ending_kl"]
    assert kl > 0
    assert first == pytest.approx(plain + 3.0 * kl, abs=1e-5)
    assert 0 < ours._metrics["train"]["written_tokens"][0] <= 12
    ours.state.global_step = 3
    assert loss() == pytest.approx(plain, abs=1e-5)
    ours.state.global_step = 4
    assert loss() == pytest.approx(first, abs=1e-5)
    ours.model.eval()
    assert ours.compute_loss(ours.model, ours.data_collator(ROWS)).item() == pytest.approx(plain, abs=1e-5)  # not in evaluations
