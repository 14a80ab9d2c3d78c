"""What the core, contract, guarantee and node tests share: accelerate a tiny model, read its last run, compare."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from tiny import CASES, Case
from torch import Tensor

from blockdance_core.config import Config
from blockdance_core.host.attach import attach, handle_of

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_family = pytest.mark.parametrize(
    "case", {case.family: case for case in reversed(CASES.values())}.values(), ids=lambda case: case.name
)
"""The first case of each family, for what depends on the engine and the kind of model alone."""
FORECASTS = ("hold", "delta", "taylor")
STEPS = 10
WINDOW: dict[str, Any] = {"preset": "custom", "window": "steps", "start_percent": 0.25, "end_percent": 1.0}
"""Of 10 steps, 3..9 are inside; the last is computed: groups of two are (3, 4), (5, 6), (7, 8)."""
REUSED = [4, 6, 8]


@functools.cache
def model_of(case: Case) -> ModelPatcher:
    """One model per case, shared by all tests: whoever leaves something on it makes another test fail."""
    return case.build()


def accelerate(model: ModelPatcher, **settings: Any) -> ModelPatcher:
    """An accelerated clone; by default groups of two in the window above, at the recommended boundary."""
    return attach(model, Config(**{**WINDOW, "group_size": 2, "forecast": "hold", **settings}))


def runs(model: ModelPatcher) -> list[dict[str, Any]]:
    """Records of the finished runs of an accelerated model, oldest first."""
    handle = handle_of(model)
    assert handle is not None
    return handle.runs()


def last_run(model: ModelPatcher) -> dict[str, Any]:
    """Record of the last run."""
    return runs(model)[-1]


def reused_steps(run: dict[str, Any]) -> list[int]:
    """Indices of the steps of which every call reused."""
    return [step for step, decision in enumerate(run["decisions"]) if decision == "reuse"]


def distance(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference, relative to the largest value."""
    return float((one - other).abs().max() / one.abs().max())


def assert_close(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> None:
    """Equal up to the rounding of another order of operations."""
    assert torch.isfinite(one).all()
    assert torch.isfinite(other).all()
    assert distance(one, other) <= tolerance
