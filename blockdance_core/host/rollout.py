"""Sample the same prompt again and again with different plans, and compare with the full run.

A rollout may *replay* steps of the full run: the sampler gets the predictions recorded there, and the model does not run.
So any sampler, whatever it remembers, stands after k replayed steps exactly where the full run stood.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any

import comfy.sample
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from blockdance_core.config import Config
from blockdance_core.host.attach import KEY, attach, handle_of
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


@dataclasses.dataclass
class Trajectory:
    """What happened in one run.

    Attributes:
        entered: Latent at the first evaluation of each step, [B, ...]; behind them the result.
        predicted: Predictions of the clean latent, one for each evaluation of each step.
        record: The run's figures.
    """

    entered: list[Tensor] = dataclasses.field(default_factory=list)
    predicted: list[list[Tensor]] = dataclasses.field(default_factory=list)
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
    """

    def __init__(self, model: ModelPatcher, prompt: Prompt) -> None:
        self.model, self.prompt = model, prompt
        self.noise = comfy.sample.prepare_noise(prompt.latent, prompt.seed)
        self.full = self.run([None] * prompt.steps)

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
        model = attach(self.model, Config(policy=Fixed(tuple(plan))))
        trajectory = Trajectory()
        model.add_wrapper_with_key(
            WrappersMP.PREDICT_NOISE, _KEY, functools.partial(self._predict, trajectory, replayed, until)
        )
        if around is not None:
            model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, around)
        prompt = self.prompt
        with contextlib.suppress(_Enough):
            result = comfy.sample.sample(
                model, self.noise, prompt.steps, prompt.cfg, prompt.sampler, prompt.scheduler, prompt.positive, prompt.negative,
                prompt.latent, denoise=prompt.denoise, disable_pbar=True, seed=prompt.seed,
            )
            trajectory.entered.append(model.get_model_object("latent_format").process_in(result))
        handle = handle_of(model)
        assert handle is not None
        trajectory.record = handle.runs()[-1]
        return trajectory

    def _predict(
        self, trajectory: Trajectory, replayed: Container[int], until: int | None,
        executor: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any], *args: Any, **kwargs: Any,
    ) -> Tensor:
        step = model_options["transformer_options"][KEY].step
        while len(trajectory.predicted) <= step:
            trajectory.entered.append(x.clone())
            trajectory.predicted.append([])
        if until is not None and step >= until:
            raise _Enough
        before = trajectory.predicted[step]
        if step in replayed:
            prediction = self.full.predicted[step][len(before)].clone()
        else:
            prediction = executor(x, timestep, model_options, *args, **kwargs)
        before.append(prediction.clone())
        return prediction

    def distances(self, trajectory: Trajectory) -> Tensor:
        """Root mean square distance of every entered latent to the full run's, [steps seen, B]."""
        pairs = zip(trajectory.entered, self.full.entered, strict=False)
        return torch.stack([(one.double() - other.double()).flatten(1).square().mean(1).sqrt() for one, other in pairs])
