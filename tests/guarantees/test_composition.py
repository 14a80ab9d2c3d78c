"""Guarantees beside other nodes that change the MODEL: weights, model sampling, wrappers and patches of other packs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import comfy.hooks
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from guarantees.composition import BOUNDARY, check_both_orders, lora_of, sigmas_of
from harness import STEPS, accelerate, assert_close, distance, last_run, model_of, reused_steps
from tiny import CASES, Case, count_calls, sample
from tiny.case import normal
from torch import Tensor

from blockdance_core.streams import NOTHING_STORED

sd3, flux, wan = CASES["sd3"], CASES["flux"], CASES["wan_t2v"]


def with_lora(model: ModelPatcher) -> ModelPatcher:
    return comfy.sd.load_lora_for_models(model, None, lora_of(model), 0.4, 0.0)[0]


def with_bypassed_lora(model: ModelPatcher) -> ModelPatcher:
    """Beside the weights, not in them: the layers' own forward is replaced while the model is loaded."""
    return comfy.sd.load_bypass_lora_for_models(model, None, lora_of(model), 0.4, 0.0)[0]


def with_patches(model: ModelPatcher) -> ModelPatcher:
    clone = model.clone()
    weights = {key: value for key, value in model.model.state_dict().items() if key.endswith("mlp.fc1.weight")}
    patches = {key: (0.2 * normal(value.shape, key, 1),) for key, value in weights.items()}
    assert len(clone.add_patches(patches, 0.3)) == len(patches)
    return clone


def merged(model: ModelPatcher) -> ModelPatcher:
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    return ModelMergeSimple().merge(model, sd3.build(seed=1), 0.7)[0]


def merged_by_blocks(model: ModelPatcher) -> ModelPatcher:
    from comfy_extras.nodes_model_merging_model_specific import ModelMergeSD3_2B

    shares = {"x_embedder.": 1.0, "joint_blocks.2.": 0.4, "joint_blocks.7.": 0.6}
    return ModelMergeSD3_2B().merge(model, sd3.build(seed=1), **shares)[0]


@pytest.mark.parametrize("patch", [with_lora, with_bypassed_lora, with_patches, merged, merged_by_blocks])
def test_changed_weights_before_and_after_the_node(patch: Any) -> None:
    model = sd3.build()
    full = sample(model, sd3, steps=STEPS)
    check_both_orders(sd3, model, patch)
    assert torch.equal(sample(model, sd3, steps=STEPS), full), "the plain model is as it was"


def test_a_merge_is_accelerated_if_its_first_model_is() -> None:
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    model, other = sd3.build(), sd3.build(seed=1)
    plain = ModelMergeSimple().merge(model, other, 0.7)[0]
    first = ModelMergeSimple().merge(accelerate(model), other, 0.7)[0]
    second = ModelMergeSimple().merge(model, accelerate(other), 0.7)[0]
    full = sample(plain, sd3, steps=STEPS)
    assert torch.equal(sample(second, sd3, steps=STEPS), full)
    assert distance(full, sample(first, sd3, steps=STEPS)) > 1e-3
    assert reused_steps(last_run(first)) == [4, 6, 8]


def sampling_node(name: str) -> Any:
    from comfy_extras import nodes_lt, nodes_model_advanced

    def patched(model: ModelPatcher) -> ModelPatcher:
        if name == "sd3":
            return nodes_model_advanced.ModelSamplingSD3().patch(model, 7.0)[0]
        if name == "flux":
            return nodes_model_advanced.ModelSamplingFlux().patch(model, 1.15, 0.5, 2048, 2048)[0]
        if name == "discrete":
            return nodes_model_advanced.ModelSamplingDiscrete().patch(model, "lcm", False)[0]
        if name == "edm":
            return nodes_model_advanced.ModelSamplingContinuousEDM().patch(model, "eps", 30.0, 0.01)[0]
        return nodes_lt.ModelSamplingLTXV.execute(model, 2.05, 0.95).result[0]

    return patched


@pytest.mark.parametrize(("case", "name"), [
    (sd3, "sd3"), (wan, "sd3"), (flux, "flux"), (CASES["pixart_sigma"], "discrete"), (CASES["pixart_sigma"], "edm"),
    (CASES["ltxv"], "ltxv"),
], ids=lambda value: value if isinstance(value, str) else value.name)
def test_the_window_is_that_of_the_sampling_node_before_or_after(case: Case, name: str) -> None:
    model, node = case.build(), sampling_node(name)
    settings = {"window": "noise_level", "start_percent": 0.4, "end_percent": 0.95}
    plain = accelerate(model, **settings)
    sample(plain, case, steps=20)
    found = []
    for accelerated in (node(accelerate(model, **settings)), accelerate(node(model), **settings)):
        schedule = accelerated.get_model_object("model_sampling")
        start, end = (schedule.percent_to_sigma(share) for share in (0.4, 0.95))
        inside = [k for k, sigma in enumerate(sigmas_of(accelerated, 20)[:-1]) if end + 1e-4 < sigma <= start + 1e-4]
        for _ in range(2):
            found.append(sample(accelerated, case, steps=20))
            window = last_run(accelerated)["window"]
            assert (window["first"], window["last"]) == (inside[0], inside[-1])
            assert last_run(accelerated)["reused_steps"] > 0
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert last_run(accelerated)["sigmas"] != last_run(plain)["sigmas"]


BETWEEN_BLOCKS = "wan_uni3c" in CASES  # earlier releases of the host have no patches between the blocks of Wan
KINDS = [value for name, value in vars(WrappersMP).items() if name.isupper()]


def instrumented(model: ModelPatcher, seen: Counter[str]) -> ModelPatcher:
    """Everything that other packs hang on a model, each of which only counts."""
    def counting(kind: str) -> Any:
        def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
            seen[kind] += 1
            return executor(*args, **kwargs)
        return wrapper

    def handing_on(kind: str, result: Any = lambda first: first) -> Any:
        def patch(first: Any = None, *_: Any, **__: Any) -> Any:
            seen[kind] += 1
            return result(first)
        return patch

    def function_wrapper(apply: Any, args: dict[str, Any]) -> Tensor:
        seen["function wrapper"] += 1
        return apply(args["input"], args["timestep"], **args["c"])

    clone = model.clone()
    for kind in KINDS:
        clone.add_wrapper_with_key(kind, "another pack", counting(kind))
    for kind in (CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_CLEANUP, CallbacksMP.ON_PREPARE_STATE):
        clone.add_callback_with_key(kind, "another pack", handing_on(kind))
    clone.set_model_unet_function_wrapper(function_wrapper)
    clone.set_model_sampler_pre_cfg_function(handing_on("pre cfg", lambda args: args["conds_out"]))
    clone.set_model_sampler_post_cfg_function(handing_on("post cfg", lambda args: args["denoised"]))
    clone.set_model_patch(handing_on("double_block"), "double_block")
    clone.set_model_attn1_output_patch(handing_on("attention"))
    return clone


@pytest.mark.parametrize("case", [flux, wan], ids=lambda case: case.name)
def test_wrappers_patches_and_callbacks_of_other_packs_run_as_often_as_without_the_node(case: Case) -> None:
    model, without = model_of(case), Counter[str]()
    full = sample(instrumented(model, without), case, steps=STEPS)
    assert torch.equal(full, sample(model, case, steps=STEPS))
    alone = sample(accelerate(model), case, steps=STEPS)
    assert {without[kind] for kind in (*KINDS, "pre cfg", "post cfg", "function wrapper")} == {1, STEPS}
    assert without[CallbacksMP.ON_PRE_RUN] == without[CallbacksMP.ON_CLEANUP] == 1
    assert without["double_block"] == (STEPS * case.depth if case is wan and BETWEEN_BLOCKS else 0)
    for order in ("before", "after"):
        seen = Counter[str]()
        accelerated = accelerate(instrumented(model, seen)) if order == "before" else instrumented(accelerate(model), seen)
        assert torch.equal(sample(accelerated, case, steps=STEPS), alone)
        assert last_run(accelerated)["reused_calls"] == 3
        skipped = 3 * (BOUNDARY + 1) if case is flux else 0  # Wan's attention has no such patch
        assert seen == without - Counter({"attention": skipped}), order


def test_a_hook_that_wraps_the_model_for_one_prompt_runs_as_often_as_without_the_node() -> None:
    seen = Counter[str]()

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        seen["wrapper"] += 1
        return executor(*args, **kwargs)

    wrappers = {kind: {"another pack": [wrapper]} for kind in (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)}
    hooks = comfy.hooks.HookGroup()
    hooks.add(comfy.hooks.TransformerOptionsHook({"wrappers": wrappers}, comfy.hooks.EnumHookScope.HookedOnly))
    model = model_of(flux)
    positive, negative = flux.conds(model)
    conds = (comfy.hooks.set_hooks_for_conditioning(positive, hooks), negative)
    accelerated = accelerate(model)
    found = sample(accelerated, flux, steps=STEPS, conds=conds)
    assert seen["wrapper"] == 2 * STEPS
    assert (last_run(accelerated)["reused_calls"], last_run(accelerated)["fallbacks"]) == (6, {})
    assert_close(found, sample(accelerate(model), flux, steps=STEPS), 1e-3)


@pytest.mark.skipif(not BETWEEN_BLOCKS, reason="this release of the host has no such patches")
def test_a_patch_between_blocks_that_writes_in_place_has_its_effect_on_reuse_steps() -> None:
    def add(args: dict[str, Any]) -> dict[str, Any]:
        args["img"] += 0.3 * normal(args["img"].shape[1:], f"block {args['block_index']}", 0)
        return args

    def patched(model: ModelPatcher) -> ModelPatcher:
        clone = model.clone()
        clone.set_model_patch(add, "double_block")
        return clone

    for forecast in ("hold", "taylor"):
        check_both_orders(wan, model_of(wan), patched, forecast=forecast)


@pytest.mark.parametrize("begins", [0, 6], ids=["always", "in mid-group"])
def test_each_pass_of_a_wrapper_that_runs_the_model_twice_in_a_call_is_a_stream(begins: int) -> None:
    """As HiDream-O1's node against seams does, between two noise levels."""
    model = model_of(flux)
    level = float(sigmas_of(model)[begins])

    def shifted_too(executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        once = executor(x, t, *args, **kwargs)
        return once if float(t[0]) > level else 0.5 * (once + executor(x.roll(2, -1), t, *args, **kwargs).roll(-2, -1))

    def patched(model: ModelPatcher) -> ModelPatcher:
        clone = model.clone()
        clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "seams", shifted_too)
        return clone

    full = sample(patched(model), flux, steps=STEPS)
    blocks = flux.blocks(model.model.diffusion_model)
    for accelerated in (accelerate(patched(model), forecast="taylor"), patched(accelerate(model, forecast="taylor"))):
        with count_calls(blocks) as counts:
            found = sample(accelerated, flux, steps=STEPS)
        run = last_run(accelerated)
        twice = STEPS - begins
        assert counts[-1] == STEPS + twice
        assert counts[-1] - counts[0] == (6 if begins == 0 else 4), "the pass that is new in its group computes"
        assert run["fallbacks"] == ({} if begins == 0 else {NOTHING_STORED: 1})
        assert reused_steps(run) == ([4, 6, 8] if begins == 0 else [4, 8])
        assert run["blocks_run"][4] == 8 - BOUNDARY - 1
        assert distance(full, found) < 0.2
