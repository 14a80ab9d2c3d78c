"""Guarantees for several runs of one graph: two samplers, tiles, clones, two models in one run, a latent that grows."""

from __future__ import annotations

import logging
from typing import Any

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from guarantees.composition import restated, sigmas_of
from harness import STEPS, accelerate, assert_close, distance, last_run, model_of, reused_steps, runs
from tiny import CASES, Case, sample, sample_custom
from tiny.case import normal
from torch import Tensor

from blockdance_core.config import QUALITIES
from blockdance_core.host.attach import handle_of

sd3, flux = CASES["sd3"], CASES["flux"]


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
    assert handle.runs("another prompt") == of_prompt, "the last one that sampled, and no run of before"
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
    dual(both, negative)
    assert any("negative model" in text for text in last_run(both)["warnings"])
    dual(both, accelerate(other, boundary=5))
    assert last_run(both)["warnings"] == []
    assert runs(negative) == []
    assert torch.equal(dual(model, negative), dual(model, other))
    assert runs(negative) == []


@pytest.mark.parametrize("tolerance", [1.0, 5.0])
def test_a_quality_gives_two_models_in_one_run_one_answer(tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUALITIES, "draft", tolerance)
    both = accelerate(model_of(sd3), preset="auto", quality="draft")
    dual(both, sd3.build(seed=1))
    assert "reuse" in last_run(both)["decisions"]
    assert "mixed" not in last_run(both)["decisions"]


def test_a_latent_that_grows_in_mid_run_computes_once_and_goes_on() -> None:
    """Samplers that work their way up in resolution; the groups are of four."""
    def growing(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: Any) -> Tensor:
        for step in range(len(sigmas) - 1):
            if step == 5:
                x = torch.nn.functional.interpolate(x, size=(12, 10))
            denoised = model(x, sigmas[step].expand(len(x)), **extra_args)
            x = denoised + (x - denoised) * sigmas[step + 1] / sigmas[step]
            if callback is not None:
                callback({"i": step, "denoised": denoised, "x": x})
        return x

    def run_of(model: ModelPatcher, case: Case, *, steps: int, callback: Any = None) -> Tensor:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(*sd3.conds(model))
        guider.set_cfg(3.0)
        latent = sd3.latent()
        return guider.sample(comfy.sample.prepare_noise(latent, 0), latent, comfy.samplers.KSAMPLER(growing),
                             sigmas_of(model), callback=callback, disable_pbar=True, seed=0)

    expected = restated(sd3, model_of(sd3), group_size=4, run=run_of, streams=lambda step, call: (step < 5, call))
    accelerated = accelerate(model_of(sd3), group_size=4, forecast="taylor")
    assert_close(expected, run_of(accelerated, sd3, steps=STEPS))
    run = last_run(accelerated)
    assert run["decisions"][3:] == ["cache", "reuse", "cache", "reuse", "cache", "reuse", "compute"]
    assert list(run["fallbacks"].values()) == [1]


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


class Training(comfy.samplers.Sampler):
    """What the host's Train LoRA does with a model: noise levels at random, and a latent that wants gradients."""

    def sample(
        self, model_wrap: Any, sigmas: Tensor, extra_args: dict[str, Any], callback: Any, noise: Tensor, *_: Any
    ) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        self.seen = []
        with torch.enable_grad():
            for _step in range(30):
                sigma = (torch.rand((1,), generator=generator) * 5 - 2).exp()
                x = torch.randn(noise.shape, generator=generator).requires_grad_(True)
                self.seen.append(model_wrap(x, sigma.requires_grad_(True), **extra_args).detach())
        return noise


@pytest.mark.parametrize("settings", [{}, {"start_percent": 0.0, "end_percent": 1.0}, {"preset": "auto", "quality": "draft"}])
def test_a_model_that_is_trained_is_never_accelerated(settings: dict[str, Any]) -> None:
    case = CASES["pixart_sigma"]
    model, seen = model_of(case), []
    accelerated = accelerate(model, **settings)
    for one in (model, accelerated):
        guider, training = comfy.samplers.CFGGuider(one), Training()
        guider.set_conds(*case.conds(model))
        guider.set_cfg(1.0)
        latent = case.latent()
        guider.sample(torch.zeros_like(latent), latent, training, torch.arange(12.0), disable_pbar=True, seed=0)
        seen.append(training.seen)
    assert all(torch.equal(found, full) for full, found in zip(*seen, strict=True))
    run = last_run(accelerated)
    assert (run["reused_calls"], run["cached_bytes"]) == (0, 0)
    assert any("being trained" in text for text in run["warnings"])
