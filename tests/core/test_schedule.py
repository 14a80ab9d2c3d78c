"""Plans that can be checked by hand: windows, groups, the steps that are always computed, few steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from blockdance_core.config import Config, Defaults, Effective, resolve
from blockdance_core.forecast import FORECASTS
from blockdance_core.schedule import Reuse, Schedule, build, follow


def effective(depth: int = 28, **settings: Any) -> Effective:
    return resolve(Config(**{"preset": "custom", "forecast": "hold", **settings}), Defaults(), depth)


def even(steps: int, start: float = 0.0, end: float = 1.0) -> list[float]:
    return [start + (end - start) * k / steps for k in range(steps + 1)]


def letters(schedule: Schedule) -> str:
    return "".join({"compute": ".", "cache": "C", "reuse": "r"}[step.decision] for step in schedule.steps)


@pytest.mark.parametrize(("steps", "size", "expected"), [
    (20, 2, "........CrCrCrCrCr.."),
    (20, 3, "........CrrCrrCrrCr."),
    (20, 4, "........CrrrCrrrCrr."),
    (30, 2, "." * 12 + "Cr" * 8 + ".."),  # window 12..28
    (30, 3, "." * 12 + "Crr" * 5 + "Cr" + "."),
    (30, 4, "." * 12 + "Crrr" * 4 + ".."),
    (50, 2, "." * 20 + "Cr" * 14 + ".."),  # window 20..47
    (50, 3, "." * 20 + "Crr" * 9 + "..."),
    (50, 4, "." * 20 + "Crrr" * 7 + ".."),
])
def test_paper_window_of_40_to_95_percent_in_groups(steps: int, size: int, expected: str) -> None:
    plan = build(effective(preset="paper", group_size=size), even(steps))
    assert letters(plan) == expected
    assert plan.window == tuple(range(math.ceil(0.4 * steps), math.ceil(0.95 * steps)))
    assert plan.warnings == ()


def test_cut_is_share_of_reuse_steps_times_share_of_blocks() -> None:
    plan = build(effective(preset="paper"), even(20))
    assert plan.cut(28) == pytest.approx(5 / 20 * 21 / 28)
    assert build(effective(group_size=1), even(20)).cut(28) == 0
    assert Schedule(()).cut(28) == 0


@pytest.mark.parametrize("window", ["steps", "noise_level"])
def test_last_step_is_always_computed(window: str) -> None:
    plan = build(effective(start_percent=0.0, end_percent=1.0, window=window), even(11))
    assert plan.steps[-1].decision == "compute"
    assert plan.window == tuple(range(11))


@pytest.mark.parametrize("start", [0.02, 0.5, 0.9])
@pytest.mark.parametrize("window", ["steps", "noise_level"])
def test_run_that_starts_part_way_computes_its_first_two_steps(start: float, window: str) -> None:
    plan = build(effective(start_percent=0.0, end_percent=1.0, window=window), even(12, start))
    assert letters(plan) == ".CrCrCrCrCr."


@pytest.mark.parametrize(("start", "lead"), [(0.4, 4), (0.2, 2), (0.0, 1), (0.5, 5)])
def test_noise_level_window_computes_half_its_start_share_of_the_steps_first(start: float, lead: int) -> None:
    levels = [0.0] + [0.6 + 0.02 * k for k in range(20)]  # step 1 is already at 60 %, as karras on a flow model
    plan = build(effective(start_percent=start, end_percent=1.0, window="noise_level"), levels)
    assert letters(plan).index("r") == lead


def test_steps_window_has_no_such_lead() -> None:
    assert letters(build(effective(start_percent=0.0, end_percent=1.0, window="steps"), even(10))) == "CrCrCrCr.."


def test_noise_level_window_of_a_shifted_schedule_holds_fewer_steps() -> None:
    shift, steps = 3.0, 20  # sigma = 3 s / (1 + 2 s); levels are shares of the unshifted schedule: even, here squeezed
    levels = [(k / steps) ** shift for k in range(steps + 1)]
    plan = build(effective(window="noise_level"), levels)
    assert plan.window == tuple(k for k in range(20) if 0.4 <= levels[k] < 0.95)
    assert {k for k, step in enumerate(plan.steps) if step.decision != "compute"} <= set(plan.window)


@pytest.mark.parametrize("preset", ["auto", "paper"])
@pytest.mark.parametrize(("levels", "few"), [
    (even(8), True), (even(1), True), (even(4), True), (even(9), False), (even(20), False),
    (even(4, 0.5), True), (even(5, 0.5), False), (even(10, 0.5), False),  # img2img
    (even(10, 0.0, 0.5), False), (even(4, 0.0, 0.5), True),  # the first of two samplers
    (even(2, 0.75), True), (even(3, 0.75), False),
    (even(20)[::-1], False), (even(8)[::-1], True),
])
def test_few_steps_are_computed_and_said(preset: str, levels: list[float], few: bool) -> None:
    plan = build(effective(preset=preset), levels)
    assert (len(plan.warnings) == 1 and "all computed" in plan.warnings[0]) is few
    if few:
        assert set(letters(plan)) == {"."}


def test_few_steps_custom_obeys_and_warns() -> None:
    plan = build(effective(start_percent=0.2, end_percent=1.0, window="steps"), even(8))
    assert letters(plan) == "..CrCr.."
    assert len(plan.warnings) == 1
    assert "expect visible differences" in plan.warnings[0]


@pytest.mark.parametrize("levels", [[], [0.0], [1.0], [1.0, 1.0], [0.0, 0.0], [0.5, 0.5, 0.5], [1.0, 0.0], [0.0, 1.0]])
@pytest.mark.parametrize("window", ["steps", "noise_level"])
@pytest.mark.parametrize("forecast", ["hold", "taylor", "taylor2"])
def test_degenerate_lists_are_tolerated_and_reuse_nothing(levels: list[float], window: str, forecast: str) -> None:
    plan = build(effective(window=window, start_percent=0.0, end_percent=1.0, forecast=forecast), levels)
    assert len(plan.steps) == max(len(levels) - 1, 0)
    assert set(letters(plan)) <= {"."}
    assert plan.boundaries == ()


@pytest.mark.parametrize("levels", [
    [0.0, 0.5, 0.2, 0.6, 0.3, 0.7, 0.4, 0.8, 0.5, 0.9, 0.6, 1.0],
    [math.nan] * 12,
    [0.5] * 12,
    even(11)[::-1],
])
def test_non_monotonic_lists_give_a_valid_plan(levels: list[float]) -> None:
    for window in ("steps", "noise_level"):
        check_valid(build(effective(window=window, start_percent=0.1, end_percent=0.9, forecast="taylor"), levels), 2)


@pytest.mark.parametrize("steps", range(1, 41))
@pytest.mark.parametrize("size", [2, 3, 5, 100])
def test_every_plan_is_valid(steps: int, size: int) -> None:
    for window in ("steps", "noise_level"):
        for start, end in ((0.0, 1.0), (0.4, 0.95), (0.9, 0.91), (0.99, 1.0)):
            for history, forecast in enumerate(("delta", "taylor", "taylor2")):
                settings = effective(
                    window=window, start_percent=start, end_percent=end, group_size=size, forecast=forecast
                )
                check_valid(build(settings, even(steps)), size, history)


def check_valid(plan: Schedule, size: int, history: int = 1) -> None:
    groups: dict[int, list[int]] = {}
    for k, step in enumerate(plan.steps):
        assert (step.group is None) == (step.boundary is None) == (step.decision == "compute")
        if step.group is not None:
            groups.setdefault(step.group, []).append(k)
        assert step.decision != "reuse" or step.record == ()
    for group in groups.values():
        assert group == list(range(group[0], group[-1] + 1)), "a group is one run of steps"
        assert 2 <= len(group) <= size
        assert [plan.steps[k].decision for k in group] == ["cache"] + ["reuse"] * (len(group) - 1)
        assert set(group) <= set(plan.window)
        assert plan.steps[group[0]].record == (20,)
        computed = [k for k in range(group[0]) if plan.steps[k].decision != "reuse"]
        for k in sorted(computed, reverse=True)[:history]:
            assert plan.steps[k].record == (20,), "history of the forecast"
    assert not plan.steps or plan.steps[-1].decision == "compute"
    recorded = sum(bool(step.record) for step in plan.steps)
    assert recorded <= len(groups) * (1 + history), "nothing is stored that no later step needs"


def test_window_outside_the_run_reuses_nothing_and_says_so() -> None:
    plan = build(effective(window="noise_level", start_percent=0.0, end_percent=0.3), even(10, 0.5))
    assert plan.window == ()
    assert "no step can be reused" in plan.warnings[0]


def test_group_of_one_step_at_the_end_is_not_cached() -> None:
    plan = build(effective(window="steps", start_percent=0.5, end_percent=0.8, forecast="taylor"), even(10))
    assert letters(plan) == ".....Cr..."
    assert [k for k, step in enumerate(plan.steps) if step.record] == [4, 5]


def test_order_2_history_reaches_back_two_computed_steps_at_most() -> None:
    assert records("taylor", 0.3) == [2, 3, 5, 7]
    assert records("taylor2", 0.3) == [1, 2, 3, 5, 7]


def records(forecast: str, start: float) -> Sequence[int]:
    plan = build(effective(window="steps", start_percent=start, end_percent=1.0, forecast=forecast), even(10))
    return [k for k, step in enumerate(plan.steps) if step.record]


@pytest.mark.parametrize("levels", [even(12), [*even(11), 1.0]])  # the scheduler `normal`: a last step without extent
def test_guard_may_reuse_every_step_but_the_first_and_the_window_says_so(levels: list[float]) -> None:
    plan = build(effective(), levels, everywhere=True)
    assert letters(plan) == "C" + "r" * 11
    assert plan.window == tuple(range(12))


def test_two_steps_leave_a_guard_nothing_to_reuse() -> None:
    assert build(effective(preset="custom"), even(2), everywhere=True).kept == 0


def test_explicit_plan_is_followed_to_the_last_step_and_a_reuse_without_a_feature_is_computed() -> None:
    low, high = Reuse(3, FORECASTS["taylor"]), Reuse(7, FORECASTS["delta"])
    plan = follow([low, None, low, low, None, None, high, None, None, high])
    assert letters(plan) == ".Crr.Cr.Cr"
    assert [step.boundary for step in plan.steps] == [None, 3, 3, 3, None, 7, 7, None, 7, 7]
    assert [step.record for step in plan.steps] == [(3,), (3,), (), (), (), (7,), (), (), (7,), ()]
    assert [step.forecast for step in plan.steps if step.forecast] == [
        low.forecast, low.forecast, high.forecast, high.forecast]
    assert (plan.kept, plan.anchored) == (2, True)


def test_explicit_plan_records_the_history_of_another_boundary_in_steps_of_other_groups() -> None:
    low, high = Reuse(3, FORECASTS["taylor"]), Reuse(7, FORECASTS["taylor2"])
    plan = follow([None, None, low, None, high, None])
    assert [step.record for step in plan.steps] == [(3, 7), (3, 7), (), (7,), (), ()]


@pytest.mark.parametrize("rows", [[], [None], [Reuse(1, FORECASTS["hold"])], [Reuse(1, FORECASTS["hold"])] * 5, [None] * 5])
def test_plan_without_anything_to_reuse_computes(rows: list[Reuse | None]) -> None:
    plan = follow(rows)
    assert letters(plan) == "." * len(rows)
    assert (plan.kept, plan.anchored, plan.boundaries) == (0, False, ())
