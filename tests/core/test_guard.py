"""When the guard lets a step reuse, by hand: what it measures, how far it trusts it, what it forgets."""

from __future__ import annotations

import math

import pytest
import torch

from blockdance_core.guard import QUALITIES, Guard

STEPS = 12


def guard(tolerance: float = 0.1, kept: int = 3, lead: int = 0, accepted: float = 1.0) -> Guard:
    return Guard(tolerance, kept, [accepted] * STEPS, lead)


def see(watch: Guard, step: int, value: float, key: str = "a") -> None:
    """A stream whose residual is `value` everywhere was computed at a step; sigmas fall evenly."""
    base = (torch.full((1, 4, 8), 5.0),)
    watch.observe(key, step, 1 - step / STEPS, (base[0] + value,), base)


def asked(watch: Guard, step: int) -> bool:
    return watch.allows(step, 1 - step / STEPS)


def test_nothing_is_allowed_before_an_error_was_measured() -> None:
    watch = guard(math.inf)
    assert not asked(watch, 0)
    see(watch, 0, 1.0)
    assert not asked(watch, 1)
    see(watch, 1, 1.0)
    assert asked(watch, 2)


def test_order_0_error_grows_with_the_distance() -> None:
    watch = guard(0.1, kept=1)
    for step, value in enumerate((1.0, 1.04)):  # off by .04 / 1.04 a step
        see(watch, step, value)
    assert [asked(watch, step) for step in (2, 3, 4)] == [True, True, False]
    assert watch.forecast.order == 0


def test_straight_residual_is_forecast_by_a_line_and_a_parabola_by_a_curve() -> None:
    line, curve = guard(0.01), guard(0.01)
    for step in range(4):
        see(line, step, 1 + step / 4)
        see(curve, step, 1 + step**2 / 4)
    assert asked(line, 4)
    assert line.forecast.order == 1
    assert asked(curve, 4)
    assert curve.forecast.order == 2
    flat = guard(0.01, kept=1)
    for step in range(4):
        see(flat, step, 1 + step / 4)
    assert not asked(flat, 4), "without history there is no line"


def test_less_is_accepted_where_errors_weigh_more() -> None:
    for accepted, expected in ((1.0, True), (0.3, False)):
        watch = guard(0.1, kept=1, accepted=accepted)
        see(watch, 0, 1.0)
        see(watch, 1, 1.05)
        assert asked(watch, 2) is expected


def test_lead_and_longest_group() -> None:
    watch = guard(math.inf, lead=4)
    for step in range(3):
        see(watch, step, 1.0)
    assert not asked(watch, 3)
    see(watch, 3, 1.0)
    assert [asked(watch, step) for step in range(4, STEPS)] == [True] * 8
    long = Guard(math.inf, 3, [1.0] * 40)
    see(long, 0, 1.0)
    see(long, 1, 1.0)
    assert [long.allows(step, 1 - step / 40) for step in range(2, 12)] == [True] * 8 + [False] * 2


def test_all_streams_of_a_step_count_and_get_one_answer() -> None:
    watch = guard(0.1, kept=1)
    for step, (one, other) in enumerate(((1.0, 1.0), (1.01, 2.0))):
        see(watch, step, one, "cond")
        see(watch, step, other, "uncond")
    assert not asked(watch, 2)
    see(watch, 2, 1.01, "cond")  # a later call of the same step cannot change what its first call was told
    assert not asked(watch, 2)


def test_stream_of_another_shape_starts_anew_and_restart_forgets_all() -> None:
    watch = guard(math.inf)
    see(watch, 0, 1.0)
    small = (torch.zeros(1, 2, 8),)
    watch.observe("a", 1, 0.9, (small[0] + 1,), small)
    assert not asked(watch, 2)
    see(watch, 2, 1.0)
    see(watch, 3, 1.0)
    assert asked(watch, 4)
    watch.restart()
    assert not asked(watch, 5)


def test_second_evaluation_at_the_same_noise_level_is_no_history() -> None:
    watch = guard(math.inf)
    see(watch, 0, 1.0)
    see(watch, 0, 1.0)
    assert not asked(watch, 1)


def test_residual_of_nothing_allows_nothing() -> None:
    watch = guard(math.inf)
    for step in range(3):
        see(watch, step, 0.0)
    assert not asked(watch, 3)


def test_better_qualities_accept_less() -> None:
    assert QUALITIES["near-lossless"] < QUALITIES["balanced"] < QUALITIES["draft"] < QUALITIES["off"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_numbers_are_never_reused(value: float) -> None:
    watch = guard(1.0)
    for step in range(4):
        see(watch, step, value)
    assert not asked(watch, 4)
