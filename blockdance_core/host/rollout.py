"""Sample the same prompt again and again with different plans, and compare with the full run.

A rollout may *replay* steps of the full run: guidance gets the predictions recorded there, and the model does not run. So any
sampler, whatever it remembers, stands after k replayed steps exactly where the full run stood.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Container, Mapping
from typing import TYPE_CHECKING, Any

import comfy.sample
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from blockdance_core.config import Config
from blockdance_core.host.attach import KEY, attach, handle_of, sampler_name
from blockdance_core.host.levels import noise_levels
from blockdance_core.policy import Fixed
from blockdance_core.schedule import Plan

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

_KEY = "blockdance_rollout"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a KSampler node is given, besides the model.

    Attributes:
        positive: CONDITIONING; may hold a batch.
        negative: CONDITIONING.
        latent: Samples [B, C, ...] to start from.
        seed: Seed of the noise.
        steps: Number of steps.
        cfg: Guidance.
        sampler: Name of the sampler.
        scheduler: Name of the scheduler.
        denoise: Share of the noise schedule that is run.
        noise_mask: Where the latent is painted anew, if not everywhere.
        batch_index: Which noise of the seed each sample gets, if not the first ones.
    """

    positive: Any
    negative: Any
    latent: Tensor
    seed: int
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    denoise: float = 1.0
    noise_mask: Tensor | None = None
    batch_index: Any = None


def prompt_of(
    model: ModelPatcher, positive: Any, negative: Any, latent_image: Mapping[str, Any], seed: int, steps: int, cfg: float,
    sampler_name: str, scheduler: str, denoise: float = 1.0,
) -> Prompt:
    """The prompt that a KSampler node would sample, from its inputs."""
    shares = {key: latent_image[key] for key in ("downscale_ratio_spacial", "downscale_ratio_temporal") if key in latent_image}
    latent = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"], **shares)
    return Prompt(
        positive, negative, latent, seed, steps, cfg, sampler_name, scheduler, denoise, latent_image.get("noise_mask"),
        latent_image.get("batch_index"),
    )


def choices() -> tuple[list[str], list[str]]:
    """Samplers and schedulers, as a KSampler node lists them."""
    return list(comfy.samplers.KSampler.SAMPLERS), list(comfy.samplers.KSampler.SCHEDULERS)


def sigmas_of(model: ModelPatcher, prompt: Prompt) -> list[float]:
    """The sigmas that a prompt is sampled at, one more than there are steps; some schedulers give more or fewer than asked."""
    sampler = comfy.samplers.KSampler(
        model, prompt.steps, model.load_device, prompt.sampler, prompt.scheduler, prompt.denoise, model.model_options)
    return [float(sigma) for sigma in sampler.sigmas]


def levels_of(model: ModelPatcher, prompt: Prompt) -> list[float]:
    """The same as shares of the noise schedule, see `levels.noise_levels`."""
    return noise_levels(model.get_model_object("model_sampling"), sigmas_of(model, prompt))


def function_of(sampler: str) -> str:
    """The name of a sampler's function, as a run tells it: that of `ddim`, for one, is `euler`."""
    return sampler_name(comfy.samplers.sampler_object(sampler))


@dataclasses.dataclass
class Trajectory:
    """What happened in one run.

    Attributes:
        entered: Latent at the first evaluation of each step, [B, ...], on the CPU; behind them the result.
        predicted: What the model predicted for every conditioning, one list for each time in each step that it was asked; on
            the CPU, of the full run alone: of others where it is replayed.
        estimates: The estimate of the clean latent of each evaluation, with its step; on the CPU, of the full run alone.
        record: The run's figures.
    """

    entered: list[Tensor] = dataclasses.field(default_factory=list)
    predicted: list[list[list[Tensor]]] = dataclasses.field(default_factory=list)
    estimates: list[tuple[int, Tensor]] = dataclasses.field(default_factory=list)
    record: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def result(self) -> Tensor:
        """The latent at the end."""
        return self.entered[-1]


class _Enough(Exception):
    """The rollout has seen what it was for."""


class Rollouts:
    """Runs of one prompt.

    Args:
        model: MODEL, as the sampler would get it.
        prompt: What is sampled.

    Attributes:
        steps: Number of executed steps.
        full: The full run.
        count: How many runs there were, the full one among them.
        calls: How often the model was called in them.
    """

    def __init__(self, model: ModelPatcher, prompt: Prompt) -> None:
        self.model, self.prompt = model, prompt
        self.count = self.calls = 0
        self.steps = len(sigmas_of(model, prompt)) - 1
        self.noise = comfy.sample.prepare_noise(prompt.latent, prompt.seed, prompt.batch_index)
        self.full = self.run([None] * self.steps)

    def run(
        self, plan: Plan, replayed: Container[int] = (), until: int | None = None, around: Callable[..., Any] | None = None
    ) -> Trajectory:
        """Sample.

        Args:
            plan: One row a step.
            replayed: Steps whose predictions are taken from the full run.
            until: Stop at the beginning of this step; the latent there is the last one in `entered`.
            around: Wraps every call of the model: a wrapper of the host's type APPLY_MODEL.
        """
        model = attach(self.model, Config(policy=Fixed(tuple(plan))), quiet=True)
        model.remove_additional_models("multigpu")  # what is measured is both sides of guidance in one call, on one GPU
        trajectory = Trajectory()
        for wrapper_type, wrapper in (
            (WrappersMP.SAMPLER_SAMPLE, functools.partial(self._sample, trajectory)),
            (WrappersMP.PREDICT_NOISE, functools.partial(self._evaluate, trajectory, until)),
            (WrappersMP.CALC_COND_BATCH, functools.partial(self._predict, trajectory, replayed)),
        ):
            model.add_wrapper_with_key(wrapper_type, _KEY, wrapper)
        if around is not None:
            model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, around)
        prompt = self.prompt
        with contextlib.suppress(_Enough):
            comfy.sample.sample(
                model, self.noise, prompt.steps, prompt.cfg, prompt.sampler, prompt.scheduler, prompt.positive, prompt.negative,
                prompt.latent, denoise=prompt.denoise, noise_mask=prompt.noise_mask, disable_pbar=True, seed=prompt.seed,
            )
        handle = handle_of(model)
        assert handle is not None
        trajectory.record = handle.runs()[-1]
        self.count += 1
        self.calls += sum(trajectory.record["calls"])
        return trajectory

    def _sample(self, trajectory: Trajectory, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = executor(*args, **kwargs)
        _reach(trajectory, self.steps, result)  # the host decodes its own result: this is the sampler's
        trajectory.predicted.pop()
        return result

    def _evaluate(
        self, trajectory: Trajectory, until: int | None,
        executor: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any], *args: Any, **kwargs: Any,
    ) -> Tensor:
        step = model_options["transformer_options"][KEY].step
        _reach(trajectory, step, x)
        if until is not None and step >= until:
            raise _Enough
        prediction: Tensor = executor(x, timestep, model_options, *args, **kwargs)
        if not self.count:
            trajectory.estimates.append((step, _kept(prediction)))
        return prediction

    def _predict(
        self, trajectory: Trajectory, replayed: Container[int],
        executor: Any, model: Any, conds: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any], *args: Any,
    ) -> list[Tensor]:
        step = model_options["transformer_options"][KEY].step
        before = trajectory.predicted[step]
        if step not in replayed:
            predictions = list(executor(model, conds, x, timestep, model_options, *args))
            before.append([] if self.count else [_kept(one) for one in predictions])
            return predictions
        if len(before) >= len(self.full.predicted[step]):
            raise ValueError(f"The sampler {self.prompt.sampler} evaluates step {step} more often than in the full run: it "
                             "cannot be profiled. Choose another one.")
        before.append(self.full.predicted[step][len(before)])
        return [one.to(x.device, copy=True) for one in before[-1]]

    def forget(self, replayed: int = 0) -> None:
        """Keep of the full run its result alone, and what replays of so many first steps need: that of a long video is large.

        Afterwards a run has `errors`, but no `distances`.
        """
        self.full.predicted[replayed:] = [[] for _ in self.full.predicted[replayed:]]
        self.full.entered, self.full.estimates = self.full.entered[-1:], []

    def distances(self, trajectory: Trajectory) -> Tensor:
        """Root mean square distance of every entered latent to the full run's, [steps seen, B], float64 on the CPU."""
        pairs = zip(trajectory.entered, self.full.entered, strict=False)
        return torch.stack([(one.double() - other.double()).flatten(1).square().mean(1).sqrt() for one, other in pairs])

    def errors(self, trajectory: Trajectory) -> Tensor:
        """Squared error of every result as a share of the variance of the full run's, [B], float64 on the CPU."""
        full = self.full.result.double().flatten(1)
        return (trajectory.result.double().flatten(1) - full).square().mean(1) / full.var(1)


def _reach(trajectory: Trajectory, step: int, x: Tensor) -> None:
    while len(trajectory.predicted) <= step:
        trajectory.entered.append(_kept(x))
        trajectory.predicted.append([])


def _kept(value: Tensor) -> Tensor:
    """A copy on the CPU: a run of a long video would fill the GPU. It is exact, so a replay of it is."""
    return value.to("cpu", copy=True)
