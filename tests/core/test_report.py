"""Records, their summary line and the timeline picture."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from blockdance_core import plots
from blockdance_core.config import Config
from blockdance_core.plots import timeline
from blockdance_core.report import empty_record, report, run_record, step_medians, summary
from blockdance_core.session import Session
from blockdance_core.timing import Stopwatch


def record(sigmas: list[float]) -> dict[str, Any]:
    return run_record(Session(Config(), sigmas, sigmas))


@pytest.mark.parametrize("sigmas", [[], [1.0], [1.0, 0.0], [float("nan"), float("inf"), 0.0]])
def test_a_run_without_a_call_is_a_record_and_json(sigmas: list[float]) -> None:
    run = record(sigmas)
    assert run["steps"] == max(len(sigmas) - 1, 0)
    assert run["model_family"] is None
    json.dumps(run, allow_nan=False)
    assert summary(run).startswith("BlockDance: ")
    assert timeline(run).shape == (300, 960, 3)


def test_records_of_no_run_and_of_a_run_have_the_same_keys() -> None:
    assert set(empty_record("why")) == set(record([1.0, 0.0]))
    assert report([], "why")["warnings"] == ["why"]
    assert report([], "why")["runs"] == []
    one, two = record([1.0, 0.0]), record([1.0, 0.5, 0.0])
    found = report([one, two], "")
    assert found["steps"] == 2
    assert found["runs"] == [one, two]


def test_totals_add_up_the_runs() -> None:
    one, two = record([1.0, 0.0]), record([1.0, 0.5, 0.0])
    one |= {"calls": [2], "block_runs": 16, "block_runs_full": 16, "dit_ms": [5.0], "fallbacks": {"a": 1}}
    two |= {"calls": [1, 1], "block_runs": 10, "block_runs_full": 16, "dit_ms": [4.0, 1.0], "reused_steps": 1,
            "reused_calls": 1, "fallbacks": {"a": 2, "b": 1}}
    assert report([one, two], "")["totals"] == {
        "runs": 2, "steps": 3, "reused_steps": 1, "calls": 4, "reused_calls": 1, "dit_ms": 10.0,
        "cut_arithmetic": pytest.approx(6 / 32, abs=1e-4), "fallbacks": {"a": 3, "b": 1},
    }
    assert report([], "why")["totals"]["runs"] == 0


@pytest.mark.parametrize("steps", [1, 2, 20, 1000])
def test_timeline_is_a_picture_for_any_number_of_steps(steps: int) -> None:
    run = record([1 - k / steps for k in range(steps + 1)])
    run["decisions"] = [("compute", "cache", "reuse", "mixed")[k % 4] for k in range(steps)]
    run["dit_ms"] = [float(k) for k in range(steps)]
    run["config"] = {"group_size": 2, "boundary_label": "6 of 8 blocks", "forecast": "hold"}
    picture = timeline(run)
    assert picture.shape == (300, 960, 3)
    assert picture.dtype == np.float32
    assert 0 <= picture.min() < picture.max() <= 1


@pytest.mark.parametrize(("settings", "said"), [
    ({}, "N = 2, 6 of 8 blocks, hold"), ({"policy": "mine", "quality": "off"}, "N = 2, policy mine"),
    ({"policy": "mine", "policy_cut": 0.6}, "cut 60%, policy mine"),
    ({"policy": None, "quality": "draft"}, "draft, 6 of 8 blocks"), ({"group_size": 1}, "every step computed"),
])
def test_heading_of_a_timeline_names_what_decided(settings: dict[str, Any], said: str) -> None:
    run = record([1.0, 0.5, 0.0])
    run["config"] = {"group_size": 2, "boundary_label": "6 of 8 blocks", "forecast": "hold", **settings}
    assert said in plots._heading(run)


def test_medians_are_of_computed_and_of_reused_steps() -> None:
    run = record([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    run["decisions"] = ["compute", "cache", "reuse", "mixed", "reuse"]
    run["dit_ms"] = [10.0, 20.0, 3.0, 7.0, 5.0]
    assert step_medians(run) == {"compute": 15.0, "reuse": 4.0}
    assert step_medians(record([]))["compute"] is None


def test_stopwatch_adds_up_the_spans_of_a_step() -> None:
    watch = Stopwatch()
    for step in (0, 0, 2):
        with watch.span(step, torch.device("cpu")):
            pass
    found = watch.milliseconds(3)
    assert len(found) == 3
    assert found[1] == 0 < found[0]
    assert found[2] > 0
