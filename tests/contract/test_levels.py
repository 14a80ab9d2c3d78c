"""What sigmas mean, and how much of the guard's tolerance each step may take, by the host's own formulas."""

from __future__ import annotations

import math

import pytest
from comfy.samplers import calculate_sigmas
from harness import every_case, model_of
from tiny import CASES, Case

from blockdance_core.host.levels import accepted_errors, noise_levels


@every_case
def test_noise_level_is_the_inverse_of_the_hosts_percentage(case: Case) -> None:
    sampling = model_of(case).get_model_object("model_sampling")
    shares = [0.001, 0.01, 0.25, 0.4, 0.77, 0.99]
    tables = dict(sampling.named_buffers())
    sigmas = [math.inf, *(sampling.percent_to_sigma(share) for share in (0.0, *shares, 1.0)), 0.0, math.nan]
    assert noise_levels(sampling, sigmas) == pytest.approx([0.0, 0.0, *shares, 1.0, 1.0, 0.0], abs=2e-6)
    assert all(one is tables[name] for name, one in sampling.named_buffers()), "nothing of the model was moved"


@every_case
def test_every_family_gives_a_positive_number_for_every_step(case: Case) -> None:
    sampling = model_of(case).get_model_object("model_sampling")
    sigmas = [float(sigma) for sigma in calculate_sigmas(sampling, "simple", 12)]
    accepted = accepted_errors(sampling, sigmas)
    assert len(accepted) == len(sigmas) - 1
    assert all(math.isfinite(value) and value > 0 for value in accepted)


def test_flow_in_even_steps_accepts_more_with_less_noise() -> None:
    sampling = model_of(CASES["sd3"]).get_model_object("model_sampling")
    sigmas = [1.0, 0.75, 0.5, 0.25, 0.0]
    assert accepted_errors(sampling, sigmas) == pytest.approx([1 - 0.8 * sigma for sigma in sigmas[:-1]])
    assert accepted_errors(sampling, [0.5, 0.25, 0.0]) == pytest.approx([0.6, 0.8]), "half of a run counts like a whole one"


def test_error_of_predicted_noise_counts_1_plus_sigma_times() -> None:
    sampling = model_of(CASES["pixart_alpha"]).get_model_object("model_sampling")
    sigmas = [9.0, 4.0, 1.0, 0.0]  # shares of noise 0.9, 0.8, 0.5, 0
    expected = [(1 - 0.8 * share) * 0.9 / (3 * step * factor)
                for share, step, factor in ((0.9, 0.1, 10), (0.8, 0.3, 5), (0.5, 0.5, 2))]
    assert accepted_errors(sampling, sigmas) == pytest.approx(expected)


def test_error_of_what_predicts_larger_noise_counts_as_much_more() -> None:
    """HiDream-O1 adds noise 8 times as large: so is the velocity that it predicts, and an error as a share of it."""
    sampling = model_of(CASES["hidream_o1"]).get_model_object("model_sampling")
    sigmas = [0.9, 0.5, 0.1, 0.0]
    sizes = [8 * sigma + 1 - sigma for sigma in sigmas]
    shares = [8 * sigma / size for sigma, size in zip(sigmas, sizes, strict=True)]
    expected = [(1 - 0.8 * share) * shares[0] / (3 * (share - following) * size)
                for share, following, size in zip(shares, shares[1:], sizes, strict=False)]
    assert accepted_errors(sampling, sigmas) == pytest.approx(expected)
    assert accepted_errors(sampling, sigmas, slopes=True) == pytest.approx(expected)


@pytest.mark.parametrize("sigmas", [[], [1.0], [0.0, 0.0], [0.5, 0.5, 0.5]])
def test_degenerate_lists_are_tolerated(sigmas: list[float]) -> None:
    sampling = model_of(CASES["sd3"]).get_model_object("model_sampling")
    assert accepted_errors(sampling, sigmas) == [1.0] * max(len(sigmas) - 1, 0)


def test_error_of_a_slope_is_one_of_noise_or_velocity_whatever_the_model_predicts() -> None:
    import comfy.model_sampling as host

    class Noise(host.ModelSamplingDiscrete, host.EPS):
        pass

    class Velocity(host.ModelSamplingDiscrete, host.V_PREDICTION):
        pass

    sigmas = [9.0, 4.0, 1.0, 0.0]
    noise, velocity = (kind() for kind in (Noise, Velocity))
    expected = accepted_errors(noise, sigmas)
    assert accepted_errors(noise, sigmas, slopes=True) == pytest.approx(expected)
    assert accepted_errors(velocity, sigmas, slopes=True) == pytest.approx(expected)
    assert accepted_errors(velocity, sigmas) != pytest.approx(expected)
    flow = model_of(CASES["sd3"]).get_model_object("model_sampling")
    assert accepted_errors(flow, [1.0, 0.5, 0.0], slopes=True) == pytest.approx(accepted_errors(flow, [1.0, 0.5, 0.0]))
