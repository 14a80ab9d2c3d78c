"""Guarantees beside guidance nodes and guiders: an extra pass is its own stream, and what they change stays changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from guarantees.composition import check_both_orders, in_force, restated, sigmas_of
from harness import STEPS, accelerate, assert_close, distance, last_run, model_of, reused_steps
from tiny import CASES, Case, sample, split_calls
from torch import Tensor

sd3, flux = CASES["sd3"], CASES["flux"]
Node = Callable[[ModelPatcher], ModelPatcher]


def _rescale(model: ModelPatcher) -> ModelPatcher:
    from comfy_extras.nodes_model_advanced import RescaleCFG

    return RescaleCFG().patch(model, 0.7)[0]


def _linear(model: ModelPatcher) -> ModelPatcher:
    from comfy_extras.nodes_video_model import VideoLinearCFGGuidance

    return VideoLinearCFGGuidance().patch(model, 1.0)[0]


def node(module: str, name: str, *values: Any, **named: Any) -> Node:
    """A node of comfy_extras with the values of its widgets."""
    def patched(model: ModelPatcher) -> ModelPatcher:
        found = getattr(pytest.importorskip(f"comfy_extras.{module}"), name)
        known = {widget.id for widget in found.define_schema().inputs}
        if not named.keys() <= known:
            pytest.skip(f"{name} of this release of the host has no {', '.join(named.keys() - known)}")
        return found.execute(model, *values, **named).result[0]

    return patched


ONE_CALL = {
    "rescale": _rescale,
    "linear": _linear,
    "zero_star": node("nodes_cfg", "CFGZeroStar"),
    "norm": node("nodes_cfg", "CFGNorm", 1.0),
    "norm_before": node("nodes_cfg", "CFGNorm", 1.0, pre_cfg=True),
    "mahiro": node("nodes_mahiro", "Mahiro"),
    "apg": node("nodes_apg", "APG", 0.5, 5.0, -0.5),
    "tangential": node("nodes_tcfg", "TCFG"),
    "fresca": node("nodes_fresca", "FreSca", 1.0, 1.5, 1),
    "epsilon": node("nodes_eps", "EpsilonScaling", 1.05),
    "temporal_score": node("nodes_eps", "TemporalScoreRescaling", 0.9, 1.0),
}


@pytest.mark.parametrize("name", ONE_CALL)
def test_guidance_without_an_extra_pass_acts_on_reused_steps(name: str) -> None:
    check_both_orders(sd3, model_of(sd3), ONE_CALL[name])


def test_normalized_attention_guidance_acts_in_the_blocks_that_run() -> None:
    check_both_orders(flux, model_of(flux), node("nodes_nag", "NAGuidance", 4.0, 0.5, 2.0))


def _perp_neg(model: ModelPatcher) -> ModelPatcher:
    return node("nodes_perpneg", "PerpNeg", sd3.conds(model, seed=5)[0], 1.0)(model)


@pytest.mark.parametrize("patch", [
    node("nodes_slg", "SkipLayerGuidanceDiTSimple", 0.0, 1.0, "2", ""),
    node("nodes_sd3", "SkipLayerGuidanceSD3", "2, 7", 2.0, 0.0, 1.0),
    _perp_neg,
], ids=["slg_simple", "slg_sd3", "perp_neg"])
@pytest.mark.parametrize("forecast", ["hold", "taylor"])
def test_guidance_with_an_extra_pass_keeps_it_apart(patch: Node, forecast: str) -> None:
    check_both_orders(sd3, model_of(sd3), patch, forecast=forecast, calls=2)


def test_an_extra_pass_that_changes_nothing_still_changes_nothing() -> None:
    """PerturbedAttentionGuidance acts on U-Nets; here its pass equals the prompt's own, and their difference is zero."""
    guided = node("nodes_pag", "PerturbedAttentionGuidance", 3.0)
    model = model_of(sd3)
    expected = sample(accelerate(model, forecast="taylor"), sd3, steps=STEPS)
    for accelerated in (accelerate(guided(model), forecast="taylor"), guided(accelerate(model, forecast="taylor"))):
        assert_close(expected, sample(accelerated, sd3, steps=STEPS))
        assert (last_run(accelerated)["calls"], last_run(accelerated)["reused_calls"]) == ([2] * STEPS, 6)


@pytest.mark.parametrize("percent", [(0.0, 0.56), (0.56, 1.0)], ids=["ends", "begins"])
@pytest.mark.parametrize("name", ["SkipLayerGuidanceDiTSimple", "SkipLayerGuidanceDiT"])
def test_a_pass_that_begins_or_ends_in_mid_group_takes_nothing_of_another(name: str, percent: tuple[float, float]) -> None:
    simple = name.endswith("Simple")  # it changes the negative prompt's pass; the other adds a third
    named = {"start_percent": percent[0], "end_percent": percent[1], "double_layers": "2", "single_layers": ""}
    model = node("nodes_slg", name, **named, **({} if simple else {"scale": 2.0}))(model_of(sd3))
    skips = in_force(model, percent)

    def streams(step: int, call: int) -> object:  # the host runs the negative prompt first, the simple node last
        swapped = simple and skips(step, call) == (call, True)
        return (("positive", "skipping") if swapped else ("negative", "positive", "third"))[call - 1]

    accelerated = accelerate(model, group_size=4, forecast="delta")
    with split_calls():
        expected = restated(sd3, model, forecast="delta", group_size=4, streams=streams)
        assert_close(expected, sample(accelerated, sd3, steps=STEPS))
    run = last_run(accelerated)
    new = 0 if percent[0] == 0.0 and not simple else 1
    assert sum(run["fallbacks"].values()) == new
    assert run["reused_calls"] == sum(run["calls"][step] for step in (4, 5, 6, 8)) - new
    assert distance(expected, sample(model, sd3, steps=STEPS)) > 1e-3


def sampled(guider: Any, model: ModelPatcher, case: Case, callback: Any, mask: Tensor | None = None) -> Tensor:
    latent = case.latent()
    return guider.sample(comfy.sample.prepare_noise(latent, 0), latent, comfy.samplers.sampler_object("euler"),
                         sigmas_of(model), denoise_mask=mask, callback=callback, disable_pbar=True, seed=0)


def three_prompts(kind: str) -> Callable[..., Tensor]:
    def run(model: ModelPatcher, case: Case, *, steps: int, callback: Any = None) -> Tensor:
        from comfy_extras.nodes_custom_sampler import DualCFGGuider
        from comfy_extras.nodes_perpneg import PerpNegGuider

        (one, negative), other = case.conds(model), case.conds(model, seed=4)[0]
        if kind == "perp_neg":
            guider = PerpNegGuider.execute(model, one, negative, other, 4.0, 0.8).result[0]
        else:
            longer = [[torch.cat([other[0][0]] * 2, 1), other[0][1]]]
            guider = DualCFGGuider.execute(model, one, longer, negative, 3.0, 2.0, kind).result[0]
        return sampled(guider, model, case, callback)

    return run


@pytest.mark.parametrize("kind", ["regular", "nested", "perp_neg"])
@pytest.mark.parametrize("forecast", ["hold", "taylor"])
def test_guiders_with_three_prompts_reuse_each_of_them(kind: str, forecast: str) -> None:
    model, run = model_of(sd3), three_prompts(kind)
    expected = restated(sd3, model, forecast=forecast, run=run)
    accelerated = accelerate(model, forecast=forecast)
    assert_close(expected, run(accelerated, sd3, steps=STEPS))
    record = last_run(accelerated)
    assert (reused_steps(record), record["fallbacks"]) == ([4, 6, 8], {})
    assert record["calls"] == [1 if kind == "perp_neg" else 2] * STEPS
    assert distance(expected, run(model, sd3, steps=STEPS)) > 1e-3


def test_a_mask_of_what_is_to_change_reuses_under_differential_diffusion() -> None:
    from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

    def patched(model: ModelPatcher) -> ModelPatcher:
        return DifferentialDiffusion.execute(model).result[0]

    def run(model: ModelPatcher, case: Case, *, steps: int, callback: Any = None) -> Tensor:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(*case.conds(model))
        guider.set_cfg(3.0)
        return sampled(guider, model, case, callback, torch.linspace(0, 1, 8).expand(1, 8, 8))

    model = model_of(sd3)
    expected = restated(sd3, patched(model), run=run)
    for accelerated in (patched(accelerate(model, forecast="taylor")), accelerate(patched(model), forecast="taylor")):
        assert_close(expected, run(accelerated, sd3, steps=STEPS))
        assert reused_steps(last_run(accelerated)) == [4, 6, 8]
    assert distance(expected, run(patched(model), sd3, steps=STEPS)) > 1e-3
    assert distance(expected, restated(sd3, model, run=run)) > 1e-3


def with_pass(model: ModelPatcher, factor: float, until: float) -> ModelPatcher:
    def post_cfg(args: dict[str, Any]) -> Tensor:
        if float(args["sigma"][0]) < until:
            return args["denoised"]
        (other,) = comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], factor * args["input"], args["sigma"], args["model_options"])
        return args["denoised"] + (args["cond_denoised"] - other)

    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(post_cfg)
    return clone


@pytest.mark.parametrize("forecast", ["hold", "delta"])
def test_an_extra_pass_that_ends_leaves_the_next_one_its_own(forecast: str) -> None:
    """Two nodes run the prompt once more and change no options; the first ends in mid-group, and the second moves up."""
    model = model_of(sd3)
    ends = float(sigmas_of(model)[5]) + 1e-3  # in the group (3, 4, 5, 6)
    both = with_pass(with_pass(model, 0.5, ends), 1.5, -1.0)

    def streams(step: int, call: int) -> object:
        return ("prompts", "first", "second")[call - 1] if step < 5 else ("prompts", "second")[call - 1]

    expected = restated(sd3, both, forecast=forecast, group_size=4, streams=streams)
    assert_close(expected, sample(accelerate(both, forecast=forecast, group_size=4), sd3, steps=STEPS))


@pytest.mark.parametrize("forecast", ["hold", "taylor"])
def test_a_wrapper_that_evaluates_twice_gets_two_streams_in_both_orders(forecast: str) -> None:
    def twice(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        once = executor(x, *args, **kwargs)
        return once + 0.5 * (once - executor(0.5 * x, *args, **kwargs))

    def patched(model: ModelPatcher) -> ModelPatcher:
        clone = model.clone()
        clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "twice", twice)
        return clone

    check_both_orders(sd3, model_of(sd3), patched, forecast=forecast, calls=2)


class Nesting(comfy.samplers.CFGGuider):
    """Asks itself once more in the middle of an evaluation."""

    nested = False

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = None, seed: int | None = None) -> Tensor:
        def once(factor: float) -> Tensor:
            prompt = [self.conds["positive"]]
            return comfy.samplers.calc_cond_batch(self.inner_model, prompt, factor * x, timestep, model_options)[0]

        cond = once(1.0)
        if self.nested:
            return cond
        self.nested = True
        other = self(0.5 * x, timestep, model_options=model_options, seed=seed)
        self.nested = False
        return cond + 0.3 * (cond - other) + 0.3 * (cond - once(1.5))


@pytest.mark.parametrize("forecast", ["hold", "delta"])
def test_a_guider_that_evaluates_inside_an_evaluation_keeps_its_streams_apart(forecast: str) -> None:
    def run(model: ModelPatcher, case: Case, *, steps: int, callback: Any = None) -> Tensor:
        guider = Nesting(model)
        guider.set_conds(*case.conds(model))
        guider.set_cfg(1.0)
        return sampled(guider, model, case, callback)

    model = model_of(sd3)
    accelerated = accelerate(model, forecast=forecast)
    expected = restated(sd3, model, forecast=forecast, run=run, streams=lambda step, call: call)
    assert_close(expected, run(accelerated, sd3, steps=STEPS))
    assert (last_run(accelerated)["evaluations"], last_run(accelerated)["reused_calls"]) == (STEPS, 9)


def test_what_a_guidance_function_keeps_in_the_options_stays_from_step_to_step() -> None:
    def count(args: dict[str, Any]) -> Tensor:
        options = args["model_options"]
        counts.append(options.get("count", 0) + 1)
        options["count"] = counts[-1]
        return args["denoised"]

    model = model_of(sd3).clone()
    model.set_model_sampler_post_cfg_function(count)
    for patched in (model, accelerate(model)):
        counts: list[int] = []
        sample(patched, sd3, steps=5)
        assert counts == [1, 2, 3, 4, 5]


def test_a_pass_that_shifts_the_numbers_of_the_next_costs_one_evaluation() -> None:
    """Two passes of one function cannot be told apart by name; when the first ends, the other moves up."""
    model = model_of(sd3)
    ends = float(sigmas_of(model)[5]) + 1e-3

    def both(args: dict[str, Any]) -> Tensor:
        def once(factor: float) -> Tensor:
            return comfy.samplers.calc_cond_batch(
                args["model"], [args["cond"]], factor * args["input"], args["sigma"], args["model_options"])[0]

        first = once(0.5) if float(args["sigma"][0]) >= ends else 0
        return args["denoised"] + 0.1 * (first + once(1.5))

    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(both)
    accelerated = accelerate(patched, group_size=6)
    sample(accelerated, sd3, steps=STEPS)
    run = last_run(accelerated)
    assert run["decisions"][3:] == ["cache", "reuse", "reuse", "cache", "reuse", "reuse", "compute"]
    assert sum(run["fallbacks"].values()) == 2
