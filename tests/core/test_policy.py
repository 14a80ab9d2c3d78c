"""Policies: what is picked and how it is fitted to a run; files come back as they were, and damaged ones are refused."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from blockdance_core.config import Config, ConfigError, Defaults, Policy, resolve
from blockdance_core.forecast import FORECASTS, Forecast
from blockdance_core.policy import Calibrated, Fixed, PolicyError, SchedulePolicy, file, load, save
from blockdance_core.schedule import Reuse, Schedule, follow

SLOW, FAST = Reuse(13, FORECASTS["delta"]), Reuse(20, Forecast(True, 2, 0.9, ((1, 1.25), (4, -0.5)), (1.5, -0.75)))
PLANS = {20: ("....Cr..Cr..CrCrCr..", "....CrrrCrrrCrrCrrr."), 30: ("......CrrCrrCrrCrrCrrCrrCrr...",)}


def even(steps: int, first: float = 0.0, last: float = 1.0) -> list[float]:
    return [first + (last - first) * k / steps for k in range(steps + 1)]


def plan_of(letters: str, reuse: Reuse) -> tuple[Reuse | None, ...]:
    return tuple(reuse if letter == "r" else None for letter in letters)


def entry(steps: int = 20, sampler: str = "euler", power: float = 1.0, **changes: Any) -> Calibrated:
    plans = tuple(plan_of(letters, reuse) for letters, reuse in zip(PLANS[steps], (SLOW, FAST), strict=False))
    values = {
        "sampler": sampler, "scheduler": "simple", "levels": tuple(round(level**power, 6) for level in even(steps)),
        "plans": plans, "cuts": (0.2, 0.45)[: len(plans)], "losses": (1e-9, 0.002)[: len(plans)],
    }
    return Calibrated(**{**values, **changes})


def policy(*entries: Calibrated, **changes: Any) -> SchedulePolicy:
    values = {"name": "test", "family": "PixArt", "depth": 28, "entries": entries or (entry(),), "record": {"cfg": 4.5}}
    return SchedulePolicy(**{**values, **changes})


def letters(plan: Schedule) -> str:
    return "".join({"compute": ".", "cache": "C", "reuse": "r"}[step.decision] for step in plan.steps)


def at_speed(levels: list[float], group_size: int = 2, sampler: str = "euler", *entries: Calibrated) -> Schedule:
    return policy(*entries).schedule(levels, sampler, group_size)


def test_joined_replaces_what_is_near_and_keeps_the_rest() -> None:
    one = entry(plans=(plan_of(PLANS[20][0], SLOW),), cuts=(0.21,), losses=(0.5,))
    both = one.joined(entry(), (0.22,), 0.02)
    assert (both.cuts, both.losses) == ((0.21, 0.45), (0.5, 0.002))
    assert both.plans == (one.plans[0], entry().plans[1])
    assert one.joined(entry(), (0.23,), 0.02).cuts == (0.2, 0.21, 0.45), "not wanted, though near to what was found"
    assert dataclasses.replace(one, cuts=(0.203,)).joined(entry(), (0.3,), 0.02).cuts == (0.203, 0.45), "the same cut"
    slower = dataclasses.replace(one, cuts=(0.185,))
    assert slower.joined(entry(), (0.2,), 0.02).cuts == (0.185, 0.2, 0.45), "a faster one is not given up"
    assert slower.joined(entry(), (0.2,), 0.04).cuts == (0.185, 0.45), "measured anew, a cut differs by as much"


# What is picked


@pytest.mark.parametrize(("group_size", "expected"), [(2, 1), (3, 1), (64, 1)])
def test_speed_is_the_highest_that_n_allows(group_size: int, expected: int) -> None:
    assert letters(at_speed(even(20), group_size)) == PLANS[20][expected]
    slower = entry(cuts=(0.2, 0.51))
    assert letters(at_speed(even(20), group_size, "euler", slower)) == PLANS[20][0 if group_size == 2 else 1]


def test_cut_of_exactly_what_n_allows_is_taken() -> None:
    assert letters(at_speed(even(20), 2, "euler", entry(cuts=(0.2, 0.5)))) == PLANS[20][1]


def test_n_below_every_plan_takes_the_slowest_and_says_so() -> None:
    plan = at_speed(even(20), 2, "euler", entry(cuts=(0.6, 0.7)))
    assert letters(plan) == PLANS[20][0]
    assert plan.warnings == ("N = 2 is slower than anything in test: its slowest schedule is used",)


@pytest.mark.parametrize(("cut", "expected", "warnings"), [
    (0.2, 0, ()), (0.5, 0, ()), (0.51, 1, ()), (0.99, 1, ()), (0.0, 1, ()),
    (0.1, 0, ("cut = 0.1 is slower than anything in test: its slowest schedule is used",)),
])
def test_cut_picks_any_level_in_place_of_n(cut: float, expected: int, warnings: tuple[str, ...]) -> None:
    plan = policy(entry(cuts=(0.2, 0.51))).at(cut).schedule(even(20), "euler", 8)
    assert letters(plan) == PLANS[20][expected]
    assert plan.warnings == warnings
    assert not policy().at(0.9).schedule(even(20), "euler", 1).boundaries, "N = 1 is off"
    for nonsense in (-0.1, 1.0, math.nan):
        with pytest.raises(ConfigError, match="no share of the time"):
            policy().at(nonsense)


@pytest.mark.parametrize("levels", [[], [0.0], even(3), even(20)])
def test_n_1_computes_every_step(levels: list[float]) -> None:
    plan = at_speed(levels, 1)
    assert letters(plan) == "." * max(len(levels) - 1, 0)
    assert (plan.window, plan.warnings, plan.boundaries) == ((), (), ())


def test_calibrated_run_is_followed_exactly_without_a_warning() -> None:
    chosen = policy(entry(power=1.7))
    levels = [level + 5e-4 for level in chosen.entries[0].levels[:-1]] + [1.0]
    plan = chosen.schedule(levels, "euler", 2)
    assert plan.steps == follow(chosen.entries[0].plans[1]).steps
    assert plan.window == tuple(range(4, 19))
    assert plan.warnings == ()


def test_sampler_counts_before_the_number_of_steps() -> None:
    entries = entry(20, "euler"), entry(30, "dpmpp_2m")
    assert letters(at_speed(even(30), 2, "dpmpp_2m", *entries)) == PLANS[30][0]
    assert letters(at_speed(even(20), 2, "euler", *entries)) == PLANS[20][1]
    plan = at_speed(even(20), 2, "dpmpp_2m", *entries)
    assert plan.warnings == ("calibrated for 30 steps of dpmpp_2m, this run has 20 of dpmpp_2m: fitted by noise level",)


def test_number_of_steps_is_the_nearest_in_ratio() -> None:
    entries = entry(20), entry(30)
    for steps, nearest in ((12, 20), (24, 20), (25, 30), (60, 30)):
        assert f"calibrated for {nearest} steps" in at_speed(even(steps), 2, "euler", *entries).warnings[0]


@pytest.mark.parametrize(("steps", "far"), [(13, True), (14, False), (19, False), (40, False)])
def test_far_fewer_steps_than_calibrated_are_advised_against(steps: int, far: bool) -> None:
    (warning,) = at_speed(even(steps), 2, "euler", entry(20)).warnings
    assert ("set a quality beside it, or calibrate anew" in warning) is far


def test_another_sampler_is_fitted_and_says_so() -> None:
    plan = at_speed(even(20), 2, "dpmpp_2m")
    assert letters(plan) == PLANS[20][1]
    assert plan.warnings == ("calibrated for 20 steps of euler, this run has 20 of dpmpp_2m: fitted by noise level",)


def test_of_two_schedulers_the_one_with_the_run_s_levels_is_taken() -> None:
    other = entry(power=2.0, scheduler="karras", plans=(plan_of("." * 15 + "Crrr.", FAST),), cuts=(0.1,), losses=(0.0,))
    for levels, expected in ((even(20), PLANS[20][1]), (list(other.levels), "." * 15 + "Crrr.")):
        plan = at_speed(levels, 2, "euler", entry(), other)
        assert (letters(plan), plan.warnings) == (expected, ())
    near = at_speed([level**1.8 for level in even(20)], 2, "euler", entry(), other)
    assert near.warnings == ("calibrated with the scheduler karras, this run has other noise levels: fitted by noise level",)


def test_part_of_a_run_counts_with_the_steps_of_the_whole() -> None:
    plan = at_speed(even(10, 0.5), 2, "euler", entry(20), entry(30))
    assert letters(plan) == "..rrCrCrr." or letters(plan)[-8:] == PLANS[20][1][-8:]
    assert plan.warnings == ()


# How it is fitted


def computed(plan: Schedule) -> int:
    return sum(step.decision != "reuse" for step in plan.steps)


@pytest.mark.parametrize("power", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("first", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("steps", [12, 15, 19, 21, 28, 33, 50, 99])
def test_fitted_plan_keeps_its_share_and_its_ends(steps: int, first: float, power: float) -> None:
    source = entry(power=1.2)
    levels = [first + (1 - first) * level**power for level in even(steps)]
    plan = at_speed(levels, 2, "euler", source)
    text = letters(plan)
    assert len(text) == steps
    assert text[0] != "r"
    assert text[-1] == "."
    assert first == 0.0 or text[1] != "r"
    assert {step.boundary for step in plan.steps} <= {None, 20}
    expansion = dataclasses.replace(FAST.forecast, fitted=(), guided=())
    assert {step.forecast for step in plan.steps} <= {None, expansion}, "the weights are of other steps"
    low, high = round(source.position(levels[0])), source.steps
    share = sum(row is None for row in source.plans[1][low:high]) / (high - low)
    slack = 2 + steps * (0.15 if first else 0)
    assert abs(computed(plan) - steps * share) <= slack
    if plan.window:
        assert (text[plan.window[0]], text[plan.window[-1]]) == ("C", "r")
        assert set("r") & set(text) and text.find("r") > plan.window[0]


@pytest.mark.parametrize(("steps", "last", "reused"), [
    (20, 1.0, True), (40, 1.0, True), (33, 1.0, True), (20, 0.9, False), (40, 0.5, False),
])
def test_last_step_is_reused_only_where_the_plan_reuses_its_own_and_the_run_ends_there(
    steps: int, last: float, reused: bool
) -> None:
    source = entry(plans=(plan_of("CCCr" * 5, SLOW),), cuts=(0.25,), losses=(0.0,))
    plan = at_speed(even(steps, 0.0, last), 2, "euler", source)
    assert (plan.steps[-1].decision == "reuse") == reused
    assert abs(computed(plan) - 0.75 * steps) <= 2
    computing = entry(plans=(plan_of("CCCr" * 4 + "CCr.", SLOW),), cuts=(0.25,), losses=(0.0,))
    assert at_speed(even(steps, 0.0, last), 2, "euler", computing).steps[-1].decision == "compute"


@pytest.mark.parametrize("steps", [20, 25, 30, 40])
def test_last_step_without_an_extent_in_noise_level_is_fitted_as_any_other(steps: int) -> None:
    def doubled(count: int) -> list[float]:  # as with the scheduler `normal`
        return [*even(count - 1), 1.0]

    for letters_, decision in (("CCCr" * 5, "reuse"), ("CCCr" * 4 + "CCr.", "compute")):
        source = entry(levels=tuple(doubled(20)), plans=(plan_of(letters_, SLOW),), cuts=(0.25,), losses=(0.0,))
        levels = [level + (1e-3 if 0 < level < 1 else 0) for level in doubled(steps)]
        plan = at_speed(levels, 2, "euler", source)
        assert plan.steps[-1].decision == decision
        assert computed(plan) - 0.75 * steps <= 1.5


def test_twice_the_steps_are_computed_as_densely_not_in_longer_groups() -> None:
    plan = at_speed(even(40))
    assert computed(plan) == pytest.approx(2 * PLANS[20][1].count("."), abs=16)
    longest = max(len(run) for run in letters(plan).replace(".", "C").split("C"))
    assert longest <= 4


def test_reuse_rows_are_those_of_the_same_noise_level() -> None:
    low, high = Reuse(3, FORECASTS["hold"]), Reuse(9, FORECASTS["taylor"])
    mixed = tuple({"l": low, "h": high}.get(letter) for letter in "....cl.cl.ch.chch...")
    plan = at_speed(even(60), 2, "euler", entry(plans=(mixed,), cuts=(0.1,), losses=(0.0,)))
    found = [step.boundary for step in plan.steps if step.decision == "reuse"]
    assert found == sorted(found)
    assert set(found) == {3, 9}


def test_few_steps_are_computed_unless_they_were_calibrated() -> None:
    plan = at_speed(even(6))
    assert letters(plan) == "......"
    assert "6 steps cover as much" in plan.warnings[0]
    small = entry(levels=tuple(even(6)), plans=(plan_of("..Cr..", SLOW),), cuts=(0.1,), losses=(0.0,))
    plan = at_speed(even(6), 2, "euler", entry(), small)
    assert (letters(plan), plan.warnings) == ("..Cr..", ())


@pytest.mark.parametrize("levels", [even(20)[::-1], [0.0] * 21, [0.0, 0.5, 0.2, 0.6, 1.0] * 3])
def test_levels_that_do_not_ascend_are_computed(levels: list[float]) -> None:
    plan = at_speed(levels)
    assert set(letters(plan)) == {"."}
    assert "the policy does not apply" in plan.warnings[0]


def test_plan_without_reuse_stays_one() -> None:
    plan = at_speed(even(33), 2, "euler", entry(plans=((None,) * 20,), cuts=(0.0,), losses=(0.0,)))
    assert (letters(plan), plan.window) == ("." * 33, ())


@pytest.mark.parametrize("steps", [1, 2, 3, 9, 1000])
def test_equal_levels_and_any_number_of_steps_are_fitted(steps: int) -> None:
    doubled = entry(levels=tuple(sorted([*even(20)[:-3], 0.0, 1.0, 1.0])))
    plan = at_speed([0.0, *even(steps, 0.9), 1.0], 2, "euler", doubled)
    assert len(plan.steps) == steps + 2
    assert plan.steps[-1].decision == "compute"


def dense(first: float, last: float) -> Calibrated:
    """Twenty calibrated steps in a part of the noise schedule, as few of them computed as there can be."""
    return entry(levels=tuple(even(20, first, last)), plans=(plan_of("C" + "r" * 18 + ".", FAST),), cuts=(0.4,), losses=(0.0,))


@pytest.mark.parametrize(("first", "last"), [(0.5, 1.0), (0.0, 0.5), (0.25, 0.75)])
@pytest.mark.parametrize("steps", [20, 33, 40])
def test_steps_outside_the_calibrated_levels_are_computed(steps: int, first: float, last: float) -> None:
    source, levels = dense(first, last), even(steps)
    plan = at_speed(levels, 2, "euler", source)
    beyond = [k for k in range(steps) if not first <= levels[k] < last]
    assert all(plan.steps[k].decision != "reuse" for k in beyond)
    within = [k for k in range(steps) if k not in beyond]
    assert sum(plan.steps[k].decision == "reuse" for k in within) >= len(within) * 0.8
    assert plan.warnings == (
        f"{len(beyond)} of {steps} steps are at noise levels that euler with 20 steps was not calibrated for: they are "
        "computed, the others fitted by noise level",)
    assert source.whole(levels) == pytest.approx(steps * (last - first))


@pytest.mark.parametrize("levels", [even(20, 0.0, 0.5), even(20, 0.0, 0.3), even(20, 0.5 - 1e-9, 0.5), even(1, 0.1, 0.2)])
def test_run_without_any_calibrated_level_is_computed(levels: list[float]) -> None:
    plan = at_speed(levels, 2, "euler", dense(0.5, 1.0))
    assert computed(plan) == len(levels) - 1
    assert "was not calibrated for" in plan.warnings[0] or "all computed" in plan.warnings[0] or "too few" in plan.warnings[0]
    assert all("whole noise schedule" not in warning for warning in plan.warnings)


@pytest.mark.parametrize("extent", [1e-3, 1e-6, 1e-9])
def test_tiny_part_of_the_schedule_is_computed_and_not_put_in_absurd_numbers(extent: float) -> None:
    plan = at_speed(even(20, 0.5, 0.5 + extent))
    assert all("000 over the whole" not in warning for warning in plan.warnings)


def test_of_two_parts_the_one_that_holds_the_run_is_taken() -> None:
    late, early = dense(0.5, 1.0), dense(0.0, 0.5)
    for levels in (even(15, 0.0, 0.5), even(15, 0.5, 1.0)):
        plan = at_speed(levels, 2, "euler", late, early)
        assert computed(plan) < 8
        assert all("not calibrated" not in warning for warning in plan.warnings)


# What is checked


def test_policy_is_one_and_names_what_it_was_made_for() -> None:
    for one in (policy(), Fixed(plan_of(".Crr.", FAST))):
        assert isinstance(one, Policy)
        assert one.boundary == 20
    policy().check("PixArt", 28)
    for family, depth in (("PixArt", 27), ("Flux", 28)):
        with pytest.raises(ConfigError) as error:
            policy().check(family, depth)
        for part in ("test", "PixArt with 28 blocks", f"{family} with {depth} blocks", "disconnect"):
            assert part in str(error.value)


def test_effective_values_name_the_policy_in_force() -> None:
    for settings, name, boundary in (({}, "test", 20), ({"enabled": False}, None, 20), ({"group_size": 1}, None, 20)):
        effective = resolve(Config(policy=policy(), preset="custom", **settings), Defaults(), 28)
        assert (effective.policy, effective.boundary, effective.preset) == (name, boundary, "custom")
        assert effective.as_dict()["policy"] == name
    assert resolve(Config(policy=policy(entry(plans=(PLAN_LOW,), cuts=(0.1,), losses=(0.0,)))), Defaults(), 28).boundary == 13


PLAN_LOW = plan_of(PLANS[20][0], SLOW)


@pytest.mark.parametrize("wrong", [object(), "policy", 3, {"name": "x"}])
def test_config_refuses_what_is_no_policy(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=f"policy is a {type(wrong).__name__}.*Load BlockDance Policy"):
        Config(policy=wrong)


@pytest.mark.parametrize(("changes", "said"), [
    ({"levels": ()}, "no steps"),
    ({"levels": tuple(even(20)[::-1])}, "ascend"),
    ({"levels": (0.5,) * 21}, "ascend"),
    ({"levels": (0.0, float("nan"), *even(20)[2:])}, "0 to 1"),
    ({"levels": tuple(even(20, 0.0, 1.1))}, "0 to 1"),
    ({"levels": tuple(even(19))}, "19 steps"),
    ({"plans": (), "cuts": (), "losses": ()}, "no plan"),
    ({"cuts": (0.2,)}, "2 plans, 1 cuts"),
    ({"cuts": (0.4, 0.2)}, "cuts must ascend"),
    ({"cuts": (0.4, 1.0)}, "below 1"),
    ({"cuts": (float("nan"), 0.5)}, "cuts"),
    ({"losses": (-1.0, 0.0)}, "losses"),
    ({"plans": (plan_of(PLANS[20][0], Reuse(-2, SLOW.forecast)),) * 2}, "boundary -2"),
    ({"plans": (plan_of(PLANS[20][0], Reuse(2, Forecast(True, 3))),) * 2}, "order 3"),
    ({"plans": (plan_of(PLANS[20][0], Reuse(2, Forecast(True, 1, 1.5))),) * 2}, "damping 1.5"),
])
def test_values_that_do_not_fit_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        entry(**changes)


@pytest.mark.parametrize(("changes", "said"), [
    ({"family": ""}, "family"), ({"depth": 0}, "depth 0"), ({"depth": 19}, "boundary 20"), ({"entries": ()}, "no calibrated"),
])
def test_policy_that_does_not_fit_its_model_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        policy(**changes)


# Files


def test_file_comes_back_as_it_was(tmp_path: Path) -> None:
    before = policy(entry(), entry(30, "dpmpp_2m", power=1.3, scheduler="karras"), record={"model": "x", "seeds": [1, 2]})
    path = tmp_path / "new" / "pixart.safetensors"
    save(before, path)
    after = load(path)
    assert os.listdir(path.parent) == [path.name]
    assert [(one.sampler, one.scheduler, one.plans, one.cuts, one.levels) for one in after.entries] == [
        (one.sampler, one.scheduler, one.plans, one.cuts, one.levels) for one in before.entries]
    for one, other in zip(after.entries, before.entries, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-6)
    assert (after.name, after.family, after.depth, after.record) == ("test", "PixArt", 28, before.record)
    assert after.schedule(even(20), "euler", 2) == before.schedule(even(20), "euler", 2)


def test_saving_replaces_the_file_and_an_error_leaves_it_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    save(policy(), path)
    save(policy(name="second"), path)
    assert load(path).name == "second"

    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        save(policy(name="third"), path)
    with pytest.raises(ValueError, match="JSON"):
        save(policy(record={"loss": float("nan")}), path)
    assert os.listdir(tmp_path) == [path.name]
    assert load(path).name == "second"


def content() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a good file."""
    one = entry()
    tensors = {f"0.{key}": value for key, value in file._tensors(one).items()}
    metadata = {"schema_version": "1", "kind": "schedule", "family": "PixArt", "depth": "28", "sampler": '["euler"]',
                "scheduler": '["simple"]', "steps": "[20]", "record": "{}"}
    return tensors, metadata


def test_name_is_that_of_the_file_where_it_has_none(tmp_path: Path) -> None:
    tensors, metadata = content()
    safetensors.torch.save_file(tensors, tmp_path / "my policy.safetensors", metadata)
    assert load(tmp_path / "my policy.safetensors").name == "my policy"


def test_file_without_fitted_weights_has_the_expansions_alone(tmp_path: Path) -> None:
    tensors, metadata = content()
    del tensors["0.age"], tensors["0.weight"], tensors["0.guided"]
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata)
    (found,) = load(tmp_path / "a.safetensors").entries
    assert found.plans == (entry().plans[0], plan_of(PLANS[20][1], Reuse(20, Forecast(True, 2, 0.9))))


def test_file_without_weights_of_the_guidance_has_one_set_for_all(tmp_path: Path) -> None:
    tensors, metadata = content()
    del tensors["0.guided"]
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata)
    (found,) = load(tmp_path / "a.safetensors").entries
    single = dataclasses.replace(FAST.forecast, guided=())
    assert found.plans[1] == plan_of(PLANS[20][1], Reuse(20, single))


def refused(path: Path) -> str:
    with pytest.raises(PolicyError) as error:
        load(path)
    message = str(error.value)
    assert str(path) in message
    assert message.endswith(".")
    return message


@pytest.mark.parametrize(("key", "value", "said"), [
    ("schema_version", "2", "schema version 2, this pack reads 1: update the pack"),
    ("schema_version", "x", "schema_version is 'x'"),
    ("schema_version", None, "no schema_version"),
    ("kind", "oracle", "kind 'oracle'"),
    ("kind", None, "no kind"),
    ("family", None, "no family"),
    ("family", "", "family"),
    ("depth", "19", "boundary 20 is outside the depth of 19 blocks"),
    ("depth", "-1", "depth is '-1'"),
    ("depth", "9" * 5000, "depth is '999"),
    ("sampler", '["euler", "ddim"]', "2 samplers, 1 schedulers"),
    ("sampler", "[3]", "no name"),
    ("sampler", "[]", "0 samplers"),
    ("sampler", '{"a": 1}', "sampler is not a JSON list"),
    ("sampler", "[" * 100_000, "damaged"),
    ("sampler", "[", "damaged"),
    ("steps", "[19]", r"expected torch.int16 [2, 19]"),
    ("steps", "[true]", "steps are not whole numbers"),
    ("steps", "[1e400]", "steps are not whole numbers"),
    ("steps", "[-3]", "steps are not whole numbers"),
    ("record", "[]", "record is not a JSON dict"),
    ("record", None, "no record"),
])
def test_metadata_is_checked(key: str, value: str | None, said: str, tmp_path: Path) -> None:
    tensors, metadata = content()
    path = tmp_path / "bad.safetensors"
    if value is None:
        del metadata[key]
    else:
        metadata[key] = value
    safetensors.torch.save_file(tensors, path, metadata)
    assert said in refused(path)


def changed(index: Any, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = value
        return tensor

    return change


@pytest.mark.parametrize(("key", "change", "said"), [
    ("boundary", lambda tensor: None, "no tensor 0.boundary"),
    ("loss", lambda tensor: None, "no tensor 0.loss"),
    ("boundary", lambda tensor: tensor.int(), "expected torch.int16"),
    ("boundary", lambda tensor: tensor[0], "expected torch.int16 [0, 20]"),
    ("boundary", lambda tensor: tensor[:0], "0.anchored"),
    ("boundary", changed((0, 5), 29), "boundary 29"),
    ("boundary", changed((0, 5), -2), "boundary -2"),
    ("order", changed((0, 5), 3), "order 3"),
    ("anchored", changed((0, 5), 2), "anchored is 2"),
    ("damping", changed((0, 5), float("nan")), "damping nan"),
    ("damping", changed((0, 5), -0.5), "damping -0.5"),
    ("age", changed((1, 5, 0), -1), "ages [-1, 4]"),
    ("age", changed((1, 5, 1), 1), "ages [1, 1]"),
    ("age", lambda tensor: tensor[:, :, :2], "0.age"),
    ("weight", lambda tensor: None, "no tensor 0.weight"),
    ("weight", changed((1, 5, 1), float("nan")), "fitted weights [1.25, nan, "),
    ("weight", changed((1, 5, 1), 101), "fitted weights [1.25, 101.0, "),
    ("guided", changed((1, 5, 1), float("nan")), "weights of the guidance"),
    ("guided", changed((1, 5, 1), 101), "fitted weights [1.25, -0.5, 1.5, 101.0]"),
    ("guided", lambda tensor: tensor[:, :, :2], "0.guided"),
    ("age", lambda tensor: tensor.mul(0), "weights of the guidance"),
    ("levels", lambda tensor: tensor[1:].clone(), "0.levels"),
    ("levels", lambda tensor: tensor.flip(0), "ascend"),
    ("levels", changed(3, float("inf")), "levels"),
    ("cut", lambda tensor: tensor.flip(0), "cuts must ascend"),
    ("cut", changed(0, float("nan")), "cuts"),
    ("loss", changed(0, float("nan")), "losses"),
])
def test_tensors_are_checked(
    key: str, change: Callable[[torch.Tensor], torch.Tensor | None], said: str, tmp_path: Path
) -> None:
    tensors, metadata = content()
    path = tmp_path / "bad.safetensors"
    value = change(tensors.pop(f"0.{key}"))
    safetensors.torch.save_file({**tensors, **({} if value is None else {f"0.{key}": value.contiguous()})}, path, metadata)
    assert said in refused(path)


class Trap:
    """Executed by whoever unpickles it."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize("data", [
    b"", b"\x00" * 7, b"\x00" * 4096, bytes(range(256)) * 20, b"PK\x03\x04" + b"\x00" * 200, pickle.dumps(Trap()),
    header(b"{}", 2**63), header(b"{}", 2**64 - 1), header(b"{}", 3), header(b"{}"), header(b"[]"), header(b"null"),
    header(b"{" * 10_000), header(b'{"__metadata__": 3}'), header(b'{"__metadata__": {"kind": 3}}'), header(b"\xff\xfe"),
    header(json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()),
    header(json.dumps({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}).encode()),
    header(json.dumps({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}).encode() + b"    "),
])
def test_other_files_are_refused_and_nothing_in_them_runs(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    refused(path)
    assert os.listdir(tmp_path) == [path.name]


def test_file_cut_short_anywhere_or_with_a_byte_too_many_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    save(policy(), path)
    data = path.read_bytes()
    for length in [*range(0, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:length])
        refused(path)
    path.write_bytes(data + b"x")
    refused(path)


def test_changed_bytes_are_refused_or_give_a_valid_policy(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    save(policy(), path)
    data = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(len(data), (300,), generator=generator).tolist():
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x15]) + data[place + 1:])
        try:
            found = load(path)
        except PolicyError:
            continue
        assert found.schedule(even(25), "euler", 2).steps[-1].decision == "compute"


def test_missing_files_folders_and_huge_files_are_refused(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none.safetensors")
    assert "directory" in refused(tmp_path)
    huge = tmp_path / "huge.safetensors"
    with huge.open("wb") as written:
        written.truncate(257 * 2**20)
    assert "257 MiB" in refused(huge)


def test_more_rows_than_any_run_has_are_refused(tmp_path: Path) -> None:
    tensors, metadata = content()
    tensors["1.boundary"] = torch.zeros((1001, 1000), dtype=torch.int16)
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata)
    assert "rows" in refused(tmp_path / "a.safetensors")


def test_entries_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy().depth = 3
