"""Policies that look at the picture: after a few steps a network decides, for each sample, what the remaining ones do.

Source: BlockDance-Ada, Zhang et al., arXiv 2503.15927.

Published: the network decides every remaining step, cache or reuse. Here it decides *segments* of the steps, each a choice
among a few rows: a segment may be one step with or without reuse, as published, one step with several boundaries, or all
remaining steps with the schedules of a calibration to choose from.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from blockdance_core.config import ConfigError
from blockdance_core.policy.calibrated import (
    SAME_LEVEL,
    Calibrated,
    SchedulePolicy,
    ascending,
    level_for,
    require,
    require_rows,
)
from blockdance_core.policy.network import DecisionNetwork, Sight
from blockdance_core.schedule import Plan, Reuse, Schedule, Step, follow

_ROUNDING = 1e-6
_LOST = 0.1
"""What a call of a part of the batch costs more than its share, as a share of the whole call."""
LEAST_STEP = 2
"""The network sees how the estimate of the picture changed: there must be two evaluations before."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive steps that are decided together.

    Attributes:
        start: The first of them.
        options: What they may do, one row a step in each.
    """

    start: int
    options: tuple[Plan, ...]

    @property
    def stop(self) -> int:
        """The step behind the last."""
        return self.start + len(self.options[0])


@dataclasses.dataclass(frozen=True, eq=False)
class AdaptivePolicy:
    """A decision network and what it chooses from.

    Attributes:
        base: Schedules for runs in which the network cannot look, one of them with the steps that it was trained for.
        trained: Which entry of `base` that is.
        segments: What is decided, in the order of the steps; from the first on every step is in one.
        cuts: For each level, a trade of speed against fidelity, the mean cut in training; ascending.
        network: Gives a logit for every level and, within it, every option of every segment.
        name: For messages and the report.
        record: How it was trained, as plain JSON data.
        wanted: See `SchedulePolicy`; a mean here.

    Raises:
        ConfigError: The parts do not fit together.
    """

    base: SchedulePolicy
    trained: int
    segments: tuple[Segment, ...]
    cuts: tuple[float, ...]
    network: DecisionNetwork
    name: str
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    wanted: float = 0.0

    def __post_init__(self) -> None:
        require(0 <= self.trained < len(self.base.entries), f"entry {self.trained} is none of {len(self.base.entries)}")
        require(bool(self.segments), "it decides nothing")
        require(all(segment.options for segment in self.segments), "a segment has no options")
        require(all(len({len(plan) for plan in segment.options}) == 1 and segment.options[0] for segment in self.segments),
                "the options of a segment must have as many steps")
        starts = [segment.start for segment in self.segments]
        stops = [segment.stop for segment in self.segments]
        require(starts[0] >= LEAST_STEP, f"it looks at step {starts[0]}, expected {LEAST_STEP} or more")
        require(starts[1:] == stops[:-1] and stops[-1] == self.entry.steps, "the segments must fill the steps")
        require(bool(self.cuts) and all(0 <= cut < 1 for cut in self.cuts) and ascending(self.cuts),
                "cuts must ascend, and be shares from 0 to below 1")
        expected = len(self.cuts) * self.choices
        require(self.network.shape.outputs == expected,
                f"the network has {self.network.shape.outputs} outputs, expected {expected}")
        require_rows(plan for segment in self.segments for plan in segment.options)
        require(len({row.forecast.anchored for row in self._rows()}) <= 1, "its options mix hold with other forecasts")
        boundary = self.boundary
        require(boundary is None or 0 <= boundary <= self.base.depth,
                f"boundary {boundary} is outside the depth of {self.base.depth} blocks")

    @property
    def entry(self) -> Calibrated:
        """Sampler, scheduler and steps that it was trained for, with the schedules that it replaces."""
        return self.base.entries[self.trained]

    @property
    def start(self) -> int:
        """rho: the step of `entry` at which the network looks."""
        return self.segments[0].start

    @property
    def choices(self) -> int:
        """Options of all segments."""
        return sum(len(segment.options) for segment in self.segments)

    @property
    def boundary(self) -> int | None:
        """The largest boundary that may be chosen."""
        own = (row.boundary for row in self._rows())
        return max((*own, *(() if self.base.boundary is None else (self.base.boundary,))), default=None)

    def _rows(self) -> Iterator[Reuse]:
        return (row for segment in self.segments for plan in segment.options for row in plan if row)

    def at(self, cut: float) -> AdaptivePolicy:
        """The same policy at the fastest level that saves at most this share of the time on average; 0 lets N decide."""
        return dataclasses.replace(self, wanted=cut, base=self.base.at(cut))

    def check(self, family: str, depth: int) -> None:
        """Raise a `ConfigError` unless it is for a model of this family and depth."""
        self.base.check(family, depth)

    def require(self, channels: int, text_width: int | None) -> None:
        """Raise a `ConfigError` unless it is for latents of so many channels and texts of this width, None for no text."""
        try:
            self.network.require(channels, text_width)
        except ConfigError as error:
            raise ConfigError(f"The policy {self.name} does not fit this model: {error}. Load a policy that was trained for "
                              "this model, or disconnect the input `policy`.") from None

    def looks_at(self, levels: Sequence[float], sampler: str, group_size: int) -> int | str:
        """The step of a run at which the network looks, or why it does not."""
        count = len(levels) - 1
        if not ascending(levels):
            return "the noise level rises"
        target = self.entry.levels[self.start] - SAME_LEVEL
        step = next((k for k in range(max(count, 0)) if levels[k] >= target), None)
        if step is None or step >= count - 1:
            return "the run ends before the step at which the policy looks at the picture"
        if step < LEAST_STEP:
            return "the run begins at or after the step at which the policy looks at the picture, or just before it"
        static = self.base.schedule(levels, sampler, group_size)
        return step if static.boundaries or not static.warnings else "; ".join(static.warnings)

    def schedule(self, levels: Sequence[float], sampler: str, group_size: int) -> Schedule:
        """What is known of a run before the network has looked; all of it, where it does not look.

        Args:
            levels: Shares of the noise schedule, see `schedule.build`.
            sampler: Name of the sampler.
            group_size: N: the mean cut is at most 1 - 1/N. 1 computes everything.
        """
        static = self.base.schedule(levels, sampler, group_size)
        if group_size == 1:
            return static
        step = self.looks_at(levels, sampler, group_size)
        if isinstance(step, str):
            reason = f"{step}: the policy's static schedule is used" if static.boundaries else step
            return dataclasses.replace(static, warnings=tuple(dict.fromkeys((*static.warnings, reason))))
        return self._undecided(step, len(levels) - 1, self._warnings(levels, sampler, group_size))

    def _undecided(self, step: int, count: int, warnings: tuple[str, ...]) -> Schedule:
        """All steps before the decision, with the features that any choice may need; nothing yet of those behind it."""
        rows = list(self._rows())
        if not rows:
            return Schedule((Step(),) * count, warnings=warnings)
        widest = max((row.forecast for row in rows), key=lambda forecast: forecast.features)
        boundaries = tuple(sorted({row.boundary for row in rows}))
        return Schedule(tuple(
            Step(record=boundaries if step - widest.features <= k < step else (), forecast=widest if k >= step else None)
            for k in range(count)
        ), warnings=warnings, looks_at=step)

    def decide(self, sight: Sight, levels: Sequence[float], group_size: int, step: int) -> tuple[Schedule, ...]:
        """What each sample of a run does, by its most likely options.

        Args:
            sight: Of the whole batch.
            levels: Of the run.
            group_size: N.
            step: Where the decision falls.
        """
        logits = self.logits(sight)[:, level_for(self.cuts, group_size, self.wanted, self.name)[0]]
        return tuple(self.scheduled(self.plan(self.likeliest(row)), levels, step) for row in logits)

    def logits(self, sight: Sight) -> Tensor:
        """[B, levels, choices] on the CPU."""
        return self.network.decide(sight).reshape(-1, len(self.cuts), self.choices)

    def likeliest(self, logits: Tensor) -> tuple[int, ...]:
        """The most likely option of every segment, from one sample's logits [choices] at one level."""
        return tuple(int(part.argmax()) for part in logits.split([len(segment.options) for segment in self.segments]))

    def plan(self, chosen: Sequence[int]) -> Plan:
        """The plan of the steps that it was trained for: one option of every segment; those before are computed."""
        rows = (row for segment, index in zip(self.segments, chosen, strict=True) for row in segment.options[index])
        return (*(None,) * self.start, *rows)

    def scheduled(self, plan: Plan, levels: Sequence[float], step: int) -> Schedule:
        """A plan fitted to the steps of a run, of which those before the decision are computed."""
        fitted = self.entry.fitted(plan, levels)
        return follow((*(None,) * step, *fitted[step:]))

    def _warnings(self, levels: Sequence[float], sampler: str, group_size: int) -> tuple[str, ...]:
        entry, count = self.entry, len(levels) - 1
        _, warnings = level_for(self.cuts, group_size, self.wanted, self.name)
        if sampler != entry.sampler or not entry.same(levels):
            warnings += (f"trained for {entry.steps} steps of {entry.sampler} {entry.scheduler}, this run has {count} of "
                         f"{sampler}: what the network decides is fitted by noise level",)
        return warnings


Part = tuple[tuple[int, ...], Schedule]
"""Samples that go on together, and how."""


def parts_of(schedules: Sequence[Schedule], depth: int, together: bool = False) -> tuple[Part, ...]:
    """Which samples go on together.

    Those that want the same do. Of the others, those are put together where a call of their own would cost more than it saves:
    then all of them do what saves least, so that none is cut more than it should be.

    Args:
        schedules: What is wanted of each sample.
        depth: Number of blocks.
        together: Whether all must go as one.
    """
    wanted: dict[Schedule, list[int]] = {}
    for sample, schedule in enumerate(schedules):
        wanted.setdefault(schedule, []).append(sample)
    parts = sorted(wanted.items(), key=lambda part: part[0].cut(depth))
    while len(parts) > 1:
        # The part joined to the one that saves a little less than it: what that costs beside what a call costs.
        lost = [len(rows) / len(schedules) * (schedule.cut(depth) - before.cut(depth))
                for (before, _), (schedule, rows) in itertools.pairwise(parts)]
        k = min(range(len(lost)), key=lost.__getitem__)
        if not together and lost[k] > _LOST:
            break
        parts[k : k + 2] = [(parts[k][0], [*parts[k][1], *parts[k + 1][1]])]
    return tuple(sorted(((tuple(sorted(rows)), schedule) for schedule, rows in parts), key=lambda part: part[0]))


def one_choice(entry: Calibrated, start: int) -> tuple[Segment, ...]:
    """All steps from `start` on as one segment: the schedules of a calibration, and computing everything."""
    tails = dict.fromkeys(tuple(plan[start:]) for plan in ((None,) * entry.steps, *entry.plans))
    return (Segment(start, tuple(tails)),)


def every_step(steps: int, start: int, options: Plan) -> tuple[Segment, ...]:
    """Each step from `start` on as a segment of its own, but for the last, which is computed.

    Args:
        steps: Number of steps.
        start: The first that is decided.
        options: What a step may do; None computes it.
    """
    last = Segment(steps - 1, ((None,),))
    return (*(Segment(k, tuple((row,) for row in options)) for k in range(start, steps - 1)), last)


def step_at(steps: int, share: float) -> int:
    """The step rho for a share of the steps."""
    return max(LEAST_STEP, math.ceil(share * steps - _ROUNDING))
