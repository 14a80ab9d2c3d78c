"""What the composition tests share: the plain restatement of a run of any make-up, and the node in both places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from contract.reference import Reference, plan
from harness import STEPS, accelerate, assert_close, distance, last_run
from tiny import Case, sample
from tiny.case import normal
from torch import Tensor

Patch = Callable[[ModelPatcher], ModelPatcher]
Streams = Callable[[int, int], object]
BOUNDARY = 5  # the recommended one of eight blocks


class InStreams(Reference):
    """The restatement of a run in whose middle something changes: `streams` says what a call at a step is, from 1.

    What was stored for one is never reused for another. None leaves it to the reference: calls in order, with and
    without control residuals.
    """

    streams: Streams | None = None
    number = 0

    def callback(self, step: int, *args: Any) -> None:
        super().callback(step, *args)
        self.number = 0

    def _call(self, *args: Any) -> None:
        super()._call(*args)
        self.number += 1
        if self.streams is not None:
            self.control, self.calls = self.streams(self.step, self.number), 0


def restated(
    case: Case, model: ModelPatcher, *, forecast: str = "taylor", group_size: int = 2, boundary: int = BOUNDARY,
    streams: Streams | None = None, run: Callable[..., Tensor] = sample, **settings: Any,
) -> Tensor:
    """What `accelerate` with these settings should give, from a model without it."""
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
    reference = InStreams(case, forecast, boundary, sigmas, plan(STEPS, 0.25, 1.0, group_size))
    reference.streams = streams
    with reference.watch(model):
        return run(model, case, steps=STEPS, callback=reference.callback, **settings)


def check_both_orders(
    case: Case, model: ModelPatcher, patch: Patch, *, forecast: str = "taylor", calls: int = 1, **settings: Any
) -> None:
    """Another node before and after Accelerate: both as restated, every reuse step reused, no call more."""
    expected = restated(case, patch(model), forecast=forecast, **settings)
    full = sample(patch(model), case, steps=STEPS, **settings)
    assert distance(full, expected) > 1e-3
    assert distance(full, sample(model, case, steps=STEPS, **settings)) > 1e-3, "the patch has an effect"
    for accelerated in (accelerate(patch(model), forecast=forecast), patch(accelerate(model, forecast=forecast))):
        assert_close(expected, sample(accelerated, case, steps=STEPS, **settings))
        run = last_run(accelerated)
        assert run["calls"] == [calls] * STEPS
        assert (run["reused_steps"], run["reused_calls"], run["fallbacks"]) == (3, 3 * calls, {})


def lora_of(model: ModelPatcher, strength: float = 1.0) -> dict[str, Tensor]:
    """A LoRA of rank 2 on every linear layer of the blocks, named as trainers name it."""
    lora: dict[str, Tensor] = {}
    for key, weight in model.model.state_dict().items():
        if weight.ndim == 2 and "blocks." in key and key.endswith(".weight"):
            name, (out, into) = key.removesuffix(".weight"), weight.shape
            lora[f"{name}.lora_up.weight"] = strength * normal((out, 2), f"up {key}", 0)
            lora[f"{name}.lora_down.weight"] = normal((2, into), f"down {key}", 0) * into**-0.5
    assert lora
    return lora


def sigmas_of(model: ModelPatcher, steps: int = STEPS) -> Tensor:
    """The sigmas that `sample` runs on."""
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    assert isinstance(sigmas, torch.Tensor)
    return sigmas


def in_force(model: ModelPatcher, *ranges: tuple[float, float]) -> Streams:
    """A call of a step, in the ranges of noise level that hold the step, as the host decides it."""
    sigmas, percent_to_sigma = sigmas_of(model), model.get_model_object("model_sampling").percent_to_sigma
    limits = [(percent_to_sigma(start), percent_to_sigma(end)) for start, end in ranges]
    return lambda step, call: (call, *(bool(end <= sigmas[step]) and bool(sigmas[step] <= start) for start, end in limits))
