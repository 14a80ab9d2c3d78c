"""Invariant 7: streams never cross."""

from __future__ import annotations

import inspect
from typing import Any

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.model_patcher import ModelPatcher, set_model_options_patch_replace
from contract.reference import Reference, plan
from harness import STEPS, accelerate, assert_close, distance, every_family, last_run, model_of, reused_steps
from tiny import CASES, Case, count_calls, sample, split_calls
from torch import Tensor


@pytest.mark.smoke
@every_family
def test_batched_and_split_conditionings_agree(case: Case) -> None:
    accelerated = accelerate(model_of(case), forecast="taylor")
    whole = sample(accelerated, case, steps=STEPS)
    with split_calls():
        split = sample(accelerated, case, steps=STEPS)
    assert_close(whole, split, 1e-3)
    run = last_run(accelerated)
    assert run["calls"] == [2] * STEPS
    assert (run["reused_calls"], run["fallbacks"]) == (6, {})


@every_family
@pytest.mark.parametrize("at", [3, 5], ids=["cache split reuse whole", "mid-run"])
def test_a_split_that_starts_or_ends_in_mid_run_still_reuses(case: Case, at: int) -> None:
    accelerated = accelerate(model_of(case), forecast="delta", group_size=4)
    whole = sample(accelerated, case, steps=STEPS)
    context = split_calls()

    def switch(step: int, *_: Any) -> None:
        if step == at - 1:
            context.__enter__()
        elif step == at:
            context.__exit__(None, None, None)

    mixed = sample(accelerated, case, steps=STEPS, callback=switch)
    run = last_run(accelerated)
    assert run["calls"] == [2 if step == at else case.calls() for step in range(STEPS)]
    if case.separable or not case.together:
        assert_close(whole, mixed, 1e-3)
        assert run["fallbacks"] == {}
        assert run["decisions"].count("reuse") == 4
    else:  # a call of another make-up is another stream: computed, never guessed
        assert torch.isfinite(mixed).all()
        assert sum(run["fallbacks"].values()) > 0
        assert run["reused_calls"] > 0


@pytest.mark.smoke
def test_conditionings_of_different_length_reuse_their_own() -> None:
    case = CASES["flux"]
    accelerated = accelerate(model_of(case))
    positive, negative = case.conds(accelerated)
    longer = [[torch.cat([negative[0][0], negative[0][0]], 1), negative[0][1]]]
    sample(accelerated, case, steps=STEPS, conds=(positive, longer))
    assert last_run(accelerated)["reused_calls"] == 6
    assert last_run(accelerated)["fallbacks"] == {}


def test_a_batch_gives_each_row_what_it_gets_alone() -> None:
    case = CASES["sd3"]
    accelerated = accelerate(model_of(case), forecast="taylor")
    latents, conds = case.latent(3), case.conds(accelerated)
    together = run_rows(accelerated, case, latents, conds)
    for row in range(3):
        assert_close(run_rows(accelerated, case, latents[row:row + 1], conds), together[row:row + 1], 1e-3)
    assert distance(together[:1], together[1:2]) > 1e-2


def run_rows(model: ModelPatcher, case: Case, latents: Tensor, conds: Any) -> Tensor:
    """Without noise, so that every row starts from its own latent whatever the batch."""
    return sample(model, case, steps=2 * STEPS, start_step=STEPS, latent=latents, batch=len(latents), conds=conds,
                  disable_noise=True)


@pytest.mark.smoke
def test_area_conditioning_that_shares_a_uuid_across_cond_and_uncond_stays_apart() -> None:
    case = CASES["sd3"]
    model = model_of(case)
    positive, negative = case.conds(model)
    areas = [[positive[0][0], {**positive[0][1], "area": (8, 8, 0, 0)}],
             [case.conds(model, seed=3)[0][0][0], {**positive[0][1], "area": (8, 4, 0, 4)}]]
    conds = (areas, negative)
    accelerated = accelerate(model, forecast="delta")
    whole = sample(accelerated, case, steps=STEPS, conds=conds)
    with split_calls():
        split = sample(accelerated, case, steps=STEPS, conds=conds)
    assert_close(whole, split, 1e-3)
    for at in (3, 4):  # the order of the regions differs between one call and several
        context = split_calls()

        def switch(step: int, *_: Any, at: int = at, context: Any = context) -> None:
            if step == at - 1:
                context.__enter__()
            elif step == at:
                context.__exit__(None, None, None)

        mixed = accelerate(model, forecast="delta")
        assert_close(whole, sample(mixed, case, steps=STEPS, conds=conds, callback=switch), 1e-3)
        assert last_run(mixed)["reused_steps"] == 3
    run = last_run(accelerated)
    assert run["calls"][0] >= 4
    assert run["reused_calls"] == 3 * run["calls"][0]
    full = sample(model, case, steps=STEPS, conds=conds)
    assert distance(full, whole) < 0.2, "a region with another region's feature is far off"


def guided(model: ModelPatcher, scale: float, layer: int | None) -> ModelPatcher:
    """An extra pass at the same sigma, as SkipLayerGuidance (nodes_slg.py) or, without a layer, as SAG do it."""
    def post_cfg(args: dict[str, Any]) -> Tensor:
        options = args["model_options"].copy()
        x = args["input"]
        if layer is None:
            x = 0.9 * x
        else:
            options = set_model_options_patch_replace(options, lambda a, extra: a, "dit", "double_block", layer)
        (other,) = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], x, args["sigma"], options)
        return args["denoised"] + scale * (args["cond_denoised"] - other)

    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(post_cfg)
    return clone


@pytest.mark.smoke
@pytest.mark.parametrize("layer", [None, 1, 3], ids=["sag", "slg_1", "slg_3"])
@pytest.mark.parametrize("forecast", ["hold", "taylor"])
def test_an_extra_guidance_pass_is_its_own_stream(layer: int | None, forecast: str) -> None:
    case = CASES["sd3"]
    model = model_of(case)
    with_guidance = accelerate(guided(model, 2.0, layer), forecast=forecast)
    found = sample(with_guidance, case, steps=STEPS)
    run = last_run(with_guidance)
    assert (run["calls"], run["reused_calls"], run["fallbacks"]) == ([2] * STEPS, 6, {})
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
    reference = Reference(case, forecast, 5, sigmas, plan(STEPS, 0.25, 1.0, 2))
    with reference.watch(model):
        expected = sample(guided(model, 2.0, layer), case, steps=STEPS, callback=reference.callback)
    assert_close(found, expected)
    assert distance(expected, sample(accelerate(model, forecast=forecast), case, steps=STEPS)) > 1e-2
    with split_calls():
        assert_close(found, sample(with_guidance, case, steps=STEPS), 1e-3)


@pytest.mark.smoke
@pytest.mark.parametrize("schedule", ["standard_static", "standard_uniform", "batched"])
def test_context_windows_are_streams_of_their_own(schedule: str) -> None:
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    case = CASES["wan_t2v"]
    latent = torch.cat([case.latent(seed=seed) for seed in range(3)], 2)  # nine frames
    fix = "causal_window_fix"  # on by default where the host has it
    plain = {fix: False} if fix in inspect.signature(ContextWindowsManualNode.execute).parameters else {}

    def in_windows(model: ModelPatcher) -> ModelPatcher:
        return ContextWindowsManualNode.execute(
            model, context_length=4, context_overlap=1, context_schedule=schedule, context_stride=1,
            closed_loop=False, fuse_method="pyramid", dim=2, freenoise=False, **plain).result[0]

    windowed = in_windows(model_of(case))
    accelerated = accelerate(windowed, forecast="delta")
    found = sample(accelerated, case, steps=STEPS, latent=latent)
    run = last_run(accelerated)
    assert min(run["calls"]) >= 3
    assert run["reused_calls"] > 0
    if schedule != "standard_uniform":  # that one drifts: windows unseen in the group compute
        assert run["fallbacks"] == {}
        assert run["reused_calls"] == sum(run["calls"][step] for step in (4, 6, 8))
    full = sample(windowed, case, steps=STEPS, latent=latent)
    other = sample(accelerate(windowed, group_size=1), case, steps=STEPS, latent=latent)
    assert torch.equal(full, other)
    assert distance(full, found) < 0.2
    for settings, expected in (({"forecast": "delta"}, found), ({"enabled": False}, full)):
        behind = in_windows(accelerate(model_of(case), **settings))
        assert torch.equal(sample(behind, case, steps=STEPS, latent=latent), expected)


def dual(model: ModelPatcher, negative: ModelPatcher, case: Case) -> Tensor:
    from comfy_extras.nodes_custom_sampler import Guider_DualModel

    guider = Guider_DualModel(model, negative)
    guider.set_conds(*case.conds(model))
    guider.set_cfg(3.0)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
    latent = case.latent()
    return guider.sample(comfy.sample.prepare_noise(latent, 0), latent, comfy.samplers.sampler_object("euler"), sigmas,
                         disable_pbar=True, seed=0)


def test_two_models_in_one_run_keep_their_features_apart() -> None:
    case = CASES["sd3"]
    model, other = model_of(case), case.build(seed=1)
    full = dual(model, other, case)
    accelerated = accelerate(model, forecast="delta")
    blocks = case.blocks(other.model.diffusion_model)
    with count_calls(blocks) as counts:
        found = dual(accelerated, other, case)
    run = last_run(accelerated)
    assert reused_steps(run) == [4, 6, 8]
    assert run["reused_calls"] == 6
    assert counts[0] == 7
    assert counts[-1] == 10
    assert distance(full, found) < 0.5 * distance(full, dual(model, model.clone(), case))
    assert torch.equal(dual(accelerated, other, case), found)


@pytest.mark.smoke
def test_whatever_tells_two_streams_apart_is_in_their_key() -> None:
    """Occurrence numbers hide most mix-ups; they shift where one of two guidance nodes ends or windows drift."""
    from comfy.context_windows import IndexListContextWindow

    from blockdance_core.host.identity import streams

    plain: dict[str, Any] = {"uuids": ["a"], "cond_or_uncond": [0]}
    options = [
        plain,
        {**plain, "uuids": ["b"]},
        {**plain, "cond_or_uncond": [1]},
        {**plain, "context_window": IndexListContextWindow([0, 1, 2], dim=2, total_frames=9)},
        {**plain, "context_window": IndexListContextWindow([1, 2, 3], dim=2, total_frames=9)},
        {**plain, "patches": {"attn1_patch": [len]}},
        {**plain, "patches_replace": {"dit": {("double_block", 2): len}}},
        {**plain, "patches_replace": {"dit": {("double_block", 3): len}}},
        {**plain, "patches_replace": {"attn1": {("middle", 0): len}}},
    ]
    assert len({streams(plain, "guidance"), *(streams(option) for option in options)}) == len(options) + 1
    assert streams({**plain, "patches": {"attn1_patch": []}, "patches_replace": {"dit": {}}}) == streams(plain)
    assert streams({"uuids": ["a", "b"], "cond_or_uncond": [1, 0]}) == (
        *streams({"uuids": ["a"], "cond_or_uncond": [1]}), *streams({"uuids": ["b"], "cond_or_uncond": [0]}))
    assert streams({}) == ()
