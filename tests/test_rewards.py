"""DPO's arithmetic: by hand, and against TRL's own trainer on a tiny model."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from biasdpo import models, rewards
from biasdpo.config import LOSS_TYPES
from biasdpo.data import splits

# Losses per pair, (B,), by TRL's names, from log-ratios (log pi - log pi_ref) of chosen and rejected, in sum and per token


def log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


def robust(margin, e):  # arXiv:2403.00409
    return (-(1 - e) * log_sigmoid(margin) + e * log_sigmoid(-margin)) / (1 - 2 * e)


LOSSES = {
    "sigmoid": lambda r, _each, beta, _e: -log_sigmoid(beta * (r[0] - r[1])),  # eq. 7, arXiv:2305.18290
    "sigmoid_norm": lambda _r, each, beta, _e: -log_sigmoid(beta * (each[0] - each[1])),
    "ipo": lambda _r, each, beta, _e: (each[0] - each[1] - 1 / (2 * beta)) ** 2,  # eq. 17, arXiv:2310.12036
    "hinge": lambda r, _each, beta, _e: np.maximum(0.0, 1.0 - beta * (r[0] - r[1])),  # arXiv:2305.10425
    "robust": lambda r, _each, beta, e: robust(beta * (r[0] - r[1]), e),
    # Eq. 7, arXiv:2408.06266
    "apo_zero": lambda r, _each, beta, _e: 1 - np.exp(log_sigmoid(beta * r[0])) + np.exp(log_sigmoid(beta * r[1])),
}


def loss_of(name, logps, lengths, beta, e=0.0):
    """The mean loss of (policy chosen, policy rejected, reference chosen, reference rejected), (chosen and rejected lengths)."""
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = map(np.array, logps)
    if name == "sft":
        return -policy_chosen.sum() / np.sum(lengths[0])
    ratios = np.array([policy_chosen - reference_chosen, policy_rejected - reference_rejected])
    return LOSSES[name](ratios, ratios / lengths, beta, e).mean()


LOGPS = ([-10.0], [-20.0], [-12.0], [-19.0])  # chosen log-ratio -10 - -12 = 2, rejected -20 - -19 = -1: 0.5 and -0.5 a token
TOKENS = ([4], [2])


@pytest.mark.parametrize(
    ("name", "beta", "e", "expected"),
    [
        ("sigmoid", 0.5, 0, 0.2014133),  # margin 0.5 * 3 = 1.5; -log(1 / (1 + e^-1.5))
        ("sigmoid_norm", 2.0, 0, 0.1269280),  # margin 2; -log(1 / (1 + e^-2))
        ("ipo", 0.25, 0, 1.0),  # gap 1, wanted 1 / (2 * 0.25) = 2: (1 - 2)^2
        ("hinge", 0.1, 0, 0.7),  # margin 0.3: 1 - 0.3
        ("hinge", 0.5, 0, 0.0),  # nothing once the margin is above 1
        # -log sigmoid(1.5) = 0.2014133, -log sigmoid(-1.5) = 1.7014133; (0.9 * 0.2014133 - 0.1 * 1.7014133) / 0.8
        ("robust", 0.5, 0.1, 0.0139133),
        ("robust", 0.5, 0.0, 0.2014133),  # no wrong labels: DPO's loss
        # rewards 0.5 * 2 = 1 and 0.5 * -1 = -0.5: 1 - sigmoid(1) + sigmoid(-0.5) = 1 - 0.7310586 + 0.3775407
        ("apo_zero", 0.5, 0, 0.6464821),
        ("sft", 0.5, 0, 2.5),  # 10 nats over 4 tokens
    ],
)
def test_the_losses_that_trainers_are_compared_with_by_hand(name, beta, e, expected) -> None:
    assert loss_of(name, LOGPS, TOKENS, beta, e) == pytest.approx(expected, abs=1e-6)
    assert rewards.reward_margin(*LOGPS, beta=0.5) == [1.5]


def test_ties_count_half_in_reward_accuracy() -> None:
    assert rewards.reward_accuracy([0.1, 0.0, 0.00009, 5.0], beta=0.1) == 0.75  # two of four above zero, two within rounding
    # a token: -10/10 = -1 against -4/2 = -2: right; -3/1 = -3 against -2/1 = -2: wrong; -2/2 against -1/1: a tie
    accuracy = rewards.length_normalised_accuracy([-10, -3, -2], [-4, -2, -1], [10, 1, 2], [2, 1, 1])
    assert accuracy == pytest.approx(1 / 3)


# Against the trainers, on real pairs

BETA, SMOOTHING = 0.7, 0.2


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_phi"])
def on_seed_pairs(request: pytest.FixtureRequest):
    """(model folder, token rows of four shipped pairs)."""
    from transformers import AutoTokenizer

    from training.rows import tokenize

    folder = request.getfixturevalue(request.param)
    pairs = splits.load_file(Path("assets/seed_pairs.jsonl"))[:4]
    template = models.catalog()["smollm2" if request.param == "tiny_llama" else "phi-2"].template
    return folder, [row.to_trl() for row in tokenize(pairs, AutoTokenizer.from_pretrained(folder), template, 512).rows]


@pytest.fixture(scope="module")
def logps(on_seed_pairs, tmp_path_factory):
    """The oracle's inputs of these rows: log-probabilities summed here, row by row, from plain logits; and lengths."""
    import torch

    from tests.tiny_trainer import build_tiny_trainer

    folder, rows = on_seed_pairs
    model = build_tiny_trainer(folder, tmp_path_factory.mktemp("out"), rows, trained=0.02, ours=False).model.eval()
    sums = []
    for reference in (False, True):
        for completion in ("chosen_ids", "rejected_ids"):
            sums.append([])
            for row in rows:
                ids = torch.tensor([row["prompt_ids"] + row[completion]])
                with torch.no_grad(), model.disable_adapter() if reference else nullcontext():
                    scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                sums[-1].append(scores[len(row["prompt_ids"]) - 1 :].double().sum().item())
    return sums, [[len(row[name]) for row in rows] for name in ("chosen_ids", "rejected_ids")]


@pytest.mark.parametrize("way", ["ours", "trl"])
@pytest.mark.parametrize("loss_types", [*([name] for name in LOSS_TYPES), ["sigmoid_norm", "sft"]], ids="+".join)
def test_agrees_with_the_trainers(on_seed_pairs, logps, tmp_path, loss_types, way) -> None:
    """The loss, margins, accuracies and log-probabilities that a trainer reports of a batch, by TRL's own way and by ours."""
    from tests.tiny_trainer import build_tiny_trainer

    folder, rows = on_seed_pairs
    weights = [1.0, 0.3][: len(loss_types)]
    trainer = build_tiny_trainer(
        folder,
        tmp_path,
        rows,
        ours=way == "ours",
        batch=4,
        trained=0.02,
        loss_type=loss_types,
        loss_weights=weights,
        beta=BETA,
        label_smoothing=SMOOTHING,
    )
    loss = trainer.compute_loss(trainer.model.train(), trainer.data_collator(rows)).item()
    sums, lengths = logps
    margins = rewards.reward_margin(*sums, BETA)
    assert np.abs(margins).min() > 1e-3  # else the comparison would show nothing
    expected = sum(w * loss_of(name, sums, lengths, BETA, SMOOTHING) for w, name in zip(weights, loss_types, strict=True))
    assert loss == pytest.approx(expected, abs=1e-4, rel=1e-5)
    logged = {name: values[0] for name, values in trainer._metrics["train"].items()}
    assert logged["rewards/margins"] == pytest.approx(margins.mean(), abs=1e-4)
    assert logged["rewards/accuracies"] == pytest.approx(rewards.reward_accuracy(margins, BETA))
    assert logged["rewards/chosen"] == pytest.approx(rewards.implicit_reward(sums[0], sums[2], BETA).mean(), abs=1e-4)
    assert logged["rewards/rejected"] == pytest.approx(rewards.implicit_reward(sums[1], sums[3], BETA).mean(), abs=1e-4)
    assert logged["logps/chosen"] == pytest.approx(np.mean(sums[0]), abs=1e-3)
    assert logged["logps/rejected"] == pytest.approx(np.mean(sums[1]), abs=1e-3)
