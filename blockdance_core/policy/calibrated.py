"""Schedules that a calibration found, and how they are fitted to a run that differs from the calibrated one."""

from __future__ import annotations

import dataclasses
import itertools
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from blockdance_core.config import ConfigError
from blockdance_core.forecast import LARGEST_WEIGHT, MOST_FEATURES
from blockdance_core.schedule import REUSE, Plan, Reuse, Schedule, Step, expanded, few_steps, follow, part_way

SAME_LEVEL = 1e-3
_PART = 0.05
"""A run that leaves out more of the noise schedule than this, at its beginning or end, is one of a part."""
_ROUNDING = 1e-6
_SAME = 0.005
"""Cuts this near to each other are one."""
_MAX_ORDER = 2
_FEWER = 2 / 3
"""With less than this share of the calibrated steps a schedule bridges more than it was made for."""
_MOST = 1000
"""A run's part of the noise schedule is not put in words where it is smaller than one in so many."""


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """What was found for one sampler and one number of steps.

    Attributes:
        sampler: Name of the sampler's function, such as `euler` or `dpmpp_2m`.
        scheduler: Name of the scheduler.
        levels: Shares of the noise schedule at the start of every step and at the end of the last, n + 1 values,
            ascending, 0 to 1; see `schedule.build`.
        plans: One plan of n steps for each speed.
        cuts: Share of DiT time that each plan saves, ascending, 0 to 1.
        losses: Mean squared error at the end that is expected of each plan.

    Raises:
        ConfigError: The values do not fit together, or one is out of its range.
    """

    sampler: str
    scheduler: str
    levels: tuple[float, ...]
    plans: tuple[Plan, ...]
    cuts: tuple[float, ...]
    losses: tuple[float, ...]

    def __post_init__(self) -> None:
        of = f"the calibration of {self.sampler}: "
        require(self.steps >= 1, f"{of}it has no steps")
        require(all(math.isfinite(level) and 0 <= level <= 1 for level in self.levels),
                f"{of}levels must be shares from 0 to 1")
        require(ascending(self.levels) and self.levels[0] < self.levels[-1], f"{of}levels must ascend")
        require(len(self.plans) >= 1, f"{of}it has no plan")
        require(len(self.plans) == len(self.cuts) == len(self.losses),
                f"{of}{len(self.plans)} plans, {len(self.cuts)} cuts and {len(self.losses)} losses, expected as many of each")
        require(all(len(plan) == self.steps for plan in self.plans), f"{of}a plan must have {self.steps} steps")
        require(all(0 <= cut < 1 for cut in self.cuts) and ascending(self.cuts),
                f"{of}cuts must ascend, and be shares from 0 to below 1")
        require(all(math.isfinite(loss) and loss >= 0 for loss in self.losses), f"{of}losses must be 0 or more")
        require_rows(self.plans, of)

    @property
    def steps(self) -> int:
        """Number of steps that were calibrated."""
        return len(self.levels) - 1

    @property
    def key(self) -> str:
        """Sampler, scheduler, steps and, of a part of the noise schedule, which; a policy holds one calibration of each."""
        first, last = self.levels[0], self.levels[-1]
        part = f" from {first:.0%}" * (first > _PART) + f" to {last:.0%}" * (last < 1 - _PART)
        return f"{self.sampler} {self.scheduler} {self.steps}{part}"

    def joined(self, other: Calibrated, wanted: Sequence[float], apart: float) -> Calibrated:
        """The same with the plans of another calibration, but those that its own stand for.

        A plan goes if its cut is within `apart` of one that was wanted, unless it saves more than the nearest of its own by
        over half of that. One of the same cut as its own goes in any case.
        """
        def stays(cut: float) -> bool:
            more = cut - min(self.cuts, key=lambda own: abs(own - cut))
            return abs(more) > _SAME and (more > apart / 2 or min(abs(cut - one) for one in wanted) > apart)

        levels = [*zip(self.cuts, self.losses, self.plans, strict=True)]
        levels += [level for level in zip(other.cuts, other.losses, other.plans, strict=True) if stays(level[0])]
        cuts, losses, plans = zip(*sorted(levels, key=lambda level: level[:2]), strict=True)
        return dataclasses.replace(self, cuts=cuts, losses=losses, plans=plans)

    def position(self, level: float) -> float:
        """How many of the calibrated steps are over at a noise level, 0 to n, with fractions."""
        if level <= self.levels[0]:
            return 0.0
        if level >= self.levels[-1]:
            return float(self.steps)
        k = bisect_right(self.levels, level) - 1
        return k + (level - self.levels[k]) / (self.levels[k + 1] - self.levels[k])

    def whole(self, levels: Sequence[float]) -> float:
        """How many steps a run would have over all calibrated levels, if it went on as it does in its part of them.

        Next to none, if it has no part of them.
        """
        share = (self.position(levels[-1]) - self.position(levels[0])) / self.steps
        low, high = self.levels[0], self.levels[-1]
        inside = sum(
            (min(end, high) - max(start, low)) / (end - start) if end > start else 1.0
            for start, end in itertools.pairwise(levels) if start <= high and end >= low)
        return max(inside / max(share, _ROUNDING), _ROUNDING)

    def outside(self, start: float, end: float) -> bool:
        """Whether a step starts outside the calibrated levels."""
        return start < self.levels[0] - SAME_LEVEL or end <= self.levels[0] or start >= self.levels[-1]

    def uncalibrated(self, levels: Sequence[float]) -> int:
        """How many steps of a run start outside the calibrated levels, and have an extent."""
        return sum(self.outside(start, end) and end > start for start, end in itertools.pairwise(levels))

    def same(self, levels: Sequence[float]) -> bool:
        """Whether a run has exactly the calibrated steps."""
        return len(levels) == len(self.levels) and all(
            abs(one - other) <= SAME_LEVEL for one, other in zip(levels, self.levels, strict=True))

    def departure(self, levels: Sequence[float]) -> float:
        """How far a run's levels are from those it would have if its steps were spaced like the calibrated ones, mean."""
        first, last, count = self.position(levels[0]), self.position(levels[-1]), len(levels) - 1
        return sum(
            abs(level - self._level(first + (last - first) * k / count)) for k, level in enumerate(levels)) / len(levels)

    def _level(self, position: float) -> float:
        k = min(int(position), self.steps - 1)
        return self.levels[k] + (position - k) * (self.levels[k + 1] - self.levels[k])

    def fitted(self, plan: Plan, levels: Sequence[float]) -> Plan:
        """The same plan for other steps, by noise level.

        Between two computed steps of the plan a count grows evenly by one. Scaled by the ratio of the numbers of steps,
        it says how many steps a run should have computed up to any noise level: a step is computed if the count passes
        a whole number in it. Where a step would have to count for more than one, the others make up for it, so that the
        share of computed steps stays what it is.

        Args:
            plan: One of `plans`.
            levels: Shares of the noise schedule at the start of every step and at the end of the last, ascending.

        Returns:
            One row a step. The first is computed, of a run that begins part-way the first two; so is every one that
            starts outside the calibrated levels, and the last, unless the plan reuses its own and the run ends there.
        """
        count = len(levels) - 1
        if self.same(levels):
            return plan
        plan = expanded(plan)  # other steps are stored than those that weights were fitted to
        reused = [j for j, row in enumerate(plan) if row]
        if not reused:
            return (None,) * count
        knots = [j for j, row in enumerate(plan) if row is None or j == 0] + [self.steps]
        scale = self.whole(levels) / self.steps
        positions = [self.position(level) for level in levels]
        passed = [_between(knots, position) for position in positions]
        gains = [after - before for before, after in itertools.pairwise(passed)]
        factor = _factor(gains, min(scale * sum(gains), count))
        counts = list(itertools.accumulate(
            (min(factor * gain, 1.0) for gain in gains), initial=scale * passed[0] - _ROUNDING))
        lead = 2 if part_way(levels) else 1
        ends = plan[-1] is not None and abs(levels[-1] - self.levels[-1]) <= SAME_LEVEL
        outside = [self.outside(*pair) for pair in itertools.pairwise(levels)]
        outside[-1] = not ends or (outside[-1] and levels[-2] < levels[-1])
        computed = {k for k in range(count) if k < lead or outside[k] or math.ceil(counts[k]) < counts[k + 1]}

        def nearest(position: float) -> Reuse | None:
            return plan[min(reused, key=lambda j: abs(j - position))]

        return tuple(None if k in computed else nearest(positions[k]) for k in range(count))


@dataclasses.dataclass(frozen=True)
class SchedulePolicy:
    """Calibrated schedules of one model.

    Attributes:
        name: For messages and the report.
        family: Name of the model family.
        depth: Number of blocks of the model.
        entries: What was calibrated, one entry for each sampler, scheduler and number of steps.
        record: How it was calibrated, as plain JSON data.
        wanted: The share of DiT time that may be saved, in place of N; 0 where N decides. Not part of the file.

    Raises:
        ConfigError: There is nothing in it, or a boundary is outside the depth.
    """

    name: str
    family: str
    depth: int
    entries: tuple[Calibrated, ...]
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    wanted: float = 0.0

    def __post_init__(self) -> None:
        require(bool(self.family), "the model family has no name")
        require(self.depth >= 1, f"depth {self.depth} must be 1 or more")
        require(bool(self.entries), "it holds no calibrated schedule")
        boundary = self.boundary
        require(boundary is None or boundary <= self.depth,
                f"boundary {boundary} is outside the depth of {self.depth} blocks")
        require(0 <= self.wanted < 1, f"cut = {self.wanted:g} is no share of the time: expected 0 to below 1")

    @property
    def boundary(self) -> int | None:
        """The largest boundary of any plan."""
        rows = (row for entry in self.entries for plan in entry.plans for row in plan)
        return max((row.boundary for row in rows if row), default=None)

    def at(self, cut: float) -> SchedulePolicy:
        """The same policy, at the fastest schedule that saves at most this share of the time; 0 lets N decide."""
        return dataclasses.replace(self, wanted=cut)

    def extended(self, calibration: Calibrated) -> SchedulePolicy:
        """The same policy with one more calibration, in place of that of the same `key`."""
        entries = (*(entry for entry in self.entries if entry.key != calibration.key), calibration)
        in_order = sorted(entries, key=lambda entry: (entry.sampler, entry.scheduler, entry.steps))
        return dataclasses.replace(self, entries=tuple(in_order))

    def check(self, family: str, depth: int) -> None:
        """Raise a `ConfigError` unless it is for a model of this family and depth."""
        if (family, depth) != (self.family, self.depth):
            raise ConfigError(
                f"The policy {self.name} was calibrated for {self.family} with {self.depth} blocks; this model is {family} "
                f"with {depth} blocks. Load a policy for this model, or disconnect the input `policy`."
            )

    def schedule(self, levels: Sequence[float], sampler: str, group_size: int) -> Schedule:
        """The plan of a run: that of the nearest calibration, at the highest speed that N allows, fitted to its steps.

        Args:
            levels: Shares of the noise schedule, see `schedule.build`.
            sampler: Name of the sampler.
            group_size: N: the cut is at most 1 - 1/N, or what is `wanted`. 1 computes everything.
        """
        count = max(len(levels) - 1, 0)
        full = Schedule((Step(),) * count)
        if group_size == 1 or count == 0:
            return full
        if not ascending(levels) or levels[0] == levels[-1]:
            return dataclasses.replace(full, warnings=("the noise level rises: the policy does not apply, all computed",))
        few = few_steps(levels)
        if few and not any(round(entry.whole(levels)) == entry.steps for entry in self.entries):
            return dataclasses.replace(full, warnings=(f"{few}: neighbouring steps differ too much, all computed",))
        entry = min(self.entries, key=lambda entry: (
            entry.sampler != sampler, not entry.same(levels), entry.uncalibrated(levels),
            round(abs(math.log(entry.whole(levels) / entry.steps)), 3), entry.departure(levels)))
        level, slower = level_for(entry.cuts, group_size, self.wanted, self.name)
        plan = entry.plans[level]
        warnings = self._warnings(entry, levels, sampler) + slower
        scheduled = follow(entry.fitted(plan, levels))
        reuses = any(step.decision == REUSE for step in scheduled.steps)
        if not reuses and any(plan):
            warnings += ("no step can be reused: the run has too few steps",)
        return dataclasses.replace(scheduled, warnings=warnings)

    @staticmethod
    def _warnings(entry: Calibrated, levels: Sequence[float], sampler: str) -> tuple[str, ...]:
        count, whole, outside = len(levels) - 1, round(entry.whole(levels)), entry.uncalibrated(levels)
        if outside:
            return (f"{outside} of {count} steps are at noise levels that {entry.sampler} with {entry.steps} steps was not "
                    "calibrated for: they are computed, the others fitted by noise level",)
        if sampler == entry.sampler and whole == entry.steps:
            if entry.same(levels) or entry.departure(levels) <= SAME_LEVEL:
                return ()
            return (f"calibrated with the scheduler {entry.scheduler}, this run has other noise levels: fitted by noise level",)
        part = f" (as {whole} over the whole noise schedule)" if whole != count and whole < _MOST * count else ""
        far = "; with so many fewer steps it loses far more: set a quality beside it, or calibrate anew"
        return (f"calibrated for {entry.steps} steps of {entry.sampler}, this run has {count}{part} of {sampler}: "
                "fitted by noise level" + (far if whole < _FEWER * entry.steps else ""),)


def level_for(cuts: Sequence[float], group_size: int, wanted: float, name: str) -> tuple[int, tuple[str, ...]]:
    """The fastest level with a cut of at most what is wanted, or else 1 - 1/N; and a warning if policy `name` has none."""
    most, given = (wanted, f"cut = {wanted:g}") if wanted else (1 - 1 / group_size, f"N = {group_size}")
    allowed = [index for index, cut in enumerate(cuts) if cut <= most + _ROUNDING]
    if allowed:
        return allowed[-1], ()
    return 0, (f"{given} is slower than anything in {name}: its slowest schedule is used",)


def require_rows(plans: Iterable[Plan], of: str = "") -> None:
    """Raise a `ConfigError` unless every row of some plans is within its ranges; `of` begins the message."""
    for row in {row for plan in plans for row in plan if row}:
        require(row.boundary >= 0, f"{of}boundary {row.boundary} must be 0 or more")
        require(0 <= row.forecast.order <= _MAX_ORDER,
                f"{of}order {row.forecast.order} of a forecast must be 0 to {_MAX_ORDER}")
        require(0 <= row.forecast.damping <= 1, f"{of}damping {row.forecast.damping} of a forecast must be 0 to 1")
        ages = [age for age, _ in row.forecast.fitted]
        require(len(ages) <= MOST_FEATURES and all(age > 0 for age in ages) and ages == sorted(set(ages)),
                f"{of}ages {ages} of fitted weights must ascend from 1, {MOST_FEATURES} at most")
        guided = len(row.forecast.guided)
        require(guided in (0, len(ages)), f"{of}{guided} weights of the guidance for {len(ages)} features")
        weights = [*(weight for _, weight in row.forecast.fitted), *row.forecast.guided]
        require(all(abs(weight) <= LARGEST_WEIGHT for weight in weights),
                f"{of}fitted weights {weights} must be -{LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}")


def _between(knots: Sequence[int], position: float) -> float:
    """The index of `position` in an ascending list, with fractions."""
    j = min(max(bisect_right(knots, position) - 1, 0), len(knots) - 2)
    return j + (position - knots[j]) / (knots[j + 1] - knots[j])


def _factor(gains: Sequence[float], total: float) -> float:
    """What to multiply `gains` by to make them `total` in all, if none counts for more than 1."""
    rest = sum(gains)
    for capped, gain in enumerate(sorted(gains, reverse=True)):
        if gain <= _ROUNDING:
            break
        factor = (total - capped) / rest
        if factor * gain <= 1 + _ROUNDING:
            return factor
        rest -= gain
    return 1 / _ROUNDING


def ascending(values: Sequence[float]) -> bool:
    """Whether none is below the one before."""
    return all(one <= other for one, other in itertools.pairwise(values))


def require(ok: bool, reason: str) -> None:
    """Raise a `ConfigError` for a reason, unless all is well."""
    if not ok:
        raise ConfigError(f"{reason}.")
