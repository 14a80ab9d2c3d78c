"""Settings: every bad value is refused with its name, its value and the range."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from blockdance_core.config import Config, ConfigError, Defaults, resolve
from blockdance_core.policy import Fixed


@pytest.mark.parametrize(("name", "value", "expected"), [
    ("preset", "fast", "auto, paper, custom"),
    ("preset", None, "auto, paper, custom"),
    ("window", "percent", "noise_level, steps"),
    ("forecast", "linear", "taylor, taylor2, delta, hold"),
    ("forecast", "", "taylor, taylor2, delta, hold"),
    ("cache_device", "cuda", "auto, gpu, cpu"),
    ("quality", ["draft"], "off, strict"),
    ("quality", "best", "off, strict, near-lossless, balanced, draft, sketch"),
    ("group_size", 0, ">= 1"),
    ("group_size", -3, ">= 1"),
    ("group_size", 2.0, ">= 1"),
    ("group_size", True, ">= 1"),
    ("group_size", "2", ">= 1"),
    ("group_size", math.nan, ">= 1"),
    ("boundary", -2, "0-based"),
    ("boundary", 3.5, "0-based"),
    ("boundary", False, "0-based"),
    ("boundary", math.inf, "0-based"),
    ("start_percent", -0.01, "0 to 1"),
    ("start_percent", math.nan, "0 to 1"),
    ("start_percent", True, "0 to 1"),
    ("start_percent", None, "0 to 1"),
    ("end_percent", 1.01, "0 to 1"),
    ("end_percent", math.inf, "0 to 1"),
    ("end_percent", -math.inf, "0 to 1"),
    ("end_percent", "0.9", "0 to 1"),
])
def test_config_bad_value_is_refused_with_name_value_and_range(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config(**{name: value})
    for part in (name, repr(value), expected):
        assert part in str(error.value)


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (0.6, 0.5), (1.0, 0.0), (0.0, 0.0), (1.0, 1.0)])
def test_config_start_not_below_end_is_refused_with_both(start: float, end: float) -> None:
    with pytest.raises(ConfigError, match=r"start_percent = .* must be below end_percent = ") as error:
        Config(start_percent=start, end_percent=end)
    assert str(start) in str(error.value)
    assert str(end) in str(error.value)
    for off in ({"enabled": False}, {"group_size": 1}, {"policy": Fixed((None,))}):
        Config(start_percent=start, end_percent=end, **off)


def test_config_limits_are_inclusive_and_whole_numbers_are_shares() -> None:
    assert Config(start_percent=0, end_percent=1).end_percent == 1


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().group_size = 3  # type: ignore[misc]


@pytest.mark.parametrize(("settings", "active"), [
    ({}, True), ({"group_size": 1}, False), ({"enabled": False}, False), ({"group_size": 64}, True),
])
def test_active_needs_enabled_and_a_group_of_two(settings: dict[str, Any], active: bool) -> None:
    assert Config(**settings).active is active


@pytest.mark.parametrize(("depth", "boundary"), [(28, 20), (24, 17), (38, 27), (57, 42), (1, 0), (2, 1), (8, 5)])
def test_recommended_boundary_is_three_quarters_of_the_depth(depth: int, boundary: int) -> None:
    assert Defaults().boundary(depth) == boundary


def test_resolve_paper_is_the_published_method_whatever_the_widgets_say() -> None:
    config = Config(preset="paper", group_size=3, start_percent=0.1, end_percent=0.2, window="noise_level",
                    boundary=3, forecast="taylor")
    effective = resolve(config, Defaults(paper_window=(0.25, 0.95)), 28)
    assert (effective.start_percent, effective.end_percent, effective.window) == (0.25, 0.95, "steps")
    assert (effective.boundary, effective.forecast, effective.group_size) == (20, "hold", 3)
    assert effective.boundary_label == "21 of 28 blocks"


def test_resolve_auto_takes_the_family_and_custom_the_widgets() -> None:
    defaults = Defaults(window=(0.3, 0.9), boundary_share=0.5, forecast="delta")
    auto = resolve(Config(preset="auto", start_percent=0.0, boundary=1, forecast="hold", window="steps"), defaults, 8)
    assert (auto.start_percent, auto.end_percent, auto.window, auto.boundary, auto.forecast) == (
        0.3, 0.9, "noise_level", 3, "delta")
    custom = resolve(Config(preset="custom", start_percent=0.0, boundary=1, forecast="hold", window="steps"), defaults, 8)
    assert (custom.start_percent, custom.end_percent, custom.window, custom.boundary, custom.forecast) == (
        0.0, 0.95, "steps", 1, "hold")
    assert resolve(Config(preset="custom"), defaults, 8).boundary == 3


def test_resolve_disabled_is_a_group_of_one() -> None:
    assert resolve(Config(enabled=False, group_size=4), Defaults(), 8).group_size == 1


@pytest.mark.parametrize("boundary", [8, 9, 9999])
def test_resolve_boundary_outside_the_depth_names_value_and_range(boundary: int) -> None:
    with pytest.raises(ConfigError, match=rf"boundary = {boundary} .* 8 blocks, so the range is 0 to 7"):
        resolve(Config(preset="custom", boundary=boundary), Defaults(), 8)
    assert resolve(Config(preset="custom", boundary=7), Defaults(), 8).boundary == 7


@pytest.mark.parametrize("settings", [{"preset": "auto"}, {"preset": "paper"}, {"preset": "custom", "enabled": False}])
def test_resolve_boundary_that_is_not_in_force_may_be_of_a_deeper_model(settings: dict[str, Any]) -> None:
    assert resolve(Config(**settings, boundary=29), Defaults(), 8).boundary == 5
