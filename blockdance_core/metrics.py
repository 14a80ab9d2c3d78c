"""Fidelity to the full run: SSIM and PSNR in float."""

from __future__ import annotations

import torch
from torch import Tensor

_WINDOW = 11


def psnr(image: Tensor, reference: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio of each picture.

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
    """Structural similarity of each picture: Gaussian window 11 x 11, sigma 1.5, no padding, mean over pixels and channels.

    Args:
        image: Pictures [B, H, W, C], float, at least 11 x 11.
        reference: The full run's pictures, same shape.
        data_range: Largest minus smallest possible value.

    Returns:
        Similarity, float64 [B], at most 1.

    Source: Z. Wang et al., "Image Quality Assessment", IEEE TIP 2004, as implemented by kornia.
    """
    from kornia.metrics import ssim as similarity_map  # loads in seconds: only where it is used

    _check(image, reference)
    if min(image.shape[1:3]) < _WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {_WINDOW} x {_WINDOW}, got {tuple(image.shape[1:3])}")
    x, y = (pictures.double().permute(0, 3, 1, 2) for pictures in (image, reference))
    similarity: Tensor = similarity_map(x, y, _WINDOW, max_val=data_range, padding="valid")
    return similarity.flatten(1).mean(1)


def _check(image: Tensor, reference: Tensor) -> None:
    if image.shape != reference.shape or image.ndim != 4:
        shapes = f"{tuple(image.shape)} and {tuple(reference.shape)}"
        raise ValueError(f"expected two tensors [B, H, W, C] of one shape, got {shapes}")
