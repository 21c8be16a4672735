"""The vocabulary projection in slices, against autograd on whole logits."""

from __future__ import annotations

import pytest
import torch

from training import packing

N, H, V = 7, 5, 11


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def head(request):
    torch.manual_seed(0)
    head = torch.nn.Linear(H, V, bias=request.param).requires_grad_(False)
    torch.nn.init.normal_(head.weight)
    return head


@pytest.fixture(params=[1, 2 * V, 2**23], ids=["a row a slice", "two rows", "one slice"])
def _slices(request, monkeypatch):
    monkeypatch.setattr(packing, "LOGITS_A_SLICE", request.param)


def states(seed):
    return torch.randn((N, H), generator=torch.Generator().manual_seed(seed)).requires_grad_()


def test_one_token_by_hand():
    head = torch.nn.Linear(1, 2, bias=False).requires_grad_(False)
    head.weight.copy_(torch.tensor([[0.0], [1.0]]))
    hidden = torch.tensor([[2.0]], requires_grad=True)
    scores = packing.score_tokens(hidden, head, torch.tensor([0]))
    assert scores.logps.item() == pytest.approx(-2.126928)  # logits 0 and 2: -log(1 + e^2)
    assert scores.mean_logits.item() == pytest.approx(1.0)
    assert scores.entropies.item() == pytest.approx(0.365334)  # p 0.1192, 0.8808: 0.1192 * 2.1269 + 0.8808 * 0.1269
    assert not scores.are_top.item()
    scores.logps.sum().backward()
    assert hidden.grad.item() == pytest.approx(-0.880797)  # W[y] - p W = 0 - 0.8808


@pytest.mark.usefixtures("_slices")
def test_scores_and_gradient_are_autograds(head):
    targets = torch.tensor([0, 10, 3, 3, 7, 1, 9])
    weights = torch.linspace(-1, 2, N)
    ours, theirs = states(1), states(1)
    log_probabilities = head(theirs).log_softmax(-1)
    logps = log_probabilities.gather(1, targets[:, None])[:, 0]
    (logps * weights).sum().backward()
    scores = packing.score_tokens(ours, head, targets)
    (scores.logps * weights).sum().backward()
    assert torch.allclose(scores.logps, logps, atol=1e-6)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)
    assert torch.allclose(scores.entropies, -(log_probabilities.exp() * log_probabilities).sum(-1), atol=1e-6)
    assert torch.allclose(scores.mean_logits, head(theirs).mean(-1), atol=1e-6)
    assert scores.are_top.tolist() == (head(theirs).argmax(-1) == targets).tolist()
    assert head.weight.grad is None


@pytest.mark.usefixtures("_slices")
def test_kl_and_gradient_are_autograds(head):
    base, ours, theirs = states(2).detach(), states(3), states(3)
    p, q = head(base).log_softmax(-1), head(theirs).log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)
    expected.mean().backward()
    kl = packing.kl_of_tokens(base, ours, head)
    kl.mean().backward()
    assert torch.allclose(kl, expected, atol=1e-5)
    assert kl.min() > 0.01
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


def test_no_gradient_is_computed_where_none_is_wanted(head, monkeypatch):
    monkeypatch.setattr(packing, "_expected", None)  # would be called for it
    with torch.no_grad():
        assert not packing.score_tokens(states(4), head, torch.zeros(N, dtype=torch.long)).logps.requires_grad
    assert not packing.kl_of_tokens(states(5).detach(), states(4).detach(), head).requires_grad


def test_no_tokens_at_all(head):
    hidden = torch.zeros((0, H), requires_grad=True)
    scores = packing.score_tokens(hidden, head, torch.zeros(0, dtype=torch.long))
    assert scores.logps.shape == (0,)
