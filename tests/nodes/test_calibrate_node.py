"""BlockDanceCalibrate: finds schedules, proves them, saves them where the loader finds them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import last_run, model_of
from tiny import CASES, sample

from blockdance_core.calibration import Found, plan_of
from blockdance_core.config import ConfigError
from blockdance_core.host import paths, search
from blockdance_core.host.calibrate import keep
from blockdance_core.host.search import Checked, best_schedules, letters, reaching
from blockdance_core.policy import PolicyError, load
from blockdance_core.schedule import expanded, follow, unguided

CASE = CASES["sd3"]
STEPS = 8


@pytest.fixture(scope="module")
def measured(nodes: dict[str, Any]) -> Any:
    """A profile of one sample and eight steps, with plain costs: what a tiny model saves is not to be measured."""
    model = model_of(CASE)
    positive, negative = CASE.conds(model)
    found, _ = nodes["BlockDanceProfile"].execute(
        model, positive, negative, {"samples": CASE.latent(1)}, 1, STEPS, 3.0, "euler", "simple", 1.0, "0.5, 7").result
    return with_costs(found)


def with_costs(measured: Any) -> Any:
    return dataclasses.replace(measured, profile=dataclasses.replace(measured.profile, costs=(0.5, 0.0)))


@pytest.fixture
def calibrate(nodes: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The node, with a few of its levels: all of them would take minutes."""
    node = nodes["BlockDanceCalibrate"]
    monkeypatch.setattr(sys.modules[node.__module__], "CUTS", (0.15, 0.3, 0.45, 0.6, 0.75))
    return node


def test_schema_is_the_api(calibrate: Any) -> None:
    schema = calibrate.GET_SCHEMA()
    assert (schema.display_name, schema.category, schema.is_output_node) == ("BlockDance Calibrate", "model/BlockDance", True)
    assert [(i.id, i.get_io_type()) for i in schema.inputs] == [
        ("profile", "BLOCKDANCE_PROFILE"), ("policy_name", "STRING"), ("cut", "FLOAT"), ("fidelity", "FLOAT"),
        ("effort", "INT"),
    ]
    assert [output.get_io_type() for output in schema.outputs] == ["BLOCKDANCE_POLICY", "STRING"]


def test_levels_are_saved_loaded_and_followed(calibrate: Any, nodes: dict[str, Any], folder: Path, measured: Any) -> None:
    policy, text = calibrate.execute(measured, "mine", 0.0, 0.0, 2).result
    report = json.loads(text)
    assert report["path"] == str(folder / "mine.safetensors")
    assert (policy.name, policy.family, policy.depth) == ("mine", "SD3", 8)
    loaded, = nodes["BlockDanceLoadPolicy"].execute("mine.safetensors").result
    assert loaded == policy
    only, = policy.entries
    assert (only.sampler, only.scheduler, only.steps) == ("euler", "simple", STEPS)
    levels = report["levels"]
    assert len(levels) == len(only.plans) > 2
    assert [row["cut"] for row in levels] == pytest.approx(only.cuts, abs=1e-4)
    assert [row["plan"] for row in levels] == [letters(plan) for plan in only.plans]
    assert all(row["plan"][0] == "C" for row in levels)
    assert {boundary for row in levels for boundary in row["boundaries"]} <= {3, 7}
    assert report["cost"]["rollouts"] > measured.rollouts + len(levels)
    assert loaded.record["calibrations"]["euler simple 8"]["levels"] == levels
    model, = nodes["BlockDanceAccelerate"].execute(
        model_of(CASE), enabled=True, preset="auto", group_size=2, policy=loaded).result
    sample(model, CASE, steps=STEPS)
    run = last_run(model)
    plan = only.plans[max(index for index, cut in enumerate(only.cuts) if cut <= 0.5)]
    assert [decision == "reuse" for decision in run["decisions"]] == [row is not None for row in plan]
    assert run["warnings"] == []


def test_wanted_cut_gives_the_one_schedule_nearest_to_it(calibrate: Any, measured: Any) -> None:
    report = json.loads(calibrate.execute(measured, "a", 0.25, 0.0, 0).result[1])
    assert [row["cut"] for row in report["levels"]] == [0.25]
    report = json.loads(calibrate.execute(measured, "a", 0.9, 0.0, 0).result[1])
    assert [row["plan"].count("C") for row in report["levels"]] == [1]


def test_wanted_fidelity_gives_the_cheapest_that_reaches_it(calibrate: Any, measured: Any) -> None:
    levels = json.loads(calibrate.execute(measured, "a", 0.0, 0.0, 0).result[1])["levels"]
    wanted = levels[1]["loss_db"]
    report = json.loads(calibrate.execute(measured, "a", 0.0, wanted - 0.01, 0).result[1])
    best = max((row for row in levels if row["loss_db"] >= wanted - 0.01), key=lambda row: row["cut"])
    assert report["levels"] == [best]
    with pytest.raises(ValueError, match=r"No schedule reaches 200 dB .* the best one reaches"):
        calibrate.execute(measured, "a", 0.0, 200.0, 0)


def test_boundary_at_which_reuse_takes_longer_saves_nothing(calibrate: Any, folder: Path, measured: Any) -> None:
    slow = dataclasses.replace(measured, profile=dataclasses.replace(measured.profile, costs=(1.3, 1.1)))
    with pytest.raises(ValueError, match="No schedule of 8 steps saves"):
        calibrate.execute(slow, "slow", 0.5, 0.0, 0)
    assert not (folder / "slow.safetensors").exists()


def test_schedule_whose_runs_overflow_is_not_kept(measured: Any) -> None:
    """Half precision overflows where a forecast reaches too far: such a schedule is out, the others stay."""
    def found(overflow: float) -> list[int]:
        def errors(plan: Any) -> torch.Tensor:
            return torch.tensor([1e-3 * plan.count(None), overflow if plan.count(None) < 5 else 1e-3])

        return [one.plan.count(None) for one in best_schedules(measured.profile, [pretended(errors)])]

    assert min(found(1e-3)) < 5
    assert min(found(float("nan"))) == 5


def test_plan_that_was_given_up_comes_back_where_the_better_one_overflows(
    measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = measured.profile
    ways = [(0, 1, 1), (1, 3, 1), (4, 1, 1), (5, 3, 1)], [(0, 3, 1), (3, 1, 1), (4, 1, 1), (5, 3, 1)]
    plans = [plan_of(profile, some) for some in ways]
    monkeypatch.setattr(search, "front", lambda _, lead: [Found(plans[lead > 1], 0.5, 1.0)])

    def of(*squared: float) -> Any:
        return pretended(lambda plan: torch.full((4,), dict(zip(plans, squared, strict=True)).get(plan, 1.0)))

    found, = best_schedules(profile, [of(1e-4, 2e-4), of(float("nan"), 2e-4)], (0.5,))
    assert found.plan == plans[1]


def pretended(errors: Any, calls: Sequence[int] = (1,) * STEPS, computed: Sequence[int] = ()) -> Any:
    """Rollouts in which nothing runs; `computed` are steps that do not reuse, whatever a plan says."""
    def run(plan: Any) -> Any:
        decisions = ["reuse" if row and k not in computed else "compute" for k, row in enumerate(plan)]
        return SimpleNamespace(plan=plan, record={"decisions": decisions})

    return SimpleNamespace(run=run, errors=lambda run: errors(run.plan), full=SimpleNamespace(record={"calls": calls}))


def test_slower_level_may_come_from_the_next_faster_one(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program knows but one schedule: the slower levels are its own with further steps computed, in any order of cuts."""
    profile, ran = measured.profile, []
    fast = plan_of(profile, [(0, 1, 1), (1, 3, 1), (4, 4, 1)])
    monkeypatch.setattr(search, "front", lambda *_: [Found(fast, 5 / 8, 1.0)])

    def errors(plan: Any) -> torch.Tensor:
        ran.append(plan)
        return torch.tensor([10.0 ** -plan.count(None)])

    cuts = (0.25, 0.375, 0.5, 0.625)
    found = best_schedules(profile, [pretended(errors)], cuts)
    assert [one.cut for one in found] == list(cuts)
    assert found[-1].plan == fast
    computed = [{k for k, row in enumerate(one.plan) if row is None} for one in found]
    assert all(faster < slower for slower, faster in itertools.pairwise(computed))
    plain = {plan for plan in ran if plan == expanded(plan)}
    assert plain == {expanded(one.plan, order) for one in found for order in (None, 0)}, "tried of the best one alone"
    assert best_schedules(profile, [pretended(errors)], cuts[::-1]) == found


def test_one_level_may_come_from_the_next_faster_one_of_before(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = measured.profile
    fast, faster = plan_of(profile, [(0, 1, 1), (1, 3, 1), (4, 4, 1)]), plan_of(profile, [(0, 1, 1), (1, 7, 1)])
    monkeypatch.setattr(search, "front", lambda *_: [Found(faster, 7 / 8, 1.0)])
    found, = best_schedules(profile, [pretended(lambda plan: torch.tensor([1e-3]))], (0.5,), before=[faster, fast])
    assert found.cut == 0.5
    assert {k for k, row in enumerate(found.plan) if row is None} > {k for k, row in enumerate(fast) if row is None}


def test_weights_that_do_not_hold_on_other_prompts_give_way_to_what_was_stored_last(measured: Any) -> None:
    def errors(plan: Any) -> torch.Tensor:
        return torch.tensor([1e-6 if plan == expanded(plan, 0) else 1e-3])

    found, = best_schedules(measured.profile, [pretended(errors)], (0.5,))
    assert any(found.plan)
    assert {(row.forecast.order, row.forecast.fitted, row.forecast.guided) for row in found.plan if row} == {(0, (), ())}


def test_weights_of_its_own_for_guidance_give_way_where_runs_are_closer_without(measured: Any) -> None:
    def errors(plan: Any) -> torch.Tensor:
        return torch.tensor([1e-6 if plan == unguided(plan) != expanded(plan) else 1e-3])

    (guided,), (found,) = (
        best_schedules(measured.profile, [pretended(judge)], (0.5,)) for judge in (lambda plan: torch.tensor([1e-3]), errors))
    assert any(row.forecast.guided for row in guided.plan if row)
    assert found.plan == unguided(guided.plan)
    assert any(row.forecast.fitted for row in found.plan if row)


def test_faster_level_may_come_from_the_next_slower_one(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = measured.profile
    slow = plan_of(profile, [(0, 1, 1), (1, 1, 1), (2, 3, 1), (5, 3, 1)])
    bad = plan_of(profile, [(0, 1, 1), (1, 7, 1)])
    monkeypatch.setattr(search, "front", lambda *_: [Found(plan, 0.0, 1.0) for plan in (slow, bad)])

    def errors(plan: Any) -> torch.Tensor:
        good = {k for k, row in enumerate(plan) if row is None} <= {0, 1, 2, 5}
        return torch.tensor([10.0 ** -plan.count(None) if good and plan != bad else 1.0])

    found = best_schedules(profile, [pretended(errors)], (0.5, 0.62, 0.75))
    assert [one.cut for one in found] == [0.5, 0.625, 0.75]
    assert found[0].plan == slow
    assert [one.loss for one in found] == pytest.approx([1e-4, 1e-3, 1e-2])


def test_plans_of_before_are_tried_as_well_if_they_are_of_the_same_boundaries(measured: Any) -> None:
    profile = measured.profile
    good = plan_of(profile, [(0, 3, 1), (3, 1, 1), (4, 1, 1), (5, 3, 1)])
    foreign = tuple(dataclasses.replace(row, boundary=6) if row else None for row in good)
    long = (None, *[good[1]] * (STEPS - 1))

    def errors(plan: Any) -> torch.Tensor:
        return torch.tensor([1e-9 if plan in (good, foreign) else 1e-3])

    assert best_schedules(profile, [pretended(errors)], (0.5,))[0].plan != good
    found, = best_schedules(profile, [pretended(errors)], (0.5,), before=[foreign, long, good[:-1], good])
    assert found.plan == good


def test_plans_of_before_with_another_boundary_are_remade_and_tried(measured: Any) -> None:
    profile = measured.profile
    good = plan_of(profile, [(0, 3, 1), (3, 1, 1), (4, 1, 1), (5, 3, 1)])
    foreign = tuple(dataclasses.replace(row, boundary=6) if row else None for row in good)

    def errors(plan: Any) -> torch.Tensor:
        return torch.tensor([1e-9 if plan == good else 1e-3])

    found, = best_schedules(profile, [pretended(errors)], (0.5,), before=[foreign])
    assert found.plan == good


def test_without_boundaries_the_whole_model_is_calibrated_and_followed(
    calibrate: Any, nodes: dict[str, Any], folder: Path
) -> None:
    positive, negative = CASE.conds(model_of(CASE))
    found = nodes["BlockDanceProfile"].execute(
        model_of(CASE), positive, negative, {"samples": CASE.latent(1)}, 1, STEPS, 3.0, "euler", "simple", 1.0).result[0]
    assert found.profile.boundaries == (CASE.depth,)
    policy, text = calibrate.execute(found, "whole", 0.5, 0.0, 0).result
    assert json.loads(text)["levels"][0]["boundaries"] == [CASE.depth]
    assert load(folder / "whole.safetensors") == policy
    assert all(len(row.forecast.guided) == len(row.forecast.fitted) > 0
               for row in plan_of(found.profile, [(0, 4, 0), (4, 4, 0)]) if row)
    rows = [row for row in policy.entries[0].plans[0] if row]
    assert rows
    model, = nodes["BlockDanceAccelerate"].execute(
        model_of(CASE), enabled=True, preset="auto", group_size=64, policy=policy).result
    sample(model, CASE, steps=STEPS)
    run = last_run(model)
    assert run["reused_steps"] == len(rows)
    assert run["block_runs"] * STEPS == run["block_runs_full"] * (STEPS - len(rows))


def test_calibrating_again_keeps_what_was_better(
    calibrate: Any, nodes: dict[str, Any], measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the schedules in the file, those for the same sampler and scheduler are tried; they win if they are better."""
    own, _ = calibrate.execute(measured, "a", 0.5, 0.0, 0).result
    before, _ = calibrate.execute(other(nodes, STEPS, "euler", "karras", 1.0), "a", 0.5, 0.0, 0).result
    best = own.entries[0].plans
    assert [entry.scheduler for entry in before.entries] == ["karras", "simple"]
    profile = measured.profile
    worse = plan_of(profile, [(0, 1, 1), (1, 1, 1), (2, 1, 1), (3, 5, 1)])
    monkeypatch.setattr(search, "front", lambda *_: [Found(worse, 0.5, 1.0)])
    assert worse not in best
    after, _ = calibrate.execute(measured, "a", 0.5, 0.0, 0).result
    assert after.entries[1].plans == best
    after, _ = calibrate.execute(measured, "b", 0.5, 0.0, 0).result
    assert after.entries[0].plans != best


@pytest.mark.parametrize("batch", [1, 4])
def test_one_lost_picture_does_not_decide(measured: Any, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """However far off one is: three that are much closer are worth more, though the mean square says the contrary."""
    profile = measured.profile
    ways = [(0, 1, 1), (1, 3, 1), (4, 1, 1), (5, 3, 1)], [(0, 3, 1), (3, 1, 1), (4, 1, 1), (5, 3, 1)]
    plans = [plan_of(profile, some) for some in ways]
    monkeypatch.setattr(search, "front", lambda _, lead: [Found(plans[lead > 1], 0.5, 1.0)])

    def errors(plan: Any) -> torch.Tensor:
        return torch.tensor([2.0, 1e-4, 1e-4, 1e-4] if plan == plans[0] else [0.1] * 4)

    def of(first: int) -> Any:
        return pretended(lambda plan: errors(plan)[first : first + batch])

    found, = best_schedules(profile, [of(first) for first in range(0, 4, batch)], (0.5,))
    assert found.plan == plans[0]
    assert found.loss > 0.1


def test_plan_that_falls_far_behind_is_not_run_on_further_prompts(measured: Any) -> None:
    """Little behind on the first prompt it may still win on all, and so may one that was run on all before."""
    ways = [(0, 1, 1), (1, 3, 1), (4, 1, 1), (5, 3, 1)], [(0, 3, 1), (3, 1, 1), (4, 1, 1), (5, 3, 1)], \
        [(0, 1, 1), (1, 3, 1), (4, 3, 1), (7, 1, 1)]
    leader, close, far = plans = [plan_of(measured.profile, some) for some in ways]
    squared, run = {leader: (1e-4, 1e-4), close: (1.4e-4, 5e-5), far: (1.7e-4, 0.0)}, []

    def of(prompt: int) -> Any:
        def errors(plan: Any) -> torch.Tensor:
            run.append((plan, prompt))
            return torch.full((4,), squared[plan][prompt])

        return pretended(errors)

    checks = [of(0), of(1)]
    assert search._Race(checks).winner(plans) is close
    assert run == [(leader, 0), (close, 0), (far, 0), (leader, 1), (close, 1)]
    race = search._Race(checks)
    assert race.result(far)[0] == pytest.approx(0.85e-4)
    assert race.winner(plans) is far


@pytest.mark.parametrize("proofs", [0, 2])
@pytest.mark.parametrize("cuts", [(0.5,), (0.1, 0.25, 0.5, 0.8)])
def test_progress_ends_when_all_is_done(measured: Any, cuts: tuple[float, ...], proofs: int) -> None:
    told: list[tuple[int, int]] = []
    one, *others = [pretended(lambda plan: torch.tensor([10.0 ** -plan.count(None)]))] * (1 + proofs)
    best_schedules(measured.profile, [one], cuts, progress=lambda done, of: told.append((done, of)), proofs=others)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (3 * len(cuts) + proofs, 3 * len(cuts) + proofs)


@pytest.mark.parametrize("cut", [math.nan, math.inf, -0.1, 1.0])
def test_a_cut_that_is_no_share_is_refused_and_nothing_is_written(
    calibrate: Any, measured: Any, cut: float, folder: Path
) -> None:
    with pytest.raises(ValueError, match="is not valid: expected a share"):
        calibrate.execute(measured, "a", cut, 0.0, 0)
    assert not folder.exists() or not list(folder.iterdir())


def test_cut_counts_the_calls_that_the_sampler_makes(measured: Any) -> None:
    calls = (2,) * (STEPS - 1) + (1,)  # as heun does
    found = best_schedules(measured.profile, [pretended(lambda plan: torch.tensor([10.0 ** -plan.count(None)]), calls)])
    assert any(one.plan[-1] for one in found)
    cost = dict(zip(measured.profile.boundaries, measured.profile.costs, strict=True))
    for one in found:
        saved = sum((1 - cost[row.boundary]) * of for row, of in zip(one.plan, calls, strict=True) if row)
        assert one.cut == pytest.approx(saved / sum(calls))


def test_fidelity_is_measured_in_decibels() -> None:
    found = [Checked((), cut, loss, 0.0) for cut, loss in ((0.2, 1e-4), (0.4, 1e-3), (0.6, 1e-2))]
    assert reaching(found, 30.0) == [found[1]]
    assert reaching(found, 20.0) == [found[2]]


def other(nodes: dict[str, Any], *sampling: Any) -> Any:
    """A further profile: steps, sampler, scheduler and denoise."""
    model = model_of(CASE)
    steps, *how = sampling
    profile, _ = nodes["BlockDanceProfile"].execute(
        model, *CASE.conds(model), {"samples": CASE.latent(1)}, 1, steps, 3.0, *how, "0.5, 7").result
    return with_costs(profile)


def test_other_calibrations_in_the_file_are_kept_and_the_same_is_replaced(
    calibrate: Any, nodes: dict[str, Any], folder: Path, measured: Any
) -> None:
    calibrate.execute(measured, "a", 0.25, 0.0, 0)
    calibrate.execute(other(nodes, 5, "dpmpp_2m", "karras", 1.0), "a.safetensors", 0.2, 0.0, 0)
    policy, _ = calibrate.execute(measured, "a", 0.5, 0.0, 0).result
    assert [entry.key for entry in policy.entries] == ["dpmpp_2m karras 5", "euler simple 8"]
    assert [entry.cuts for entry in policy.entries] == [(0.2,), (0.5,)]
    assert set(policy.record["calibrations"]) == {"dpmpp_2m karras 5", "euler simple 8"}
    assert os.listdir(folder) == ["a.safetensors"]


def test_calibration_of_a_part_of_the_noise_schedule_does_not_replace_that_of_the_whole(
    calibrate: Any, nodes: dict[str, Any], folder: Path, measured: Any
) -> None:
    calibrate.execute(measured, "a", 0.25, 0.0, 0)
    policy, _ = calibrate.execute(other(nodes, 8, "euler", "simple", 0.5), "a", 0.25, 0.0, 0).result
    whole, part = policy.entries
    assert whole.key == "euler simple 8"
    assert part.key.startswith("euler simple 8 from ")
    assert set(policy.record["calibrations"]) == {whole.key, part.key}
    for entry in (whole, part):
        schedule = policy.schedule(entry.levels, "euler", 64)
        assert (schedule.warnings, schedule.steps) == ((), follow(entry.plans[-1]).steps)


def test_file_of_another_model_or_damaged_stays_as_it_is(
    calibrate: Any, folder: Path, measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flux = CASES["flux"]
    policy, _ = calibrate.execute(measured, "a", 0.25, 0.0, 0).result
    with pytest.raises(ConfigError, match="was calibrated for SD3"):
        keep(folder / "a.safetensors", model_of(flux), policy.entries[0], {})
    assert load(folder / "a.safetensors") == policy
    (folder / "b.safetensors").write_bytes(b"mine")
    monkeypatch.setattr("blockdance_core.host.calibrate.Rollouts", None)  # said before anything is sampled
    with pytest.raises(PolicyError, match=r"b\.safetensors"):
        calibrate.execute(measured, "b", 0.25, 0.0, 0)
    assert (folder / "b.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize("name", [
    "", " ", ".", "..", "../a", "a/b", "a\\b", "/etc/passwd", "C:a", "a\0b", ".hidden", "con", "NUL.txt", "a" * 101, "-a",
    "a\nb", ".safetensors", "a*", "~", "$HOME", "\u6a21" * 90,
])
def test_bad_names_are_refused(name: str, calibrate: Any, folder: Path, measured: Any) -> None:
    assert "policy_name" in calibrate.validate_inputs(name)
    with pytest.raises(ValueError, match="policy_name"):
        calibrate.execute(measured, name, 0.25, 0.0, 0)
    assert not folder.exists()


def test_name_that_comes_from_another_node_is_judged_when_it_is_known(nodes: dict[str, Any]) -> None:
    assert nodes["BlockDanceCalibrate"].validate_inputs(None) is True
    assert nodes["BlockDanceLoadPolicy"].validate_inputs(None) is True
    assert nodes["BlockDanceTrainPolicy"].validate_inputs(None, None) is True


def test_good_names_are_files_of_the_folder(calibrate: Any, folder: Path) -> None:
    for name, file in (
        ("my-policy", "my-policy"), ("a.safetensors", "a"), (" SD3.5 (large) v2+", "SD3.5 (large) v2+"),
        ("\u00e9t\u00e9", "\u00e9t\u00e9"),
    ):
        assert calibrate.validate_inputs(name) is True
        assert paths.new_policy_path(name) == str(folder / f"{file}.safetensors")


def test_first_folder_that_can_be_written_is_taken(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [str(tmp_path / "locked" / "blockdance"), str(folder)]
    monkeypatch.setattr(paths, "policy_folders", lambda: places)
    locked = {str(tmp_path / "locked")}
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path not in locked)
    assert paths.writable_folder() == str(folder)
    locked.add(str(tmp_path))
    with pytest.raises(PermissionError, match="locked"):
        paths.writable_folder()


def test_cut_is_what_the_proofs_saved_not_what_the_plan_says(measured: Any) -> None:
    plain, = best_schedules(measured.profile, [pretended(lambda plan: torch.tensor([1e-3]))], (0.5,))
    last = max(k for k, row in enumerate(plain.plan) if row)
    half = [pretended(lambda plan: torch.tensor([1e-3]), computed=steps) for steps in ((), (last,))]
    found, = best_schedules(measured.profile, half, (0.5,))
    assert found.plan == plain.plan
    cost = dict(zip(measured.profile.boundaries, measured.profile.costs, strict=True))[plain.plan[last].boundary]
    assert found.cut == pytest.approx(plain.cut - (1 - cost) / STEPS / 2)


def test_promised_cut_is_that_of_a_run_where_a_feature_is_missing(nodes: dict[str, Any], folder: Path) -> None:
    case = CASES["hidream_o1"]
    model = model_of(case)
    positive, negative = case.conds(model)
    profile, _ = nodes["BlockDanceProfile"].execute(
        model, positive, negative, {"samples": case.latent(1)}, 1, STEPS, 3.0, "euler", "simple", 1.0).result
    free = dataclasses.replace(profile, profile=dataclasses.replace(profile.profile, costs=(0.0,)))
    policy, _ = nodes["BlockDanceCalibrate"].execute(free, "o1", 0.5, 0.0, 0).result
    fast = nodes["BlockDanceAccelerate"].execute(model, True, "auto", 64, policy=policy).args[0]
    sample(fast, case, steps=STEPS)
    run = last_run(fast)
    assert run["reused_steps"] / STEPS == pytest.approx(policy.entries[0].cuts[0])
    assert not run["fallbacks"]


def test_prompts_that_chose_nothing_say_what_is_lost_and_drop_what_a_faster_schedule_beats(measured: Any) -> None:
    def errors(base: float, sparse: float) -> Any:
        return lambda plan: torch.tensor([base ** plan.count(None) if plan.count(None) > 4 else sparse])

    profile = with_costs(measured).profile
    kept = best_schedules(profile, [pretended(errors(0.1, 0.5))], (0.25, 0.5))
    assert [one.plan.count(None) <= 4 for one in kept] == [False, True]
    proved = best_schedules(profile, [pretended(errors(0.1, 0.5))], (0.25, 0.5), proofs=[pretended(errors(0.9, 0.2))])
    assert [one.plan for one in proved] == [kept[1].plan]
    assert proved[0].loss == pytest.approx(0.2)


def test_of_two_levels_of_nearly_the_same_cut_the_better_one_stays(
    measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = dataclasses.replace(measured.profile, costs=(0.004, 0.0))
    better, faster = (plan_of(profile, [(0, 3, way), (3, 1, way), (4, 1, way), (5, 3, way)]) for way in (0, 1))
    monkeypatch.setattr(search, "front", lambda *_: [Found(better, 0.498, 1.0)])
    proof = pretended(lambda plan: torch.tensor([{better: 0.1, faster: 0.2}.get(plan, 1.0)]))
    found = best_schedules(profile, [proof], (0.25, 0.5), before=[faster], proofs=[proof])
    assert [one.plan for one in found] == [better]
    assert found[0].cut == pytest.approx(0.498)


def test_plans_of_before_are_proved_too_for_their_luck_on_the_checks_may_be_worse(measured: Any) -> None:
    before = plan_of(measured.profile, [(0, 3, 1), (3, 1, 1), (4, 1, 1), (5, 3, 1)])

    def errors(theirs: float) -> Any:
        return lambda plan: torch.tensor([theirs if plan == before else 1e-2 * plan.count(None)])

    worse, better = pretended(errors(0.5)), pretended(errors(1e-4))
    found, = best_schedules(measured.profile, [worse], (0.5,), before=[before], proofs=[better])
    assert (found.plan, found.loss) == (before, pytest.approx(1e-4))
    found, = best_schedules(measured.profile, [better], (0.5,), before=[before], proofs=[worse])
    assert found.plan == before, "it won on the checks: another one was not proved"
    levels = best_schedules(measured.profile, [worse], (0.2, 0.5), before=[before], proofs=[better])
    assert [one.plan for one in levels] == [before], "it beats what saves less, too"


def test_effort_keeps_to_the_cut(measured: Any) -> None:
    """Moves between groups of different boundaries change it; the closest run of all would save less."""
    mixed = plan_of(measured.profile, [(0, 1, 1), (1, 3, 0), (4, 4, 1)])

    def found(tries: int) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(search, "front", lambda *_: [Found(mixed, 0.5, 1.0)])
            return best_schedules(
                measured.profile,
                [pretended(lambda plan: torch.tensor([1e-3 - 1e-4 * sum(row.boundary == 3 for row in plan if row)]))],
                (0.5,), tries)[0]

    assert found(50).cut == pytest.approx(found(0).cut, abs=0.021)
