"""Invariant 4: a reuse step runs exactly the blocks behind the boundary, counted in the blocks."""

from __future__ import annotations

import pytest
import torch
from harness import REUSED, STEPS, accelerate, every_case, last_run, model_of
from tiny import CASES, Case, count_calls, sample

pytestmark = pytest.mark.smoke


def per_step(case: Case, accelerated: object, blocks: list, **settings: object) -> list[list[int]]:
    totals: list[list[int]] = []
    with count_calls(blocks) as counts:
        sample(accelerated, case, steps=STEPS, callback=lambda *_: totals.append(list(counts)), **settings)
    return [[now - before for now, before in zip(after, start, strict=True)]
            for start, after in zip([[0] * case.depth, *totals], totals, strict=False)]


@every_case
@pytest.mark.parametrize("different_lengths", [False, True], ids=["batched", "split"])
def test_reuse_steps_run_the_blocks_behind_the_boundary_alone(case: Case, different_lengths: bool) -> None:
    model = model_of(case)
    blocks = case.blocks(model.model.diffusion_model)
    calls = case.calls(different_lengths)
    for boundary in (2,) if different_lengths else (0, case.depth - 1):
        accelerated = accelerate(model, boundary=boundary)
        steps = per_step(case, accelerated, blocks, different_lengths=different_lengths)
        for step, counts in enumerate(steps):
            skipped = boundary + 1 if step in REUSED else 0
            assert counts == [0] * skipped + [calls] * (case.depth - skipped), step
        run = last_run(accelerated)
        assert run["blocks_total"] == case.depth
        assert run["blocks_run"] == [sum(counts) / calls for counts in steps]
        assert run["calls"] == [calls] * STEPS
        assert run["reused_calls"] == calls * len(REUSED)
        assert run["boundary"] == [None] * 3 + [boundary] * 6 + [None]
        assert run["cut_arithmetic"] == pytest.approx(3 / 10 * (boundary + 1) / case.depth, abs=1e-4)


def test_a_model_that_runs_its_blocks_in_a_way_of_its_own_is_computed_and_no_cut_is_claimed() -> None:
    """As a later release's WanAnimate2Model does, a WanModel whose loop calls other methods of its blocks."""
    case = CASES["wan_t2v"]
    model = case.build()
    for block in case.blocks(model.model.diffusion_model):
        block.__class__ = type("Aside", (type(block),), {"__call__": type(block).forward})
    full = sample(model, case, steps=STEPS)
    accelerated = accelerate(model, boundary=2)
    assert torch.equal(sample(accelerated, case, steps=STEPS), full)
    run = last_run(accelerated)
    assert run["fallbacks"] == {"the blocks did not run: something else answered the call": sum(run["calls"])}
    assert run["cut_arithmetic"] == run["reused_steps"] == 0
