"""A quality in force: the guard decides which steps reuse; off, at N = 1 and under `paper` it changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from harness import STEPS, accelerate, every_case, every_family, last_run, model_of, reused_steps, runs
from tiny import CASES, Case, count_calls, sample

from blockdance_core import streams
from blockdance_core.config import QUALITIES

pytestmark = pytest.mark.smoke
GUARDED = {"preset": "auto", "quality": "draft", "group_size": 2}


@every_case
def test_guard_that_accepts_everything_skips_all_blocks_behind_its_lead(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(case)
    monkeypatch.setitem(QUALITIES, "draft", math.inf)
    accelerated = accelerate(model, **GUARDED)
    totals: list[list[int]] = []
    with count_calls(case.blocks(model.model.diffusion_model)) as counts:
        result = sample(accelerated, case, steps=STEPS, callback=lambda *_: totals.append(list(counts)))
    run = last_run(accelerated)
    assert torch.isfinite(result).all()
    assert run["fallbacks"] == {}
    assert run["warnings"] == []
    assert reused_steps(run) == list(range(2, STEPS)), "two stored steps give the first error"
    assert run["config"]["quality"] == "draft"
    assert run["config"]["boundary_label"] == "the whole model"
    assert run["cached_bytes"] <= run["predicted_bytes"]
    assert [now - then for now, then in zip(totals[5], totals[4], strict=True)] == [0] * case.depth


@every_case
def test_guard_that_accepts_nothing_computes_everything_bit_by_bit(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(case)
    monkeypatch.setitem(QUALITIES, "draft", 0.0)
    accelerated = accelerate(model, **GUARDED)
    assert torch.equal(sample(accelerated, case, steps=STEPS), sample(model, case, steps=STEPS))
    assert reused_steps(last_run(accelerated)) == []
    assert last_run(accelerated)["decisions"][-1] == "compute", "nothing is stored for steps that do not come"
    assert last_run(accelerated)["fallbacks"] == {}


@every_family
def test_strict_stays_close_whatever_the_model_predicts_and_however_large_its_noise_is(case: Case) -> None:
    """Random weights, which are hard to forecast: mostly little is reused, but where it is, it is right."""
    model = model_of(case)
    full, near = (sample(one, case, steps=30) for one in (model, accelerate(model, preset="auto", quality="strict")))
    assert float((near - full).norm() / full.norm()) < 0.1


@every_family
def test_switched_off_a_quality_changes_nothing(case: Case) -> None:
    model = model_of(case)
    full = sample(model, case, steps=STEPS)
    for settings in ({"enabled": False}, {"group_size": 1}):
        assert torch.equal(sample(accelerate(model, **{**GUARDED, **settings}), case, steps=STEPS), full)


def test_published_method_is_left_as_it_is() -> None:
    case = CASES["sd3"]
    model = model_of(case)
    plain, guarded = (accelerate(model, preset="paper", quality=quality) for quality in ("off", "near-lossless"))
    assert torch.equal(sample(plain, case, steps=STEPS), sample(guarded, case, steps=STEPS))
    assert last_run(guarded)["config"]["quality"] == "off"


def test_guard_turns_planned_reuse_into_compute_and_what_it_computes_serves_the_next_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CASES["sd3"]
    model = model_of(case)
    monkeypatch.setitem(QUALITIES, "near-lossless", 0.0)
    monkeypatch.setitem(QUALITIES, "draft", math.inf)
    strict, loose, free = (
        accelerate(model, group_size=4, forecast="taylor", quality=quality) for quality in ("near-lossless", "draft", "off")
    )
    for accelerated in (strict, loose, free):
        sample(accelerated, case, steps=STEPS)
    assert reused_steps(last_run(strict)) == []
    assert reused_steps(last_run(loose)) == [5, 6, 8], "a line has been measured from the third step on"
    assert reused_steps(last_run(free)) == [4, 5, 6, 8]
    assert "cache" in last_run(strict)["decisions"]


def test_residual_that_does_not_fit_its_input_is_not_watched_and_never_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["sd3"]
    monkeypatch.setattr(streams, "_fits", lambda *_: False)
    monkeypatch.setitem(QUALITIES, "draft", math.inf)
    accelerated = accelerate(model_of(case), forecast="taylor", quality="draft")
    assert torch.equal(sample(accelerated, case, steps=STEPS), sample(model_of(case), case, steps=STEPS))
    assert reused_steps(last_run(accelerated)) == []
    assert any("cannot be watched" in text for text in last_run(accelerated)["warnings"])


@every_family
def test_second_run_is_as_the_first(case: Case) -> None:
    accelerated = accelerate(model_of(case), **GUARDED)
    first, second = (sample(accelerated, case, steps=STEPS) for _ in range(2))
    assert torch.equal(first, second)
    assert runs(accelerated)[0]["decisions"] == runs(accelerated)[1]["decisions"]
