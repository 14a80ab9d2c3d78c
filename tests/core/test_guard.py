"""When the guard lets a step reuse, by hand: what it measures, how far it trusts it, what it forgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from blockdance_core.config import QUALITIES
from blockdance_core.guard import ORDERS, Guard, sample

STEPS = 12


def guard(tolerance: float = 0.1, lead: int = 0, accepted: float = 1.0) -> Guard:
    return Guard(tolerance, [accepted] * STEPS, lead)


def see(watch: Guard, step: int, value: float, key: str = "a", boundary: int = 5, later: float = 0.0) -> None:
    """A stream whose residual is `value` everywhere was computed at a step; sigmas fall evenly."""
    base = (torch.full((1, 4, 8), 5.0),)
    watch.observe(boundary, key, step, 1 - (step + later) / STEPS, (base[0] + value,), base)


def order(watch: Guard, step: int, orders: Sequence[int] = ORDERS, boundary: int = 5) -> int | None:
    return watch.order(boundary, step, 1 - step / STEPS, orders)


def asked(watch: Guard, step: int, boundary: int = 5, orders: Sequence[int] = ORDERS) -> bool:
    return order(watch, step, orders, boundary) is not None


def test_nothing_is_allowed_before_an_error_was_measured() -> None:
    watch = guard(math.inf)
    assert not asked(watch, 0)
    see(watch, 0, 1.0)
    assert not asked(watch, 1)
    see(watch, 1, 1.0)
    assert asked(watch, 2)


def test_order_0_error_grows_with_the_distance() -> None:
    watch = guard(0.1)
    for step, value in enumerate((1.0, 1.04)):  # off by .04 / 1.04 a step
        see(watch, step, value)
    assert [order(watch, step, (0,)) for step in (2, 3, 4)] == [0, 0, None]


def test_straight_residual_is_forecast_by_a_line_and_a_parabola_by_a_curve() -> None:
    line, curve = guard(0.01), guard(0.01)
    for step in range(4):
        see(line, step, 1 + step / 4)
        see(curve, step, 1 + step**2 / 4)
    assert order(line, 4) == 1
    assert order(curve, 4) == 2
    flat = guard(0.01)
    for step in range(4):
        see(flat, step, 1 + step / 4)
    assert not asked(flat, 4, orders=(0,)), "without history there is no line"


def test_less_is_accepted_where_errors_weigh_more() -> None:
    for accepted, expected in ((1.0, True), (0.3, False)):
        watch = guard(0.1, accepted=accepted)
        see(watch, 0, 1.0)
        see(watch, 1, 1.05)
        assert asked(watch, 2, orders=(0,)) is expected


def test_lead_and_longest_group() -> None:
    watch = guard(math.inf, lead=4)
    for step in range(3):
        see(watch, step, 1.0)
    assert not asked(watch, 3)
    see(watch, 3, 1.0)
    assert [asked(watch, step) for step in range(4, STEPS)] == [True] * 8
    long = Guard(math.inf, [1.0] * 40)
    see(long, 0, 1.0)
    see(long, 1, 1.0)
    assert [asked(long, step) for step in range(2, 12)] == [True] * 8 + [False] * 2


def test_all_streams_of_a_step_count_and_get_one_answer() -> None:
    watch = guard(0.1)
    for step, (one, other) in enumerate(((1.0, 1.0), (1.01, 2.0))):
        see(watch, step, one, "cond")
        see(watch, step, other, "uncond")
    assert not asked(watch, 2, orders=(0,))
    see(watch, 2, 1.01, "cond")  # a later call of the same step cannot change what its first call was told
    assert not asked(watch, 2, orders=(0,))


def test_stream_of_another_shape_starts_anew_and_restart_forgets_all() -> None:
    watch = guard(math.inf)
    see(watch, 0, 1.0)
    small = (torch.zeros(1, 2, 8),)
    watch.observe(5, "a", 1, 0.9, (small[0] + 1,), small)
    assert not asked(watch, 2)
    see(watch, 2, 1.0)
    see(watch, 3, 1.0)
    assert asked(watch, 4)
    watch.restart()
    assert not asked(watch, 5)


def test_second_evaluation_of_a_step_takes_the_place_of_the_first() -> None:
    watch = guard(math.inf)
    see(watch, 0, 1.0)
    see(watch, 0, 1.0, later=1.0)
    assert not asked(watch, 1), "two evaluations of one step are no history"
    see(watch, 1, 1.2)
    see(watch, 1, 1.4, later=1.0)
    assert asked(watch, 2)
    strict = guard(0.3)
    see(strict, 0, 1.0)
    see(strict, 1, 1.0)
    see(strict, 1, 2.0, later=1.0)
    assert not asked(strict, 2, orders=(0,)), "the last evaluation is what would be injected, and it is off by a half"


def test_two_evaluations_a_step_leave_enough_history_for_every_order() -> None:
    watch = guard(0.1)
    for step in range(4):
        see(watch, step, 1.0 + 0.1 * step**2)
        see(watch, step, 1.0 + 0.1 * (step + 1) ** 2, later=1.0)
    assert order(watch, 4, (2,)) == 2


def test_what_small_steps_showed_is_not_believed_of_large_ones() -> None:
    def reuses(sigma: float) -> bool:
        watch = guard(0.15)
        for step, value in enumerate((1.0, 1.1)):
            base = (torch.full((1, 4, 8), 5.0),)
            watch.observe(5, "a", step, 1 - 0.01 * step, (base[0] + value,), base)
        return watch.order(5, 2, sigma, (0,)) is not None

    assert [reuses(1 - far) for far in (0.02, 0.03, 0.05, 0.2)] == [True, True, False, False]


def test_evaluation_of_an_earlier_step_is_judged_by_what_lies_before_it() -> None:
    watch = guard(5.0)
    for step in (0, 1, 2, 3, 2, 4):  # as heunpp2 looks ahead
        see(watch, step, 1.0 + 0.1 * step)
    assert asked(watch, 5)
    assert not asked(watch, 4)


def test_stream_that_appears_late_forbids_what_it_has_not_measured() -> None:
    for names in ("ab", "ba"):
        watch = guard(math.inf)
        for step in range(3):
            see(watch, step, 1.0, "a")
        for key in names:
            see(watch, 3, 1.0, key)
        assert not asked(watch, 4), "b has one feature and no error"
        for key in names:
            see(watch, 4, 1.0, key)
        assert order(watch, 5) == 0, "b has measured no other"


def test_stream_that_is_gone_forbids_nothing_and_is_forgotten() -> None:
    watch = guard(math.inf)
    see(watch, 0, 1.0, "gone")
    for step in range(3):
        see(watch, step, 1.0, "a")
    assert asked(watch, 3)
    assert len(watch._streams) == 1


def test_boundaries_are_judged_apart() -> None:
    watch = guard(0.1)
    for step in range(4):
        see(watch, step, 1.0, boundary=5)
        see(watch, step, 1.0 + step % 2, boundary=9)
    assert asked(watch, 4, boundary=5)
    assert not asked(watch, 4, boundary=9)
    assert not asked(watch, 4, boundary=7), "nothing was seen there"


def test_orders_that_are_not_asked_for_are_not_taken() -> None:
    watch = guard(0.01)
    for step in range(4):
        see(watch, step, 1 + step / 4)
    assert not asked(watch, 4, orders=(0,))
    watch = guard(0.01)
    for step in range(4):
        see(watch, step, 1 + step / 4)
    assert asked(watch, 4, orders=(1,))


def test_feature_from_before_the_last_computed_step_is_too_old() -> None:
    watch = guard()
    assert watch.since(5) == 0
    see(watch, 3, 1.0)
    assert watch.since(5) == 3


def test_residual_of_nothing_allows_nothing() -> None:
    watch = guard(math.inf)
    for step in range(3):
        see(watch, step, 0.0)
    assert not asked(watch, 3)


def test_better_qualities_accept_less() -> None:
    off, *tolerances = QUALITIES.values()
    assert [*tolerances, off] == sorted(QUALITIES.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_numbers_are_never_reused(value: float) -> None:
    watch = guard(1.0)
    for step in range(4):
        see(watch, step, value)
    assert not asked(watch, 4)


@pytest.mark.parametrize("most", [1 << 12, 1 << 15, 1 << 18])
@pytest.mark.parametrize("shape", [(1, 4096, 1536), (2, 1024, 1536), (1, 4096, 3072), (1, 16, 30, 52, 128)])
def test_sample_sees_every_channel_and_no_more_than_it_may(shape: tuple[int, ...], most: int) -> None:
    channels = torch.arange(shape[-1]).expand(shape).contiguous()
    seen = sample(channels, most)
    assert most / 2 < seen.numel() <= most
    assert len(seen.unique()) == min(shape[-1], seen.numel())


@pytest.mark.parametrize("turned", [
    lambda part: part, lambda part: part.transpose(1, 2), lambda part: part[:, ::2], lambda part: part[:, :, 3:9],
    lambda part: part[:1].expand(5, -1, -1),
])
def test_sample_takes_the_same_places_however_the_values_lie_in_memory(turned: Callable[[torch.Tensor], torch.Tensor]) -> None:
    part = turned(torch.randn(2, 60, 14))
    for most in (1, 7, 100, part.numel(), 10**6):
        assert torch.equal(sample(part, most), sample(part.contiguous(), most))
        assert 1 <= sample(part, most).numel() <= most
    assert torch.equal(sample(part, 10**6), part.flatten())


@pytest.mark.parametrize(("shape", "count"), [((), 1), ((0,), 0), ((2, 0, 8), 0), ((3, 8, 0), 0), ((1,), 1)])
def test_sample_of_little_or_nothing(shape: tuple[int, ...], count: int) -> None:
    assert sample(torch.zeros(shape), 4).shape == (count,)
