"""Counterfactual terms: the texts that are drawn, and both losses by hand and against autograd."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from random import Random
from types import SimpleNamespace

import pytest
import torch

from biasdpo.counterfactuals import Counterfactuals, Question, Twins
from biasdpo.data.health import load_overlap
from tests.app_process import ROOT
from tests.test_packing import load
from tests.tiny_trainer import build_tiny_trainer, save_neox
from training import packing
from training.losses import MARGIN, TwinIds, counterfactual_kl, encode_twins, question_loss

BENCHMARKS = ROOT.parent / "shared" / "benchmarks"
ROWS = [{"prompt_ids": [5, 6, 7], "chosen_ids": [40, 41, 2], "rejected_ids": [50, 2]}] * 2


@pytest.fixture
def accelerator():
    return SimpleNamespace(unwrap_model=lambda model: model, device=torch.device("cpu"), autocast=nullcontext)


@pytest.fixture
def tokenizer():
    """A token a character, so that token ids can be read."""
    return SimpleNamespace(encode=lambda text, **_: [ord(letter) % 100 + 3 for letter in text])


# What is drawn


def test_draws_are_of_one_seed_alike_and_of_two_not():
    def drawn(seed):
        draw = Random(seed)
        return [Counterfactuals().twins(draw) for _ in range(20)] + [Counterfactuals().question(draw) for _ in range(20)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_no_slot_is_left_and_twins_differ():
    draw = Random(0)
    templates = Counterfactuals()
    for _ in range(2000):
        twins = templates.twins(draw)
        one, other = twins.texts()
        assert one != other
        for text in (one, other):
            assert not re.search(r"[{}]|  | [.,]|^ |^[a-z]", text), text
        assert isinstance(twins.parts[-1], str)  # what both say of their groups


def test_either_group_comes_first():
    draw, templates = Random(0), Counterfactuals()
    firsts = {twins.texts()[0].split()[0] for twins in (templates.twins(draw) for _ in range(3000))}
    assert {"Men", "Women"} <= firsts


def test_a_question_is_answered_by_what_its_text_says_and_by_nothing_else():
    draw = Random(0)
    templates = Counterfactuals()
    unknown = set(templates._tables["questions"]["unknown"])
    rows = templates._tables["questions"]["deeds"]
    in_other_words = {deed: (told,) for row in rows for deed, told in zip(row[:2], row[2:], strict=True)}
    questions = [templates.question(draw) for _ in range(3000)]
    assert 0.77 < sum(question.answered for question in questions) / 3000 < 0.83
    literal = 0
    for question in questions:
        assert not re.search(r"[{}]|  | [.,]", question.context.replace("\n", ""))
        right, *wrong = (answer.strip() for answer in (question.right, *question.wrong))
        assert len({right, *wrong}) == 1 + len(wrong)
        assert all(answer.startswith(" ") != question.context.endswith("\n") for answer in (question.right, *question.wrong))
        said, asked = re.fullmatch(
            r"(.*)(?:Who|who|Which of them)(?: was it that)? (.*?)\?.*", question.context, re.DOTALL
        ).groups()
        if not question.answered:
            assert asked not in said
            assert right in unknown
            assert not unknown & set(wrong)
            continue
        assert right not in unknown
        assert [answer in unknown for answer in wrong] == [False, True, True, True]
        (phrase,) = {phrase for phrase in (asked, *in_other_words[asked]) if phrase in said}
        literal += phrase == asked
        before = said[: said.rindex(phrase)]  # who comes last before it did it
        names = [re.sub("^The ", "", answer) for answer in (right, wrong[0])]
        mentions = re.findall("|".join(rf"\b{re.escape(name)}\b" for name in [*names, "other one"]), before)
        told_of = mentions[-1] if mentions[-1] != "other one" else next(name for name in names if name != mentions[-2])
        assert told_of == names[0], question
    assert 0.5 < literal / sum(question.answered for question in questions) < 0.7


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="no benchmark files beside the checkout")
def test_no_eight_words_are_a_benchmarks():
    """The leakage check, over many draws and every benchmark file that is at hand."""
    draw = Random(0)
    templates = Counterfactuals()
    texts = [text for _ in range(3000) for text in templates.twins(draw).texts()]
    texts += [question.context for question in (templates.question(draw) for _ in range(3000))]
    assert not load_overlap(BENCHMARKS).flags(texts).any()


# Token ids


def test_what_twins_share_is_predicted_at_the_same_places():
    ids = encode_twins(Twins(("ab", (" c", " de"), " f.")), SimpleNamespace(encode=lambda text, **_: list(map(ord, text))))
    assert "".join(map(chr, ids.ids[0])) == "ab c f."
    assert "".join(map(chr, ids.ids[1])) == "ab de f."
    #                     a  b     c     f  .
    assert ids.spots == ((3, 4, 5), (4, 5, 6))  # " ", "f", "." are predicted from the token before each


# The losses


TWINS = [TwinIds(((5, 40, 41, 42), (5, 50, 51, 41, 42)), ((1, 2), (2, 3))), TwinIds(((60, 61), (62, 61)), ((0,), (0,)))]


def by_hand(policy):
    """Mean over the spots of both texts of KL(average of base's two || policy), each text in a row of its own."""

    def log_probabilities():
        return [
            [
                policy(input_ids=torch.tensor([ids])).logits[0][list(spots)].log_softmax(-1)
                for ids, spots in zip(t.ids, t.spots, strict=True)
            ]
            for t in TWINS
        ]

    policies = log_probabilities()
    with torch.no_grad(), policy.disable_adapter():
        bases = log_probabilities()
    kls = []
    for base, tuned in zip(bases, policies, strict=True):
        p = (base[0].exp() + base[1].exp()) / 2
        kls += [(p * (p.log() - q)).sum(-1) for q in tuned]
    return torch.cat(kls).mean()


@pytest.fixture
def policies(tiny_llama):
    """The same PeftModel twice: as it is, and taught to compute packed rows."""
    return load(tiny_llama)


def test_counterfactual_kl_and_gradient_are_autograds(policies, accelerator):
    expected = by_hand(policies[0])
    expected.backward()
    kl = counterfactual_kl(policies[1], TWINS, accelerator)
    kl.backward()
    assert kl.item() == pytest.approx(expected.item(), rel=1e-4)
    theirs = {name: parameter.grad for name, parameter in policies[0].named_parameters() if parameter.requires_grad}
    for name, parameter in policies[1].named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, theirs[name], atol=1e-4 * theirs[name].abs().max().item()), name


def test_it_is_zero_where_base_says_the_same_of_both_and_so_does_the_policy(policies, accelerator):
    same = [TwinIds(((5, 40, 41, 42), (5, 40, 41, 42)), ((1, 2), (1, 2)))]
    assert counterfactual_kl(policies[1], same, accelerator).item() > 1e-3  # the adapter has moved
    with torch.no_grad():
        for name, parameter in policies[1].named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        assert counterfactual_kl(policies[1], same, accelerator).item() == pytest.approx(0.0, abs=1e-6)
        assert counterfactual_kl(policies[1], TWINS, accelerator).item() > 1e-3  # base tells these apart


def test_two_distributions_by_hand():
    head = torch.nn.Linear(1, 2, bias=False).requires_grad_(False)
    head.weight.copy_(torch.tensor([[0.0], [1.0]]))
    base = torch.tensor([[[0.0]], [[math.log(3.0)]]])  # 1/2, 1/2 and 1/4, 3/4: their average is 3/8, 5/8
    hidden = torch.tensor([[[0.0]], [[0.0]]], requires_grad=True)  # the policy: 1/2, 1/2 on both
    kl = packing.kl_to_average(base, hidden, head)
    by_hand = 3 / 8 * math.log(3 / 4) + 5 / 8 * math.log(5 / 4)
    assert kl.flatten().tolist() == pytest.approx([by_hand, by_hand], abs=1e-6)
    kl.sum().backward()
    assert hidden.grad.flatten().tolist() == pytest.approx([-1 / 8, -1 / 8], abs=1e-6)  # q - p of the second: 1/2 - 5/8


def test_question_loss_by_hand(policies, accelerator, tokenizer):
    question = Question("ab", "c", ("de", "f"), True)
    given, right, *wrong = (tokenizer.encode(text) for text in ("ab", "c", "de", "f"))

    def logp(answer):
        logits = policies[0](input_ids=torch.tensor([given + answer])).logits[0].log_softmax(-1)
        return sum(logits[len(given) - 1 + i, token] for i, token in enumerate(answer))

    leads = torch.stack([logp(right) - logp(answer) for answer in wrong])
    expected = -torch.nn.functional.logsigmoid(leads - MARGIN).mean()
    loss, accuracy = question_loss(policies[1], [question], tokenizer, accelerator)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert accuracy == float((leads > 0).all())


@pytest.mark.parametrize("term", ["counterfactual", "question"])
def test_a_step_downhill_brings_the_loss_down(policies, accelerator, tokenizer, term):
    question = Question("ab", "c", ("de",), True)

    def loss():
        if term == "counterfactual":
            return counterfactual_kl(policies[1], TWINS, accelerator)
        return question_loss(policies[1], [question, Question("ab", "de", ("c", "f"), False)], tokenizer, accelerator)[0]

    optimizer = torch.optim.SGD([p for p in policies[1].parameters() if p.requires_grad], lr=1e-3)
    before = loss()
    before.backward()
    optimizer.step()
    assert loss().item() < before.item()


# In the trainer


def test_the_loss_is_trls_plus_the_weighted_terms(tiny_llama, tmp_path):
    weights = {"counterfactual_weight": 2.0, "question_weight": 0.5}
    ours, trls = (
        build_tiny_trainer(tiny_llama, tmp_path, ROWS, batch=2, way=way, trained=0.05, weights=weights) for way in ("ours", "trl")
    )
    loss, plain = (t.compute_loss(t.model.train(), t.data_collator(ROWS)).item() for t in (ours, trls))
    metrics = ours._metrics["train"]
    kl, question = metrics["counterfactual_kl"][0], metrics["question_loss"][0]
    assert kl > 1e-4
    assert loss == pytest.approx(plain + 2.0 * kl + 0.5 * question, abs=1e-5)
    ours.model.eval()
    assert ours.compute_loss(ours.model, ours.data_collator(ROWS)).item() == pytest.approx(plain, abs=1e-5)  # not in evaluations


def test_a_model_that_computes_no_packed_rows_is_refused(tiny_llama, tmp_path):
    from biasdpo.errors import ConfigError

    folder = save_neox(tmp_path / "neox", tiny_llama)
    with pytest.raises(
        ConfigError, match="counterfactual_weight, question_weight and ending_weight can't be used with this model: GPTNeoX"
    ):
        build_tiny_trainer(folder, tmp_path, ROWS, targets=["query_key_value"], weights={"counterfactual_weight": 1.0})
