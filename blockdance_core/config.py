"""What the user asked for, validated: `Config`; and what it means for one model: `Effective`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from blockdance_core.forecast import FORECASTS

if TYPE_CHECKING:
    from blockdance_core.schedule import Schedule

PRESETS = ("auto", "paper", "custom")
WINDOWS = ("noise_level", "steps")
CACHE_DEVICES = ("auto", "gpu", "cpu")
QUALITIES = {"off": math.inf, "strict": 0.1, "near-lossless": 0.2, "balanced": 0.3, "draft": 0.45, "sketch": 0.8}
"""Largest error of a forecast that is injected: a share of the slope, or of what the blocks contribute (root mean square), in
units of what a step accepts (`host.levels.accepted_errors`). Measured: docs/benchmarks.md."""
RECOMMENDED = -1
"""The value of `boundary` that stands for the model family's recommended one."""
FEW_STEPS = 8
"""`auto` and `paper` compute everything when the noise level falls as fast as in a run of this many steps or fewer."""


class ConfigError(ValueError):
    """A setting is out of its range; the message names the setting, the value and the range."""


@runtime_checkable
class Policy(Protocol):
    """What says, in place of preset and window, which steps reuse; see `policy/`."""

    @property
    def name(self) -> str:
        """For messages and the report."""

    @property
    def boundary(self) -> int | None:
        """The largest boundary that it may choose, the number of blocks for the whole model; None if it never reuses."""

    @property
    def wanted(self) -> float:
        """The share of the time that it may save; 0 where N says so."""

    def check(self, family: str, depth: int) -> None:
        """Raise a `ConfigError` unless it is for a model of this family and depth."""

    def schedule(self, levels: Sequence[float], sampler: str, group_size: int) -> Schedule:
        """The plan of a run.

        Args:
            levels: Shares of the noise schedule, see `schedule.build`.
            sampler: Name of the sampler.
            group_size: N, the speed that is wanted, 2 or more.
        """


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of one Accelerate node.

    Attributes:
        enabled: False computes every block of every step.
        preset: `auto` takes the family's recommended values, `paper` the published method, `custom` the fields below.
        group_size: N, steps per group of one cache step and N-1 reuse steps; 1 is off.
        start_percent: Start of the window, share 0..1, inclusive.
        end_percent: End of the window, share 0..1, exclusive.
        window: What the two shares measure: the host's `noise_level` or the executed `steps`.
        boundary: Last block that is skipped, 0-based; -1 for the recommended one.
        forecast: What is injected at a reuse step, see `forecast.py`.
        cache_device: Where features are kept.
        policy: Says which steps reuse what, in place of everything but `enabled`, N, `cache_device` and `quality`.
        quality: How far a forecast may be off before a step is computed instead, see `guard.py`; `off` for no limit.

    Raises:
        ConfigError: A value is out of its range.
    """

    enabled: bool = True
    preset: str = "auto"
    group_size: int = 2
    start_percent: float = 0.40
    end_percent: float = 0.95
    window: str = "noise_level"
    boundary: int = RECOMMENDED
    forecast: str = "taylor"
    cache_device: str = "auto"
    policy: Policy | None = None
    quality: str = "off"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("preset", PRESETS), ("window", WINDOWS), ("forecast", FORECASTS), ("cache_device", CACHE_DEVICES),
            ("quality", QUALITIES),
        ):
            _require(getattr(self, name) in tuple(allowed), name, getattr(self, name), "one of " + ", ".join(allowed))
        _require(_is_int(self.group_size) and self.group_size >= 1, "group_size", self.group_size,
                 "a whole number >= 1 (1 = off)")
        _require(_is_int(self.boundary) and self.boundary >= RECOMMENDED, "boundary", self.boundary,
                 "a 0-based block index, or -1 for the recommended one")
        for name in ("start_percent", "end_percent"):
            value = getattr(self, name)
            _require(_is_number(value) and 0.0 <= value <= 1.0, name, value, "a share from 0 to 1")
        if self.active and self.policy is None and self.start_percent >= self.end_percent:
            raise ConfigError(
                f"start_percent = {self.start_percent} must be below end_percent = {self.end_percent}: "
                "the window between them is where steps are reused. Lower the start or raise the end."
            )
        if self.policy is not None and not isinstance(self.policy, Policy):
            raise ConfigError(
                f"policy is a {type(self.policy).__name__}: expected a policy. Connect the output of Load BlockDance Policy, "
                "or nothing."
            )

    @property
    def active(self) -> bool:
        """Whether any step could be reused at all."""
        return self.enabled and self.group_size > 1

    @property
    def guarded(self) -> bool:
        """Whether the forecasts are watched. The published method, which makes none, is left as it is."""
        makes = self.preset == "auto" or (self.preset == "custom" and self.forecast != "hold")
        return self.active and self.quality != "off" and (self.policy is not None or makes)

    @property
    def guard_alone(self) -> bool:
        """Whether the guard alone decides which steps reuse."""
        return self.guarded and self.policy is None and self.preset == "auto"


@dataclasses.dataclass(frozen=True)
class Defaults:
    """The recommended values of a model family.

    Attributes:
        paper_window: Window of the `paper` preset, shares of executed steps.
        window: Window of the `auto` preset, shares of the noise level.
        boundary_share: The boundary as a share of depth: round(share * L) - 1.
        forecast: Forecast of the `auto` preset.
        source: `measured` or `by analogy`, with where from.
    """

    paper_window: tuple[float, float] = (0.40, 0.95)
    window: tuple[float, float] = (0.40, 0.95)
    boundary_share: float = 0.75
    forecast: str = "taylor"
    source: str = "by analogy with the published models"

    def boundary(self, depth: int) -> int:
        """The recommended boundary of a model of `depth` blocks, 0-based (28 -> 20)."""
        return max(0, min(depth - 1, round(self.boundary_share * depth) - 1))


@dataclasses.dataclass(frozen=True)
class Effective:
    """The values in force for one model: `Config` after preset, family and depth have spoken.

    `policy` names the policy that decides in place of preset, window and forecast, if there is one and it is in force, and
    `policy_cut` is the share of the time that it may save, 0 where N says so. The boundary is then the largest that it may
    choose. With a `quality`, the guard decides which of the planned steps reuse.
    """

    preset: str
    group_size: int
    start_percent: float
    end_percent: float
    window: str
    boundary: int
    depth: int
    forecast: str
    cache_device: str
    policy: str | None = None
    policy_cut: float = 0.0
    quality: str = "off"

    def as_dict(self) -> dict[str, Any]:
        """The values as plain JSON data, with the boundary also in words."""
        return dataclasses.asdict(self) | {"boundary_label": self.boundary_label}

    @property
    def boundary_label(self) -> str:
        """For example `21 of 28 blocks`: how much of the model a reuse step skips."""
        return "the whole model" if self.boundary == self.depth else f"{self.boundary + 1} of {self.depth} blocks"


def resolve(config: Config, defaults: Defaults, depth: int) -> Effective:
    """Apply precedence to the settings of one model: off, the policy, the preset, the single values.

    Args:
        config: What the user asked for.
        defaults: The family's recommended values.
        depth: L, the number of blocks of the model.

    Raises:
        ConfigError: The boundary is in force, and outside the depth of the model.
    """
    if config.boundary >= depth and config.active and config.preset == "custom" and config.policy is None:
        raise ConfigError(
            f"boundary = {config.boundary} is outside this model: it has {depth} blocks, so the range is 0 to "
            f"{depth - 1}, or -1 for the recommended {defaults.boundary(depth)}."
        )
    window, forecast, boundary = config.window, config.forecast, config.boundary if config.boundary < depth else RECOMMENDED
    start, end = config.start_percent, config.end_percent
    if config.preset == "paper":
        (start, end), window, forecast, boundary = defaults.paper_window, "steps", "hold", RECOMMENDED
    elif config.preset == "auto":
        (start, end), window, forecast, boundary = defaults.window, "noise_level", defaults.forecast, RECOMMENDED
    policy = config.policy if config.active else None
    if policy is not None and policy.boundary is not None:
        boundary = policy.boundary
    elif config.guard_alone:
        start, end, boundary = 0.0, 1.0, depth
    return Effective(
        preset=config.preset,
        group_size=config.group_size if config.enabled else 1,
        start_percent=start,
        end_percent=end,
        window=window,
        boundary=defaults.boundary(depth) if boundary == RECOMMENDED else boundary,
        depth=depth,
        forecast=forecast,
        cache_device=config.cache_device,
        policy=policy.name if policy is not None else None,
        policy_cut=policy.wanted if policy is not None else 0.0,
        quality=config.quality if config.guarded else "off",
    )


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{name} = {value!r} is not valid: expected {expected}.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
