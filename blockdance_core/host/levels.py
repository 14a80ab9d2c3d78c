"""The host's sigmas as shares of its noise schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HALVINGS = 20


def noise_levels(model_sampling: Any, sigmas: Sequence[float]) -> list[float]:
    """The share of the noise schedule that is passed at each sigma: the inverse of the host's `percent_to_sigma`.

    Args:
        model_sampling: The object in force for this run; it knows the shift.
        sigmas: Noise levels.

    Returns:
        Shares 0 (pure noise) to 1 (clean), exact to 1e-6.
    """
    return [_level(model_sampling, sigma) for sigma in sigmas]


def _level(model_sampling: Any, sigma: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if float(model_sampling.percent_to_sigma(middle)) > sigma:
            low = middle
        else:
            high = middle
    return 0.0 if low == 0.0 else high
