"""Reuse of the whole model: what is injected is the slope of the latent, and nothing of the model runs."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import node_helpers
import pytest
import torch
from comfy.model_patcher import ModelPatcher, create_model_options_clone, set_model_options_patch_replace
from comfy.patcher_extension import WrappersMP
from comfy.samplers import calc_cond_batch
from harness import STEPS, accelerate, assert_close, distance, every_family, last_run, model_of, reused_steps
from tiny import CASES, Case, count_calls, fake_control, sample, sample_custom, split_calls
from torch import Tensor

from blockdance_core.config import QUALITIES
from blockdance_core.forecast import FORECASTS, Forecast
from blockdance_core.policy import Fixed
from blockdance_core.schedule import Plan, Reuse

pytestmark = pytest.mark.smoke
REUSED = (3, 5, 6, 9)
BASE, GUIDANCE = {1: 1.5, 2: -0.6, 3: 0.1}, {1: 1.25, 2: -0.2, 3: -0.1}
"""Weights of what was stored so many steps before, of the unconditional stream and of what guidance adds."""


def plan_of(case: Case, forecast: Forecast) -> Plan:
    return tuple(Reuse(case.depth, forecast) if step in REUSED else None for step in range(STEPS))


def fitted() -> Forecast:
    """Step 3 takes what the three steps before it stored; at the others that is not what is stored."""
    return Forecast(True, 1, fitted=tuple(BASE.items()), guided=tuple(GUIDANCE.values()))


def whole(model: ModelPatcher, case: Case, forecast: Forecast = FORECASTS["taylor"]) -> ModelPatcher:
    return accelerate(model, policy=Fixed(plan_of(case, forecast)))


class Restated:
    """The method once more, for one model, deterministic steps and one positive and one negative conditioning."""

    def __init__(self, order: int, weighed: bool = False) -> None:
        self.order, self.weighed = order, weighed
        self.sigmas: list[float] = []
        self.slopes: defaultdict[int, dict[int, Tensor]] = defaultdict(dict)  # of each conditioning, by step

    def patch(self, model: ModelPatcher) -> ModelPatcher:
        clone = model.clone()
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "restated", self)
        return clone

    def __call__(self, executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sigma, kinds = float(t[0]), args[3]["cond_or_uncond"]
        if sigma not in self.sigmas:
            self.sigmas.append(sigma)
        step = len(self.sigmas) - 1
        if step in REUSED:
            return x - sigma * torch.cat([self.forecast(step, sigma, kind) for kind in kinds])
        denoised = executor(x, t, *args, **kwargs)
        for kind, slope in zip(kinds, ((x - denoised) / sigma).chunk(len(kinds)), strict=True):
            self.slopes[kind][step] = slope
        return denoised

    def forecast(self, step: int, sigma: float, kind: int) -> Tensor:
        own, other = self.slopes[kind], self.slopes[1]
        if self.weighed and step == 3:
            base = sum(weight * other[step - age] for age, weight in BASE.items())
            if kind == 1:
                return base
            return base + sum(weight * (own[step - age] - other[step - age]) for age, weight in GUIDANCE.items())
        newest, *before = sorted(own, reverse=True)
        if not self.order:
            return own[newest]
        far, near = self.sigmas[before[0]], self.sigmas[newest]
        return own[newest] + (own[newest] - own[before[0]]) * (sigma - near) / (near - far)


@every_family
@pytest.mark.parametrize("name", ["delta", "taylor"])
def test_equals_a_restatement_and_runs_nothing(case: Case, name: str) -> None:
    model, forecast = model_of(case), FORECASTS[name]
    expected = sample(Restated(forecast.order).patch(model), case, steps=STEPS)
    accelerated = whole(model, case, forecast)
    totals: list[int] = []
    with count_calls(case.blocks(model.model.diffusion_model)) as counts:
        found = sample(accelerated, case, steps=STEPS, callback=lambda *_: totals.append(sum(counts)))
    assert_close(expected, found, 1e-3)
    assert distance(sample(model, case, steps=STEPS), found) > 1e-3
    run = last_run(accelerated)
    assert (run["warnings"], run["fallbacks"]) == ([], {})
    assert reused_steps(run) == list(REUSED)
    assert [step for step, (one, other) in enumerate(zip([0, *totals], totals, strict=False)) if one == other] == list(REUSED)
    assert [run["blocks_run"][step] for step in REUSED] == [0] * len(REUSED)
    assert run["boundary"][3] == case.depth
    assert run["config"]["boundary_label"] == "the whole model"
    assert run["cut_arithmetic"] == pytest.approx(len(REUSED) / STEPS)
    latent = case.latent(1)
    assert run["cached_bytes"] == run["predicted_bytes"] == 2 * min(2, forecast.features) * latent.numel() * 4


@every_family
@pytest.mark.parametrize("lengths", [False, True], ids=["equal texts", "texts of different length"])
def test_guidance_has_weights_of_its_own(case: Case, lengths: bool) -> None:
    model, settings = model_of(case), {"steps": STEPS, "different_lengths": lengths}
    expected = sample(Restated(1, weighed=True).patch(model), case, **settings)
    assert_close(expected, sample(whole(model, case, fitted()), case, **settings), 1e-4)
    with split_calls():
        assert_close(expected, sample(whole(model, case, fitted()), case, **settings), 1e-4)
    single = Forecast(True, 1, fitted=tuple(BASE.items()))
    assert distance(expected, sample(whole(model, case, single), case, **settings)) > 1e-4


def test_without_guidance_the_weights_of_the_stream_hold() -> None:
    case = CASES["sd3"]
    model = model_of(case)
    single = Forecast(True, 1, fitted=tuple(BASE.items()))
    pair = [sample(whole(model, case, one), case, steps=STEPS, cfg=1.0) for one in (fitted(), single)]
    assert torch.equal(*pair)


def test_three_conditionings_are_extrapolated() -> None:
    """Weights that were found for one set against one other are not theirs. DualCFGGuider's first is not the positive one."""
    case = CASES["sd3"]
    pair = [sample_custom(whole(model_of(case), case, one), case, steps=STEPS, guider="dual_cfg")
            for one in (fitted(), Forecast(True, 1))]
    assert torch.equal(*pair)


def test_weights_that_are_not_theirs_are_spoken_of() -> None:
    case = CASES["sd3"]
    model = whole(model_of(case), case, fitted())
    for guider, told in (("cfg", 0), ("basic", 0), ("dual_cfg", 1)):
        sample_custom(model, case, steps=STEPS, guider=guider)
        assert len(last_run(model)["warnings"]) == told
    assert "one prompt against one negative" in last_run(model)["warnings"][0]
    assert "set a quality beside it" in last_run(model)["warnings"][0]


def test_prompts_of_two_regions_are_extrapolated() -> None:
    """The host adds the negative one in the area of each: nobody says which of the two a region is set against."""
    case = CASES["sd3"]
    model = model_of(case)
    positive, negative = case.conds(model)
    regions = [entry for left in (0, 4) for entry in node_helpers.conditioning_set_values(
        positive, {"area": (8, 4, 0, left), "strength": 1.0, "set_area_to_bounds": False})]
    pair = [sample(whole(model, case, one), case, steps=STEPS, conds=(regions, negative))
            for one in (fitted(), Forecast(True, 1))]
    assert torch.equal(*pair)


def patched(args: dict[str, Any], *conds: Any) -> list[Tensor]:
    """Passes of the model under a patch that does nothing."""
    options = set_model_options_patch_replace(
        create_model_options_clone(args["model_options"]), lambda given, kept: kept["original_block"](given),
        "dit", "double_block", 1)
    return calc_cond_batch(args["model"], list(conds), args["input"], args["sigma"], options)


def test_a_pass_of_guidance_that_adds_nothing_changes_nothing() -> None:
    """As perturbed-attention and skip-layer guidance make them, which multiply what it differs by."""
    case = CASES["sd3"]
    accelerated = whole(model_of(case), case, fitted())
    expected = sample(accelerated, case, steps=STEPS)
    accelerated.set_model_sampler_post_cfg_function(
        lambda args: args["denoised"] + 3.0 * (args["cond_denoised"] - patched(args, args["cond"])[0]))
    assert_close(expected, sample(accelerated, case, steps=STEPS), 1e-3)
    assert reused_steps(last_run(accelerated)) == list(REUSED)


def test_a_negative_under_a_patch_of_its_own_is_still_what_the_positive_is_set_against() -> None:
    """As SkipLayerGuidanceDiTSimple does it."""
    case = CASES["sd3"]
    accelerated = whole(model_of(case), case, fitted())
    expected = sample(accelerated, case, steps=STEPS)

    def apart(args: dict[str, Any]) -> list[Tensor]:
        positive, negative = args["conds"]
        given = args["input"], args["sigma"], args["model_options"]
        return [calc_cond_batch(args["model"], [positive, None], *given)[0], patched(args, None, negative)[1]]

    accelerated.set_model_sampler_calc_cond_batch_function(apart)
    assert_close(expected, sample(accelerated, case, steps=STEPS), 1e-3)


def test_without_noise_the_step_is_computed_and_counted() -> None:
    case = CASES["sd3"]
    accelerated = whole(model_of(case), case)
    sigmas = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0])
    sample_custom(accelerated, case, steps=STEPS, sigmas=sigmas)  # the host's Euler divides by them
    run = last_run(accelerated)
    assert 3 in reused_steps(run)
    assert 9 not in reused_steps(run)
    assert "without noise the latent has no slope" in run["fallbacks"]


@pytest.mark.parametrize("device", ["cpu", "auto"])
@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m"])
def test_a_batch_gives_each_row_what_it_gets_alone(sampler: str, device: str) -> None:
    case = CASES["wan_t2v"]
    accelerated = accelerate(model_of(case), policy=Fixed(plan_of(case, fitted())), cache_device=device)
    latents, conds = case.latent(2), case.conds(accelerated)
    together, *alone = (
        sample(accelerated, case, steps=STEPS, sampler=sampler, latent=rows, conds=conds, disable_noise=True)
        for rows in (latents, latents[:1], latents[1:]))
    assert_close(together, torch.cat(alone), 1e-3)
    assert reused_steps(last_run(accelerated)) == list(REUSED)


@every_family
def test_batched_and_split_conditionings_agree(case: Case) -> None:
    accelerated = whole(model_of(case), case)
    together = sample(accelerated, case, steps=STEPS)
    with split_calls():
        assert_close(together, sample(accelerated, case, steps=STEPS), 1e-3)
    assert reused_steps(last_run(accelerated)) == list(REUSED)


@every_family
def test_the_blocks_are_not_touched(case: Case) -> None:
    model = model_of(case)
    blocks = case.blocks(model.model.diffusion_model)
    before = [dict(block.__dict__) for block in blocks]
    seen: list[bool] = []

    def look(*_: Any) -> None:
        seen.append(all(block.__dict__.keys() == known.keys() for block, known in zip(blocks, before, strict=True)))

    handle = model.model.diffusion_model.register_forward_pre_hook(look)
    try:
        sample(whole(model, case), case, steps=STEPS)
    finally:
        handle.remove()
    assert len(seen) == case.calls() * (STEPS - len(REUSED))
    assert all(seen)


def test_blocks_and_whole_model_in_one_plan() -> None:
    case = CASES["sd3"]
    plan = list(plan_of(case, FORECASTS["taylor"]))
    plan[5:7] = [Reuse(case.depth - 2, FORECASTS["taylor"])] * 2
    accelerated = accelerate(model_of(case), policy=Fixed(tuple(plan)))
    result = sample(accelerated, case, steps=STEPS)
    assert torch.isfinite(result).all()
    run = last_run(accelerated)
    assert (run["warnings"], run["fallbacks"]) == ([], {})
    assert [run["blocks_run"][step] for step in REUSED] == [0, 1, 1, 0]
    assert run["cached_bytes"] <= run["predicted_bytes"]


def test_a_block_that_another_node_replaces_is_no_obstacle() -> None:
    case = CASES["sd3"]
    accelerated = whole(model_of(case), case)
    accelerated.set_model_patch_replace(lambda args, more: more["original_block"](args), "dit", "double_block", 0)
    sample(accelerated, case, steps=STEPS)
    run = last_run(accelerated)
    assert reused_steps(run) == list(REUSED)
    assert run["fallbacks"] == {}


def test_what_another_node_puts_around_the_run_is_part_of_what_is_forecast_from() -> None:
    """As by InfiniteTalk: a wrapper of the model's calls, added when the run begins, pins part of the latent."""
    case = CASES["sd3"]

    def pinned(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x[..., 0] = 0.5
        return executor(x, *args, **kwargs)

    def around(executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = executor.class_obj.model_options["transformer_options"]
        options["wrappers"].setdefault(WrappersMP.APPLY_MODEL, {})["pin"] = [pinned]
        return executor(*args, **kwargs)

    def pinning(model: ModelPatcher) -> ModelPatcher:
        clone = model.clone()
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "pin", around)
        return clone

    before, after = pinning(whole(model_of(case), case)), whole(pinning(model_of(case)), case)
    outputs = [sample(model, case, steps=STEPS) for model in (before, after)]
    assert reused_steps(last_run(before)) == list(REUSED)
    assert torch.equal(*outputs)


def test_a_cache_that_wraps_the_models_calls_is_noticed() -> None:
    """As TeaCache packs do: a `model_function_wrapper` answers with what it kept, and no block runs."""
    case, kept = CASES["sd3"], []

    def answering(apply_model: Any, args: dict[str, Any]) -> Any:
        network = case_model.model.diffusion_model
        forward = network.forward
        if len(kept) == 1:
            network.forward = lambda *_, **__: kept[0]
        else:
            def noted(*args: Any, **kwargs: Any) -> Any:
                kept.append(forward(*args, **kwargs))
                return kept[-1]

            network.forward = noted
        try:
            return apply_model(args["input"], args["timestep"], **args["c"])
        finally:
            del network.forward

    case_model = model_of(case)
    accelerated = whole(case_model, case)
    accelerated.set_model_unet_function_wrapper(answering)
    sample(accelerated, case, steps=STEPS)
    run = last_run(accelerated)
    assert run["fallbacks"]["the blocks did not run: something else answered the call"] > 0
    assert run["blocks_run"][1] == 0


def test_weights_of_guidance_are_left_where_nobody_says_which_half_is_whose() -> None:
    """Two tiles in one batch, as MultiDiffusion makes them: unconditional and conditional rows take turns."""
    case = CASES["sd3"]

    def tiled(apply_model: Any, args: dict[str, Any]) -> Any:
        def twice(part: Any) -> Any:
            return torch.cat([part, part]) if isinstance(part, Tensor) and part.shape[0] == args["input"].shape[0] else part

        conditions = {name: twice(part) for name, part in args["c"].items()}
        found = apply_model(twice(args["input"]), twice(args["timestep"]), **conditions)
        return found[: args["input"].shape[0]]

    weighed, plain = (whole(model_of(case), case, one) for one in (fitted(), Forecast(True, 1)))
    for model in (weighed, plain):
        model.set_model_unet_function_wrapper(tiled)
    outputs = [sample(model, case, steps=STEPS) for model in (weighed, plain)]
    assert reused_steps(last_run(weighed)) == list(REUSED)
    assert torch.equal(*outputs)


def test_a_latent_that_grows_in_mid_run_is_computed_anew() -> None:
    case = CASES["sd3"]
    accelerated = whole(model_of(case), case)

    def grow(executor: Any, x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """From step 5 on guidance sees a latent that is twice as high."""
        if len(steps) < 5:
            steps.append(1)
            return executor(x, timestep, *args, **kwargs)
        return executor(torch.cat([x, x], 2), timestep, *args, **kwargs)[:, :, : x.shape[2]]

    steps: list[int] = []
    accelerated.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test", grow)
    result = sample(accelerated, case, steps=STEPS)
    assert torch.isfinite(result).all()
    assert 3 in reused_steps(last_run(accelerated))
    assert 5 not in reused_steps(last_run(accelerated))


def test_another_control_computes_the_step() -> None:
    import nodes

    case = CASES["sd3"]
    model = model_of(case)
    conds = nodes.ControlNetApplyAdvanced().apply_controlnet(
        *case.conds(model), fake_control(case), torch.zeros(1, 64, 96, 3), 1.0, 0.0, 0.55)
    accelerated = whole(model, case)
    sample(accelerated, case, steps=STEPS, conds=conds)
    run = last_run(accelerated)
    assert len(run["fallbacks"]) == 1
    assert len(reused_steps(run)) == len(REUSED) - 1


def test_a_quality_turns_planned_reuse_into_compute_and_what_it_computes_serves_the_next_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CASES["sd3"]
    found = []
    for tolerance in (0.0, math.inf):
        monkeypatch.setitem(QUALITIES, "draft", tolerance)
        accelerated = accelerate(model_of(case), policy=Fixed(plan_of(case, FORECASTS["delta"])), quality="draft")
        assert torch.isfinite(sample(accelerated, case, steps=STEPS)).all()
        run = last_run(accelerated)
        assert run["warnings"] == []
        found.append(reused_steps(run))
    assert found == [[], [5, 6, 9]], "at step 3 one step alone is stored: no error is known"
