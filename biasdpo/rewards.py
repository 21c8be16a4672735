"""DPO's arithmetic, pure: implicit reward, margins, accuracies.

`Logps` are (B,) log-probabilities in nats, summed over a completion's tokens including end-of-text; `lengths` are the numbers of
those tokens, (B,).
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


def _array(values: ArrayLike) -> Array:
    return np.asarray(values, dtype=np.float64)
