"""BlockDanceReport: defined for every model, JSON, and complete."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from comfy import model_management
from harness import STEPS, model_of
from tiny import CASES, sample

pytestmark = pytest.mark.smoke

KEYS = {
    "schema_version", "steps", "sigmas", "evaluations", "window", "decisions", "boundary", "blocks_total", "blocks_run",
    "reused_calls", "fallbacks", "dit_ms", "cached_bytes", "model_family", "warnings", "config",
}
PER_STEP = ("decisions", "boundary", "blocks_run", "dit_ms")
sd3 = CASES["sd3"]


def accelerated(nodes: dict[str, Any], **values: Any) -> Any:
    defaults = {"enabled": True, "preset": "custom", "group_size": 2, "window": "steps", "start_percent": 0.25,
                "end_percent": 1.0}
    return nodes["BlockDanceAccelerate"].execute(model_of(sd3), **{**defaults, **values}).result[0]


def report(nodes: dict[str, Any], model: Any) -> dict[str, Any]:
    latent = {"samples": torch.zeros(1, 16, 8, 8), "noise_mask": None}
    output = nodes["BlockDanceReport"].execute(model, latent)
    passed, image, text = output.result
    assert passed is latent
    assert image.ndim == 4
    assert image.shape[0] == 1
    assert image.shape[-1] == 3
    assert image.dtype == torch.float32
    assert 0 <= float(image.min()) < float(image.max()) <= 1
    found = json.loads(text)
    assert set(found) >= KEYS | {"runs"}
    for run in [found, *found["runs"]]:
        assert set(run) >= KEYS
        for key in PER_STEP:
            assert len(run[key]) == run["steps"]
    assert output.ui is not None
    return found


def test_accelerated_run(nodes: dict[str, Any]) -> None:
    model = accelerated(nodes)
    sample(model, sd3, steps=STEPS)
    found = report(nodes, model)
    assert found["decisions"] == ["compute"] * 3 + ["cache", "reuse"] * 3 + ["compute"]
    assert found["boundary"] == [None] * 3 + [5] * 6 + [None]
    assert found["blocks_run"] == [8] * 4 + [2, 8, 2, 8, 2, 8]
    assert found["window"]["text"] == "window covers 7 of 10 steps"
    assert (found["evaluations"], found["reused_calls"], found["blocks_total"]) == (10, 3, 8)
    assert len(found["sigmas"]) == STEPS + 1
    assert found["cached_bytes"] > 0
    assert found["model_family"] == "SD3"
    assert found["config"]["group_size"] == 2
    assert found["config"]["enabled"] is True
    assert len(found["runs"]) == 1


@pytest.mark.parametrize("values", [{"enabled": False}, {"group_size": 1}])
def test_disabled_run_has_every_key(nodes: dict[str, Any], values: dict[str, Any]) -> None:
    model = accelerated(nodes, **values)
    sample(model, sd3, steps=STEPS)
    found = report(nodes, model)
    assert found["decisions"] == ["compute"] * STEPS
    assert found["blocks_run"] == [8] * STEPS
    assert found["reused_calls"] == found["cached_bytes"] == 0
    assert min(found["dit_ms"]) > 0
    assert found["config"]["group_size"] == 1


def test_models_without_a_run_are_defined_and_say_why(nodes: dict[str, Any]) -> None:
    plain = report(nodes, model_of(sd3))
    assert (plain["steps"], plain["runs"]) == (0, [])
    assert "not accelerated" in plain["warnings"][0]
    fresh = report(nodes, accelerated(nodes))
    assert (fresh["steps"], fresh["runs"]) == (0, [])
    assert "not sampled" in fresh["warnings"][0]


def test_several_runs_of_one_model_are_all_there_and_the_last_is_on_top(nodes: dict[str, Any]) -> None:
    model = accelerated(nodes)
    for steps in (10, 12, 14):
        sample(model.clone(), sd3, steps=steps)
    found = report(nodes, model)
    assert [run["steps"] for run in found["runs"]] == [10, 12, 14]
    assert {key: found[key] for key in KEYS} == {key: found["runs"][-1][key] for key in KEYS}


def test_interrupted_run_is_reported(nodes: dict[str, Any]) -> None:
    model = accelerated(nodes)

    def interrupt(step: int, *_: Any) -> None:
        if step == 5:
            raise model_management.InterruptProcessingException

    with pytest.raises(model_management.InterruptProcessingException):
        sample(model, sd3, steps=STEPS, callback=interrupt)
    found = report(nodes, model)
    assert found["completed"] is False
    assert found["blocks_run"][6:] == [0] * 4


def test_one_summary_line_goes_to_the_console_and_to_the_progress_text(
    nodes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import sys

    notify = sys.modules["blockdance_core.host.notify"]
    texts: list[str] = []
    events: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(notify, "progress_text", lambda text, node_id: texts.append(text))
    monkeypatch.setattr(notify, "send", lambda name, data: events.append((name, data)))
    with caplog.at_level("INFO"):
        sample(accelerated(nodes), sd3, steps=STEPS)
    assert len(texts) == 1
    for part in ("SD3", "window covers 7 of 10 steps", "3 reused", "ms"):
        assert part in texts[0]
    assert caplog.text.count("BlockDance:") == 1
    steps = [data["step"] for name, data in events if name == "progress"]
    assert steps == list(range(STEPS))
    assert [name for name, _ in events][-1] == "run"
    json.dumps(events, allow_nan=False)
