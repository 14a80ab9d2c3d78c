"""What the host's sigmas mean: shares of its noise schedule, and how much an error of the model weighs there."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from scipy.optimize import brentq

_EXACT = 1e-6
_EARLY = 0.8
"""By so much less of an error is accepted at pure noise, where it decides about the structure of the picture."""


def noise_levels(model_sampling: Any, sigmas: Sequence[float]) -> list[float]:
    """The share of the noise schedule that is passed at each sigma: the inverse of the host's `percent_to_sigma`.

    Args:
        model_sampling: The object in force for this run; it knows the shift.
        sigmas: Noise levels.

    Returns:
        Shares 0 (pure noise) to 1 (clean), exact to `_EXACT`.
    """
    model_sampling = _in_main_memory(model_sampling)
    return [_level(model_sampling, sigma) for sigma in sigmas]


def accepted_errors(model_sampling: Any, sigmas: Sequence[float], slopes: bool = False) -> list[float]:
    """How much of the guard's tolerance an error of the model's output, or of the latent's slope, may take at each step.

    What a model predicts differs: noise, a velocity, the clean latent; and so do the steps of schedulers. An error counts as
    what it does to the latent within its step, both seen as on the straight path of a flow from noise to the clean latent,
    in steps of equal size. Errors in strong noise count for more: there they decide about the structure of the picture.

    Args:
        model_sampling: The object in force for this run; its own formulas are asked.
        sigmas: Noise levels, n + 1.
        slopes: Whether the error is one of the slope (x - denoised) / sigma.

    Returns:
        n values above 0; 1 where the formulas give no answer.
    """
    levels = [_flow(model_sampling, sigma, slopes) for sigma in sigmas]
    count = len(sigmas) - 1
    span = abs(levels[0][0] - levels[-1][0]) if count > 0 else 0.0
    accepted = []
    for (share, factor), (following, _) in itertools.pairwise(levels):
        weight = factor * abs(share - following) * count / span if span > 0 else 0.0
        accepted.append((1 - _EARLY * share) / weight if weight > 0 and math.isfinite(weight) else 1.0)
    return accepted


def _flow(model_sampling: Any, sigma: float, slope: bool) -> tuple[float, float]:
    """Share of noise in a latent at `sigma`, 0 to 1, and the error of the velocity that an error of 1 makes.

    Both errors as shares of what is predicted: where noise is made larger (HiDream-O1: 8 times), that is as large.
    """
    at, one = torch.full((1,), sigma, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    clean, noise = (
        float(model_sampling.noise_scaling(at, *pair)) for pair in ((0 * one, one.clone()), (one.clone(), 0 * one))
    )
    # what an error of 1 does to the clean latent
    moved = sigma if slope else abs(float(model_sampling.calculate_denoised(at, one, 0 * one)))
    size = max(1.0, noise / sigma) if sigma else 1.0
    share = noise / (clean + noise) if clean + noise > 0 else math.nan
    return share, moved * size / share if share else math.nan


def _in_main_memory(model_sampling: Any) -> Any:
    """The same object, but for its tables: where these are on a GPU, each of many questions would wait for it."""
    if not isinstance(model_sampling, torch.nn.Module):
        return model_sampling
    alike = copy.copy(model_sampling)
    alike._buffers = {name: None if table is None else table.cpu() for name, table in model_sampling._buffers.items()}
    return alike


def _level(model_sampling: Any, sigma: float) -> float:
    def above(share: float) -> float:
        return float(model_sampling.percent_to_sigma(share)) - sigma

    if not above(_EXACT) > 0:
        return 0.0
    if not above(1 - _EXACT) < 0:
        return 1.0
    return float(brentq(above, _EXACT, 1 - _EXACT, xtol=_EXACT))
