"""Packed rows: what each token attends to, that a pair's numbers are those of separate rows, and the projection."""

from __future__ import annotations

import math

import pytest
import torch

from tests.tiny_trainer import assert_same_gradients, load_policies
from training import packing
from training.packing import Branches, pack, shared_length, unpad, why_not_packed

PAIRS = [  # prompt, chosen, rejected: of one token, of very unequal lengths, a prompt that others begin with
    ([5, 6, 7], [40, 41, 2], [50, 2]),
    ([5, 6, 7, 8, 9], [42], [*range(51, 74), 2]),
    ([5, 6], [43, 44, 45, 46, 47], [2]),
]


def branches(pairs=PAIRS):
    return [Branches(tuple(prompt), (tuple(chosen), tuple(rejected))) for prompt, chosen, rejected in pairs]


def trl_batch(pairs=PAIRS):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    batch = DataCollatorForPreference(pad_token_id=2)(
        [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in pairs]
    )
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


# The layout


def test_layout_of_two_pairs_by_hand():
    packed = pack(branches([([5, 6, 7], [40, 41], [50]), ([5, 8], [42], [51, 52])]))
    #                            0  1  2   3   4   5  6   7   8   9
    assert packed.ids.tolist() == [[5, 6, 7, 40, 41, 50, 8, 42, 51, 52]]  # the 5, which both prompts begin with, only once
    assert packed.positions.tolist() == [[0, 1, 2, 3, 4, 3, 1, 2, 2, 3]]  # rejected continues from the prompt's end
    assert (packed.shared, packed.own) == (1, (5, 4))
    assert packed.targets.tolist() == [40, 41, 50, 42, 51, 52]
    assert packed.sources.tolist() == [2, 3, 2, 6, 6, 8]  # both completions' first tokens are predicted at the prompt's last
    assert packed.masks[0].int().tolist() == [
        # 5  6  7 40 41 50
        [1, 1, 0, 0, 0, 0],  # 6
        [1, 1, 1, 0, 0, 0],  # 7
        [1, 1, 1, 1, 0, 0],  # 40
        [1, 1, 1, 1, 1, 0],  # 41
        [1, 1, 1, 0, 0, 1],  # 50 of rejected: not chosen's 40, 41
    ]


def test_a_prompt_that_is_all_shared_and_a_plain_text():
    packed = pack(branches([([5, 6], [40], [50]), ([5, 6], [42], [51])]))
    assert packed.ids.tolist() == [[5, 6, 40, 50, 42, 51]]
    assert packed.sources.tolist() == [1, 1, 1, 1]
    packed = pack([Branches((), ((30, 31, 32),)), Branches((), ((40,),))])
    assert packed.ids.tolist() == [[30, 31, 32, 40]]
    assert packed.positions.tolist() == [[0, 1, 2, 0]]
    assert (packed.targets.tolist(), packed.sources.tolist()) == ([31, 32], [0, 1])  # nothing predicts a text's first token


@pytest.mark.parametrize(
    ("prompts", "length"),
    [
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2], [1, 2, 3]], 2),
        ([[1], [2]], 0),
        ([[1, 2]], 0),  # nothing to share
        ([[], [1]], 0),
        ([[3, 1], [3, 1]], 2),
    ],
)
def test_shared_length(prompts, length):
    assert shared_length(list(map(tuple, prompts))) == length


def test_unpad_reads_trls_batch():
    ids, mask, labels = trl_batch().values()
    assert unpad(ids, mask, labels) == branches()
    labels[0, 2] = ids[0, 2]  # chosen's prompt would end a token earlier than rejected's
    with pytest.raises(ValueError, match="same prompt"):
        unpad(ids, mask, labels)


# The model


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_phi"])
def policies(request):
    return load_policies(request.getfixturevalue(request.param))


@pytest.fixture(autouse=True)
def _no_gradients_left(request):
    yield
    if "policies" in request.fixturenames:
        for model in request.getfixturevalue("policies"):
            model.zero_grad()


def packed_logps(model, pairs=PAIRS):
    return model(**trl_batch(pairs), fused_lm_head=True).log_probs.sum(1)


def logps_one_by_one(model, pairs):
    """Summed log-probabilities [chosen of all pairs, rejected of all pairs], from rows of their own, by plain logits."""
    sums = []
    for side in (1, 2):
        for pair in pairs:
            ids = torch.tensor([pair[0] + pair[side]])
            with torch.no_grad():
                logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            sums.append(logps[len(pair[0]) - 1 :].sum().item())
    return sums


@pytest.mark.parametrize("pairs", [PAIRS, PAIRS[:1], PAIRS[1:2], [PAIRS[0]] * 2], ids=["three", "one", "unequal", "same twice"])
def test_packed_logps_are_those_of_rows_of_their_own(policies, pairs):
    plain, packed = policies
    assert packed_logps(packed, pairs).tolist() == pytest.approx(logps_one_by_one(plain, pairs), abs=1e-4)
    assert logps_one_by_one(packed, pairs) == pytest.approx(logps_one_by_one(plain, pairs), abs=1e-6)  # unpacked calls as ever


def test_every_score_and_gradient_is_trls(policies):
    theirs, ours = (model(**trl_batch(), fused_lm_head=True) for model in policies)
    for name in ("log_probs", "entropy", "mean_logits"):
        assert torch.allclose(getattr(ours, name), getattr(theirs, name), atol=1e-4), name
    assert torch.equal(ours.is_top1 & ours.label_mask, theirs.is_top1 & theirs.label_mask)
    assert torch.equal(ours.label_mask, theirs.label_mask)
    for scores in (theirs, ours):
        (scores.log_probs.sum(1) * torch.linspace(-1.0, 2.0, 6)).sum().backward()
    assert_same_gradients(policies[1], policies[0])


def test_no_completion_attends_to_another_completion_or_pair(policies):
    _, packed = policies
    before = packed_logps(packed).tolist()
    changed = packed_logps(packed, [(PAIRS[0][0], [90, 91, 92, 93, 94], PAIRS[0][2]), *PAIRS[1:]]).tolist()
    assert changed[0] != pytest.approx(before[0], abs=0.1)  # the changed one: chosen of the first pair
    assert changed[1:] == pytest.approx(before[1:], abs=1e-4)
    longer = packed_logps(packed, [([5, 6, 7, 99], *PAIRS[0][1:]), *PAIRS[1:]]).tolist()
    assert [longer[i] for i in (1, 2, 4, 5)] == pytest.approx([before[i] for i in (1, 2, 4, 5)], abs=1e-4)


def test_what_cannot_be_packed_says_why(tiny_llama):
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert "vocabulary projection is trained" in why_not_packed(model)
    model.requires_grad_(False)
    assert why_not_packed(model) == ""
    model.config.attention_dropout = 0.1
    assert "dropout (0.1)" in why_not_packed(model)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16))
    assert why_not_packed(gpt2) == "GPT2LMHeadModel is neither LlamaForCausalLM nor PhiForCausalLM"


# The vocabulary projection, against autograd on whole logits

N, H, V = 7, 5, 11


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def head(request):
    torch.manual_seed(0)
    head = torch.nn.Linear(H, V, bias=request.param).requires_grad_(False)
    torch.nn.init.normal_(head.weight)
    return head


@pytest.fixture(params=[1, 2 * V, 2**23], ids=["a row a slice", "two rows", "one slice"])
def _slices(request, monkeypatch):
    monkeypatch.setattr(packing, "LOGITS_PER_SLICE", request.param)


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


def test_kl_to_the_average_of_two_distributions_by_hand():
    head = torch.nn.Linear(1, 2, bias=False).requires_grad_(False)
    head.weight.copy_(torch.tensor([[0.0], [1.0]]))
    base = torch.tensor([[[0.0]], [[math.log(3.0)]]])  # 1/2, 1/2 and 1/4, 3/4: their average is 3/8, 5/8
    hidden = torch.tensor([[[0.0]], [[0.0]]], requires_grad=True)  # the policy: 1/2, 1/2 on both
    kl = packing.kl_to_average(base, hidden, head)
    by_hand = 3 / 8 * math.log(3 / 4) + 5 / 8 * math.log(5 / 4)
    assert kl.flatten().tolist() == pytest.approx([by_hand, by_hand], abs=1e-6)
    kl.sum().backward()
    assert hidden.grad.flatten().tolist() == pytest.approx([-1 / 8, -1 / 8], abs=1e-6)  # q - p of the second: 1/2 - 5/8


def test_no_tokens_and_no_gradient_unless_wanted(head, monkeypatch):
    hidden = torch.zeros((0, H), requires_grad=True)
    assert packing.score_tokens(hidden, head, torch.zeros(0, dtype=torch.long)).logps.shape == (0,)
    monkeypatch.setattr(packing, "_expected", None)  # would be called for a gradient
    with torch.no_grad():
        assert not packing.score_tokens(states(4), head, torch.zeros(N, dtype=torch.long)).logps.requires_grad
    assert not packing.kl_of_tokens(states(5).detach(), states(4).detach(), head).requires_grad
