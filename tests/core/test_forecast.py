"""Weights of the forecasts, by hand."""

from __future__ import annotations

import pytest

from blockdance_core.forecast import FORECASTS, Forecast


def test_hold_and_delta_use_the_newest_alone() -> None:
    for name, anchored in (("hold", False), ("delta", True)):
        forecast = FORECASTS[name]
        assert forecast.anchored is anchored
        assert forecast.order == 0
        assert forecast.weights([0.5, 0.7], 0.3) == (1.0,)


@pytest.mark.parametrize(("stored_at", "sigma", "expected"), [
    ([0.6, 0.8], 0.4, (2.0, -1.0)),  # one interval further
    ([0.6, 0.8], 0.5, (1.5, -0.5)),
    ([0.6, 0.8], 0.6, (1.0, 0.0)),
    ([0.6, 0.8], 0.7, (0.5, 0.5)),  # halfway between
    ([0.6, 0.8], 0.8, (0.0, 1.0)),
    ([0.4, 0.2], 0.6, (2.0, -1.0)),  # rising sigmas
    ([0.6, 0.8, 1.0], 0.4, (2.0, -1.0)),  # older ones do not matter
    ([0.6], 0.4, (1.0,)),
    ([0.6, 0.6], 0.4, (1.0,)),
    ([0.6, 0.6 + 5e-7], 0.4, (1.0,)),
])
def test_taylor_extrapolates_along_sigma(stored_at: list[float], sigma: float, expected: tuple[float, ...]) -> None:
    weights = FORECASTS["taylor"].weights(stored_at, sigma)
    assert weights == pytest.approx(expected)
    assert sum(weights) == pytest.approx(1)


def test_damping_scales_the_extrapolated_part() -> None:
    assert Forecast(True, 1, 0.5).weights([0.6, 0.8], 0.4) == pytest.approx((1.5, -0.5))
    assert Forecast(True, 1, 0.0).weights([0.6, 0.8], 0.4) == pytest.approx((1.0, 0.0))


def test_fitted_weights_hold_where_exactly_those_features_are_stored() -> None:
    forecast = Forecast(True, 1, 0.5, ((2, 1.8), (3, -0.7), (6, 0.1)))
    assert forecast.features == 3
    assert forecast.weights([0.6, 0.8, 0.9], 0.4, [2, 3, 6]) == (1.8, -0.7, 0.1)
    assert forecast.weights([0.6, 0.8, 0.9, 1.0], 0.4, [2, 3, 6, 7]) == (1.8, -0.7, 0.1)
    for ages in ([2, 3, 5], [2, 3], [1, 2, 5], []):
        assert forecast.weights([0.6, 0.8, 0.9], 0.4, ages) == pytest.approx((1.5, -0.5)), "the expansion"


def test_weights_far_beyond_two_close_sigmas_take_the_newest_alone() -> None:
    assert Forecast(anchored=True, order=1).weights([0.5, 0.5001], 0.4) == (1.0,)


def test_order_2_is_exact_on_parabolas_and_its_weights_sum_to_1() -> None:
    forecast = FORECASTS["taylor2"]
    weights = forecast.weights([0.6, 0.7, 0.9], 0.4)
    assert sum(weights) == pytest.approx(1)
    for parabola in (lambda s: s * s, lambda s: 3 - 2 * s + 5 * s * s):
        assert sum(w * parabola(s) for w, s in zip(weights, (0.6, 0.7, 0.9), strict=True)) == pytest.approx(parabola(0.4))
    assert forecast.weights([0.6, 0.8, 0.8], 0.4) == pytest.approx((2.0, -1.0)), "a lower order where two are the same"
    assert forecast.weights([0.6, 0.8], 0.4) == pytest.approx((2.0, -1.0))


def test_damping_falls_on_every_order_once_more() -> None:
    full, half = Forecast(True, 2), Forecast(True, 2, 0.5)
    first, second = Forecast(True, 1).weights([0.6, 0.7, 0.9], 0.4), full.weights([0.6, 0.7, 0.9], 0.4)
    expected = [
        zero + 0.5 * (one - zero) + 0.25 * (two - one)
        for zero, one, two in zip((1, 0, 0), (*first, 0), second, strict=True)
    ]
    assert half.weights([0.6, 0.7, 0.9], 0.4) == pytest.approx(expected)
