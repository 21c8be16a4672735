"""DPO's arithmetic, pure: losses, implicit reward, margins, accuracies. TRL's trainer is tested against this file.

Every `logps` is a NumPy array (B,) of log-probabilities in nats, summed over a completion's tokens, end-of-text included;
`lengths` are those tokens' counts, (B,). Losses come back per pair, (B,); their mean is what TRL reports.
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
    chosen = (_array(policy_chosen_logps) - _array(reference_chosen_logps)) / _array(chosen_lengths)
    rejected = (_array(policy_rejected_logps) - _array(reference_rejected_logps)) / _array(rejected_lengths)
    return -log_sigmoid(beta * (chosen - rejected))


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


def _array(values: ArrayLike) -> Array:
    return np.asarray(values, dtype=np.float64)
