"""DPO's arithmetic, pure: losses, implicit reward, margins, accuracies. TRL's trainer is tested against this file.

`Logps` are (B,) log-probabilities in nats, summed over a completion's tokens including end-of-text; `lengths` are the numbers of
those tokens, (B,). Losses are per pair, (B,), except for `sft_loss`; TRL reports their mean, and for several losses the weighted
sum of the means.

 TRL's name     here            purpose
 sigmoid        dpo_loss        DPO as in the paper
 sigmoid_norm   dpo_norm_loss   no reward for length: for data whose chosen completions are mostly the longer ones
 ipo            ipo_loss        a margin to reach, not to exceed: less overfitting on few pairs
 hinge          hinge_loss      no gradient once the margin is reached
 robust         robust_loss     for a known share of wrong labels
 apo_zero       apo_zero_loss   raises the likelihood of chosen itself, not only relative to rejected
 sft            sft_loss        beside another loss: keeps chosen likely
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Logps = ArrayLike
Lengths = ArrayLike


def implicit_reward(policy: Logps, reference: Logps, beta: float) -> Array:
    """beta * (log pi(y|x) - log pi_ref(y|x)), arXiv:2305.18290, section 5, up to a constant of the prompt. (B,), nats."""
    return beta * (_array(policy) - _array(reference))


def reward_margin(
    policy_chosen: Logps, policy_rejected: Logps, reference_chosen: Logps, reference_rejected: Logps, beta: float
) -> Array:
    """Implicit reward of chosen minus that of rejected. (B,), nats. TRL's `rewards/margins` is its mean."""
    return implicit_reward(policy_chosen, reference_chosen, beta) - implicit_reward(policy_rejected, reference_rejected, beta)


def dpo_loss(
    policy_chosen: Logps, policy_rejected: Logps, reference_chosen: Logps, reference_rejected: Logps, beta: float
) -> Array:
    """Eq. 7, arXiv:2305.18290: -log sigmoid(beta * (chosen log-ratio - rejected log-ratio)). (B,); TRL's `sigmoid`."""
    return -log_sigmoid(reward_margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta))


def dpo_norm_loss(
    policy_chosen: Logps,
    policy_rejected: Logps,
    reference_chosen: Logps,
    reference_rejected: Logps,
    chosen_lengths: Lengths,
    rejected_lengths: Lengths,
    beta: float,
) -> Array:
    """Eq. 7 with each log-ratio divided by its completion's tokens, so that length earns nothing. (B,); TRL's `sigmoid_norm`."""
    chosen = _log_ratio_per_token(policy_chosen, reference_chosen, chosen_lengths)
    rejected = _log_ratio_per_token(policy_rejected, reference_rejected, rejected_lengths)
    return -log_sigmoid(beta * (chosen - rejected))


def ipo_loss(
    policy_chosen: Logps,
    policy_rejected: Logps,
    reference_chosen: Logps,
    reference_rejected: Logps,
    chosen_lengths: Lengths,
    rejected_lengths: Lengths,
    beta: float,
) -> Array:
    """Eq. 17, arXiv:2310.12036, on log-ratios per token: (chosen - rejected - 1 / (2 beta))^2. (B,), nats^2; TRL's `ipo`."""
    chosen = _log_ratio_per_token(policy_chosen, reference_chosen, chosen_lengths)
    rejected = _log_ratio_per_token(policy_rejected, reference_rejected, rejected_lengths)
    return np.asarray((chosen - rejected - 1 / (2 * beta)) ** 2)


def hinge_loss(
    policy_chosen: Logps, policy_rejected: Logps, reference_chosen: Logps, reference_rejected: Logps, beta: float
) -> Array:
    """max(0, 1 - reward margin): SLiC's hinge (arXiv:2305.10425) on DPO's rewards. (B,); TRL's `hinge`."""
    margin = reward_margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta)
    return np.asarray(np.maximum(0.0, 1.0 - margin))


def robust_loss(
    policy_chosen: Logps,
    policy_rejected: Logps,
    reference_chosen: Logps,
    reference_rejected: Logps,
    beta: float,
    label_smoothing: float,
) -> Array:
    """DPO's loss, unbiased if a share e of the labels is flipped: arXiv:2403.00409. (B,); TRL's `robust`.

    (-(1 - e) log sigmoid(margin) + e log sigmoid(-margin)) / (1 - 2 e), e = label_smoothing in [0, 0.5).
    """
    margin, e = reward_margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta), label_smoothing
    return (-(1 - e) * log_sigmoid(margin) + e * log_sigmoid(-margin)) / (1 - 2 * e)


def apo_zero_loss(
    policy_chosen: Logps, policy_rejected: Logps, reference_chosen: Logps, reference_rejected: Logps, beta: float
) -> Array:
    """1 - sigmoid(chosen reward) + sigmoid(rejected reward): eq. 7, arXiv:2408.06266. (B,); TRL's `apo_zero`."""
    chosen = implicit_reward(policy_chosen, reference_chosen, beta)
    rejected = implicit_reward(policy_rejected, reference_rejected, beta)
    return 1 - np.exp(log_sigmoid(chosen)) + np.exp(log_sigmoid(rejected))


def sft_loss(policy_chosen: Logps, chosen_lengths: Lengths) -> float:
    """Cross-entropy of the chosen completions, nats, averaged over all their tokens (so long ones weigh more); TRL's `sft`."""
    return float(-_array(policy_chosen).sum() / _array(chosen_lengths).sum())


TIE_NATS = 1e-3
"""Log-ratios closer than this are a tie: in float32, the rounding of a summed log-probability depends on its batch."""


def wins(log_ratio_differences: ArrayLike) -> Array:
    """1 where chosen has the higher log-ratio, 0 where rejected has, 1/2 for a tie. (B,) nats."""
    differences = _array(log_ratio_differences)
    return np.where(np.abs(differences) <= TIE_NATS, 0.5, differences > 0)


def reward_accuracy(margins: ArrayLike, beta: float) -> float:
    """Share of pairs whose margin is above zero. Unlike in TRL's `rewards/accuracies`, a tie counts one half."""
    return float(wins(_array(margins) / beta).mean())


def length_normalised_accuracy(chosen: Logps, rejected: Logps, chosen_lengths: Lengths, rejected_lengths: Lengths) -> float:
    """Share of pairs whose chosen completion has the higher log-probability per token under ONE model. A tie is a miss.

    Needs no reference, so it exists for a base model too: what the model itself prefers, regardless of length.
    """
    per_token_chosen, per_token_rejected = _array(chosen) / _array(chosen_lengths), _array(rejected) / _array(rejected_lengths)
    return float((per_token_chosen > per_token_rejected).mean())


def log_sigmoid(x: ArrayLike) -> Array:
    """log(1 / (1 + exp(-x))), without overflow at either end."""
    return np.asarray(-np.logaddexp(0.0, -_array(x)))


def _log_ratio_per_token(policy: Logps, reference: Logps, lengths: Lengths) -> Array:
    """(log pi - log pi_ref) / tokens. (B,), nats per token."""
    return (_array(policy) - _array(reference)) / _array(lengths)


def _array(values: ArrayLike) -> Array:
    return np.asarray(values, dtype=np.float64)
