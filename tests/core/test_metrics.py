"""SSIM and PSNR against values that can be computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from blockdance_core.metrics import psnr, ssim


def pictures(count: int = 2, side: int = 16) -> torch.Tensor:
    return torch.rand(count, side, side, 3)


def test_equal_pictures_are_perfect() -> None:
    image = pictures()
    assert psnr(image, image).tolist() == [math.inf, math.inf]
    assert ssim(image, image).tolist() == pytest.approx([1.0, 1.0])


def test_psnr_of_a_constant_error_by_hand_and_per_picture() -> None:
    image = torch.zeros(2, 4, 4, 3)
    other = image.clone()
    other[0] += 0.1
    other[1] += 0.01
    assert psnr(image, other).tolist() == pytest.approx([20.0, 40.0], rel=1e-6)
    assert psnr(image * 255, other * 255, data_range=255.0).tolist() == pytest.approx([20.0, 40.0], rel=1e-6)


def test_ssim_of_constant_pictures_is_the_luminance_term() -> None:
    a, b, c1 = 0.4, 0.6, 0.01**2
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    one, other = torch.full((1, 16, 16, 3), a), torch.full((1, 16, 16, 3), b)
    assert ssim(one, other).tolist() == pytest.approx([expected], rel=1e-4)
    assert ssim(255 * one, 255 * other, data_range=255.0).tolist() == pytest.approx([expected], rel=1e-4)


def test_ssim_is_symmetric_falls_with_noise_and_is_per_picture() -> None:
    image = pictures(1)
    noise = torch.randn_like(image)
    values = [float(ssim(image, image + share * noise)) for share in (0.01, 0.05, 0.2)]
    assert 1 > values[0] > values[1] > values[2]
    assert float(ssim(image, image + noise)) == pytest.approx(float(ssim(image + noise, image)))
    both = ssim(torch.cat([image, image]), torch.cat([image, image + noise]))
    assert both.shape == (2,)
    assert both[0] == pytest.approx(1)
    assert both[1] < 0.9


@pytest.mark.parametrize("measure", [ssim, psnr])
def test_pictures_of_another_shape_are_refused(measure: object) -> None:
    with pytest.raises(ValueError, match=r"\(1, 16, 16, 3\) and \(1, 16, 15, 3\)"):
        measure(torch.zeros(1, 16, 16, 3), torch.zeros(1, 16, 15, 3))  # type: ignore[operator]
