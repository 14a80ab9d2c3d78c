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
from blockdance_core.interception import Feature, intercept


class Replay:
    """Injects the recorded outputs of one block, call by call."""

    def __init__(self, outputs: list[Any]) -> None:
        self.outputs = list(outputs)

    def at_input(self, feature: Feature | None) -> Feature | None:
        assert feature is not None
        output = self.outputs.pop(0)
        parts = output if isinstance(output, tuple) else (output,)
        return tuple(None if part is None else part.clone() for part in parts)

    def at_output(self, index: int, passage: Any) -> None:
        raise AssertionError("a skipped or unobserved block ran")


def replaying(model: ModelPatcher, outputs: list[Any], boundary: int) -> ModelPatcher:
    replay = Replay(outputs)
    blocks = families.find(model.model.diffusion_model).blocks

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        with intercept(blocks, replay, boundary=boundary):
            return executor(*args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "replay", wrapper)
    return clone


def check(case: Case, **settings: Any) -> None:
    model = model_of(case)
    blocks = case.blocks(model.model.diffusion_model)
    assert [block.module for block in families.find(model.model.diffusion_model).blocks] == blocks
    with record_outputs(blocks) as outputs:
        full = sample(model, case, steps=2, **settings)
    calls = len(outputs[0])
    for boundary in range(case.depth):
        with count_calls(blocks) as counts:
            replayed = sample(replaying(model, outputs[boundary], boundary), case, steps=2, **settings)
        assert torch.equal(replayed, full), f"boundary {boundary}"
        assert counts == [0] * (boundary + 1) + [calls] * (case.depth - 1 - boundary)


@every_case
def test_replay_at_every_boundary_is_bit_identical(case: Case) -> None:
    check(case)


@every_case
def test_replay_of_split_calls_in_a_batch_is_bit_identical(case: Case) -> None:
    check(case, batch=2, different_lengths=True)


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.control], ids=lambda case: case.name)
def test_replay_with_control_is_bit_identical(case: Case) -> None:
    check(case, control=fake_control(case))
