"""A policy in force: exactly its steps reuse, at its boundaries; switched off it changes nothing."""

from __future__ import annotations

import pytest
import torch
from harness import STEPS, accelerate, every_family, last_run, model_of, reused_steps
from tiny import CASES, Case, count_calls, sample, sample_custom

from blockdance_core.forecast import FORECASTS
from blockdance_core.host import attach as attached
from blockdance_core.host.attach import handle_of
from blockdance_core.host.levels import noise_levels
from blockdance_core.policy import Calibrated, SchedulePolicy
from blockdance_core.schedule import Reuse

pytestmark = pytest.mark.smoke


def policy_for(case: Case, sampler: str = "euler") -> SchedulePolicy:
    """Steps 2, 5 and 6 of 10 reuse; the first group skips one block, the second one all but the last."""
    model = model_of(case)
    handle = handle_of(accelerate(model))
    assert handle is not None
    low, high = Reuse(0, FORECASTS["delta"]), Reuse(case.depth - 2, FORECASTS["taylor"])
    run = accelerate(model)
    sample(run, case, steps=STEPS)
    levels = noise_levels(model.get_model_object("model_sampling"), last_run(run)["sigmas"])
    plan = (None, None, low, None, None, high, high, None, None, None)
    entry = Calibrated(sampler, "simple", tuple(levels), (plan,), (0.2,), (0.0,))
    return SchedulePolicy("tiny", handle.family, case.depth, (entry,))


@every_family
def test_exactly_the_planned_steps_reuse_at_the_planned_boundaries(case: Case) -> None:
    model = model_of(case)
    accelerated = accelerate(model, policy=policy_for(case))
    totals: list[list[int]] = []
    with count_calls(case.blocks(model.model.diffusion_model)) as counts:
        result = sample(accelerated, case, steps=STEPS, callback=lambda *_: totals.append(list(counts)))
    assert torch.isfinite(result).all()
    run = last_run(accelerated)
    assert run["warnings"] == []
    assert run["fallbacks"] == {}
    assert reused_steps(run) == [2, 5, 6]
    assert run["boundary"] == [None, 0, 0, None] + [case.depth - 2] * 3 + [None] * 3
    assert run["window"]["text"] == "window covers 6 of 10 steps"
    assert run["config"]["policy"] == "tiny"
    assert run["cached_bytes"] <= run["predicted_bytes"]
    for step, (before, after) in enumerate(zip([[0] * case.depth, *totals], totals, strict=False)):
        skipped = {2: 1, 5: case.depth - 1, 6: case.depth - 1}.get(step, 0)
        expected = [0] * skipped + [case.calls()] * (case.depth - skipped)
        assert [now - then for now, then in zip(after, before, strict=True)] == expected, step


@every_family
def test_switched_off_a_policy_changes_nothing(case: Case) -> None:
    model, policy = model_of(case), policy_for(case)
    full = sample(model, case, steps=STEPS)
    for settings in ({"enabled": False}, {"group_size": 1}):
        accelerated = accelerate(model, policy=policy, **settings)
        assert torch.equal(sample(accelerated, case, steps=STEPS), full)
        run = last_run(accelerated)
        assert run["decisions"] == ["compute"] * STEPS
        assert run["cached_bytes"] == 0
        assert run["config"]["policy"] is None


def test_policy_of_this_sampler_applies_to_another_one_with_a_warning() -> None:
    case = CASES["sd3"]
    accelerated = accelerate(model_of(case), policy=policy_for(case, "dpmpp_2m"))
    sample(accelerated, case, steps=STEPS, sampler="dpmpp_2m")
    assert last_run(accelerated)["warnings"] == []
    sample(accelerated, case, steps=STEPS)
    run = last_run(accelerated)
    assert reused_steps(run) == [2, 5, 6]
    assert run["warnings"] == ["calibrated for 10 steps of dpmpp_2m, this run has 10 of euler: fitted by noise level"]


@pytest.mark.parametrize("settings", [{"denoise": 0.5, "steps": 10}, {"steps": 25}, {"start_step": 4}, {"last_step": 7}])
def test_other_runs_are_fitted(settings: dict) -> None:
    case = CASES["sd3"]
    accelerated = accelerate(model_of(case), policy=policy_for(case))
    result = sample(accelerated, case, **{"steps": STEPS, **settings})
    assert torch.isfinite(result).all()
    run = last_run(accelerated)
    assert run["decisions"][-1] == "compute"
    assert reused_steps(run)
    assert run["fallbacks"] == {}


def test_second_part_of_a_calibrated_run_follows_the_rest_of_its_plan() -> None:
    case = CASES["sd3"]
    accelerated = accelerate(model_of(case), policy=policy_for(case))
    sample(accelerated, case, steps=STEPS, start_step=3)
    run = last_run(accelerated)
    assert reused_steps(run) == [2, 3]
    assert run["warnings"] == []


def test_two_runs_of_one_policy_are_the_same() -> None:
    case = CASES["sd3"]
    accelerated = accelerate(model_of(case), policy=policy_for(case))
    assert torch.equal(sample(accelerated, case, steps=STEPS), sample(accelerated, case, steps=STEPS))


def test_second_model_of_another_family_is_computed_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["sd3"]
    policy = policy_for(case)
    accelerated = accelerate(model_of(case), policy=policy)
    full = sample(model_of(case), case, steps=STEPS)
    # The wrappers of one MODEL run another one, as those of DualModelGuider's first do with its second.
    object.__setattr__(policy, "family", "Flux")
    assert torch.equal(sample(accelerated, case, steps=STEPS), full)
    run = last_run(accelerated)
    assert "was calibrated for Flux with 8 blocks; this model is SD3" in run["warnings"][0]
    assert run["decisions"] == ["compute"] * STEPS


def test_guider_with_its_own_levels_is_fitted() -> None:
    case = CASES["sd3"]
    accelerated = accelerate(model_of(case), policy=policy_for(case))
    result = sample_custom(accelerated, case, steps=STEPS, sampler="heun", scheduler="karras")
    assert torch.isfinite(result).all()
    run = last_run(accelerated)
    assert run["decisions"][-1] == "compute"
    assert "of heun: fitted by noise level" in run["warnings"][0]


def test_the_features_of_the_plan_are_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attached.model_management, "is_device_cpu", lambda device: False)
    announced: list[int] = []
    run_record = attached.run_record
    monkeypatch.setattr(attached, "run_record", lambda session, **rest: (
        announced.append(session.announced_bytes), run_record(session, **rest))[1])
    case = CASES["sd3"]
    for settings in ({"policy": policy_for(case)}, {"forecast": "hold"}, {"forecast": "taylor"}, {"enabled": False}):
        sample(accelerate(model_of(case), **settings), case, steps=STEPS)
    planned, hold, taylor, off = announced[-4:]
    assert (planned, taylor, off) == (4 * hold, 2 * hold, 0), "two boundaries, two features of each"
