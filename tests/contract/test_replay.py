"""Invariant 2: a full run's own features, injected at any boundary, give the full run bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from harness import every_case, model_of
from tiny import CASES, Case, count_calls, fake_control, record_outputs, sample

from blockdance_core import families
from blockdance_core.interception import Feature, cloned, intercept, taps

pytestmark = pytest.mark.smoke


class Replay:
    """Injects recorded outputs, call by call; a call that has to compute does, and its outputs are dropped."""

    def __init__(self, recorded: dict[int, list[Feature]]) -> None:
        self.recorded = {tap: list(features) for tap, features in recorded.items()}
        self.injected = 0

    def at_input(self, feature: Feature | None, obstacle: str | None) -> dict[int, Feature] | None:
        assert feature is not None
        now = {tap: cloned(features.pop(0)) for tap, features in self.recorded.items()}
        self.injected += obstacle is None
        return now if obstacle is None else None

    def at_output(self, index: int, passage: Any) -> None:
        raise AssertionError("a skipped or unobserved block ran")


def replaying(model: ModelPatcher, outputs: list[list[Any]], boundary: int) -> tuple[ModelPatcher, Replay]:
    blocks = families.find(model.model.diffusion_model).blocks
    replay = Replay({tap: [blocks[tap].returned(output) for output in outputs[tap]] for tap in taps(blocks, boundary)})

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        with intercept(blocks, replay, boundary=boundary):
            return executor(*args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "replay", wrapper)
    return clone, replay


def check(case: Case, **settings: Any) -> None:
    model = model_of(case)
    blocks = case.blocks(model.model.diffusion_model)
    assert [block.module for block in families.find(model.model.diffusion_model).blocks] == blocks
    with record_outputs(blocks) as outputs:
        full = sample(model, case, steps=2, **settings)
    calls = len(outputs[0])
    for boundary in range(case.depth):
        replaying_model, replay = replaying(model, outputs, boundary)
        with count_calls(blocks) as counts:
            replayed = sample(replaying_model, case, steps=2, **settings)
        assert torch.equal(replayed, full), f"boundary {boundary}"
        assert replay.injected >= calls / 2, "at most the first step has to compute"
        assert counts == [calls - replay.injected] * (boundary + 1) + [calls] * (case.depth - 1 - boundary)


@every_case
def test_replay_at_every_boundary_is_bit_identical(case: Case) -> None:
    check(case)


@every_case
def test_replay_of_split_calls_in_a_batch_is_bit_identical(case: Case) -> None:
    check(case, batch=case.rows(2), different_lengths=True)


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.control], ids=lambda case: case.name)
def test_replay_with_control_is_bit_identical(case: Case) -> None:
    check(case, control=fake_control(case))
