"""Guarantee: steps from sigmas, any sampler, any list; batch times image-to-video; split and partial runs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from comfy.k_diffusion import sampling
from comfy.samplers import SAMPLER_NAMES
from harness import STEPS, accelerate, assert_close, last_run, model_of, reused_steps, runs
from tiny import CASES, Case, count_calls, sample, sample_custom

from blockdance_core.config import QUALITIES

pytestmark = pytest.mark.smoke

SAMPLERS = ["euler", "dpmpp_2m", "dpmpp_2m_sde", "heun", "uni_pc", "ddim", "dpm_2", "dpm_adaptive", "euler_ancestral"]
PATHS = {"ksampler": sample, "custom_advanced": sample_custom}
sd3 = CASES["sd3"]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", [sd3, CASES["pixart_sigma"]], ids=["flow", "eps"])
def test_steps_from_sigmas_whatever_the_sampler(sampler: str, path: str, case: Case) -> None:
    model = model_of(case)
    accelerated = accelerate(model, forecast="taylor")
    blocks = case.blocks(model.model.diffusion_model)
    with count_calls(blocks) as counts:
        found = PATHS[path](accelerated, case, steps=STEPS, sampler=sampler)
    assert torch.isfinite(found).all()
    run = last_run(accelerated)
    assert run["steps"] == STEPS
    assert run["evaluations"] == sum(run["calls"]) == counts[-1]
    assert counts[-1] - counts[0] == run["reused_calls"] > 0
    assert run["decisions"][-1] in ("compute",)
    noisy = any("adds fresh noise at every step" in warning for warning in run["warnings"])
    assert noisy == (sampler in ("dpmpp_2m_sde", "euler_ancestral"))
    guarded = accelerate(model, preset="auto", quality="draft")
    PATHS[path](guarded, case, steps=STEPS, sampler=sampler)
    assert not any("adds fresh noise" in warning for warning in last_run(guarded)["warnings"]), "the guard sees to it"
    assert set(reused_steps(run)) <= {4, 6, 8}
    if sampler != "dpm_adaptive":
        assert reused_steps(run) == [4, 6, 8]
        assert run["fallbacks"] == {}
        assert run["reused_calls"] == sum(run["calls"][k] for k in (4, 6, 8))


def test_heun_is_not_counted_twice() -> None:
    accelerated = accelerate(model_of(sd3))
    sample(accelerated, sd3, steps=STEPS, sampler="heun")
    run = last_run(accelerated)
    assert run["evaluations"] == 2 * STEPS - 1
    assert run["calls"] == [1] + [2] * (STEPS - 1)


def test_every_sampler_of_the_host_runs_to_the_end() -> None:
    accelerated = accelerate(model_of(sd3), forecast="taylor")
    for sampler in SAMPLER_NAMES:
        found = sample(accelerated, sd3, steps=STEPS, sampler=sampler)
        assert torch.isfinite(found).all(), sampler
        assert last_run(accelerated)["reused_calls"] > 0, sampler


@pytest.mark.parametrize("sampler", ["heunpp2", "heun", "dpm_2", "dpmpp_2s_ancestral", "dpm_adaptive", "uni_pc"])
def test_quality_watches_any_sampler_and_reuses_nothing_that_it_does_not_accept(
    sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, how = model_of(sd3), {"steps": 12, "sampler": sampler}
    monkeypatch.setitem(QUALITIES, "balanced", 1e-9)
    monkeypatch.setitem(QUALITIES, "draft", 5.0)
    strict, lax = (accelerate(model, preset="auto", quality=quality) for quality in ("balanced", "draft"))
    assert torch.equal(sample(strict, sd3, **how), sample(model, sd3, **how))
    assert torch.isfinite(sample(lax, sd3, **how)).all()
    assert last_run(lax)["reused_calls"] > 0


def test_noise_that_is_added_anew_ends_what_was_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    """As restart samplers do within one run: up again by some steps, with fresh noise."""
    model, ran = model_of(sd3), []
    monkeypatch.setitem(QUALITIES, "draft", math.inf)
    accelerated = accelerate(model, preset="auto", quality="draft")

    def restarting(denoise: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any = None, **_: Any) -> torch.Tensor:
        for before, step in itertools.pairwise([0, *range(7), *range(3, STEPS)]):
            x = x + 0.5 * torch.randn_like(x) if step < before else x
            total = sum(counts)
            denoised = denoise(x, sigmas[step] * x.new_ones(len(x)), **extra_args)
            ran.append(sum(counts) > total)
            x = denoised + (x - denoised) * sigmas[step + 1] / sigmas[step]
        return x

    monkeypatch.setattr(sampling, "sample_euler", restarting)
    with count_calls(sd3.blocks(model.model.diffusion_model)) as counts:
        assert torch.isfinite(sample(accelerated, sd3, steps=STEPS)).all()
    assert [step for step, one in enumerate(ran) if one] == [0, 1, 7, 8], "two stored steps before, and two behind the noise"


@pytest.mark.parametrize("sigmas", [[0.0, 0.0], [1.0, 0.0], [0.5], [1.0, 1.0, 1.0, 0.0], [0.5, 0.5]])
def test_degenerate_sigmas_are_tolerated(sigmas: list[float]) -> None:
    model = model_of(sd3)
    full = sample_custom(model, sd3, sigmas=torch.tensor(sigmas))
    found = sample_custom(accelerate(model, forecast="taylor"), sd3, sigmas=torch.tensor(sigmas))
    assert torch.equal(full, found) or (full.isnan() == found.isnan()).all()


def test_rising_sigmas_of_an_unsampling_run_are_tolerated() -> None:
    accelerated = accelerate(model_of(sd3))
    found = sample_custom(accelerated, sd3, sigmas=torch.linspace(0.01, 0.9, 11))
    assert torch.isfinite(found).all()
    assert last_run(accelerated)["reused_calls"] > 0


@pytest.mark.parametrize("denoise", [0.5, 0.9])
def test_image_to_image_computes_its_first_two_steps(denoise: float) -> None:
    accelerated = accelerate(model_of(sd3), start_percent=0.0, window="noise_level")
    assert torch.isfinite(sample(accelerated, sd3, steps=STEPS, denoise=denoise)).all()
    run = last_run(accelerated)
    assert run["steps"] == STEPS
    assert run["decisions"][0] == "compute"
    assert run["decisions"][1] != "reuse"
    assert run["decisions"][-1] == "compute"
    assert run["reused_steps"] >= 1


@pytest.mark.parametrize("preset", ["custom", "auto"])
def test_advanced_sampler_split_in_two_reuses_in_both_and_shares_nothing(preset: str) -> None:
    model = model_of(sd3)
    settings = {"start_percent": 0.1, "window": "noise_level"} if preset == "custom" else {}
    outputs = []
    for _ in range(2):
        accelerated = accelerate(model, preset=preset, **settings)
        half = sample(accelerated, sd3, steps=24, start_step=0, last_step=14)
        outputs.append(sample(accelerated, sd3, steps=24, start_step=14, latent=half, disable_noise=True,
                              force_full_denoise=True))
    assert torch.equal(*outputs)
    first, second = runs(accelerated)
    assert (first["steps"], second["steps"]) == (14, 10)
    assert second["decisions"][:2] != ["cache", "reuse"]
    assert second["decisions"][1] != "reuse"
    assert first["decisions"][-1] == second["decisions"][-1] == "compute"
    assert second["reused_steps"] > 0


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", [
    name for name in (
        "sd3", "flux", "wan_t2v", "wan_i2v", "wan22_i2v", "wan22_ti2v", "wan_vace", "hunyuan_video_i2v",
    ) if name in CASES
])
def test_batch_times_image_to_video_reuses_every_row(name: str, batch: int) -> None:
    case = CASES[name]
    accelerated = accelerate(model_of(case), forecast="taylor")
    found = sample(accelerated, case, steps=STEPS, batch=batch)
    assert found.shape == (batch, *case.latent_shape)
    assert torch.isfinite(found).all()
    run = last_run(accelerated)
    assert (run["reused_steps"], run["fallbacks"], run["warnings"]) == (3, {}, [])


def test_eight_steps_or_fewer_compute_everything_and_say_so() -> None:
    model = model_of(sd3)
    for preset in ("auto", "paper"):
        accelerated = accelerate(model, preset=preset)
        assert torch.equal(sample(accelerated, sd3, steps=8), sample(model, sd3, steps=8))
        run = last_run(accelerated)
        assert run["reused_steps"] == 0
        assert "all computed" in run["warnings"][0]
    accelerated = accelerate(model)
    sample(accelerated, sd3, steps=8)
    assert last_run(accelerated)["reused_steps"] > 0
    assert "expect visible differences" in last_run(accelerated)["warnings"][0]


@pytest.mark.parametrize("steps", [9, 13, 30, 51])
def test_schedules_are_defined_for_any_step_count(steps: int) -> None:
    for preset in ("auto", "paper"):
        accelerated = accelerate(model_of(sd3), preset=preset)
        sample(accelerated, sd3, steps=steps)
        run = last_run(accelerated)
        assert len(run["decisions"]) == steps
        assert run["reused_steps"] > 0 or steps == 9


def test_a_shift_changed_by_a_later_node_is_the_one_in_force() -> None:
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    windows = []
    for shift in (1.0, 8.0):
        accelerated = accelerate(model_of(sd3), window="noise_level", start_percent=0.4, end_percent=0.95)
        (shifted,) = ModelSamplingSD3().patch(accelerated, shift)
        for _ in range(2):
            sample_custom(shifted, sd3, sigmas=torch.linspace(1, 0, 21))
            windows.append(last_run(accelerated)["window"]["covered"])
    assert windows[0] == windows[1] != windows[2] == windows[3]


def test_second_sampler_after_an_upscale_computes_what_does_not_fit() -> None:
    accelerated = accelerate(model_of(sd3), forecast="taylor")
    first = sample(accelerated, sd3, steps=STEPS)
    larger = torch.nn.functional.interpolate(first, size=(12, 10))
    second = sample(accelerated, sd3, steps=STEPS, latent=larger, denoise=0.6)
    assert second.shape[-2:] == (12, 10)
    assert_close(second, sample(accelerate(model_of(sd3), forecast="taylor"), sd3, steps=STEPS, latent=larger,
                                denoise=0.6), 0.0)
    assert last_run(accelerated)["fallbacks"] == {}
