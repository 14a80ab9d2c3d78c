"""Invariant 6: two runs share nothing; a second queue of the same prompt is as fast and as faithful as the first."""

from __future__ import annotations

import torch
from harness import STEPS, accelerate, distance, every_family, model_of, runs
from tiny import Case, sample


@every_family
def test_a_second_run_equals_a_fresh_one(case: Case) -> None:
    model = model_of(case)
    used = accelerate(model, forecast="taylor")
    first = sample(used, case, steps=STEPS, seed=1)
    other = sample(used, case, steps=STEPS, seed=2)
    assert torch.equal(other, sample(accelerate(model, forecast="taylor"), case, steps=STEPS, seed=2))
    assert torch.equal(first, sample(used, case, steps=STEPS, seed=1))
    assert distance(first, other) > 1e-2
    assert [run["reused_steps"] for run in runs(used)] == [3, 3, 3]
    assert len({str(run["fallbacks"]) for run in runs(used)}) == 1


@every_family
def test_a_run_with_another_batch_length_and_steps_in_between_changes_nothing(case: Case) -> None:
    used = accelerate(model_of(case), forecast="taylor")
    first = sample(used, case, steps=STEPS)
    sample(used, case, steps=12, batch=case.rows(3), different_lengths=True)
    sample(used, case, steps=STEPS, cfg=1.0, denoise=0.5)
    assert torch.equal(first, sample(used, case, steps=STEPS))
