"""Guarantees for conditionings: control, areas, masks, ranges, scheduled LoRA hooks, references, context windows."""

from __future__ import annotations

import functools
from typing import Any

import comfy.hooks
import comfy.samplers
import pytest
import torch
from comfy.controlnet import ControlBase
from comfy.model_patcher import ModelPatcher
from guarantees.composition import Streams, in_force, lora_of, restated, sigmas_of
from harness import STEPS, accelerate, assert_close, distance, last_run, model_of, reused_steps
from tiny import CASES, Case, Conditioning, fake_control, sample, split_calls
from tiny.case import normal

from blockdance_core.host.identity import active_controls

sd3, flux = CASES["sd3"], CASES["flux"]
Pair = tuple[Conditioning, Conditioning]
IMAGE = torch.zeros(1, 64, 96, 3)


def controlled(conds: Pair, case: Case, seed: int, start: float, end: float, strength: float = 1.0) -> Pair:
    import nodes

    return nodes.ControlNetApplyAdvanced().apply_controlnet(*conds, fake_control(case, seed=seed), IMAGE, strength,
                                                            start, end)


def check(case: Case, model: ModelPatcher, conds: Pair, streams: Streams, forecast: str) -> dict[str, Any]:
    """Equal to the restatement in groups of four, in which something changes."""
    expected = restated(case, model, forecast=forecast, group_size=4, streams=streams, conds=conds)
    accelerated = accelerate(model, group_size=4, forecast=forecast)
    assert_close(expected, sample(accelerated, case, steps=STEPS, conds=conds))
    assert distance(expected, sample(model, case, steps=STEPS, conds=conds)) > 1e-3
    return last_run(accelerated)


CONTROLLED = [case for case in (CASES.get(name) for name in ("sd3", "flux", "qwen_image")) if case is not None]


@pytest.mark.parametrize("forecast", ["hold", "taylor"])
@pytest.mark.parametrize("case", CONTROLLED, ids=lambda case: case.name)
def test_control_that_takes_over_from_another_of_equal_shapes_drops_the_cache(case: Case, forecast: str) -> None:
    model, ranges = model_of(case), ((0.0, 0.56), (0.56, 1.0))
    conds = case.conds(model)
    for seed, (start, end) in enumerate(ranges):
        conds = controlled(conds, case, seed, start, end)
    streams = in_force(model, *ranges)
    run = check(case, model, conds, streams, forecast)
    changes = [step for step in range(4, STEPS - 1) if streams(step, 1) != streams(step - 1, 1)]
    assert len(changes) == 1
    assert changes[0] not in (3, 7), "in the middle of a group"
    assert run["decisions"][changes[0]] == "cache"
    assert list(run["fallbacks"].values()) == [1]


@pytest.mark.parametrize("case", CONTROLLED, ids=lambda case: case.name)
def test_two_chained_controls_with_ranges_of_their_own(case: Case) -> None:
    model, ranges = model_of(case), ((0.1, 0.8), (0.3, 0.52))
    conds = case.conds(model)
    for seed, (start, end) in enumerate(ranges):
        conds = controlled(conds, case, seed, start, end, strength=0.6)
    for forecast in ("hold", "delta", "taylor"):
        run = check(case, model, conds, in_force(model, *ranges), forecast)
        assert run["reused_calls"] > 0


@pytest.mark.parametrize("case", [sd3, flux, CASES["pixart_sigma"]], ids=lambda case: case.name)
def test_a_control_is_in_force_exactly_where_the_host_says_so(case: Case) -> None:
    """Ranges that end exactly at a step are usual; the host compares in float32."""
    model = model_of(case)
    control = ControlBase()
    for sigma in sigmas_of(model)[:-1]:
        for share in (k / 20 for k in range(21)):
            for control.timestep_percent_range in ((0.0, share), (share, 1.0)):
                control.pre_run(model.model, model.get_model_object("model_sampling").percent_to_sigma)
                start, end = control.timestep_range
                ours = active_controls({"positive": [{"control": control}], "negative": [{}]}, float(sigma))
                assert bool(ours) == (not (sigma > start or sigma < end))  # as in ControlNet.get_control


def flux_controlnet(model: ModelPatcher) -> Any:
    """A ControlNet of the host's own, with a network, smaller than the tiny model."""
    from comfy.controlnet import ControlNet
    from comfy.ldm.flux.controlnet import ControlNetFlux
    from comfy.ops import disable_weight_init
    from tiny.case import initialise

    config = {**model.model.model_config.unet_config, "dtype": torch.float32, "depth": 2, "depth_single_blocks": 1}
    network = ControlNetFlux(operations=disable_weight_init, device="cpu", **config)
    initialise(network, 0)
    return ControlNet(network, load_device=torch.device("cpu"), extra_conds=["y", "guidance"])


@pytest.mark.parametrize("forecast", ["hold", "taylor"])
def test_a_real_controlnet_that_stops_in_the_window(forecast: str) -> None:
    import nodes

    model = model_of(flux)
    image = normal((1, 64, 96, 3), "hint", 0).sigmoid()
    network = flux_controlnet(model)
    conds = nodes.ControlNetApplyAdvanced().apply_controlnet(*flux.conds(model), network, image, 0.8, 0.0, 0.56)
    run = check(flux, model, conds, in_force(model, (0.0, 0.56)), forecast)
    assert list(run["fallbacks"].values()) == [1]
    full = sample(model, flux, steps=STEPS, conds=conds)
    found = sample(accelerate(model, forecast=forecast), flux, steps=STEPS, conds=conds)
    assert distance(full, found) < 0.5 * distance(full, sample(model, flux, steps=STEPS))


def ranged(conditioning: Conditioning, start: float, end: float) -> Conditioning:
    import nodes

    return nodes.ConditioningSetTimestepRange().set_range(conditioning, start, end)[0]


def combined(*conditionings: Conditioning) -> Conditioning:
    import nodes

    return functools.reduce(lambda one, other: nodes.ConditioningCombine().combine(one, other)[0], conditionings)


@pytest.mark.parametrize("name", ["wan_vace", "flux"])
@pytest.mark.parametrize("forecast", ["hold", "delta"])
def test_a_conditioning_that_takes_over_in_mid_group_computes_once(name: str, forecast: str) -> None:
    """With VACE: the control video ends, or rather another takes its place."""
    case = CASES[name]
    model, ranges = model_of(case), ((0.0, 0.56), (0.56, 1.0))
    first, second = case.conds(model), case.conds(model, seed=1)
    if name == "wan_vace":
        second[0][0][1]["vace_strength"] = second[1][0][1]["vace_strength"] = [0.0, 0.0]
    conds = (combined(*(ranged(pair[0], *part) for pair, part in zip((first, second), ranges, strict=True))),
             combined(*(ranged(pair[1], *part) for pair, part in zip((first, second), ranges, strict=True))))
    run = check(case, model, conds, in_force(model, *ranges), forecast)
    assert list(run["fallbacks"].values()) == [1]


def with_mask(conditioning: Conditioning, columns: slice, bounds: str, strength: float = 1.0) -> Conditioning:
    import nodes

    mask = torch.zeros(1, 64, 64)
    mask[:, :, columns] = 1
    return nodes.ConditioningSetMask().append(conditioning, mask, bounds, strength)[0]


def in_area(conditioning: Conditioning, width: int, x: int) -> Conditioning:
    import nodes

    return nodes.ConditioningSetArea().append(conditioning, width, 64, x, 0, 0.8)[0]


def longer(conditioning: Conditioning, times: int) -> Conditioning:
    return [[torch.cat([text] * times, 1), extras] for text, extras in conditioning]


def region_graphs(model: ModelPatcher) -> dict[str, Pair]:
    one, two, negative = sd3.conds(model)[0], sd3.conds(model, seed=3)[0], sd3.conds(model)[1]
    return {
        "masks": (combined(with_mask(one, slice(0, 40), "default"), with_mask(two, slice(24, 64), "default", 0.7)), negative),
        "mask bounds": (combined(one, with_mask(two, slice(32, 64), "mask bounds")), negative),
        "areas": (combined(one, in_area(two, 32, 0), in_area(longer(one, 2), 32, 32)), negative),
        "lengths": (combined(one, longer(two, 2), longer(one, 3)), longer(negative, 2)),
    }


@pytest.mark.parametrize("graph", ["masks", "mask bounds", "areas", "lengths"])
def test_regions_and_combined_prompts_of_any_length_reuse_their_own(graph: str) -> None:
    model = model_of(sd3)
    conds = region_graphs(model)[graph]
    expected = restated(sd3, model, conds=conds)
    accelerated = accelerate(model, forecast="taylor")
    assert_close(expected, sample(accelerated, sd3, steps=STEPS, conds=conds))
    run = last_run(accelerated)
    assert (reused_steps(run), run["fallbacks"]) == ([4, 6, 8], {})
    assert run["reused_calls"] == 3 * run["calls"][0]
    with split_calls():
        assert_close(expected, sample(accelerated, sd3, steps=STEPS, conds=conds), 1e-3)
    assert last_run(accelerated)["fallbacks"] == {}
    assert distance(expected, sample(model, sd3, steps=STEPS, conds=conds)) > 1e-3


def test_a_region_that_begins_in_mid_group_computes_and_leaves_the_others_alone() -> None:
    model = model_of(sd3)
    positive, negative = sd3.conds(model)
    late = ranged(in_area(longer(sd3.conds(model, seed=3)[0], 2), 32, 32), 0.56, 1.0)
    conds = (combined(positive, late), negative)
    accelerated = accelerate(model, group_size=4, forecast="delta")
    found = sample(accelerated, sd3, steps=STEPS, conds=conds)
    run = last_run(accelerated)
    begins = run["calls"].index(max(run["calls"]))
    assert begins in (5, 6)
    new = run["calls"][begins] - run["calls"][0]
    assert run["decisions"][begins] == "mixed"
    assert sum(run["fallbacks"].values()) == new
    assert run["reused_calls"] == sum(run["calls"][step] for step in (4, 5, 6, 8)) - new
    assert distance(sample(model, sd3, steps=STEPS, conds=conds), found) < 0.3


def scheduled_lora(model: ModelPatcher, *keyframes: tuple[float, float]) -> comfy.hooks.HookGroup:
    """A LoRA hook whose strength is given by (strength, start) keyframes, as the nodes make it."""
    from comfy_extras.nodes_hooks import CreateHookKeyframe, SetHookKeyframes

    hooks, frames = comfy.hooks.create_hook_lora(lora_of(model, 0.4), 1.0, 0.0), None
    for strength, start in keyframes:
        (frames,) = CreateHookKeyframe().create_hook_keyframe(strength, start, frames)
    return SetHookKeyframes().set_hook_keyframes(hooks, frames)[0]


def hooked(conditioning: Conditioning, hooks: comfy.hooks.HookGroup) -> Conditioning:
    from comfy_extras.nodes_hooks import ConditioningSetProperties

    return ConditioningSetProperties().set_properties(conditioning, 1.0, "default", hooks=hooks)[0]


@pytest.mark.parametrize("forecast", ["hold", "taylor"])
def test_a_lora_hook_that_changes_in_mid_group_drops_the_cache(forecast: str) -> None:
    model = sd3.build()
    hooks = scheduled_lora(model, (1.0, 0.0), (0.2, 0.56))
    positive, negative = sd3.conds(model)
    conds = (hooked(positive, hooks), hooked(negative, hooks))
    run = check(sd3, model, conds, in_force(model, (0.56, 1.0)), forecast)
    assert list(run["fallbacks"].values()) == [1]
    assert "cache" in run["decisions"][5:7]
    constant = scheduled_lora(model, (0.7, 0.0))
    conds = (hooked(positive, constant), hooked(negative, constant))
    run = check(sd3, model, conds, lambda _, call: call, forecast)
    assert (reused_steps(run), run["fallbacks"]) == ([4, 5, 6, 8], {})


def test_a_lora_hook_on_one_prompt_leaves_the_other_one_its_features() -> None:
    model = sd3.build()
    full = sample(model, sd3, steps=STEPS)
    positive, negative = sd3.conds(model)
    conds = (hooked(positive, scheduled_lora(model, (1.0, 0.0), (0.2, 0.56))), negative)
    weaker = in_force(model, (0.56, 1.0))
    expected = restated(sd3, model, forecast="delta", group_size=4, conds=conds,
                        streams=lambda step, call: weaker(step, call) if call == 1 else call)  # the prompt's is the first
    accelerated = accelerate(model, group_size=4, forecast="delta")
    found = sample(accelerated, sd3, steps=STEPS, conds=conds)
    run = last_run(accelerated)
    assert run["calls"] == [2] * STEPS
    assert (run["reused_calls"], list(run["fallbacks"].values())) == (7, [1])
    assert run["decisions"].count("mixed") == 1
    assert_close(expected, found)
    assert torch.equal(sample(model, sd3, steps=STEPS), full), "the hooks left nothing in the weights"


def fading_lora(model: ModelPatcher) -> comfy.hooks.HookGroup:
    """A LoRA hook whose strength is another one at every step."""
    from comfy_extras.nodes_hooks import CreateHookKeyframesInterpolated

    hooks = scheduled_lora(model, (1.0, 0.0))
    (frames,) = CreateHookKeyframesInterpolated().create_hook_keyframes(1.0, 0.0, "linear", 0.0, 1.0, 60)
    hooks.set_keyframes_on_hooks(frames)
    return hooks


def test_a_lora_hook_that_changes_at_every_step_on_one_prompt_soon_computes_the_other_too() -> None:
    model = sd3.build()
    positive, negative = sd3.conds(model)
    accelerated = accelerate(model, forecast="taylor")
    sample(accelerated, sd3, steps=16, conds=(hooked(positive, fading_lora(model)), negative))
    decisions = last_run(accelerated)["decisions"]
    assert decisions.count("mixed") == 1
    assert "reuse" not in decisions
    assert "another call of this step cannot reuse, so none does" in last_run(accelerated)["fallbacks"]


def test_a_lora_hook_that_changes_at_every_step_computes_everything() -> None:
    model = sd3.build()
    hooks = fading_lora(model)
    positive, negative = sd3.conds(model)
    conds = (hooked(positive, hooks), hooked(negative, hooks))
    accelerated = accelerate(model, forecast="taylor")
    found = sample(accelerated, sd3, steps=STEPS, conds=conds)
    assert torch.equal(found, sample(model, sd3, steps=STEPS, conds=conds))
    run = last_run(accelerated)
    assert (run["reused_calls"], sum(run["fallbacks"].values())) == (0, 3)
    assert run["cached_bytes"] <= 4 * run["predicted_bytes"]


REFERENCES = {"flux_guidance": (1, 16, 8, 8), "qwen_image": (1, 16, 1, 8, 8), "flux2": (1, 128, 4, 4)}


@pytest.mark.parametrize("name", REFERENCES)
def test_reference_latents_of_the_node_reuse_all_their_tokens(name: str) -> None:
    from comfy_extras.nodes_edit_model import ReferenceLatent

    case = CASES.get(name)
    if case is None:
        pytest.skip("this release of the host does not have the model")
    model, reference = model_of(case), normal(REFERENCES[name], "reference", 0)
    conds = case.conds(model)
    for _ in range(2):
        conds = tuple(ReferenceLatent.execute(cond, {"samples": reference}).result[0] for cond in conds)
        accelerated = accelerate(model, forecast="taylor")
        found = sample(accelerated, case, steps=STEPS, conds=conds)
        assert_close(found, restated(case, model, conds=conds))
        assert (reused_steps(last_run(accelerated)), last_run(accelerated)["fallbacks"]) == ([4, 6, 8], {})
    assert distance(found, sample(accelerated, case, steps=STEPS)) > 1e-3


def test_references_whose_keys_the_host_caches_leave_after_the_first_evaluation() -> None:
    from comfy_extras import nodes_flux

    case = CASES.get("flux2_references_at_zero")
    if case is None or not hasattr(nodes_flux, "FluxKVCache"):
        pytest.skip("this release of the host does not have it")
    model = case.build()

    def patched(model: ModelPatcher) -> ModelPatcher:
        return nodes_flux.FluxKVCache.execute(model).result[0]

    expected = restated(case, patched(model))
    for accelerated in (accelerate(patched(model), forecast="taylor"), patched(accelerate(model, forecast="taylor"))):
        for _ in range(2):
            assert_close(expected, sample(accelerated, case, steps=STEPS))
            run = last_run(accelerated)
            assert (reused_steps(run), run["fallbacks"]) == ([4, 6, 8], {})
            assert run["cached_bytes"] < run["predicted_bytes"], "the prediction counts the references"


def windowed(model: ModelPatcher, schedule: str, stride: int) -> ModelPatcher:
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    return ContextWindowsManualNode.execute(
        model, context_length=4, context_overlap=1, context_schedule=schedule, context_stride=stride, closed_loop=True,
        fuse_method="pyramid", dim=2, freenoise=False).result[0]


@pytest.mark.parametrize("name", ["wan_t2v", "wan_i2v"])
def test_context_windows_whose_number_changes_reuse_what_they_share(name: str) -> None:
    case = CASES[name]
    model = windowed(model_of(case), "standard_uniform", 2)
    frames = 11
    latent = 0.5 * normal((1, case.latent_shape[0], frames, *case.latent_shape[2:]), "video", 0)
    conds = case.conds(model)
    for (_, extras), key in ((cond[0], key) for cond in conds for key in ("concat_latent_image", "concat_mask")):
        if key in extras:  # of three frames: the image, and emptiness behind it
            extras[key] = torch.cat([extras[key], extras[key][:, :, -1:].expand(-1, -1, frames - 3, -1, -1)], 2)
    full = sample(model, case, steps=STEPS, latent=latent, conds=conds)
    accelerated = accelerate(model, forecast="delta")
    found = sample(accelerated, case, steps=STEPS, latent=latent, conds=conds)
    run = last_run(accelerated)
    assert len(set(run["calls"])) > 1, "the number of windows changes"
    wanted = sum(run["calls"][step] for step in (4, 6, 8))
    assert 0 < run["reused_calls"] == wanted - sum(run["fallbacks"].values())
    assert distance(full, found) < 0.2
    assert torch.equal(found, sample(accelerated, case, steps=STEPS, latent=latent, conds=conds))


def test_drifting_windows_do_not_pile_up_under_a_quality_and_the_report_says_why_nothing_is_reused() -> None:
    case = CASES["wan_t2v"]
    latent = 0.5 * normal((1, case.latent_shape[0], 25, *case.latent_shape[2:]), "video", 0)
    runs = []
    for settings in ({"quality": "off"}, {"quality": "draft"}):
        model = accelerate(windowed(model_of(case), "standard_uniform", 3), preset="auto", group_size=3, **settings)
        sample(model, case, steps=24, latent=latent)
        runs.append(last_run(model))
    plain, guarded = runs
    assert guarded["cached_bytes"] < 2 * guarded["predicted_bytes"], "windows that are gone pile up"
    assert plain["reused_calls"] > 0 == guarded["reused_calls"]
    assert not plain["warnings"]
    assert [text for text in guarded["warnings"] if "conditionings or context windows come and go" in text]


@pytest.mark.skipif("wan_uni3c" not in CASES, reason="this release of the host has no Uni3C")
@pytest.mark.parametrize("percent", [(0.0, 0.56), (0.56, 1.0)], ids=["ends", "begins"])
def test_a_patch_with_a_range_of_its_own_drops_the_cache_where_it_ends(percent: tuple[float, float]) -> None:
    case = CASES["wan_uni3c"]
    model = case.build()
    (patch,) = model.model_options["transformer_options"]["patches"]["double_block"]
    patch.sigma_start, patch.sigma_end = map(model.get_model_object("model_sampling").percent_to_sigma, percent)
    run = check(case, model, case.conds(model), in_force(model, percent), "hold")
    assert list(run["fallbacks"].values()) == [1]
    check(case, model, case.conds(model), in_force(model, percent), "delta")


@pytest.mark.parametrize("forecast", ["hold", "taylor"])
def test_features_of_a_condition_that_is_over_are_dropped(forecast: str) -> None:
    """A LoRA hook whose strength changes at every step: what was stored under the one before is never used again."""
    from comfy_extras.nodes_hooks import CreateHookKeyframesInterpolated

    model = sd3.build()
    hooks = scheduled_lora(model, (1.0, 0.0))
    (frames,) = CreateHookKeyframesInterpolated().create_hook_keyframes(1.0, 0.0, "linear", 0.0, 1.0, 100)
    hooks.set_keyframes_on_hooks(frames)
    positive, negative = sd3.conds(model)
    accelerated = accelerate(model, group_size=8, forecast=forecast)
    sample(accelerated, sd3, steps=40, conds=(hooked(positive, hooks), negative))
    run = last_run(accelerated)
    assert run["cached_bytes"] <= run["predicted_bytes"]
    assert not [reason for reason in run["fallbacks"] if "limit" in reason]
