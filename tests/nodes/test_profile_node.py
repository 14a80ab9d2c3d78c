"""BlockDanceProfile, and the rollouts that it measures with."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from typing import Any

import comfy.model_management
import comfy.samplers
import numpy as np
import pytest
import torch
from harness import accelerate, last_run, model_of, reused_steps
from tiny import CASES, count_calls, sample

from blockdance_core.forecast import FORECASTS, Forecast
from blockdance_core.host import attach, profiling, rollout
from blockdance_core.host.measured import parse_boundaries
from blockdance_core.host.rollout import Prompt, Rollouts
from blockdance_core.schedule import Reuse

CASE = CASES["sd3"]
STEPS = 8


def inputs(**changes: Any) -> dict[str, Any]:
    """Inputs of the node; by default two samples of five Euler steps."""
    positive, negative = CASE.conds(model_of(CASE))
    return {
        "model": model_of(CASE), "positive": positive, "negative": negative, "latent_image": {"samples": CASE.latent(2)},
        "seed": 1, "steps": 5, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0, **changes,
    }


def prompt(sampler: str = "euler", scheduler: str = "simple", steps: int = STEPS, **changes: Any) -> Prompt:
    positive, negative = CASE.conds(model_of(CASE))
    one = Prompt(positive, negative, CASE.latent(2), 1, steps, 3.0, sampler, scheduler)
    return dataclasses.replace(one, **changes)


def everything_of(model: Any) -> dict[str, Any]:
    """What a run could leave on a model."""
    blocks = CASE.blocks(model.model.diffusion_model)
    return {
        "options": repr(model.model_options), "wrappers": repr(model.wrappers), "attachments": dict(model.attachments),
        "attributes": set(vars(model.model)), "blocks": [set(vars(block)) for block in blocks],
        "weights": [parameter.data_ptr() for parameter in model.model.parameters()],
    }


@pytest.fixture
def node(nodes: dict[str, Any]) -> Any:
    return nodes["BlockDanceProfile"]


def test_schema_is_the_api_and_samples_like_the_hosts_node(node: Any) -> None:
    import nodes as host_nodes

    schema = node.GET_SCHEMA()
    assert (schema.display_name, schema.category) == ("BlockDance Profile", "model/BlockDance")
    assert [i.id for i in schema.inputs] == [
        "model", "positive", "negative", "latent_image", "seed", "steps", "cfg", "sampler_name", "scheduler", "denoise",
        "boundaries", "profile",
    ]
    assert [output.get_io_type() for output in schema.outputs] == ["BLOCKDANCE_PROFILE", "STRING"]
    assert schema.inputs[-1].optional
    declared = host_nodes.KSampler.INPUT_TYPES()["required"]
    ours = {i.id: i for i in schema.inputs}
    for name, (kind, *options) in declared.items():
        if isinstance(kind, list):
            assert list(ours[name].options) == kind
            continue
        assert ours[name].get_io_type() == kind
        for key, value in options[0].items():
            if key not in ("tooltip", "control_after_generate"):
                assert getattr(ours[name], key) == value, f"{name} {key}"
    assert ours["seed"].as_dict()["control_after_generate"] == "fixed", "queued again, nothing is profiled again"


def test_run_that_is_lost_is_refused_before_anything_is_measured(node: Any) -> None:
    latent = CASE.latent(2)
    latent[1] = math.nan
    with pytest.raises(ValueError, match=r"no finite result \(sample 2 of 2\): nothing can be compared"):
        node.execute(**inputs(latent_image={"samples": latent}))


@pytest.mark.parametrize(("sampler", "scheduler"), [
    ("euler", "simple"), ("dpmpp_2m", "karras"), ("dpmpp_2m_sde", "simple"), ("euler_ancestral", "simple"), ("heun", "simple"),
    ("euler_cfg_pp", "simple"), ("lms", "simple"), ("ddim", "ddim_uniform"),
])
def test_replayed_steps_leave_the_sampler_where_the_full_run_was(sampler: str, scheduler: str) -> None:
    model, blocks = model_of(CASE), CASE.blocks(model_of(CASE).model.diffusion_model)
    rollouts = Rollouts(model, prompt(sampler, scheduler))
    steps, before = rollouts.steps, rollouts.calls
    with count_calls(blocks) as counts:
        run = rollouts.run([None] * steps, range(steps // 2))
    assert all(torch.equal(one, other) for one, other in zip(run.entered, rollouts.full.entered, strict=True))
    assert len(run.entered) == steps + 1
    assert 0 < counts[0] == rollouts.calls - before < before
    with count_calls(blocks) as counts:
        run = rollouts.run([None] * steps, range(steps))
    assert counts[0] == 0
    assert torch.equal(run.result, rollouts.full.result)
    assert rollouts.count == 3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU"))])
def test_what_is_kept_of_a_run_lies_on_the_cpu_and_is_replayed_as_it_was(device: str) -> None:
    copied = rollout._kept(torch.ones(3, device=device))
    assert copied.device.type == "cpu"
    rollouts = Rollouts(model_of(CASE), prompt())
    before = [one.clone() for one in rollouts.full.entered]
    given: list[torch.Tensor] = []
    original = Rollouts._predict

    def written_into(*args: Any) -> Any:
        given.extend(predictions := original(*args))
        return predictions

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rollouts, "_predict", written_into)
        run = rollouts.run([None] * STEPS, range(STEPS))
    kept = [*run.entered, *(one for step in run.predicted for asked in step for one in asked)]
    assert {one.device.type for one in kept} == {"cpu"}
    assert not {one.data_ptr() for one in given} & {one.data_ptr() for one in kept}  # a sampler may write into what it gets
    assert all(torch.equal(one, other) for one, other in zip(run.entered, before, strict=True))


def test_full_run_is_what_the_hosts_sampler_gives(node: Any) -> None:
    for changes in ({}, {"denoise": 0.5}, {"noise_mask": torch.ones(1, 1, 8, 8).tril()}):
        rollouts = Rollouts(model_of(CASE), prompt(**changes))
        mask = changes.get("noise_mask")
        noise = comfy.sample.prepare_noise(rollouts.prompt.latent, 1)
        full = comfy.sample.sample(
            model_of(CASE), noise, STEPS, 3.0, "euler", "simple", *CASE.conds(model_of(CASE)), rollouts.prompt.latent,
            denoise=changes.get("denoise", 1.0), noise_mask=mask, disable_pbar=True, seed=1)
        decoded = model_of(CASE).get_model_object("latent_format").process_out(rollouts.full.result)
        assert torch.allclose(decoded, full, atol=1e-6)
        assert rollouts.steps == STEPS


def test_steps_that_reuse_change_the_run_and_those_before_do_not() -> None:
    rollouts = Rollouts(model_of(CASE), prompt())
    plan = [None, None, None, Reuse(7, FORECASTS["hold"]), *[None] * 4]
    run = rollouts.run(plan)
    off = rollouts.distances(run)
    assert off.shape == (STEPS + 1, 2)
    assert (off[:4] == 0).all()
    assert (off[4:] > 0).all()
    assert reused_steps(run.record) == [3]
    stopped = rollouts.run(plan, range(2), until=5)
    assert len(stopped.entered) == 6
    assert not stopped.record["completed"]
    assert torch.equal(rollouts.distances(stopped), off[:6])
    variance = rollouts.full.result.double().flatten(1).var(1)
    assert torch.allclose(rollouts.errors(run), off[-1].square() / variance)


def test_profile_measures_every_step_lag_and_boundary_and_says_so(node: Any) -> None:
    model = model_of(CASE)
    before = everything_of(model)
    measured, text = node.execute(**inputs(boundaries="0.75, 7")).result
    assert everything_of(model) == before
    profile, report = measured.profile, json.loads(text)
    assert profile.boundaries == (5, 7)
    assert profile.errors.shape == (2, 2, 5, len(profiling.LAGS), profiling.LONGEST)
    for v, c, i in profiling.groups(5, 2):
        assert np.isfinite(profile.errors[:, v, c, i, : 5 - c]).all()
        assert (profile.errors[:, v, c, i, 1 : 5 - c] > 0).all()
    assert np.isnan(profile.errors[:, :, 4, :, 1:]).all()  # the last step
    assert {key: report[key] for key in ("steps", "sampler", "scheduler", "prompts", "samples", "boundaries")} == {
        "steps": 5, "sampler": "euler", "scheduler": "simple", "prompts": 1, "samples": 2, "boundaries": [5, 7],
    }
    assert len(report["errors"]) == len(report["costs"]) == 2
    assert [value is None for value in report["errors"][0]] == [False] * 4 + [True]
    assert report["rollouts"] == measured.rollouts == 2 + len(profiling.groups(5, 2)) + len(profiling.probes(5))
    assert report["seconds"] > 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        measured.model = None


GRAM = np.zeros((1, 0, 0))  # measuring errors needs none


def all_alike(forecast: Forecast, lags: int, steps: int = STEPS) -> Any:
    """Forecasts for `measure`: the same for every step of every group."""
    return [[[[None] + [forecast] * (profiling.LONGEST - 1)] * lags] * steps]


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("lag", [1, 2, 3])
def test_groups_are_measured_with_the_features_of_the_steps_that_the_lag_says(
    lag: int, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts = Rollouts(model_of(CASE), prompt(steps=10))
    sigmas = rollouts.full.record["sigmas"]
    computed: list[int] = []
    used = 0
    run, weights = Rollouts.run, Forecast.weights

    def spied_run(self: Rollouts, plan: Any, replayed: Any, **rest: Any) -> Any:
        computed[:] = [k for k, row in enumerate(plan) if k not in replayed and not row]
        return run(self, plan, replayed, **rest)

    def spied_weights(self: Forecast, stored_at: Any, sigma: float, ages: Any) -> Any:
        nonlocal used
        used += 1
        step = min(range(10), key=lambda k: abs(sigmas[k] - sigma))
        before = sorted((k for k in computed if k < step), reverse=True)
        assert before == [k for k in (before[0], before[0] - lag, before[0] - 2 * lag) if k >= 0]
        assert list(stored_at[: order + 1]) == [sigmas[k] for k in before[: order + 1]]
        assert list(ages) == [step - k for k in before[: len(stored_at)]]
        return weights(self, stored_at, sigma, ages)

    monkeypatch.setattr(Rollouts, "run", spied_run)
    monkeypatch.setattr(Forecast, "weights", spied_weights)
    profiling.measure(rollouts, [7], all_alike(Forecast(True, order), 1, 10), GRAM, [lag])
    assert used > 20


def test_history_makes_a_difference_at_every_lag_and_none_where_there_is_none() -> None:
    lags = (1, 3)
    held, led = (
        profiling.measure(Rollouts(model_of(CASE), prompt()), [7], all_alike(forecast, len(lags)), GRAM, lags).errors
        for forecast in (Forecast(True, 0), Forecast(True, 1))
    )
    for _, c, i in profiling.groups(STEPS, 1, lags):
        one, other = held[:, 0, c, i, 1], led[:, 0, c, i, 1]
        assert (one == other).all() if c == 0 else (one != other).all(), (c, lags[i])


@pytest.mark.parametrize("sampler", [
    "heun", "dpm_2", "dpm_2_ancestral", "dpmpp_sde", "dpmpp_2s_ancestral", "seeds_2", "seeds_3", "heunpp2",
])
def test_samplers_that_evaluate_a_step_several_times_are_profiled(sampler: str, node: Any) -> None:
    profile = node.execute(**inputs(sampler_name=sampler, steps=4)).result[0].profile
    for v, c, i in profiling.groups(4, 1):
        assert np.isfinite(profile.errors[:, v, c, i, : 3 - c]).all()
    assert np.isfinite(profile.gains).all()


def test_steps_that_a_sampler_leaves_out_cost_no_time(node: Any) -> None:
    measured = node.execute(**inputs(sampler_name="dpm_fast", scheduler="ddim_uniform", steps=14)).result[0]
    assert all(cost > 0 for cost in measured.profile.costs)


def test_cost_of_a_reuse_step_is_its_share_of_the_same_run(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between runs the machine may become much slower, or faster."""
    real, slowness = Rollouts.run, itertools.cycle((1.0, 9.0, 4.0))

    def run(*args: Any, **kwargs: Any) -> Any:
        found, factor = real(*args, **kwargs), next(slowness)
        found.record["dit_ms"] = [factor * (0.25 if decision == "reuse" else 1.0) for decision in found.record["decisions"]]
        return found

    monkeypatch.setattr(Rollouts, "run", run)
    assert node.execute(**inputs()).result[0].profile.costs == (0.25,)


def test_gram_holds_first_evaluations() -> None:
    euler, heun = (profiling.gram(Rollouts(model_of(CASE), prompt(sampler, steps=4)), [7]) for sampler in ("euler", "heun"))
    assert np.isfinite(heun).all()
    assert heun[0, :, 0, :, 0] == pytest.approx(euler[0, :, 0, :, 0])
    assert heun[0, :, 1, :, 2].sum() == pytest.approx(euler[0, :, 1, :, 2].sum(), rel=0.5)


def test_gram_weighs_conditionings_as_guidance_does() -> None:
    _, negative = CASE.conds(model_of(CASE))

    def gram(**changes: Any) -> np.ndarray:
        return profiling.gram(Rollouts(model_of(CASE), prompt(**changes)), [7])

    same = [gram(cfg=cfg, positive=negative, negative=negative) for cfg in (1.0, 4.5)]
    assert same[1] == pytest.approx(same[0], rel=1e-3, abs=1e-3), "what both have in common is not amplified"
    (other,), (stronger,) = gram(cfg=4.5), gram(cfg=9.0)
    assert other == pytest.approx(other.transpose(2, 3, 0, 1))
    assert all((other[part, range(STEPS), part, range(STEPS)] > 0).all() for part in (0, 1))
    assert np.array_equal(other[0, 0, 0, 0], stronger[0, 0, 0, 0])
    assert stronger[1, 0, 1, 0] == pytest.approx(4 * other[1, 0, 1, 0])


@pytest.mark.parametrize("boundary", [7, 8], ids=["blocks", "whole model"])
def test_gram_is_of_residuals_or_slopes_as_guidance_combines_them(boundary: int) -> None:
    """The sum of both parts at the first step, restated from the full run."""
    rollouts = Rollouts(model_of(CASE), prompt(cfg=4.5))
    positive, negative = (one.double() for one in rollouts.full.predicted[0][0])
    slope = (rollouts.full.entered[0].double() - torch.lerp(negative, positive, 4.5)) / rollouts.full.record["sigmas"][0]
    found = profiling.gram(rollouts, [boundary])[0].sum((0, 2))[0, 0]
    assert (found == pytest.approx(float(slope.square().sum()), rel=1e-3)) == (boundary == CASE.depth)


def test_conditionings_that_come_and_go_are_profiled_and_never_compared(node: Any) -> None:
    positive, negative = CASE.conds(model_of(CASE))
    early, late = ([[one, {**rest, **share}] for one, rest in positive] for share in (
        {"start_percent": 0.0, "end_percent": 0.5}, {"start_percent": 0.3, "end_percent": 1.0}))
    changes = {"positive": [*early, *late], "negative": negative, "steps": 6}
    assert np.isfinite(node.execute(**inputs(**changes)).result[0].profile.gains).all()
    gram = profiling.gram(Rollouts(model_of(CASE), prompt(steps=6, positive=changes["positive"])), [7])[0].sum((0, 2))
    assert 0 < np.isnan(gram).sum() < gram.size
    assert np.isfinite(gram.diagonal()).all()


def test_chained_nodes_make_one_profile(node: Any) -> None:
    first = node.execute(**inputs()).result[0]
    errors = first.profile.errors.copy()
    second = node.execute(**inputs(seed=2, latent_image={"samples": CASE.latent(1)}, profile=first)).result[0]
    assert len(first.prompts) == 1
    assert np.array_equal(first.profile.errors, errors, equal_nan=True)
    assert [one.seed for one in second.prompts] == [1, 2]
    assert second.profile.errors.shape[0] == second.profile.gains.shape[0] == 3
    one, both = (np.einsum("pipi->pi", measured.profile.grams[0])[0] for measured in (first, second))
    assert (both > one).all()
    assert np.array_equal(second.profile.errors[:2], errors, equal_nan=True)
    assert second.rollouts == 2 * first.rollouts


@pytest.mark.parametrize(("changes", "said"), [
    ({"steps": 6}, "noise levels"), ({"scheduler": "karras"}, "noise levels"), ({"sampler_name": "heun"}, "sampler"),
    ({"boundaries": "3"}, "boundaries"), ({"denoise": 0.5}, "noise levels"),
])
def test_prompts_that_are_sampled_in_another_way_are_refused(changes: dict[str, Any], said: str, node: Any) -> None:
    first = node.execute(**inputs(steps=3)).result[0]
    with pytest.raises(ValueError, match=f"another {said}"):
        node.execute(**inputs(**{"steps": 3, "profile": first, **changes}))


def test_other_model_is_refused(node: Any) -> None:
    first = node.execute(**inputs(steps=3)).result[0]
    with pytest.raises(ValueError, match="another model"):
        node.execute(**inputs(steps=3, profile=first, model=CASE.build(1)))


def test_accelerated_model_is_profiled_without_its_acceleration(node: Any) -> None:
    accelerated = accelerate(model_of(CASE))
    sample(accelerated, CASE)
    runs = list(attach.handle_of(accelerated).runs())
    measured = node.execute(**inputs(model=accelerated)).result[0]
    plain = node.execute(**inputs()).result[0]
    assert np.array_equal(measured.profile.errors, plain.profile.errors, equal_nan=True)
    assert attach.handle_of(accelerated).runs() == runs
    assert last_run(accelerated)["reused_steps"] > 0


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_runs_that_are_too_short_are_refused(steps: int, node: Any) -> None:
    changes = {"steps": steps} if steps else {"denoise": 0.0}
    with pytest.raises(ValueError, match=f"A run of {steps} steps"):
        node.execute(**inputs(**changes))


def test_interrupt_ends_the_node_and_leaves_nothing(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(CASE)
    before, calls = everything_of(model), 0
    original = rollout.Rollouts._predict

    def predict(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 40:
            comfy.model_management.interrupt_current_processing()
        comfy.model_management.throw_exception_if_processing_interrupted()
        return original(*args)

    monkeypatch.setattr(rollout.Rollouts, "_predict", predict)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        node.execute(**inputs())
    assert calls == 40
    assert everything_of(model) == before


def test_progress_is_shown_to_the_end_and_single_runs_are_not_logged(
    node: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr("comfy.utils.PROGRESS_BAR_HOOK", lambda value, total, *_, **__: seen.append((value, total)))
    sent: list[Any] = []
    monkeypatch.setattr(sys.modules["blockdance_core.host.notify"], "send", lambda *event: sent.append(event))
    with caplog.at_level("INFO"):
        measured = node.execute(**inputs()).result[0]
    assert seen[-1] == (measured.rollouts, measured.rollouts)
    assert not sent
    assert "BlockDance" not in caplog.text


def test_boundaries_are_indices_or_shares() -> None:
    assert parse_boundaries("", 28) == ()
    assert parse_boundaries(" 0.75 , 27,20, 1.0", 28) == (20, 27)
    assert parse_boundaries("0, 8", 8) == (0, 8)
    for wrong in ("29", "-1", "1.5", "x", "nan", "inf", "1e400", "0.0", "3;4"):
        with pytest.raises(ValueError, match="0 to 27"):
            parse_boundaries(wrong, 28)


def test_steps_that_did_not_reuse_count_as_not_measured(node: Any) -> None:
    """HiDream-O1 stores nothing at its first step, which also reads the prompt: what is planned to reuse it is computed."""
    case = CASES["hidream_o1"]
    positive, negative = case.conds(model_of(case))
    measured, report = node.execute(**inputs(
        model=model_of(case), positive=positive, negative=negative, latent_image={"samples": case.latent(1)},
        boundaries=str(case.depth - 1))).result
    errors, = json.loads(report)["errors"]
    assert errors[0] is None
    assert all(error > 0 for error in errors[1:-1])
    assert not np.isfinite(measured.profile.errors[:, :, 0, :, 1:]).any()
    assert (measured.profile.gains > 1e-3).all()


def test_model_of_which_nothing_can_be_reused_is_refused_early_and_the_reason_is_said(node: Any) -> None:
    replaced = model_of(CASE).clone()
    replaced.set_model_patch_replace(lambda args, more: more["original_block"](args), "dit", "double_block", 0)
    blocks = CASE.blocks(replaced.model.diffusion_model)
    with count_calls(blocks) as counts, pytest.raises(ValueError, match=r"Nothing can be reused with this model .* replace"):
        node.execute(**inputs(model=replaced, steps=20, boundaries="7"))
    assert counts[0] < 150


def test_of_runs_that_are_only_judged_no_prediction_is_kept() -> None:
    """Those of a long video would fill the memory."""
    rollouts = Rollouts(model_of(CASE), prompt())
    plan = [None, None, None, Reuse(7, FORECASTS["hold"]), *[None] * 4]
    run = rollouts.run(plan)
    assert not any(asked for step in run.predicted for asked in step)
    before = rollouts.errors(run)
    replayed = rollouts.run(plan, range(2))
    rollouts.forget(2)
    assert torch.equal(rollouts.run(plan, range(2)).result, replayed.result)
    assert len(rollouts.full.entered) == 1
    assert not any(rollouts.full.predicted[2:])
    assert torch.equal(rollouts.errors(run), before)


def test_beside_a_guidance_pass_that_cannot_be_shortened_the_whole_model_is_profiled(node: Any) -> None:
    """At a block nothing reuses, as the other passes are computed, too."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    guided = SkipLayerGuidanceDiT.execute(model_of(CASE), 3.0, 0.0, 1.0, double_layers="0", single_layers="").result[0]
    with pytest.raises(ValueError, match=r"Nothing can be reused .*another node replaces block 0"):
        node.execute(**inputs(model=guided, boundaries="7"))
    _, report = node.execute(**inputs(model=guided)).result
    errors, = json.loads(report)["errors"]
    assert all(error > 0 for error in errors[:-1])
