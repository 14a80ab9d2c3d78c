"""The program against every plan there is."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest

from blockdance_core.calibration import (
    CANDIDATES,
    Found,
    Profile,
    best_forecast,
    best_forecasts,
    denser,
    fits,
    front,
    groups_of,
    merged,
    neighbours,
    plan_of,
    refitted,
    sparser,
)
from blockdance_core.schedule import REUSE, Plan, follow

STEPS, LONGEST = 7, 4
BOUNDARIES = (5, 7)
UNIT = 24


def profile(steps: int = STEPS, seed: int = 0, prompts: int = 3) -> Profile:
    """Errors that grow with the size of a group, drawn at random; costs that are whole parts of a step."""
    rng = np.random.default_rng(seed)
    lags = (1, 2, 3)
    errors = rng.uniform(0.1, 1, (prompts, len(BOUNDARIES), steps, len(lags), LONGEST)).cumsum(-1)
    errors[..., 0] = 0
    for c, i in itertools.product(range(steps), range(len(lags))):
        errors[:, :, c, i, max(1, steps - c):] = np.nan  # behind the run
        if lags[i] > max(c, 1):
            errors[:, :, c, i] = np.nan
    residuals = rng.normal(size=(len(BOUNDARIES), 2, steps, 20))
    return Profile(
        BOUNDARIES, (6 / UNIT, 3 / UNIT), lags, sigmas_of(steps), np.stack([gram_of(*parts) for parts in residuals]), errors,
        rng.uniform(0.5, 2, (prompts, steps + 1)))


def gram_of(base: np.ndarray, guidance: np.ndarray | None = None) -> np.ndarray:
    """Inner products of two parts, [2, steps, 2, steps]."""
    parts = np.stack([base, np.zeros_like(base) if guidance is None else guidance])
    return np.einsum("pix,qjx->piqj", parts, parts)


def sigmas_of(steps: int) -> tuple[float, ...]:
    return tuple(1 - k / steps for k in range(steps + 1))


def every_way(steps: int, lead: int) -> list[list[tuple[int, int, int]]]:
    """Every list of groups (computed step, size, way) with the first `lead` steps computed."""
    @functools.cache
    def behind(c: int) -> list[list[tuple[int, int, int]]]:
        if c == steps:
            return [[]]
        return [
            [(c, size, way), *rest] for size in range(1, min(LONGEST, steps - c) + 1)
            if size == 1 or c + 1 >= lead
            for way in (range(len(BOUNDARIES)) if size > 1 else (0,)) for rest in behind(c + size)
        ]

    return behind(0)


def expected(one: Profile, groups: list[tuple[int, int, int]]) -> tuple[float, float]:
    """Cut and loss of groups, restated: errors times gains, squared, mean over the prompts, added up."""
    saved, loss, lag = 0.0, 0.0, 1
    for c, size, way in groups:
        if size > 1:
            nearest = min(range(len(one.lags)), key=lambda i: abs(one.lags[i] - lag))
            end = min(c + size, one.steps)
            loss += float(np.mean((one.errors[:, way, c, nearest, size - 1] * one.gains[:, end]) ** 2))
            saved += (size - 1) * (1 - one.costs[way])
        lag = size
    return saved / one.steps, loss


@pytest.mark.parametrize("lead", [1, 3])
@pytest.mark.parametrize("steps", [3, 5, 7])
def test_front_is_the_best_of_all_plans(steps: int, lead: int) -> None:
    one = profile(steps)
    found = front(one, lead)
    all_plans = [expected(one, groups) for groups in every_way(steps, lead)]
    for cut in sorted({cut for cut, loss in all_plans if math.isfinite(loss)}):
        best = min(loss for other, loss in all_plans if other >= cut - 1e-9)
        assert min(one.loss for one in found if one.cut >= cut - 1e-9) == pytest.approx(best)
    table = {round(cut, 9): min(loss for other, loss in all_plans if abs(other - cut) < 1e-9) for cut, loss in all_plans}
    for row in found:
        assert row.loss == pytest.approx(table[round(row.cut, 9)])


def test_front_ascends_and_what_saves_more_costs_more() -> None:
    found = front(profile())
    assert found[0] == Found((None,) * STEPS, 0.0, 0.0)
    assert len(found) > 5
    for one, other in itertools.pairwise(found):
        assert one.cut < other.cut
        assert one.loss < other.loss


@pytest.mark.parametrize("lead", [1, 2, 4])
def test_first_steps_are_computed(lead: int) -> None:
    assert all(not any(one.plan[:lead]) for one in front(profile(), lead))


def test_last_step_is_reused_where_that_costs_nothing_and_computed_where_nothing_may_be_lost_there() -> None:
    one = profile()
    errors = one.errors.copy()
    errors[:, :, STEPS - 2, :, 1] = 0.0
    assert front(dataclasses.replace(one, errors=errors))[0].plan[-1] is not None
    for c in range(STEPS - LONGEST, STEPS):
        errors[:, :, c, :, STEPS - c - 1] = 1e3
    errors[:, :, STEPS - 1] = 0.0  # a group of one
    assert all(found.plan[-1] is None for found in front(dataclasses.replace(one, errors=errors))[:5])


def groups_of_steps(plan: Plan) -> list[tuple[int, int]]:
    starts = [k for k, row in enumerate(plan) if row is None]
    return [(start, end - start) for start, end in zip(starts, [*starts[1:], len(plan)], strict=True)]


def test_plans_are_followed_as_they_are_and_have_one_boundary_a_group() -> None:
    for one in front(profile()):
        steps = follow(one.plan).steps
        assert [step.decision == REUSE for step in steps] == [row is not None for row in one.plan]
        for start, size in groups_of_steps(one.plan):
            assert len({row.boundary for row in one.plan[start + 1:start + size]}) <= 1


def test_plan_of_takes_the_best_forecasts_for_exactly_its_computed_steps() -> None:
    one = profile()
    plan = plan_of(one, [(0, 1, 0), (1, 3, 1), (4, 2, 0), (6, 1, 0)])
    assert [row and row.boundary for row in plan] == [None, None, 7, 7, None, 5, None]
    assert [row and row.forecast for row in plan] == [
        None, None, *(best_forecast(one.grams[1], one.sigmas, [1, 0], step) for step in (2, 3)), None,
        best_forecast(one.grams[0], one.sigmas, [4, 1, 0], 5), None,
    ]
    assert [[age for age, _ in row.forecast.fitted] for row in plan if row] == [[1, 2], [2, 3], [1, 4, 5]]


def test_groups_of_a_plan_give_it_back() -> None:
    one = profile()
    assert groups_of(one, (None,) * 3) == [(0, 1, 1), (1, 1, 1), (2, 1, 1)]
    for found in front(one):
        assert plan_of(one, groups_of(one, found.plan)) == found.plan


def test_plans_of_another_profile_do_not_fit() -> None:
    one = profile()
    for found in front(one):
        assert fits(one, found.plan)
        assert not fits(one, found.plan[:-1])
    reuse = next(row for row in front(one)[-1].plan if row)
    long, late = (None, *[reuse] * LONGEST, None, None), (reuse, *[None] * 6)
    for plan in (long, late, (reuse,) * STEPS):
        assert len(plan) == STEPS
        assert not fits(one, plan)


def test_a_plan_of_another_boundary_is_remade_for_one_that_was_measured() -> None:
    one = profile()
    for found in front(one):
        elsewhere = tuple(row and dataclasses.replace(row, boundary=6) for row in found.plan)
        assert fits(one, elsewhere)
        for way, boundary in enumerate(BOUNDARIES):
            plan = refitted(one, elsewhere, boundary)
            assert plan == plan_of(one, [(c, size, way) for c, size in groups_of_steps(found.plan)])


def test_neighbours_move_one_computed_step_but_the_first() -> None:
    one = profile()
    for found in front(one):
        before = {k for k, row in enumerate(found.plan) if row is None}
        reached = set()
        for plan in neighbours(one, found.plan):
            after = {k for k, row in enumerate(plan) if row is None}
            assert len(plan) == STEPS
            assert plan[0] is None
            (gone,), (new,) = before - after, after - before
            assert abs(gone - new) == 1
            reached.add((gone, new))
            assert max(size for _, size in groups_of_steps(plan)) <= LONGEST
        free = {(k, to) for k in before - {0} for to in (k - 1, k + 1) if to not in before and to < STEPS}
        assert reached <= free
        assert free == reached or any(size == LONGEST for _, size in groups_of_steps(found.plan))


def test_denser_plan_computes_the_one_step_more_that_lowers_the_expected_error_most() -> None:
    one = profile()
    for found in front(one):
        groups = groups_of(one, found.plan)
        plan = denser(one, found.plan)
        if not any(found.plan):
            assert plan == found.plan
            continue
        before, after = ({k for k, row in enumerate(rows) if row is None} for rows in (found.plan, plan))
        assert before < after
        assert len(after) == len(before) + 1
        best = min(
            expected(one, [*groups[:i], (c, j, way), (c + j, size - j, way), *groups[i + 1 :]])[1]
            for i, (c, size, way) in enumerate(groups) for j in range(1, size))
        assert expected(one, groups_of(one, plan))[1] == pytest.approx(best)


def test_sparser_plans_compute_one_step_less_and_come_by_the_error_that_is_expected() -> None:
    one = profile()
    for found in front(one):
        groups = groups_of(one, found.plan)
        plans = list(sparser(one, found.plan))
        before = {k for k, row in enumerate(found.plan) if row is None}
        for plan in plans:
            after = {k for k, row in enumerate(plan) if row is None}
            assert after < before
            assert len(after) == len(before) - 1
        joined = [
            [*groups[:i], (c, size + wide, way), *groups[i + 2 :]] for way in range(len(BOUNDARIES))
            for i, ((c, size, _), (_, wide, _)) in enumerate(itertools.pairwise(groups)) if size + wide <= LONGEST]
        losses = [expected(one, groups_of(one, plan))[1] for plan in plans]
        assert losses == pytest.approx(sorted(expected(one, some)[1] for some in joined))


def test_best_forecast_finds_the_expansion_that_made_a_step_and_fits_its_weights() -> None:
    residuals = np.random.default_rng(0).normal(size=(5, 40))
    sigmas = sigmas_of(5)
    for expansion in CANDIDATES:
        weights = expansion.weights([sigmas[3], sigmas[1], sigmas[0]], sigmas[4])
        residuals[4] = sum(weight * residuals[k] for weight, k in zip(weights, (3, 1, 0), strict=False))
        found = best_forecast(gram_of(residuals), sigmas, [3, 1, 0], 4)
        assert found is not None
        assert dataclasses.replace(found, fitted=()) == expansion
        assert [age for age, _ in found.fitted] == [1, 3, 4]
        assert [weight for _, weight in found.fitted] == pytest.approx([*weights, *[0] * (3 - len(weights))], abs=1e-6)


def test_fitted_weights_are_those_of_least_squares() -> None:
    residuals = np.random.default_rng(1).normal(size=(6, 300)).cumsum(0)
    found = best_forecast(gram_of(residuals), sigmas_of(6), [4, 3, 1, 0], 5)
    expected, *_ = np.linalg.lstsq(residuals[[4, 3, 1]].T, residuals[5])
    assert found is not None
    assert [weight for _, weight in found.fitted] == pytest.approx(expected, abs=1e-4)
    assert found.guided == ()


def test_what_guidance_adds_has_weights_of_its_own() -> None:
    """Those that make the sum of both parts closest: closer than any weights that are the same for both."""
    base, guidance = np.random.default_rng(1).normal(size=(2, 6, 300)).cumsum(1)
    found = best_forecast(gram_of(base, guidance), sigmas_of(6), [4, 3, 1, 0], 5)
    nodes = [4, 3, 1]
    expected, *_ = np.linalg.lstsq(np.concatenate([base[nodes], guidance[nodes]]).T, base[5] + guidance[5])
    assert found is not None
    assert [age for age, _ in found.fitted] == [1, 2, 4]
    assert [*(weight for _, weight in found.fitted), *found.guided] == pytest.approx(expected, abs=1e-3)


def test_best_forecast_weighs_only_what_can_be_compared() -> None:
    gram = gram_of(np.random.default_rng(2).normal(size=(5, 40)))
    gram[:, 1] = gram[:, :, :, 1] = np.nan
    found = best_forecast(gram, sigmas_of(5), [3, 1, 0], 4)
    assert found is not None
    assert [age for age, _ in found.fitted] == [1]
    assert best_forecast(gram, sigmas_of(5), [1, 0], 4) is None
    nothing = best_forecast(np.zeros((2, 5, 2, 5)), sigmas_of(5), [3, 1], 4)
    assert nothing == dataclasses.replace(CANDIDATES[0], fitted=((1, 1.0), (3, 0.0))), "of equally good ones the first"


def test_best_forecasts_has_one_for_each_step_behind_a_group_and_none_behind_the_run() -> None:
    one = profile(steps=4)
    table = best_forecasts(one.grams, one.sigmas, (1, 2), 3)
    assert table[1][2][1][1] == best_forecast(one.grams[1], one.sigmas, [2, 0], 3)
    assert [[step[0][j] is not None for j in range(3)] for step in table[0]] == [
        [False, True, True], [False, True, True], [False, True, False], [False, False, False]]


def test_merged_holds_all_prompts_and_refuses_other_settings() -> None:
    one, other = profile(), dataclasses.replace(profile(), errors=profile().errors * 2, costs=(0.5, 0.25))
    both = merged([one, other])
    assert both.errors.shape[0] == both.gains.shape[0] == 6
    assert both.costs == ((6 / UNIT + 0.5) / 2, (3 / UNIT + 0.25) / 2)
    assert np.array_equal(both.grams, 2 * one.grams)
    with pytest.raises(ValueError, match="different settings"):
        merged([one, dataclasses.replace(one, boundaries=(1, 7))])


def test_costs_of_merged_profiles_weigh_by_samples_however_they_are_chained() -> None:
    costs = 0.9, 0.1, 0.1, 0.1
    parts = [dataclasses.replace(profile(2), costs=(cost, cost)) for cost in costs]
    chained = functools.reduce(lambda one, other: merged([one, other]), parts)
    assert chained.costs == pytest.approx((0.3, 0.3))
    assert merged(parts).costs == pytest.approx((0.3, 0.3))


def test_groups_that_were_not_measured_are_planned_by_no_move() -> None:
    one = profile(8)
    errors = one.errors.copy()
    errors[:, :, 0] = np.nan
    gaps = dataclasses.replace(one, errors=errors)
    plan = plan_of(gaps, [(0, 1, 0), (1, 3, 0), (4, 4, 0)])
    for some in (*neighbours(gaps, plan), *sparser(gaps, plan), denser(gaps, plan)):
        assert some[1] is None
    assert any(some[1] for some in (*neighbours(one, plan), *sparser(one, plan)))
