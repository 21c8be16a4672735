"""Packed rows: what each token sees, and that a pair's log-probabilities and gradients are those of rows of their own."""

from __future__ import annotations

import pytest
import torch

from training.packing import Branches, add_packed_forward, pack, shared_length, unpad, why_not_packed

PAIRS = [  # prompt, chosen, rejected: of one token, of very unequal lengths, a prompt that others begin with
    ([5, 6, 7], [40, 41, 2], [50, 2]),
    ([5, 6, 7, 8, 9], [42], [51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70, 71, 72, 73, 2]),
    ([5, 6], [43, 44, 45, 46, 47], [2]),
]


def branches(pairs=PAIRS):
    return [Branches(tuple(prompt), (tuple(chosen), tuple(rejected))) for prompt, chosen, rejected in pairs]


# The layout


def test_layout_of_two_pairs_by_hand():
    packing = pack(branches([([5, 6, 7], [40, 41], [50]), ([5, 8], [42], [51, 52])]))
    #                             0  1  2   3   4   5  6   7   8   9
    assert packing.ids.tolist() == [[5, 6, 7, 40, 41, 50, 8, 42, 51, 52]]  # the 5, which both prompts begin with, is there once
    assert packing.positions.tolist() == [[0, 1, 2, 3, 4, 3, 1, 2, 2, 3]]  # rejected's go on from the prompt's end
    assert (packing.shared, packing.own) == (1, (5, 4))
    assert packing.targets.tolist() == [40, 41, 50, 42, 51, 52]
    assert packing.sources.tolist() == [2, 3, 2, 6, 6, 8]  # both completions' first tokens are predicted at the prompt's last
    # columns:                       5  6  7 40 41 50
    assert packing.masks[0].int().tolist() == [
        [1, 1, 0, 0, 0, 0],  # 6
        [1, 1, 1, 0, 0, 0],  # 7
        [1, 1, 1, 1, 0, 0],  # 40
        [1, 1, 1, 1, 1, 0],  # 41
        [1, 1, 1, 0, 0, 1],  # 50 of rejected: not chosen's 40, 41
    ]


def test_a_prompt_that_is_all_shared_predicts_from_the_shared_part():
    packing = pack(branches([([5, 6], [40], [50]), ([5, 6], [42], [51])]))
    assert packing.ids.tolist() == [[5, 6, 40, 50, 42, 51]]
    assert packing.sources.tolist() == [1, 1, 1, 1]


def test_a_bare_text_has_no_target_at_its_first_token():
    packing = pack([Branches((), ((30, 31, 32),)), Branches((), ((40,),))])
    assert packing.ids.tolist() == [[30, 31, 32, 40]]
    assert packing.positions.tolist() == [[0, 1, 2, 0]]
    assert (packing.targets.tolist(), packing.sources.tolist()) == ([31, 32], [0, 1])


@pytest.mark.parametrize(
    ("prompts", "length"),
    [
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2], [1, 2, 3]], 2),
        ([[1], [2]], 0),
        ([[1, 2]], 0),
        ([[], [1]], 0),
        ([[3, 1], [3, 1]], 2),
    ],
)
def test_shared_length(prompts, length):
    assert shared_length(list(map(tuple, prompts))) == length  # of one prompt 0: there is nothing to share


def test_unpad_reads_trls_batch():
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in PAIRS]
    batch = DataCollatorForPreference(pad_token_id=2)(rows)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    assert unpad(batch["input_ids"], batch["attention_mask"], labels) == branches()
    labels[0, 2] = batch["input_ids"][0, 2]  # chosen's prompt would end a token earlier than rejected's
    with pytest.raises(ValueError, match="same prompt"):
        unpad(batch["input_ids"], batch["attention_mask"], labels)


# The model


@pytest.fixture(params=["tiny_llama", "tiny_phi"])
def folder(request):
    return request.getfixturevalue(request.param)


def load(folder, seed=0):
    """(PeftModel with an adapter that changes something, its packed twin): the same weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    models = []
    for _ in range(2):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
        names = ["q_proj", "v_proj", "dense" if "phi" in folder.name else "o_proj"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        models.append(model)
    add_packed_forward(models[1].get_base_model())
    return models


def trl_call(model, pairs):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in pairs]
    batch = DataCollatorForPreference(pad_token_id=2)(rows)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True)


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
def test_packed_logps_are_those_of_rows_of_their_own(folder, pairs):
    plain, packed = load(folder)
    ours = trl_call(packed, pairs).log_probs.sum(1).tolist()
    assert ours == pytest.approx(logps_one_by_one(plain, pairs), abs=1e-4)
    assert logps_one_by_one(packed, pairs) == pytest.approx(logps_one_by_one(plain, pairs), abs=1e-6)  # as ever, if not packed


def test_every_score_of_trl_is_the_same(folder):
    plain, packed = load(folder)
    theirs, ours = trl_call(plain, PAIRS), trl_call(packed, PAIRS)
    for name in ("log_probs", "entropy", "mean_logits"):
        assert torch.allclose(getattr(ours, name), getattr(theirs, name), atol=1e-4), name
    assert torch.equal(ours.is_top1 & ours.label_mask, theirs.is_top1 & theirs.label_mask)
    assert torch.equal(ours.label_mask, theirs.label_mask)


def test_gradients_are_trls(folder):
    plain, packed = load(folder)
    weights = torch.linspace(-1.0, 2.0, 6)
    for model in (plain, packed):
        (trl_call(model, PAIRS).log_probs.sum(1) * weights).sum().backward()
    theirs = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    ours = {name: p.grad for name, p in packed.named_parameters() if p.requires_grad}
    for name, gradient in theirs.items():
        assert gradient.abs().max() > 1e-4
        assert torch.allclose(ours[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item()), name
    assert all(p.grad is None for p in packed.parameters() if not p.requires_grad)  # the frozen weights' were not computed


def test_nothing_sees_another_completion_or_pair(folder):
    _, packed = load(folder)
    before = trl_call(packed, PAIRS).log_probs.sum(1).detach()
    changed = [(PAIRS[0][0], [90, 91, 92, 93, 94], PAIRS[0][2]), *PAIRS[1:]]
    after = trl_call(packed, changed).log_probs.sum(1).detach()
    assert after[0].item() != pytest.approx(before[0].item(), abs=0.1)  # the changed one: chosen of the first pair
    assert after[1:].tolist() == pytest.approx(before[1:].tolist(), abs=1e-4)
    longer_prompt = [([5, 6, 7, 99], PAIRS[0][1], PAIRS[0][2]), *PAIRS[1:]]
    after = trl_call(packed, longer_prompt).log_probs.sum(1).detach()
    assert [after[i].item() for i in (1, 2, 4, 5)] == pytest.approx([before[i].item() for i in (1, 2, 4, 5)], abs=1e-4)


def test_packed_rows_survive_gradient_checkpointing(folder):
    plain, packed = load(folder)
    packed.activation_checkpointing_enable()
    for model in (plain, packed):
        model.train()
        trl_call(model, PAIRS).log_probs.sum().backward()
    theirs = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    for name, parameter in packed.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, theirs[name], rtol=1e-3, atol=1e-4 * theirs[name].abs().max().item()), name


def test_what_cannot_be_packed_says_why(folder):
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert "vocabulary projection is trained" in why_not_packed(model)
    model.requires_grad_(False)
    assert why_not_packed(model) == ""
    model.config.attention_dropout = 0.1
    assert "dropout (0.1)" in why_not_packed(model)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16))
    assert why_not_packed(gpt2) == "GPT2LMHeadModel is neither LlamaForCausalLM nor PhiForCausalLM"
