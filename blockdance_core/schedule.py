"""When to compute, cache and reuse, and at which boundary. Pure: no tensors, no host."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from blockdance_core.config import FEW_STEPS, Effective
from blockdance_core.forecast import FORECASTS, Forecast

COMPUTE, CACHE, REUSE = "compute", "cache", "reuse"
_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Step:
    """One row of a schedule.

    Attributes:
        decision: `compute`, `cache` or `reuse`.
        boundary: Last skipped block of the step's group, 0-based, or the number of blocks where the whole model is skipped;
            None on a compute step.
        group: Number of the group; a feature is valid only inside the group it was stored in. None on a compute step.
        record: Boundaries whose feature a later reuse step needs from this step.
        forecast: What a reuse step injects.
    """

    decision: str = COMPUTE
    boundary: int | None = None
    group: int | None = None
    record: tuple[int, ...] = ()
    forecast: Forecast | None = None


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The plan of one sampling run.

    Attributes:
        steps: One row per executed step.
        window: Indices of the executed steps inside the window, ascending.
        warnings: What the user should know about this plan.
        looks_at: The step at which a policy looks at the picture, and decides this one and those behind it; or None.
    """

    steps: tuple[Step, ...]
    window: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    looks_at: int | None = None

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Every boundary that the plan records at, ascending."""
        return tuple(sorted({boundary for step in self.steps for boundary in step.record}))

    @property
    def anchored(self) -> bool:
        """Whether residuals are stored, rather than outputs."""
        return any(step.forecast.anchored for step in self.steps if step.forecast)

    @property
    def needed(self) -> int:
        """Most features that a forecast takes."""
        return max((step.forecast.features for step in self.steps if step.forecast), default=0)

    @property
    def kept(self) -> int:
        """Most features that a stream ever has of one boundary, if all goes as planned."""
        if self.looks_at is not None:
            return self.needed
        return min(self.needed, sum(bool(step.record) for step in self.steps))

    def cut(self, depth: int) -> float:
        """Arithmetic cut: share of reuse steps times share of blocks skipped."""
        skipped = sum(min((step.boundary or 0) + 1, depth) for step in self.steps if step.decision == REUSE)
        return skipped / (depth * len(self.steps)) if self.steps else 0.0


@dataclasses.dataclass(frozen=True)
class Reuse:
    """One reuse step of a plan.

    Attributes:
        boundary: Last skipped block, 0-based, or the number of blocks: the whole model is skipped.
        forecast: What is injected.
    """

    boundary: int
    forecast: Forecast


Plan = Sequence["Reuse | None"]
"""How every step of a run reuses, None for one that is computed: what a calibration finds and a policy says."""


def expanded(plan: Plan, order: int | None = None) -> Plan:
    """The same plan with the expansions alone, without the weights that were fitted to full runs and to exactly these steps.

    Args:
        plan: One row a step.
        order: Of all of them; None for those that the plan has. With 0 what was stored last is held.
    """
    def plain(forecast: Forecast) -> Forecast:
        return dataclasses.replace(forecast, fitted=(), guided=(), order=forecast.order if order is None else order)

    return tuple(row and Reuse(row.boundary, plain(row.forecast)) for row in plan)


def unguided(plan: Plan) -> Plan:
    """The same plan with the weights of the unconditional stream for all streams."""
    return tuple(row and Reuse(row.boundary, dataclasses.replace(row.forecast, guided=())) for row in plan)


def follow(plan: Plan) -> Schedule:
    """The schedule of an explicit plan.

    Each run of reuse steps is a group with the computed step before it. Its first boundary holds for all of it, and
    whatever stands before the first computed step is computed. The window goes from the first group to the end of the last.
    """
    groups: list[tuple[list[int], list[Reuse]]] = []
    for k, row in enumerate(plan):
        if row is None:
            groups.append(([k], []))
        elif groups:
            groups[-1][0].append(k)
            groups[-1][1].append(row)
    scheduled = _scheduled([group for group in groups if group[1]], len(plan))
    busy = [k for k, step in enumerate(scheduled.steps) if step.group is not None]
    return dataclasses.replace(scheduled, window=tuple(range(busy[0], busy[-1] + 1)) if busy else ())


def build(effective: Effective, levels: Sequence[float], everywhere: bool = False) -> Schedule:
    """Plan a run: uniform groups of N steps inside the window.

    Args:
        effective: The settings in force.
        levels: For each executed step the noise level at its start, and the level at the end of the last: share of
            the model's noise schedule already passed, 0 (pure noise) to 1 (clean). n + 1 values for n steps.
        everywhere: Plan one group of all steps, the last among them, of which a guard says which reuse.

    Returns:
        The schedule. Unless `everywhere`, the last step is computed. A run that starts part-way (img2img, the second of
        two samplers) computes at least its first two steps. A `noise_level` window also computes at least
        `start_percent / 2` of the executed steps first: on some schedulers 40 % noise level comes after one step.

    Source of groups and window: Zhang et al., BlockDance, arXiv 2503.15927; the rest is ours.
    """
    count = max(len(levels) - 1, 0)
    inside = _window(effective, levels, count)
    warnings: list[str] = []
    if effective.group_size == 1 or count == 0:
        return Schedule((Step(),) * count, inside)
    few = few_steps(levels)
    if few:
        if effective.preset != "custom":
            return Schedule((Step(),) * count, inside, (f"{few}: neighbouring steps differ too much, all computed",))
        warnings.append(f"{few}: expect visible differences")
    if everywhere and count > 2:
        return follow([None, *[Reuse(effective.boundary, FORECASTS["taylor2"])] * (count - 1)])
    groups = _groups(_eligible(effective, levels, count, inside), effective.group_size)
    if not groups:
        warnings.append("no step can be reused: the window holds too few steps")
    reuse = Reuse(effective.boundary, FORECASTS[effective.forecast])
    planned = _scheduled([(group, [reuse] * (len(group) - 1)) for group in groups], count)
    return dataclasses.replace(planned, window=inside, warnings=tuple(warnings))


def _window(effective: Effective, levels: Sequence[float], count: int) -> tuple[int, ...]:
    if effective.window == "steps":
        first, stop = (math.ceil(share * count - _TOLERANCE)
                       for share in (effective.start_percent, effective.end_percent))
        return tuple(range(first, stop))
    start, end = effective.start_percent - _TOLERANCE, effective.end_percent - _TOLERANCE
    return tuple(k for k in range(count) if start <= levels[k] < end)


def _eligible(effective: Effective, levels: Sequence[float], count: int, inside: Sequence[int]) -> list[int]:
    lead = 0
    if effective.window == "noise_level":
        lead = math.ceil(effective.start_percent / 2 * count - _TOLERANCE) - 1
    if part_way(levels):
        lead = max(lead, 1)
    return [k for k in inside if lead <= k < count - 1]


def few_steps(levels: Sequence[float]) -> str | None:
    """In words, that the noise level falls as fast as in a full run of `FEW_STEPS` steps or fewer; None if it does not."""
    count = len(levels) - 1
    if abs(levels[-1] - levels[0]) / count < 1 / FEW_STEPS - _TOLERANCE:
        return None
    return f"{count} steps cover as much noise level as {FEW_STEPS} or fewer steps of a full run"


def part_way(levels: Sequence[float]) -> bool:
    """Whether a run begins part-way down the noise schedule (img2img, the second of two samplers)."""
    return levels[0] > 0.01


def _groups(eligible: Sequence[int], size: int) -> list[range]:
    groups: list[range] = []
    for k in eligible:
        if groups and k == groups[-1].stop and len(groups[-1]) < size:
            groups[-1] = range(groups[-1].start, k + 1)
        else:
            groups.append(range(k, k + 1))
    return [group for group in groups if len(group) > 1]


def _scheduled(groups: Sequence[tuple[Sequence[int], Sequence[Reuse]]], count: int) -> Schedule:
    """Groups of consecutive steps, the first computed and the others reusing, as rows that record what those need."""
    steps = [Step()] * count
    for number, (group, rows) in enumerate(groups):
        boundary = rows[0].boundary
        steps[group[0]] = Step(CACHE, boundary, number, (boundary,))
        for k, row in zip(group[1:], rows, strict=True):
            steps[k] = Step(REUSE, boundary, number, forecast=row.forecast)
    for group, rows in groups:
        history = max(row.forecast.features for row in rows) - 1
        computed = [k for k in range(group[0]) if steps[k].decision != REUSE]
        for k in computed[-history:] if history else []:
            steps[k] = dataclasses.replace(steps[k], record=tuple(sorted({*steps[k].record, rows[0].boundary})))
    return Schedule(tuple(steps))
