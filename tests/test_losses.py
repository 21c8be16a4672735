"""The loss terms beside DPO's, by hand on logits of unpacked rows, and against autograd."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from biasdpo.counterfactuals import Question, Twins
from tests.tiny_trainer import ACCELERATOR, TEXTS, assert_same_gradients, load_policies, reset_adapter
from training import losses
from training.losses import MARGIN, TwinIds
from training.packing import Branches

END = 2
TWINS = [TwinIds(((5, 40, 41, 42), (5, 50, 51, 41, 42)), ((1, 2), (2, 3))), TwinIds(((60, 61), (62, 61)), ((0,), (0,)))]
COMPLETED = [Branches((5, 6, 7), ((40, 41, 42), (50, 51)))]


class Characters:
    """A token a character."""

    def encode(self, text, **_settings):
        return [ord(letter) % 100 + 3 for letter in text]


@pytest.fixture
def policies(tiny_llama):
    """The same PeftModel twice: as it is, and computing packed rows."""
    return load_policies(tiny_llama)


def base_and_policy(model, ids):
    """Log-probabilities (T, V) of the next token after each of `ids`, of base without a gradient and of the policy."""
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return base, model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


def text_kl_by_hand(model):
    pairs = [base_and_policy(model, text) for text in TEXTS]  # one by one: no padding that could leak in
    return torch.cat([(base.exp() * (base - policy)).sum(-1) for base, policy in pairs]).mean()


def counterfactual_kl_by_hand(model):
    kls = []
    for twins in TWINS:
        both = [base_and_policy(model, ids) for ids in twins.ids]
        bases, policies = ([pair[side][list(spots)] for pair, spots in zip(both, twins.spots, strict=True)] for side in (0, 1))
        average = (bases[0].exp() + bases[1].exp()) / 2
        kls += [(average * (average.log() - policy)).sum(-1) for policy in policies]
    return torch.cat(kls).mean()


def answer_kl_by_hand(model):
    [item] = COMPLETED
    kls = []
    for completion in item.completions:
        base, policy = base_and_policy(model, [*item.prompt, *completion])
        answered = slice(len(item.prompt) - 1, -1)
        kls.append((base[answered].exp() * (base - policy)[answered]).sum(-1))
    return torch.cat(kls).mean()


def ending_kl_by_hand(model):
    [item] = COMPLETED
    kls = []
    for completion in item.completions:
        base, policy = base_and_policy(model, [*item.prompt, *completion])
        p, q = (side[len(item.prompt) - 1 :, END].exp() for side in (base, policy))
        assert len(q) == len(completion) + 1
        kls.append((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum())
    return sum(kls) / len(kls)


TERMS = {
    "text": (text_kl_by_hand, lambda policy: losses.packed_text_kl(policy, TEXTS, ACCELERATOR)),
    "text, padded": (text_kl_by_hand, lambda policy: losses.padded_text_kl(policy, TEXTS, ACCELERATOR)),
    "everyday": (answer_kl_by_hand, lambda policy: losses.answer_kl(policy, COMPLETED, ACCELERATOR)),
    "counterfactual": (counterfactual_kl_by_hand, lambda policy: losses.counterfactual_kl(policy, TWINS, ACCELERATOR)),
    "ending": (ending_kl_by_hand, lambda policy: losses.ending_kl(policy, COMPLETED, END, ACCELERATOR)),
}


@pytest.mark.parametrize("term", TERMS)
def test_each_kl_and_its_gradient_are_those_by_hand(policies, term):
    by_hand, ours = TERMS[term]
    expected, kl = by_hand(policies[0]), ours(policies[1])
    assert kl.item() == pytest.approx(expected.item(), rel=1e-3)
    assert kl.item() > 1e-5
    expected.backward()
    kl.backward()
    assert_same_gradients(policies[1], policies[0], tolerance=1e-3)


@pytest.mark.parametrize("term", ["text", "text, padded", "everyday", "ending"])
def test_kl_to_base_is_zero_if_the_policy_is_base(policies, term):
    reset_adapter(policies[1])
    assert TERMS[term][1](policies[1]).item() == pytest.approx(0.0, abs=1e-6)


def test_counterfactual_kl_is_zero_if_base_and_policy_say_the_same_of_both(policies):
    same = [TwinIds(((5, 40, 41, 42), (5, 40, 41, 42)), ((1, 2), (1, 2)))]
    assert losses.counterfactual_kl(policies[1], same, ACCELERATOR).item() > 1e-3  # the adapter has moved
    reset_adapter(policies[1])
    assert losses.counterfactual_kl(policies[1], same, ACCELERATOR).item() == pytest.approx(0.0, abs=1e-6)
    assert losses.counterfactual_kl(policies[1], TWINS, ACCELERATOR).item() > 1e-3  # base distinguishes these


def test_question_loss_by_hand(policies):
    tokenizer = Characters()
    given, right, *wrong = (tokenizer.encode(text) for text in ("ab", "c", "de", "f"))

    def logp(answer):
        _, log_probabilities = base_and_policy(policies[0], given + answer)
        return sum(log_probabilities[len(given) - 1 + i, token] for i, token in enumerate(answer))

    leads = torch.stack([logp(right) - logp(answer) for answer in wrong])
    expected = -torch.nn.functional.logsigmoid(leads - MARGIN).mean()
    loss, accuracy = losses.question_loss(policies[1], [Question("ab", "c", ("de", "f"), True)], tokenizer, ACCELERATOR)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert accuracy == float((leads > 0).all())


def test_a_step_downhill_brings_the_question_loss_down(policies):
    questions = [Question("ab", "c", ("de",), True), Question("ab", "de", ("c", "f"), False)]

    def loss():
        return losses.question_loss(policies[1], questions, Characters(), ACCELERATOR)[0]

    optimizer = torch.optim.SGD([p for p in policies[1].parameters() if p.requires_grad], lr=1e-3)
    before = loss()
    before.backward()
    optimizer.step()
    assert loss().item() < before.item()


def test_shared_tokens_of_twins_are_predicted_at_matching_places():
    tokenizer = SimpleNamespace(encode=lambda text, **_: list(map(ord, text)))
    ids = losses.encode_twins(Twins(("ab", (" c", " de"), " f.")), tokenizer)
    assert ["".join(map(chr, text)) for text in ids.ids] == ["ab c f.", "ab de f."]
    assert ids.spots == ((3, 4, 5), (4, 5, 6))  # " ", "f", "." are predicted from the token before each


def test_generated_in_a_batch_is_what_the_policy_writes_alone(policies, monkeypatch):
    """Prompts of different lengths, token by token; the end and what follows it are left out."""
    monkeypatch.setattr(losses, "MAX_NEW_TOKENS", 12)
    plain, packed = policies
    prompts = [(5, 6, 7, 8, 9), (40,)]

    def alone(prompt, end):
        row = list(prompt)
        while len(row) < len(prompt) + 12 and end not in row[len(prompt) :]:
            row.append(plain(input_ids=torch.tensor([row])).logits[0, -1].argmax().item())
        return tuple(token for token in row[len(prompt) :] if token != end)

    packed.train()
    whole = losses.generate(packed, prompts, END, ACCELERATOR)
    assert packed.training
    assert [one.completions for one in whole] == [(alone(prompt, END),) for prompt in prompts]
    end = whole[0].completions[0][3]  # as if this token were the end
    cut = losses.generate(packed, prompts, end, ACCELERATOR)
    assert [one.completions for one in cut] == [(alone(prompt, end),) for prompt in prompts]
    assert len(cut[0].completions[0]) <= 3
