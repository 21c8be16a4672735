"""DPO's arithmetic: by hand, and against TRL's own trainer on a tiny model."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from biasdpo import models, rewards
from biasdpo.config import LOSS_TYPES
from biasdpo.data import splits

LOGPS = ([-10.0], [-20.0], [-12.0], [-19.0])  # chosen log-ratio -10 - -12 = 2, rejected -20 - -19 = -1: 0.5 and -0.5 a token
TOKENS = ([4], [2])


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (rewards.dpo_loss([-10.0], [-20.0], [-10.0], [-20.0], beta=0.1), math.log(2)),  # policy = reference: -log(1/2)
        (rewards.dpo_loss(*LOGPS, beta=0.5), 0.2014133),  # margin 0.5 * 3 = 1.5; -log(1 / (1 + e^-1.5))
        (rewards.reward_margin(*LOGPS, beta=0.5), 1.5),
        (rewards.dpo_norm_loss(*LOGPS, *TOKENS, beta=2.0), 0.1269280),  # margin 2; -log(1 / (1 + e^-2))
        (rewards.ipo_loss(*LOGPS, *TOKENS, beta=0.25), 1.0),  # gap 1, wanted 1 / (2 * 0.25) = 2: (1 - 2)^2
        (rewards.hinge_loss(*LOGPS, beta=0.1), 0.7),  # margin 0.3: 1 - 0.3
        (rewards.hinge_loss(*LOGPS, beta=0.5), 0.0),  # nothing once the margin is above 1
        # -log sigmoid(1.5) = 0.2014133, -log sigmoid(-1.5) = 1.7014133; (0.9 * 0.2014133 - 0.1 * 1.7014133) / 0.8
        (rewards.robust_loss(*LOGPS, beta=0.5, label_smoothing=0.1), 0.0139133),
        (rewards.robust_loss(*LOGPS, beta=0.5, label_smoothing=0.0), 0.2014133),  # no wrong labels: DPO's loss
        # rewards 0.5 * 2 = 1 and 0.5 * -1 = -0.5: 1 - sigmoid(1) + sigmoid(-0.5) = 1 - 0.7310586 + 0.3775407
        (rewards.apo_zero_loss(*LOGPS, beta=0.5), 0.6464821),
    ],
)
def test_losses_by_hand(loss, expected) -> None:
    assert loss == pytest.approx([expected], abs=1e-6)


def test_sft_loss_by_hand() -> None:
    assert rewards.sft_loss([-10.0, -20.0], [4, 16]) == pytest.approx(1.5)  # 30 nats over 20 tokens


def test_log_sigmoid_at_both_ends() -> None:
    assert rewards.log_sigmoid([-1000.0, 0.0, 1000.0]) == pytest.approx([-1000.0, -math.log(2), 0.0])


def test_ties_count_half_in_reward_accuracy() -> None:
    assert rewards.reward_accuracy([0.1, 0.0, 0.00009, 5.0], beta=0.1) == 0.75  # two of four above zero, two within rounding
    # a token: -10/10 = -1 against -4/2 = -2: right; -3/1 = -3 against -2/1 = -2: wrong; -2/2 against -1/1: a tie
    accuracy = rewards.length_normalised_accuracy([-10, -3, -2], [-4, -2, -1], [10, 1, 2], [2, 1, 1])
    assert accuracy == pytest.approx(1 / 3)


# Against the trainers, on real pairs

BETA, SMOOTHING = 0.7, 0.2
ORACLES = {  # each of (policy chosen, policy rejected, reference chosen, reference rejected), (chosen lengths, rejected lengths)
    "sigmoid": lambda logps, _lengths: rewards.dpo_loss(*logps, BETA).mean(),
    "sigmoid_norm": lambda logps, lengths: rewards.dpo_norm_loss(*logps, *lengths, BETA).mean(),
    "ipo": lambda logps, lengths: rewards.ipo_loss(*logps, *lengths, BETA).mean(),
    "hinge": lambda logps, _lengths: rewards.hinge_loss(*logps, BETA).mean(),
    "robust": lambda logps, _lengths: rewards.robust_loss(*logps, BETA, SMOOTHING).mean(),
    "apo_zero": lambda logps, _lengths: rewards.apo_zero_loss(*logps, BETA).mean(),
    "sft": lambda logps, lengths: rewards.sft_loss(logps[0], lengths[0]),
}


def test_each_loss_type_offered_has_an_oracle() -> None:
    assert set(ORACLES) == set(LOSS_TYPES)


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
    assert sum(w * ORACLES[name](sums, lengths) for w, name in zip(weights, loss_types, strict=True)) == pytest.approx(
        loss, abs=1e-4, rel=1e-5
    )
    logged = {name: values[0] for name, values in trainer._metrics["train"].items()}
    assert logged["rewards/margins"] == pytest.approx(margins.mean(), abs=1e-4)
    assert logged["rewards/accuracies"] == pytest.approx(rewards.reward_accuracy(margins, BETA))
    assert logged["rewards/chosen"] == pytest.approx(rewards.implicit_reward(sums[0], sums[2], BETA).mean(), abs=1e-4)
    assert logged["rewards/rejected"] == pytest.approx(rewards.implicit_reward(sums[1], sums[3], BETA).mean(), abs=1e-4)
    assert logged["logps/chosen"] == pytest.approx(np.mean(sums[0]), abs=1e-3)
    assert logged["logps/rejected"] == pytest.approx(np.mean(sums[1]), abs=1e-3)
