"""Guarantees for whole graphs: weights, model sampling, several samplers and models, other packs' wrappers."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from guarantees.composition import BOUNDARY, check_both_orders, lora_of, sigmas_of
from harness import STEPS, accelerate, distance, last_run, model_of, reused_steps, runs
from tiny import CASES, Case, sample, sample_custom
from tiny.case import normal
from torch import Tensor

from blockdance_core.host.attach import handle_of

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


def advanced(model: ModelPatcher, case: Case, latent: Tensor, first: int, last: int, steps: int = 24) -> Tensor:
    """The KSamplerAdvanced node, as the first of two with leftover noise or as the last."""
    import nodes

    positive, negative = case.conds(model)
    begins, ends = first == 0, last >= steps
    return nodes.KSamplerAdvanced().sample(
        model, "enable" if begins else "disable", 0, steps, 3.0, "euler", "simple", positive, negative,
        {"samples": latent}, first, last, "disable" if ends else "enable")[0]["samples"]


@pytest.mark.parametrize("shared", [False, True], ids=["high and low noise models", "one model twice"])
def test_two_advanced_samplers_with_leftover_noise_keep_their_models_apart(shared: bool) -> None:
    case = CASES["wan22_i2v"]
    high = case.build()
    low = high if shared else case.build(seed=1)
    settings = {"preset": "auto"}
    full = advanced(low, case, advanced(high, case, case.latent(), 0, 14), 14, 24)
    first = accelerate(high, **settings)
    second = first if shared else accelerate(low, **settings)
    for _ in range(2):
        half = advanced(first, case, case.latent(), 0, 14)
        found = advanced(second, case, half, 14, 24)
        assert torch.equal(half, advanced(accelerate(high, **settings), case, case.latent(), 0, 14))
        assert torch.equal(found, advanced(accelerate(low, **settings), case, half, 14, 24))
    assert distance(full, found) < 0.2
    for run, steps in ((runs(first)[0], 14), (runs(second)[-1], 10)):
        assert (run["steps"], run["completed"], run["fallbacks"]) == (steps, True, {})
        assert run["reused_steps"] > 0
        assert run["decisions"][-1] == "compute"
    assert "reuse" not in runs(second)[-1]["decisions"][:2]
    assert len(runs(first)) == len(runs(second)) == (4 if shared else 2)


def test_clones_with_other_settings_in_one_graph_do_not_disturb_each_other() -> None:
    model = model_of(flux)
    full = sample(model, flux, steps=STEPS)
    clones = [accelerate(model, boundary=1, forecast="hold", group_size=4), accelerate(model, boundary=6, forecast="taylor")]
    alone = [sample(clone, flux, steps=STEPS) for clone in clones]
    for order in ((0, 1), (1, 0)):
        for number in order:
            assert torch.equal(sample(clones[number], flux, steps=STEPS), alone[number])
        assert torch.equal(sample(model, flux, steps=STEPS), full)
    assert [last_run(clone)["config"]["boundary"] for clone in clones] == [1, 6]
    assert distance(*alone) > 1e-3


TILES = [(8, 8), (8, 8), (12, 8), (4, 8), (8, 8)]


def test_every_tile_of_an_upscale_is_a_run_of_its_own() -> None:
    from comfy_execution.utils import CurrentNodeContext

    model = model_of(sd3)
    accelerated = accelerate(model, forecast="taylor")
    sample(accelerated, sd3, steps=STEPS)

    def tile(of: ModelPatcher, number: int) -> Tensor:
        latent = 0.5 * normal((1, 16, *TILES[number]), "tile", number)
        return sample(of, sd3, steps=STEPS, denoise=0.5, latent=latent, seed=number)

    with CurrentNodeContext("a prompt", "a sampler"):
        found = [tile(accelerated, number) for number in range(len(TILES))]
    for number, latent in enumerate(found):
        assert torch.equal(latent, tile(accelerate(model, forecast="taylor"), number))
    handle = handle_of(accelerated)
    assert handle is not None
    of_prompt = handle.runs("a prompt")
    assert len(of_prompt) == len(TILES)
    assert len(handle.runs()) == len(TILES) + 1
    assert {(run["steps"], run["reused_steps"], str(run["fallbacks"])) for run in of_prompt} == {(STEPS, 3, "{}")}
    sizes = [run["cached_bytes"] for run in of_prompt]
    assert sizes[0] == sizes[1] == sizes[4]
    assert len(set(sizes)) == 3


def dual(model: ModelPatcher, negative: ModelPatcher) -> Tensor:
    nodes = pytest.importorskip("comfy_extras.nodes_custom_sampler")
    if not hasattr(nodes, "Guider_DualModel"):
        pytest.skip("this release of the host has no DualModelGuider")
    guider = nodes.Guider_DualModel(model, negative)
    guider.set_conds(*sd3.conds(model))
    guider.set_cfg(3.0)
    latent = sd3.latent()
    return guider.sample(comfy.sample.prepare_noise(latent, 0), latent, comfy.samplers.sampler_object("euler"),
                         sigmas_of(model), disable_pbar=True, seed=0)


def test_of_two_models_in_one_run_the_first_decides() -> None:
    model, other = model_of(sd3), sd3.build(seed=1)
    both, negative = accelerate(model, boundary=5), accelerate(other, boundary=1)
    assert torch.equal(dual(both, negative), dual(both, other)), "both run as the first is set"
    assert reused_steps(last_run(both)) == [4, 6, 8]
    assert runs(negative) == []
    assert torch.equal(dual(model, negative), dual(model, other))
    assert runs(negative) == []


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


SECOND_STAGE = [0.909375, 0.725, 0.421875, 0.0]  # of the distilled LTX-2, behind its upscaler


@pytest.mark.parametrize("preset", ["auto", "paper"])
@pytest.mark.parametrize("sigmas", [SECOND_STAGE, SECOND_STAGE[1:], SECOND_STAGE[2:]], ids=len)
@pytest.mark.parametrize("name", ["ltxv", "ltxav"])
def test_a_short_second_stage_computes_everything_and_says_so(
    name: str, sigmas: list[float], preset: str, caplog: pytest.LogCaptureFixture
) -> None:
    case = CASES.get(name)
    if case is None:
        pytest.skip("this release of the host does not have the model")
    model = model_of(case)
    accelerated = accelerate(model, preset=preset)
    full = sample_custom(model, case, sigmas=torch.tensor(sigmas))
    with caplog.at_level(logging.INFO):
        assert torch.equal(sample_custom(accelerated, case, sigmas=torch.tensor(sigmas)), full)
    run = last_run(accelerated)
    assert (run["reused_calls"], run["fallbacks"], len(run["warnings"])) == (0, {}, 1)
    assert "computed" in run["warnings"][0] or "no step can be reused" in run["warnings"][0]
    ours = [record for record in caplog.records if record.name.startswith("blockdance")]
    assert [record.levelname for record in ours] == ["INFO"]
    assert run["warnings"][0] in ours[0].getMessage()
