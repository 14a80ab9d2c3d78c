"""Invariant 3: hold, delta and taylor equal an independent, plain re-statement of the method (reference.py).

Tolerance: 1e-4 of the largest value, for another order of additions in float32 over ten steps. What the method changes
is at least ten times that; each test checks it.
"""

from __future__ import annotations

import functools
from typing import Any

import comfy.samplers
import pytest
from contract.reference import Reference, plan
from harness import (
    FORECASTS,
    REUSED,
    STEPS,
    accelerate,
    assert_close,
    distance,
    every_case,
    every_family,
    last_run,
    model_of,
)
from tiny import CASES, Case, fake_control, sample
from torch import Tensor

pytestmark = pytest.mark.smoke

controlled = pytest.mark.parametrize("case", [case for case in CASES.values() if case.control], ids=lambda c: c.name)


@functools.cache
def full_run(case: Case) -> Tensor:
    return sample(model_of(case), case, steps=STEPS)


def check(
    case: Case, forecast: str, boundary: int, group_size: int = 2, sensitive: bool = True, **settings: Any
) -> dict[str, Any]:
    model = model_of(case)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
    reference = Reference(case, forecast, boundary, sigmas, plan(STEPS, 0.25, 1.0, group_size))
    with reference.watch(model):
        expected = sample(model, case, steps=STEPS, callback=reference.callback, **settings)
    accelerated = accelerate(model, forecast=forecast, boundary=boundary, group_size=group_size)
    found = sample(accelerated, case, steps=STEPS, **settings)
    assert_close(found, expected)
    if sensitive:
        assert distance(full_run(case), expected) > 1e-3
    run = last_run(accelerated)
    assert run["reused_calls"] == len(reference.replaced)
    return run


def test_plan_of_the_reference_is_as_stated() -> None:
    assert plan(10, 0.25, 1.0, 2) == {4: 3, 6: 5, 8: 7}
    assert plan(10, 0.25, 1.0, 3) == {4: 3, 5: 3, 7: 6, 8: 6}
    assert plan(20, 0.40, 0.95, 2) == {9: 8, 11: 10, 13: 12, 15: 14, 17: 16}


@every_case
@pytest.mark.parametrize("forecast", FORECASTS)
def test_forecast_equals_the_plain_restatement_at_several_boundaries(case: Case, forecast: str) -> None:
    for boundary in {"hold": (2,), "delta": (5,), "taylor": (0, 2, 5, case.depth - 1)}[forecast]:
        run = check(case, forecast, boundary, sensitive=boundary > 0)
        assert [k for k, decision in enumerate(run["decisions"]) if decision == "reuse"] == REUSED
        assert run["fallbacks"] == {}
        assert run["warnings"] == []


@every_family
def test_taylor_in_long_groups_of_a_split_batch_equals_the_restatement(case: Case) -> None:
    check(case, "taylor", 5, group_size=3, sensitive=False, batch=case.rows(2), different_lengths=True)


@controlled
def test_forecast_with_control_equals_the_restatement(case: Case) -> None:
    for forecast, boundary in (("hold", 2), ("delta", 2), ("taylor", 5)):
        check(case, forecast, boundary, sensitive=False, control=fake_control(case))


@controlled
@pytest.mark.parametrize("percent", [(0.0, 0.55), (0.55, 1.0)], ids=["stops", "starts"])
def test_forecast_with_control_for_part_of_the_run_equals_the_restatement(
    case: Case, percent: tuple[float, float]
) -> None:
    run = check(case, "taylor", 4, group_size=4, sensitive=False, control=fake_control(case, percent=percent))
    assert run["fallbacks"], "the change falls into a group of four"


def test_stored_features_survive_blocks_that_write_into_their_input() -> None:
    case = CASES["flux"]
    for boundary in range(case.depth):
        check(case, "delta", boundary, sensitive=False, control=fake_control(case))
