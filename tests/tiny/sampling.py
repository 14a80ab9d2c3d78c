"""Sample from a tiny model along the host's own paths, and watch its blocks while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from .case import Case, Conditioning
from .control import FakeControl, with_control

Callback = Callable[[int, Tensor, Tensor, int], None]


def sample(
    model: ModelPatcher,
    case: Case,
    *,
    steps: int = 10,
    sampler: str = "euler",
    scheduler: str = "simple",
    cfg: float = 3.0,
    denoise: float = 1.0,
    batch: int = 1,
    seed: int = 0,
    start_step: int | None = None,
    last_step: int | None = None,
    callback: Callback | None = None,
    different_lengths: bool = False,
    conds: tuple[Conditioning, Conditioning] | None = None,
    control: FakeControl | None = None,
    latent: Tensor | None = None,
    disable_noise: bool = False,
    force_full_denoise: bool = False,
) -> Tensor:
    """Run the path of KSampler and KSamplerAdvanced (ComfyUI nodes.py, common_ksampler).

    Args:
        model: What `case.build` returned, or a clone of it.
        case: Where latents and conditionings come from.
        steps: Steps of the whole schedule.
        sampler: Host sampler name.
        scheduler: Host scheduler name.
        cfg: Guidance scale; at 1.0 the host leaves the negative conditioning out.
        denoise: Share of the noise, over 0 and up to 1.
        batch: Number of latents.
        seed: Seed of the noise, the latent and the conditionings.
        start_step: First step to run, as KSamplerAdvanced's start_at_step.
        last_step: Step to stop before, as end_at_step.
        callback: `(step, denoised, x, total_steps)`, called after every step.
        different_lengths: See `Case.conds`.
        conds: Conditionings to use in place of `case.conds`.
        control: Control to attach to both conditionings.
        latent: Latent to use in place of `case.latent`.
        disable_noise: Add no noise, as KSamplerAdvanced's add_noise = disable.
        force_full_denoise: As return_with_leftover_noise = disable.

    Returns:
        The latent `[batch, *case.latent_shape]`.
    """
    latent = case.latent(batch, seed) if latent is None else latent
    positive, negative = conds or case.conds(model, batch, seed, different_lengths)
    if control is not None:
        positive, negative = with_control(control, positive), with_control(control, negative)
    noise = torch.zeros_like(latent) if disable_noise else _noise(case, latent, seed)
    sampled = comfy.sample.sample(
        model,
        _unpacked(case, noise),
        steps,
        cfg,
        sampler,
        scheduler,
        positive,
        negative,
        _unpacked(case, latent),
        denoise=denoise,
        disable_noise=disable_noise,
        start_step=start_step,
        last_step=last_step,
        force_full_denoise=force_full_denoise,
        noise_mask=None if case.noise_mask is None else case.noise_mask(batch),
        callback=_packing(callback),
        disable_pbar=True,
        seed=seed,
    )
    return _packed(sampled)


def sample_custom(
    model: ModelPatcher,
    case: Case,
    *,
    steps: int = 10,
    sampler: str = "euler",
    scheduler: str = "simple",
    guider: Literal["cfg", "basic", "dual_cfg"] = "cfg",
    cfg: float = 3.0,
    batch: int = 1,
    seed: int = 0,
    callback: Callback | None = None,
    different_lengths: bool = False,
    sigmas: Tensor | None = None,
) -> Tensor:
    """Run the parts of SamplerCustomAdvanced: a guider, a sampler, sigmas, noise.

    Args:
        model: What `case.build` returned, or a clone of it.
        case: Where latents and conditionings come from.
        steps: Steps of the schedule.
        sampler: Host sampler name.
        scheduler: Host scheduler name.
        guider: `cfg`, `basic` (positive only) or `dual_cfg` (three conditionings, so three streams).
        cfg: Guidance scale.
        batch: Number of latents.
        seed: Seed of the noise, the latent and the conditionings.
        callback: `(step, denoised, x, total_steps)`, called after every step.
        different_lengths: See `Case.conds`.
        sigmas: Sigmas `[steps + 1]` to use in place of the scheduler's.

    Returns:
        The latent `[batch, *case.latent_shape]`.
    """
    from comfy_extras import nodes_custom_sampler as nodes  # slow to import, and only needed here

    latent = case.latent(batch, seed)
    positive, negative = case.conds(model, batch, seed, different_lengths)
    if guider == "basic":
        guide = nodes.Guider_Basic(model)
        guide.set_conds(positive)
    elif guider == "dual_cfg":
        guide = nodes.Guider_DualCFG(model)
        guide.set_conds(positive, case.conds(model, batch, seed + 1)[0], negative)
        guide.set_cfg(cfg, cfg / 2)
    else:
        guide = comfy.samplers.CFGGuider(model)
        guide.set_conds(positive, negative)
        guide.set_cfg(cfg)
    if sigmas is None:
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)
    sampled = guide.sample(
        _unpacked(case, _noise(case, latent, seed)),
        _unpacked(case, latent),
        comfy.samplers.sampler_object(sampler),
        sigmas,
        denoise_mask=None if case.noise_mask is None else case.noise_mask(batch),
        callback=_packing(callback),
        disable_pbar=True,
        seed=seed,
    )
    return _packed(sampled)


@contextmanager
def split_calls() -> Iterator[None]:
    """Make the host run every conditioning in a call of its own, as it does when memory is short.

    It asks for the free memory at every evaluation (ComfyUI v0.30.0 samplers.py:273), so this may also be entered in
    the middle of a run, from a callback.
    """
    original = ModelPatcher.get_free_memory
    ModelPatcher.get_free_memory = lambda *_: 0
    try:
        yield
    finally:
        ModelPatcher.get_free_memory = original


@contextmanager
def count_calls(blocks: Sequence[nn.Module]) -> Iterator[list[int]]:
    """Count how often each block really computed.

    The hook sits on the block's first linear layer, so that a block whose `forward` was swapped counts only where the
    original ran.

    Args:
        blocks: What `Case.blocks` returned.

    Yields:
        One count per block, updated while the model runs.
    """
    counts = [0] * len(blocks)

    def count(index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[index] += 1

        return hook

    handles = [
        _first_linear(block).register_forward_pre_hook(count(index))
        for index, block in enumerate(blocks)
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _first_linear(block: nn.Module) -> nn.Module:
    """Not one of an embedding: the DiT of diffusers uses block 0's again behind its blocks."""
    return next(m for name, m in block.named_modules() if isinstance(m, nn.Linear) and ".emb." not in name)


@contextmanager
def record_outputs(blocks: Sequence[nn.Module]) -> Iterator[list[list[Any]]]:
    """Keep a copy of what each block returned, before anything is added to it in place.

    Args:
        blocks: What `Case.blocks` returned.

    Yields:
        `[block][call]`, each a tensor or a tuple of tensors and None, in the block's own order.
    """
    outputs: list[list[Any]] = [[] for _ in blocks]

    def keep(index: int) -> Callable[..., None]:
        def hook(_block: nn.Module, _arguments: Any, output: Any) -> None:
            outputs[index].append(_copy(output))

        return hook

    handles = [block.register_forward_hook(keep(index)) for index, block in enumerate(blocks)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _noise(case: Case, latent: Tensor, seed: int) -> Tensor:
    return _packed(comfy.sample.prepare_noise(_unpacked(case, latent), seed))


def _unpacked(case: Case, latent: Tensor) -> Any:
    """What the host takes: a nested tensor if the case has parts, else the latent itself."""
    if not case.parts:
        return latent
    from comfy.nested_tensor import NestedTensor  # older releases of the host do not have it

    return NestedTensor(comfy.utils.unpack_latents(latent, [(len(latent), *part) for part in case.parts]))


def _packed(latent: Any) -> Tensor:
    return comfy.utils.pack_latents(latent.unbind())[0] if getattr(latent, "is_nested", False) else latent


def _packing(callback: Callback | None) -> Callback | None:
    if callback is None:
        return None
    return lambda step, denoised, x, steps: callback(step, _packed(denoised), _packed(x), steps)


def _copy(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_copy(item) for item in value)
    return value.clone() if isinstance(value, Tensor) else value
