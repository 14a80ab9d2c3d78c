"""Guarantees beside other nodes: control, replaced blocks, EasyCache, LazyCache, another Accelerate node."""

from __future__ import annotations

import copy
from typing import Any

import comfy.samplers
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from contract.reference import Reference, plan
from harness import STEPS, accelerate, assert_close, distance, last_run, model_of, reused_steps, runs
from tiny import CASES, Case, count_calls, fake_control, sample

from blockdance_core.config import QUALITIES

sd3, flux = CASES["sd3"], CASES["flux"]


@pytest.mark.parametrize("case", [sd3, flux], ids=lambda case: case.name)
@pytest.mark.parametrize("percent", [(0.0, 0.5), (0.5, 1.0)], ids=["ends", "begins"])
def test_change_of_control_drops_the_cache(case: Case, percent: tuple[float, float]) -> None:
    model = model_of(case)
    accelerated = accelerate(model, group_size=5, forecast="delta")
    sample(accelerated, case, steps=STEPS, control=fake_control(case, percent=percent))
    run = last_run(accelerated)
    plain = accelerate(model, group_size=5, forecast="delta")
    sample(plain, case, steps=STEPS)
    assert run["reused_calls"] == last_run(plain)["reused_calls"] - 1, "one step computes again"
    assert list(run["fallbacks"].values()) == [1]
    assert "control" in next(iter(run["fallbacks"]))


def test_control_works_while_blocks_are_skipped() -> None:
    for case in (sd3, flux):
        model = model_of(case)
        full = sample(model, case, steps=STEPS, control=fake_control(case))
        found = sample(accelerate(model, forecast="taylor"), case, steps=STEPS, control=fake_control(case))
        without = sample(model, case, steps=STEPS)
        assert distance(full, found) < 0.5 * distance(full, without)


def replacing(model: ModelPatcher, block: tuple[str, int], call_original: bool) -> ModelPatcher:
    def replaced(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        return extra["original_block"](args) if call_original else {key: args[key] for key in ("img", "txt") if key in args}

    clone = model.clone()
    clone.set_model_patch_replace(replaced, "dit", *block)
    return clone


@pytest.mark.parametrize("call_original", [True, False])
@pytest.mark.parametrize(("case", "block", "boundary", "index"), [
    (sd3, ("double_block", 0), 4, 0), (sd3, ("double_block", 4), 4, 4),
    (flux, ("double_block", 0), 4, 0), (flux, ("single_block", 1), 4, 4), (flux, ("double_block", 2), 2, 2),
])
def test_a_replaced_first_or_boundary_block_computes_with_the_reason(
    case: Case, block: tuple[str, int], boundary: int, index: int, call_original: bool
) -> None:
    patched = replacing(model_of(case), block, call_original)
    accelerated = accelerate(patched, boundary=boundary, forecast="taylor")
    full = sample(patched, case, steps=STEPS)
    with count_calls(case.blocks(patched.model.diffusion_model)) as counts:
        assert torch.equal(sample(accelerated, case, steps=STEPS), full)
    run = last_run(accelerated)
    assert run["reused_calls"] == 0
    assert list(run["fallbacks"]) == [f"another node replaces block {index}"]
    if call_original:
        assert counts == [STEPS] * case.depth
        assert run["blocks_run"] == [case.depth] * STEPS


@pytest.mark.parametrize(("case", "block"), [
    (sd3, ("double_block", 2)), (flux, ("double_block", 1)), (sd3, ("double_block", 6)),
])
def test_a_replaced_block_between_or_behind_is_no_obstacle(case: Case, block: tuple[str, int]) -> None:
    patched = replacing(model_of(case), block, call_original=False)
    accelerated = accelerate(patched, boundary=4)
    assert torch.isfinite(sample(accelerated, case, steps=STEPS)).all()
    assert last_run(accelerated)["reused_steps"] == 3
    assert last_run(accelerated)["fallbacks"] == {}


@pytest.mark.parametrize("layer", [0, 3])
def test_skip_layer_guidance_on_a_needed_layer_computes_the_others_too(layer: int) -> None:
    """Guidance multiplies the error of a forecast that only one side has."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    guided = SkipLayerGuidanceDiT.execute(model_of(sd3), scale=2.0, start_percent=0.0, end_percent=1.0,
                                          double_layers=str(layer), single_layers="").result[0]
    accelerated = accelerate(guided, boundary=3)
    found = sample(accelerated, sd3, steps=STEPS)
    run = last_run(accelerated)
    assert run["calls"] == [2] * STEPS
    assert run["reused_calls"] == 0
    assert torch.equal(found, sample(guided, sd3, steps=STEPS))
    own, others = f"another node replaces block {layer}", "another call of this step cannot reuse, so none does"
    assert set(run["fallbacks"]) == {own, others}
    assert run["fallbacks"][others] == 3


def test_pass_that_cannot_reuse_holds_up_the_others_only_while_it_lasts() -> None:
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    guided = SkipLayerGuidanceDiT.execute(model_of(sd3), scale=2.0, start_percent=0.0, end_percent=0.55,
                                          double_layers="3", single_layers="").result[0]
    accelerated = accelerate(guided, boundary=3)
    sample(accelerated, sd3, steps=STEPS)
    calls, decisions = last_run(accelerated)["calls"], last_run(accelerated)["decisions"]
    assert {calls[step]: decisions[step] for step in (4, 6, 8)} == {2: "cache", 1: "reuse"}


def restated(model: ModelPatcher, forecast: str, boundary: int) -> torch.Tensor:
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
    reference = Reference(sd3, forecast, boundary, sigmas, plan(STEPS, 0.25, 1.0, 2))
    with reference.watch(model):
        return sample(model, sd3, steps=STEPS, callback=reference.callback)


def test_skip_layer_guidance_does_not_become_zero() -> None:
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    guided = SkipLayerGuidanceDiT.execute(model_of(sd3), scale=2.0, start_percent=0.3, end_percent=0.8,
                                          double_layers="2", single_layers="").result[0]
    accelerated = accelerate(guided, forecast="taylor", boundary=5)
    assert_close(sample(accelerated, sd3, steps=STEPS), restated(guided, "taylor", 5))
    assert set(last_run(accelerated)["calls"]) == {1, 2}
    assert last_run(accelerated)["fallbacks"] == {}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", ["EasyCacheNode", "LazyCacheNode"])
@pytest.mark.parametrize("case", [sd3, flux], ids=lambda case: case.name)
@pytest.mark.parametrize(
    "settings", [{}, {"start_percent": 0.7}, {"preset": "auto", "quality": "draft"}], ids=["blocks", "late", "whole model"])
def test_stacked_with_the_hosts_caches_is_finite_and_accounted(
    case: Case, name: str, order: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfy_extras import nodes_easycache

    monkeypatch.setitem(QUALITIES, "draft", 10.0)
    node = getattr(nodes_easycache, name)

    def cached(model: ModelPatcher) -> ModelPatcher:
        return node.execute(model, reuse_threshold=0.5, start_percent=0.0, end_percent=0.95, verbose=False).result[0]

    model = model_of(case)
    accelerated = cached(accelerate(model, **settings)) if order == "before" else accelerate(cached(model), **settings)
    outputs = []
    for _ in range(2):
        with count_calls(case.blocks(model.model.diffusion_model)) as counts:
            outputs.append(sample(accelerated, case, steps=STEPS))
        run = last_run(accelerated)
        assert sum(calls * blocks for calls, blocks in zip(run["calls"], run["blocks_run"], strict=True)) == sum(counts)
        assert counts[-1] - counts[0] == (0 if "quality" in settings else run["reused_calls"])
    assert torch.isfinite(outputs[0]).all()
    assert torch.equal(*outputs)


def test_two_accelerate_nodes_in_a_row_the_last_wins() -> None:
    model = model_of(sd3)
    both = accelerate(accelerate(model, boundary=1, forecast="delta"), boundary=5, forecast="taylor")
    alone = accelerate(model, boundary=5, forecast="taylor")
    assert torch.equal(sample(both, sd3, steps=STEPS), sample(alone, sd3, steps=STEPS))
    assert len(runs(both)) == 1
    assert last_run(both)["config"]["boundary"] == 5


def test_a_node_that_copies_the_options_in_mid_run_copies_no_session() -> None:
    model, copies = model_of(sd3).clone(), []

    def pre_cfg(args: dict[str, Any]) -> Any:
        copies.append(copy.deepcopy(args["model_options"])["transformer_options"]["blockdance"])
        return args["conds_out"]

    model.set_model_sampler_pre_cfg_function(pre_cfg)
    accelerated = accelerate(model)
    sample(accelerated, sd3, steps=STEPS)
    assert len({id(one) for one in copies}) == 1
    assert last_run(accelerated)["reused_steps"] > 0


def test_a_function_wrapper_that_splits_the_batch_itself_computes_or_stays_right() -> None:
    """model_function_wrapper slots run around apply_model and may pass on anything, half a batch too."""
    def halves(apply: Any, args: dict[str, Any]) -> torch.Tensor:
        x, t, c = args["input"], args["timestep"], args["c"]
        half = len(x) // 2
        parts = [{key: value[rows] if isinstance(value, torch.Tensor) and len(value) == len(x) else value
                  for key, value in c.items()} for rows in (slice(0, half), slice(half, None))]
        return torch.cat([apply(x[:half], t[:half], **parts[0]), apply(x[half:], t[half:], **parts[1])])

    model = model_of(sd3).clone()
    model.set_model_unet_function_wrapper(halves)
    full = sample(model, sd3, steps=STEPS)
    found = sample(accelerate(model), sd3, steps=STEPS)
    assert distance(full, found) < 0.2


def test_a_wrapper_that_answers_a_call_itself_is_counted() -> None:
    answered: list[int] = []

    def answer(executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        answered.append(1)
        return torch.zeros_like(x) if len(answered) in (1, 6) else executor(x, *args, **kwargs)

    model = accelerate(model_of(flux)).clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", answer)
    assert torch.isfinite(sample(model, flux, steps=STEPS)).all()
    run = last_run(model)
    assert [k for k, blocks in enumerate(run["blocks_run"]) if blocks == 0] == [0, 5]
    assert run["decisions"][6] == "cache", "the feature of the group before is not valid here: computed and stored"
    assert reused_steps(run) == [4, 8]
