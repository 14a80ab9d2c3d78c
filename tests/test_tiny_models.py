"""The tiny models themselves: finite, deterministic, and sensitive to everything the contract suite varies."""

from __future__ import annotations

from typing import Any

import comfy.clip_vision
import pytest
import torch
from harness import every_case, model_of
from host.environment import DEFAULT
from tiny import CASES, DECLARED, Case, count_calls, fake_control, record_outputs, sample, sample_custom, split_calls


def test_no_case_is_left_out_on_the_default_release() -> None:
    from comfyui_version import __version__

    missing = {case.name for case in DECLARED} - set(CASES)
    assert not missing or f"v{__version__}" != DEFAULT


@every_case
def test_sample_twice_is_finite_and_bit_identical(case: Case) -> None:
    model = model_of(case)
    first = sample(model, case, steps=4)
    assert first.shape == (1, *case.latent_shape)
    assert torch.isfinite(first).all()
    assert first.std() > 0.05
    assert torch.equal(first, sample(model, case, steps=4))
    assert torch.equal(first, sample(case.build(), case, steps=4))


@every_case
def test_sample_depends_on_noise_text_and_weights(case: Case) -> None:
    model = model_of(case)
    latent, conds = case.latent(), case.conds(model)
    first = sample(model, case, steps=2, latent=latent, conds=conds)
    assert _differ(first, sample(model, case, steps=2, latent=latent, conds=conds, seed=1)) is case.noisy
    other = case.conds(model, seed=1)
    assert _differ(first, sample(model, case, steps=2, latent=latent, conds=(other[0], conds[1])))
    assert _differ(first, sample(model, case, steps=2, latent=latent, conds=(conds[0], other[1])))
    assert _differ(first, sample(case.build(seed=1), case, steps=2, latent=latent, conds=conds))


@every_case
def test_sample_depends_on_every_further_conditioning(case: Case) -> None:
    model = model_of(case)
    positive, negative = case.conds(model)
    first = sample(model, case, steps=2, conds=(positive, negative))
    for key, value in positive[0][1].items():
        if value is None:  # an entry the host reads although the model has no use for it
            continue
        other = [[positive[0][0], {**positive[0][1], key: _changed(value)}]]
        assert _differ(first, sample(model, case, steps=2, conds=(other, negative))), key


@every_case
def test_sample_depends_on_every_block(case: Case) -> None:
    model = case.build()
    blocks = case.blocks(model.model.diffusion_model)
    assert len(blocks) == case.depth >= 6
    first = sample(model, case, steps=1, cfg=1.0)
    for block in blocks:
        weights = [p for p in block.parameters() if p.ndim > 1]
        kept = [w.clone() for w in weights]
        for weight in weights:
            weight.mul_(1.1)
        assert _differ(first, sample(model, case, steps=1, cfg=1.0))
        for weight, value in zip(weights, kept, strict=True):
            weight.copy_(value)


@every_case
def test_blocks_run_once_per_call_in_the_stated_order(case: Case) -> None:
    model = model_of(case)
    blocks = case.blocks(model.model.diffusion_model)
    order: list[int] = []
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, index=index: order.append(index))
    with count_calls(blocks) as counts, record_outputs(blocks) as outputs:
        sample(model, case, steps=2, cfg=1.0)
    assert counts == [2] * case.depth
    assert order == [*range(case.depth)] * 2
    assert [len(calls) for calls in outputs] == [2] * case.depth
    sample(model, case, steps=2, cfg=1.0)
    assert counts == [2] * case.depth, "the hooks stay after the context"


@every_case
def test_different_lengths_split_the_batch(case: Case) -> None:
    model = model_of(case)
    blocks = case.blocks(model.model.diffusion_model)
    with count_calls(blocks) as counts:
        sample(model, case, steps=2, batch=case.rows(3))
        assert counts == [2 * case.calls()] * case.depth
        sample(model, case, steps=2, batch=case.rows(3), different_lengths=True)
        assert counts == [2 * (case.calls() + case.calls(True))] * case.depth


@every_case
def test_split_calls_run_each_conditioning_alone(case: Case) -> None:
    model = model_of(case)
    whole = sample(model, case, steps=2)
    with count_calls(case.blocks(model.model.diffusion_model)) as counts, split_calls():
        split = sample(model, case, steps=2)
    assert counts == [4] * case.depth
    torch.testing.assert_close(split, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


@every_case
def test_rows_of_a_batch_do_not_mix(case: Case) -> None:
    if case.max_batch == 1:
        with pytest.raises(Exception, match="batch"):  # the host says so itself
            sample(model_of(case), case, steps=1, batch=2)
        return
    model = model_of(case)
    latent = case.latent(2)
    conds = case.conds(model, 2)
    whole = sample(model, case, latent=latent, batch=2, conds=conds, steps=3, start_step=1, disable_noise=True)
    changed = torch.cat([latent[:1], 2 * latent[1:]])
    other = sample(model, case, latent=changed, batch=2, conds=conds, steps=3, start_step=1, disable_noise=True)
    torch.testing.assert_close(whole[0], other[0], atol=1e-4, rtol=1e-4)
    assert _differ(whole[1], other[1])


@every_case
def test_custom_sampler_with_cfg_equals_ksampler(case: Case) -> None:
    model = model_of(case)
    assert torch.equal(sample_custom(model, case, steps=3), sample(model, case, steps=3))


@pytest.mark.parametrize("guider", ["basic", "dual_cfg"])
def test_custom_sampler_guiders_run(guider: str) -> None:
    case = CASES["sd3"]
    assert torch.isfinite(sample_custom(model_of(case), case, steps=2, guider=guider)).all()


controlled = [case for case in CASES.values() if case.control]


@pytest.mark.parametrize("case", controlled, ids=lambda case: case.name)
def test_control_reaches_the_output_and_ends_with_its_range(case: Case) -> None:
    model = model_of(case)
    plain = sample(model, case, steps=3)
    control = fake_control(case, 0.5)
    assert _differ(plain, sample(model, case, steps=3, control=control))
    assert control.calls == 3
    assert torch.equal(plain, sample(model, case, steps=3, control=fake_control(case, 0.0)))
    short = fake_control(case, 0.5, percent=(0.0, 0.1))
    assert _differ(plain, sample(model, case, steps=3, control=short))
    assert short.calls < 3


def _changed(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return 1 - value if value.unique().numel() == 2 else value + value.roll(1, -1)
    if isinstance(value, list):
        return [_changed(item) for item in value]
    if isinstance(value, comfy.clip_vision.Output):
        other = comfy.clip_vision.Output()
        other.__dict__ = {key: _changed(item) for key, item in value.__dict__.items()}
        return other
    return value + 1


def _differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-4 * a.abs().max())  # PixArt's sigmas reach 157, its latents thousands
