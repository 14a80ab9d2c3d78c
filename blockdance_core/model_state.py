"""What a run knows of one executing model: its blocks, its plan and its cache."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import nn

from blockdance_core import families
from blockdance_core.config import Config, Effective, resolve
from blockdance_core.guard import ORDERS, Guard
from blockdance_core.interception import taps
from blockdance_core.policy.adaptive import Part, parts_of
from blockdance_core.schedule import Schedule, Step, build
from blockdance_core.streams import FeatureCache
from blockdance_core.visit import CallInfo, Moment

_LIMIT = 4
"""Stored bytes never exceed this many times the prediction, however many streams turn up later."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What an adaptive policy decided.

    Attributes:
        step: Where it looked.
        wanted: What it wants of each sample.
        parts: Samples that go on together, and how.
        milliseconds: What looking and deciding took.
    """

    step: int
    wanted: tuple[Schedule, ...]
    parts: tuple[Part, ...]
    milliseconds: float


def in_force(config: Config, match: families.Match) -> Effective:
    """What the settings mean for a model.

    Raises:
        ConfigError: The boundary is outside the depth of the model, or the policy is for another model.
    """
    if config.active and config.policy is not None:
        config.policy.check(match.family.name, len(match.blocks))
    return resolve(config, match.family.defaults, len(match.blocks))


def planned(config: Config, effective: Effective, levels: Sequence[float], sampler: str) -> Schedule:
    """The plan of a run: off goes before the policy, the policy before the preset."""
    if config.active and config.policy is not None:
        return config.policy.schedule(levels, sampler, config.group_size)
    return build(effective, levels, everywhere=config.guard_alone)


def kept(config: Config, schedule: Schedule) -> int:
    """Features of one stream and boundary that a run keeps. The guard may compute, and store, any step."""
    return schedule.needed if config.guarded else schedule.kept


class ModelState:
    """What a session knows of one executing model: its blocks, its plan and its cache."""

    def __init__(
        self, config: Config, diffusion_model: nn.Module, levels: Sequence[float], sampler: str, guard: Guard | None = None
    ) -> None:
        """Match the model and plan the run, with the guard of the run if it has one.

        Raises:
            UnsupportedModelError: No list of blocks that can be skipped was found.
            ConfigError: The boundary is outside the depth of the model, or the policy is for another model.
        """
        match = families.find(diffusion_model)
        self.family, self.blocks = match
        self.effective = in_force(config, match)
        self.schedule: Schedule = planned(config, self.effective, levels, sampler)
        self.cache = FeatureCache(self.schedule.anchored, kept(config, self.schedule))
        self.guard, self.guard_alone = guard, config.guard_alone
        self.sole = True  # whether no other model takes part in the run
        self.broken: str | None = None
        self.first_evaluation: int | None = None
        self.predicted_bytes = 0
        self.placed = False
        self.group: int | None = None
        self.group_starts = [0, 0]
        self.parts: list[ModelState] = []
        self.tapped = self.taps(*self.schedule.boundaries)

    @property
    def depth(self) -> int:
        """Number of blocks; as a boundary, the whole model."""
        return len(self.blocks)

    @property
    def active(self) -> bool:
        """Whether the plan holds any reuse step."""
        return bool(self.schedule.boundaries)

    def taps(self, *boundaries: int) -> tuple[int, ...]:
        """The blocks whose outputs stand in for everything up to these boundaries, ascending."""
        return tuple(sorted({tap for boundary in boundaries for tap in taps(self.blocks, boundary)}))

    def streams_of(self, info: CallInfo) -> CallInfo:
        """The same call; as one stream, where the samples cannot be told apart in the blocks, and blocks are watched."""
        several = self.apart or not info.streams or self.tapped == (self.depth,)
        return info if several else info._replace(streams=(info.streams,), rows=1)

    def enter(self, group: int | None, moment: Moment) -> None:
        """A call of `group` begins; at the start of a new one, streams unseen for the whole group before are dropped.

        Where the guard decides alone, all steps are of one group: there a group begins with each step that it computes.
        """
        if self.first_evaluation is None:
            self.first_evaluation = moment.evaluation
        if group is not None and self.guard_alone and self.guard is not None:
            group = self.guard.computed
        if group is not None and group != self.group:
            self.group = group
            self.group_starts = [self.group_starts[-1], moment.step]
            self.cache.drop_unseen(self.group_starts[0])

    def from_end(self, boundary: int) -> int:
        """A boundary as the guard counts it: 0 is the whole model."""
        return boundary - self.depth

    def orders(self, plan: Step) -> Sequence[int]:
        """Orders of the forecast that the guard may choose from: a plan that was made by someone keeps its own.

        None has more than the features that are kept allow.
        """
        orders = ORDERS if self.guard_alone or plan.forecast is None else (plan.forecast.order,)
        return [order for order in orders if order < self.cache.keep]

    @property
    def apart(self) -> bool:
        """Whether the samples of a batch can be told apart in the blocks."""
        return self.blocks[0].batch_dim is not None

    @property
    def divisible(self) -> bool:
        """Whether a batch may be split: not where a model keeps something of its own from one call to the next."""
        return self.apart and self.blocks[0].obstacle is None

    @property
    def peak_bytes(self) -> int:
        """Most bytes stored so far."""
        return max(self.cache.peak_bytes, sum(part.cache.peak_bytes for part in self.parts))

    def follow(self, choice: Choice) -> None:
        """From here on it goes as an adaptive policy decided."""
        parts = choice.parts if self.divisible else parts_of(choice.wanted, len(self.blocks), together=True)
        if len(parts) == 1:
            self.replan(parts[0][1], choice.step)
            return
        caches = self.cache.divided([rows for rows, _ in parts], len(choice.wanted))
        for (_, schedule), cache in zip(parts, caches, strict=True):
            part = copy.copy(self)
            part.cache, part.parts = cache, []
            part.replan(schedule, choice.step)
            self.parts.append(part)
        self.schedule = Schedule((Step(),) * len(self.schedule.steps))

    def replan(self, schedule: Schedule, step: int) -> None:
        """Follow another plan from a step on. What was stored goes on, unless the plan is for features of another kind."""
        groups = [row.group for row in schedule.steps]
        before, cache = self.schedule, self.cache
        self.schedule, self.tapped = schedule, self.taps(*schedule.boundaries)
        if schedule.boundaries and (schedule.anchored != cache.anchored or schedule.needed > before.needed):
            self.cache = FeatureCache(schedule.anchored, schedule.needed if cache.keep >= before.needed else cache.keep)
            self.cache.device, self.cache.limit = cache.device, cache.limit
        self.cache.regroup(groups)
        self.cache.retain(self.tapped)
        if groups[step - 1] is not None:  # that group has begun
            self.group, self.group_starts = groups[step - 1], [0, step - 1]

    def forget(self) -> None:
        """Nothing stored holds any longer."""
        for part in self.parts:
            part.forget()
        self.cache.clear()
        if self.guard is not None:
            self.guard.restart()

    def restart(self) -> None:
        """The latent has another size from here on: nothing stored fits, and the new features have to be measured."""
        self.forget()
        for part in self.parts:
            part.restart()
        self.cache.limit = math.inf
        self.first_evaluation, self.predicted_bytes, self.placed = None, 0, False

    def place(self, info: CallInfo) -> tuple[str, ...]:
        """Choose once where features are kept, when their size is known; returns warnings."""
        if self.placed:
            return ()
        self.placed = True
        choice, predicted, cache = self.effective.cache_device, self.predicted_bytes, self.cache
        cache.limit = _LIMIT * predicted
        if choice == "cpu":
            return cache.move(torch.device("cpu"), cache.keep)
        room = info.room() + cache.stored_bytes  # what is stored by now has its place already
        size = f"{predicted / 2**20:.1f} MiB of features do not fit the {max(room, 0) / 2**20:.1f} MiB left on {info.device}"
        if choice == "gpu" or predicted <= room:
            cache.limit = min(cache.limit, max(room, 0.0))
            return () if predicted <= room else (f"{size}: what does not is not reused; choose cache device auto or cpu",)
        if cache.keep > 1 and predicted / cache.keep <= room and self.sole:  # others would go on with theirs
            self.predicted_bytes = predicted // cache.keep
            cache.limit = min(_LIMIT * self.predicted_bytes, room)
            return (f"{size}: no history is kept, forecasts are of order 0", *cache.move(info.device, 1))
        return (f"{size}: kept in CPU memory", *cache.move(torch.device("cpu"), cache.keep))
