"""Which step an evaluation belongs to, on the traces that the host's samplers really make."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from blockdance_core.session import step_of

FOUR = [1.0, 0.75, 0.5, 0.25, 0.0]


def resolve(sigmas: Sequence[float], evaluations: Sequence[float]) -> list[int]:
    current, steps = 0, []
    for sigma in evaluations:
        current = step_of(sigmas, sigma, current)
        steps.append(current)
    return steps


@pytest.mark.parametrize(("evaluations", "steps"), [
    ([1.0, 0.75, 0.5, 0.25], [0, 1, 2, 3]),  # euler and most others
    ([0.9999, 0.75, 0.5, 0.25], [0, 1, 2, 3]),  # nudged first sigma
    ([1.00005, 0.75, 0.5, 0.25], [0, 1, 2, 3]),
    ([1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25], [0, 1, 1, 2, 2, 3, 3]),  # heun
    ([1.0, 0.75, 0.5, 0.75, 0.5, 0.25, 0.5, 0.25, 0.25], [0, 1, 2, 1, 2, 3, 2, 3, 3]),  # heunpp2
    ([1.0, 0.866, 0.75, 0.61, 0.5, 0.35, 0.25], [0, 0, 1, 1, 2, 2, 3]),  # dpm_2: midpoints
    ([1.0, 0.9, 0.8, 0.7, 0.6, 0.3, 0.1, 0.01], [0, 0, 0, 1, 1, 2, 3, 3]),  # dpm_adaptive
    ([1.2, 1.0, -0.1], [0, 0, 3]),  # outside
])
def test_evaluations_of_a_sampler_belong_to_their_steps(evaluations: list[float], steps: list[int]) -> None:
    assert resolve(FOUR, evaluations) == steps


def test_leftover_noise_evaluated_at_the_last_sigma_is_the_last_step() -> None:
    assert resolve([1.0, 0.75, 0.5], [1.0, 0.75, 0.75, 0.5]) == [0, 1, 1, 1]


def test_rising_sigmas_have_steps_too() -> None:
    assert resolve(FOUR[::-1], [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1]) == [0, 0, 1, 2, 3, 3, 3, 3]


def test_restart_of_the_schedule_goes_on_at_the_later_step() -> None:
    sigmas = [1.0, 0.5, 0.8, 0.5, 0.2, 0.0]
    assert resolve(sigmas, [1.0, 0.5, 0.8, 0.5, 0.2]) == [0, 1, 2, 3, 4]


def test_levels_closer_than_the_tolerance_are_told_apart() -> None:
    sigmas = [1.0, 0.99995, 0.9999, 0.5, 0.0]
    assert resolve(sigmas, sigmas[:-1]) == [0, 1, 2, 3]


@pytest.mark.parametrize(("sigmas", "sigma"), [
    ([], 1.0), ([1.0], 1.0), ([0.0, 0.0], 0.0), ([0.0, 0.0], 5.0), ([1.0, 1.0, 1.0], 1.0), ([1.0, 0.0], float("nan")),
    ([float("nan")] * 3, 0.5),
])
def test_any_list_gives_a_step_inside_the_run(sigmas: list[float], sigma: float) -> None:
    for current in (0, 1):
        assert 0 <= step_of(sigmas, sigma, current) <= max(len(sigmas) - 2, 0)
