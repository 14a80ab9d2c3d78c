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
Regime = Callable[[int, int], object]
BOUNDARY = 5  # the recommended one of eight blocks


class InRegimes(Reference):
    """The restatement of a run in whose middle something changes: nothing of one regime is reused in the next.

    `regime` says what is in force at (step, call of the step, from 1); None leaves it to the reference, which looks for
    control residuals.
    """

    regime: Regime | None = None

    def _call(self, *args: Any) -> None:
        super()._call(*args)
        if self.regime is not None:
            self.control = self.regime(self.step, self.calls)


def restated(
    case: Case, model: ModelPatcher, *, forecast: str = "taylor", group_size: int = 2, boundary: int = BOUNDARY,
    regime: Regime | None = None, run: Callable[..., Tensor] = sample, **settings: Any,
) -> Tensor:
    """What `accelerate` with these settings should give, from a model without it."""
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
    reference = InRegimes(case, forecast, boundary, sigmas, plan(STEPS, 0.25, 1.0, group_size))
    reference.regime = regime
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
