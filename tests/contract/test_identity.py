"""Invariant 1: switched off, N = 1 or an empty window, the result is bit-identical to the unpatched model's."""

from __future__ import annotations

import pytest
import torch
from harness import STEPS, accelerate, every_case, every_family, last_run, model_of
from tiny import Case, count_calls, sample

pytestmark = pytest.mark.smoke

OFF = {
    "disabled": {"enabled": False},
    "n_1": {"group_size": 1},
    "empty_window": {"start_percent": 0.98, "end_percent": 1.0},
    "few_steps": {"preset": "auto"},
}


@every_case
def test_observed_but_nothing_to_reuse_is_bit_identical_and_runs_every_block(case: Case) -> None:
    check_off(case, "empty_window")


@every_family
def test_off_in_any_way_is_bit_identical_and_runs_every_block(case: Case) -> None:
    check_off(case, *OFF)


def check_off(case: Case, *ways: str) -> None:
    model = model_of(case)
    full = {steps: sample(model, case, steps=steps) for steps in ((STEPS, 4) if "few_steps" in ways else (STEPS,))}
    for name in ways:
        settings = OFF[name]
        steps = 4 if name == "few_steps" else STEPS
        accelerated = accelerate(model, **settings)
        with count_calls(case.blocks(model.model.diffusion_model)) as counts:
            assert torch.equal(sample(accelerated, case, steps=steps), full[steps]), name
        assert counts == [steps * case.calls()] * case.depth, name
        run = last_run(accelerated)
        assert run["decisions"] == ["compute"] * steps, name
        assert run["reused_calls"] == run["cached_bytes"] == 0, name


@every_family
def test_observed_steps_before_the_first_reuse_are_bit_identical(case: Case) -> None:
    model = model_of(case)
    states: list[list[torch.Tensor]] = [[], []]
    sample(model, case, steps=STEPS, callback=lambda i, d, x, n: states[0].append(d.clone()))
    sample(accelerate(model, forecast="taylor"), case, steps=STEPS,
           callback=lambda i, d, x, n: states[1].append(d.clone()))
    same = [torch.equal(a, b) for a, b in zip(*states, strict=True)]
    assert same[:4] == [True] * 4, "steps 0 to 2 are computed, 3 is the first cache step"
    assert same[4] is False


@pytest.mark.parametrize("forecast", ["hold", "delta", "taylor"])
def test_group_size_beyond_the_window_reuses_one_group(forecast: str) -> None:
    from tiny import CASES

    case = CASES["sd3"]
    accelerated = accelerate(model_of(case), group_size=1000, forecast=forecast)
    assert torch.isfinite(sample(accelerated, case, steps=STEPS)).all()
    assert last_run(accelerated)["decisions"] == ["compute"] * 3 + ["cache"] + ["reuse"] * 5 + ["compute"]
