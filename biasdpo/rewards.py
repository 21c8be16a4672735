"""DPO's arithmetic, pure: losses, implicit reward, margins, accuracies. TRL's trainer is tested against this file.

Every `logps` is a NumPy array (B,) of log-probabilities in nats, summed over a completion's tokens, end-of-text included;
`lengths` are those tokens' counts, (B,). Losses come back per pair, (B,), but for `sft_loss`; their mean is what TRL reports.
Of several losses TRL sums the means, each times its weight.

 TRL's name     here            what it is for
 sigmoid        dpo_loss        DPO as in the paper
 sigmoid_norm   dpo_norm_loss   length earns nothing: where chosen is mostly the longer one
 ipo            ipo_loss        a margin to reach, not to exceed: less overfitting on few pairs
 hinge          hinge_loss      no pull once the margin is there
 robust         robust_loss     where a known share of the labels is wrong
 apo_zero       apo_zero_loss   chosen itself must become more likely, not only more so than rejected
 sft            sft_loss        beside another: keeps chosen likely
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def implicit_reward(policy_logps: ArrayLike, reference_logps: ArrayLike, beta: float) -> Array:
    """beta * (log pi(y|x) - log pi_ref(y|x)), arXiv:2305.18290, section 5, up to a constant of the prompt. (B,), nats."""
    return beta * (_array(policy_logps) - _array(reference_logps))


def reward_margin(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    reference_chosen_logps: ArrayLike,
    reference_rejected_logps: ArrayLike,
    beta: float,
) -> Array:
    """Implicit reward of chosen minus that of rejected. (B,), nats. TRL's `rewards/margins` is its mean."""
    return implicit_reward(policy_chosen_logps, reference_chosen_logps, beta) - implicit_reward(
        policy_rejected_logps, reference_rejected_logps, beta
    )


def dpo_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    reference_chosen_logps: ArrayLike,
    reference_rejected_logps: ArrayLike,
    beta: float,
) -> Array:
    """Eq. 7, arXiv:2305.18290: -log sigmoid(beta * (chosen log-ratio - rejected log-ratio)). (B,); TRL's `sigmoid`."""
    return -log_sigmoid(
        reward_margin(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta)
    )


def dpo_norm_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    reference_chosen_logps: ArrayLike,
    reference_rejected_logps: ArrayLike,
    chosen_lengths: ArrayLike,
    rejected_lengths: ArrayLike,
    beta: float,
) -> Array:
    """Eq. 7 with each log-ratio divided by its completion's tokens, so that length earns nothing. (B,); TRL's `sigmoid_norm`."""
    chosen = _log_ratio_per_token(policy_chosen_logps, reference_chosen_logps, chosen_lengths)
    rejected = _log_ratio_per_token(policy_rejected_logps, reference_rejected_logps, rejected_lengths)
    return -log_sigmoid(beta * (chosen - rejected))


def ipo_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    reference_chosen_logps: ArrayLike,
    reference_rejected_logps: ArrayLike,
    chosen_lengths: ArrayLike,
    rejected_lengths: ArrayLike,
    beta: float,
) -> Array:
    """Eq. 17, arXiv:2310.12036, on log-ratios per token: (chosen - rejected - 1 / (2 beta))^2. (B,), nats^2; TRL's `ipo`."""
    chosen = _log_ratio_per_token(policy_chosen_logps, reference_chosen_logps, chosen_lengths)
    rejected = _log_ratio_per_token(policy_rejected_logps, reference_rejected_logps, rejected_lengths)
    result: Array = (chosen - rejected - 1 / (2 * beta)) ** 2
    return result


def hinge_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    reference_chosen_logps: ArrayLike,
    reference_rejected_logps: ArrayLike,
    beta: float,
) -> Array:
    """max(0, 1 - reward margin): SLiC's hinge (arXiv:2305.10425) on DPO's rewards. (B,); TRL's `hinge`."""
    result: Array = np.maximum(
        0.0,
        1.0 - reward_margin(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta),
    )
    return result


def robust_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    reference_chosen_logps: ArrayLike,
    reference_rejected_logps: ArrayLike,
    beta: float,
    label_smoothing: float,
) -> Array:
    """DPO's loss, unbiased where a share e of the labels is flipped: arXiv:2403.00409. (B,); TRL's `robust`.

    (-(1 - e) log sigmoid(margin) + e log sigmoid(-margin)) / (1 - 2 e), e = label_smoothing in [0, 0.5).
    """
    margin = reward_margin(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta)
    flipped = label_smoothing
    return (-(1 - flipped) * log_sigmoid(margin) + flipped * log_sigmoid(-margin)) / (1 - 2 * flipped)


def apo_zero_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    reference_chosen_logps: ArrayLike,
    reference_rejected_logps: ArrayLike,
    beta: float,
) -> Array:
    """1 - sigmoid(chosen reward) + sigmoid(rejected reward): eq. 7, arXiv:2408.06266. (B,); TRL's `apo_zero`."""
    chosen = implicit_reward(policy_chosen_logps, reference_chosen_logps, beta)
    rejected = implicit_reward(policy_rejected_logps, reference_rejected_logps, beta)
    return 1 - np.exp(log_sigmoid(chosen)) + np.exp(log_sigmoid(rejected))


def sft_loss(policy_chosen_logps: ArrayLike, chosen_lengths: ArrayLike) -> float:
    """Cross-entropy on the chosen completions, nats, mean over all their tokens (so long ones count for more); TRL's `sft`."""
    return float(-_array(policy_chosen_logps).sum() / _array(chosen_lengths).sum())


def reward_accuracy(margins: ArrayLike) -> float:
    """Share of pairs whose margin is above zero, as TRL's `rewards/accuracies` has it: a tie is a miss."""
    return float((_array(margins) > 0).mean())


def length_normalised_accuracy(
    chosen_logps: ArrayLike, rejected_logps: ArrayLike, chosen_lengths: ArrayLike, rejected_lengths: ArrayLike
) -> float:
    """Share of pairs whose chosen completion has the higher log-probability per token under ONE model. A tie is a miss.

    It needs no reference, so a base model has one too: what the model itself prefers, length set aside.
    """
    per_token_chosen = _array(chosen_logps) / _array(chosen_lengths)
    per_token_rejected = _array(rejected_logps) / _array(rejected_lengths)
    return float((per_token_chosen > per_token_rejected).mean())


def log_sigmoid(x: ArrayLike) -> Array:
    """log(1 / (1 + exp(-x))), without overflow at either end."""
    result: Array = -np.logaddexp(0.0, -_array(x))
    return result


def _log_ratio_per_token(policy_logps: ArrayLike, reference_logps: ArrayLike, lengths: ArrayLike) -> Array:
    """(log pi - log pi_ref) / tokens. (B,), nats a token."""
    return (_array(policy_logps) - _array(reference_logps)) / _array(lengths)


def _array(values: ArrayLike) -> Array:
    return np.asarray(values, dtype=np.float64)
