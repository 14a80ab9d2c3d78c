"""What the host's sigmas mean: shares of its noise schedule, and how much an error of the model weighs there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

_HALVINGS = 20
_EARLY = 0.6
"""By so much less of an error is accepted at pure noise, where it decides about the structure of the picture."""


def noise_levels(model_sampling: Any, sigmas: Sequence[float]) -> list[float]:
    """The share of the noise schedule that is passed at each sigma: the inverse of the host's `percent_to_sigma`.

    Args:
        model_sampling: The object in force for this run; it knows the shift.
        sigmas: Noise levels.

    Returns:
        Shares 0 (pure noise) to 1 (clean), exact to 1e-6.
    """
    return [_level(model_sampling, sigma) for sigma in sigmas]


def accepted_errors(model_sampling: Any, sigmas: Sequence[float]) -> list[float]:
    """How much of the guard's tolerance an error of the model's output may take at each sigma.

    What a model predicts differs: noise, a velocity, the clean latent. An error counts as the error of the velocity
    `noise - clean` that it amounts to: the same error of predicted noise is 1 + sigma times as bad.

    Args:
        model_sampling: The object in force for this run; its own formulas are asked.
        sigmas: Noise levels.

    Returns:
        Shares above 0; 1 where the formulas give no answer.
    """
    return [_accepted(model_sampling, sigma) for sigma in sigmas]


def _accepted(model_sampling: Any, sigma: float) -> float:
    at, one = torch.full((1, 1, 1, 1), sigma, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    clean, noise = (
        float(model_sampling.noise_scaling(at, *pair)) for pair in ((0 * one, one.clone()), (one.clone(), 0 * one))
    )
    moved = abs(float(model_sampling.calculate_denoised(at, one, 0 * one)))  # by an error of 1, the clean latent
    share = noise / (clean + noise) if clean + noise > 0 else 0.0
    if not (0 < share <= 1 and 0 < moved < math.inf):
        return 1.0
    return (1 - _EARLY * share) * share / moved


def _level(model_sampling: Any, sigma: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if float(model_sampling.percent_to_sigma(middle)) > sigma:
            low = middle
        else:
            high = middle
    return 0.0 if low == 0.0 else high
