"""Fidelity to the full run: SSIM and PSNR in float."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03


def psnr(image: Tensor, reference: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio.

    Args:
        image: Pictures [B, H, W, C], float.
        reference: The full run's pictures, same shape.
        data_range: Largest minus smallest possible value.

    Returns:
        Decibel, float64 [B]; infinite where the two are equal.
    """
    _check(image, reference)
    error = (image.double() - reference.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(data_range**2 / error)


def ssim(image: Tensor, reference: Tensor, data_range: float = 1.0) -> Tensor:
    """Structural similarity with an 11 x 11 Gaussian window of sigma 1.5, no padding, mean over pixels and channels.

    Args:
        image: Pictures [B, H, W, C], float, at least 11 x 11.
        reference: The full run's pictures, same shape.
        data_range: Largest minus smallest possible value.

    Returns:
        Similarity, float64 [B], at most 1.

    Source: Z. Wang et al., "Image Quality Assessment", IEEE TIP 2004.
    """
    _check(image, reference)
    if min(image.shape[1:3]) < _WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {_WINDOW} x {_WINDOW}, got {tuple(image.shape[1:3])}")
    x, y = (part.double().permute(0, 3, 1, 2) for part in (image, reference))
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    )
    return similarity.flatten(1).mean(1)


def _blur(planes: Tensor) -> Tensor:
    offsets = torch.arange(_WINDOW, dtype=planes.dtype, device=planes.device) - _WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights = (weights / weights.sum()).expand(planes.shape[1], 1, -1)
    rows = functional.conv2d(planes, weights[..., None], groups=planes.shape[1])
    return functional.conv2d(rows, weights[:, :, None], groups=planes.shape[1])


def _check(image: Tensor, reference: Tensor) -> None:
    if image.shape != reference.shape or image.ndim != 4:
        raise ValueError(f"expected two tensors [B, H, W, C] of one shape, got {tuple(image.shape)} and {tuple(reference.shape)}")
