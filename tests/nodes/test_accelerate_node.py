"""BlockDanceAccelerate: its schema is API; what it does with models and values it cannot use."""

from __future__ import annotations

import math
import sys
from typing import Any

import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from harness import STEPS, model_of
from tiny import CASES, sample
from torch import nn

pytestmark = pytest.mark.smoke

DEFAULTS: dict[str, Any] = {"enabled": True, "preset": "auto", "group_size": 2}


@pytest.fixture
def accelerate(nodes: dict[str, Any]) -> Any:
    return nodes["BlockDanceAccelerate"]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What is sent to the page."""
    events: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(sys.modules["blockdance_core.host.notify"], "send", lambda *event: events.append(event))
    return events


def execute(node: Any, model: ModelPatcher, **values: Any) -> ModelPatcher:
    return node.execute(model, **{**DEFAULTS, **values}).result[0]


def test_nodes_of_the_pack(nodes: dict[str, Any]) -> None:
    assert list(nodes)[:3] == ["BlockDanceAccelerate", "BlockDanceReport", "BlockDanceLoadPolicy"]
    for node in nodes.values():
        schema = node.GET_SCHEMA()
        assert schema.description and all(one.tooltip for one in (*schema.inputs, *schema.outputs)), schema.node_id


def test_schema_ids_order_defaults_and_advanced_flags_are_the_api(accelerate: Any) -> None:
    schema = accelerate.GET_SCHEMA()
    assert [output.get_io_type() for output in schema.outputs] == ["MODEL"]
    found = [(i.id, i.get_io_type(), getattr(i, "default", None), bool(getattr(i, "advanced", None)), bool(i.optional))
             for i in schema.inputs]
    assert found[:12] == [
        ("model", "MODEL", None, False, False),
        ("enabled", "BOOLEAN", True, False, False),
        ("preset", "COMBO", "auto", False, False),
        ("group_size", "INT", 2, False, False),
        ("start_percent", "FLOAT", 0.40, True, False),
        ("end_percent", "FLOAT", 0.95, True, False),
        ("window", "COMBO", "noise_level", True, False),
        ("boundary", "INT", -1, True, False),
        ("forecast", "COMBO", "taylor", True, False),
        ("cache_device", "COMBO", "auto", True, False),
        ("policy", "BLOCKDANCE_POLICY", None, False, True),
        ("quality", "COMBO", "off", False, True),
    ]
    options = {i.id: list(i.options) for i in schema.inputs if i.get_io_type() == "COMBO"}
    assert options == {"preset": ["auto", "paper", "custom"], "window": ["noise_level", "steps"],
                       "forecast": ["taylor", "taylor2", "delta", "hold"], "cache_device": ["auto", "gpu", "cpu"],
                       "quality": ["off", "strict", "near-lossless", "balanced", "draft", "sketch"]}
    limits = {i.id: (i.min, i.max) for i in schema.inputs if i.get_io_type() in ("INT", "FLOAT")}
    assert limits["group_size"][0] == 1
    assert limits["boundary"][0] == -1
    assert limits["start_percent"] == limits["end_percent"] == (0.0, 1.0)


def test_report_schema_is_the_api(nodes: dict[str, Any]) -> None:
    schema = nodes["BlockDanceReport"].GET_SCHEMA()
    assert [(i.id, i.get_io_type()) for i in schema.inputs] == [("model", "MODEL"), ("latent", "LATENT")]
    assert [output.get_io_type() for output in schema.outputs] == ["LATENT", "IMAGE", "STRING"]


def test_accelerated_model_is_a_clone_and_the_page_is_told(accelerate: Any, sent: list) -> None:
    model = model_of(CASES["sd3"])
    result = execute(accelerate, model)
    assert result is not model
    assert result.is_clone(model)
    (name, data), = sent
    assert name == "status"
    assert data["supported"] is True
    assert data["effective"]["boundary_label"] == "6 of 8 blocks"
    assert data["effective"]["model_family"] == "SD3"
    sent.clear()
    execute(accelerate, model, group_size=1)
    assert "off" in sent[0][1]["message"]


def wrapped(diffusion_model: nn.Module) -> ModelPatcher:
    base = CASES["undeclared"].make()
    base.diffusion_model = diffusion_model
    return ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))


def unet() -> ModelPatcher:
    return wrapped(openaimodel.UNetModel(
        image_size=8, in_channels=4, model_channels=32, out_channels=4, num_res_blocks=1, channel_mult=(1, 2),
        num_heads=2, use_spatial_transformer=True, transformer_depth=[1, 1], transformer_depth_output=[1, 1, 1, 1],
        transformer_depth_middle=1, context_dim=16, device="cpu", dtype=torch.float32))


@pytest.mark.parametrize(("make", "said"), [
    (unet, "U-Net"),
    (lambda: wrapped(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))),
     "No block list found in Sequential (children: 0, 1; looked for blocks, "),
    (lambda: wrapped(nn.Identity()), "children: none"),
], ids=["unet", "unknown", "empty"])
def test_a_model_that_cannot_be_accelerated_passes_through_untouched_and_says_so(
    make: Any, said: str, accelerate: Any, sent: list, caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    before = (dict(model.model_options), dict(model.wrappers), dict(model.attachments))
    assert execute(accelerate, model) is model
    assert (dict(model.model_options), dict(model.wrappers), dict(model.attachments)) == before
    (name, data), = sent
    assert (name, data["supported"]) == ("status", False)
    assert said in data["message"]
    assert "passes through unchanged" in data["message"]
    assert said in caplog.text


@pytest.mark.parametrize(("values", "parts"), [
    ({"group_size": 0}, ("group_size", "0", ">= 1")),
    ({"group_size": -1}, ("group_size", "-1", ">= 1")),
    ({"start_percent": math.nan}, ("start_percent", "nan", "0 to 1")),
    ({"end_percent": math.nan}, ("end_percent", "nan", "0 to 1")),
    ({"start_percent": 0.95, "end_percent": 0.4}, ("start_percent", "0.95", "0.4")),
    ({"start_percent": 0.5, "end_percent": 0.5}, ("start_percent", "0.5")),
    ({"preset": "custom", "boundary": 8}, ("boundary", "8", "0 to 7")),
    ({"preset": "custom", "boundary": -2}, ("boundary", "-2", "-1")),
    ({"preset": "fast"}, ("preset", "fast", "auto, paper, custom")),
    ({"forecast": "cubic"}, ("forecast", "cubic", "taylor, taylor2, delta, hold")),
    ({"policy": object()}, ("policy is a object", "Load BlockDance Policy")),
])
def test_bad_values_are_errors_at_the_node(values: dict[str, Any], parts: tuple[str, ...], accelerate: Any) -> None:
    with pytest.raises(ValueError) as error:
        execute(accelerate, model_of(CASES["sd3"]), **values)
    for part in parts:
        assert part in str(error.value)


def test_last_block_as_boundary_and_every_preset_sample(accelerate: Any) -> None:
    case = CASES["sd3"]
    model = model_of(case)
    for values in ({"preset": "auto"}, {"preset": "paper", "group_size": 3}, {"preset": "custom", "boundary": 7}):
        assert torch.isfinite(sample(execute(accelerate, model, **values), case, steps=STEPS)).all()
    full = sample(model, case, steps=STEPS)
    assert torch.equal(sample(execute(accelerate, model, enabled=False), case, steps=STEPS), full)


