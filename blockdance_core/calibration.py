"""From what reuse costs, measured, to the best schedule: a dynamic program over groups.

A *group* is one computed step and the reuse steps behind it. What it costs in fidelity is measured by itself: the sampler
follows the full run up to the group, and then the group reuses, its errors piling up inside it as they would. How much an
error at some step matters in the end is measured too (`gain`). Errors of different groups are taken as independent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from blockdance_core.schedule import Plan, Reuse

_UNIT = 24
"""Budgets are counted in this many parts of a step."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """What reuse costs on some prompts, for one sampler and number of steps.

    Attributes:
        reuses: The ways to reuse that were measured, V of them.
        costs: Time of a reuse step of each, as a share of a computed one, [V].
        lags: Distances from a group's computed step to the one before it that were measured, ascending.
        errors: Distance to the full run behind a group, [prompts, V, steps, lags, longest]: of the group whose computed step
            is c, with the computed step before it `lags` earlier, that has g steps, at [..., c, lag, g - 1]. Groups of one
            step have none. NaN where nothing was measured.
        gains: What a distance of 1 at the beginning of a step becomes by the end of the run, [prompts, steps + 1].
    """

    reuses: tuple[Reuse, ...]
    costs: tuple[float, ...]
    lags: tuple[int, ...]
    errors: np.ndarray
    gains: np.ndarray

    @property
    def steps(self) -> int:
        """Number of steps of the run."""
        return int(self.gains.shape[1]) - 1

    def losses(self) -> np.ndarray:
        """Mean squared error at the end of the run that each group causes, [V, steps, lags, longest]."""
        steps, longest = self.errors.shape[2], self.errors.shape[4]
        ends = np.minimum(np.arange(steps)[:, None] + np.arange(1, longest + 1), steps)
        gains = self.gains[:, ends][:, None, :, None, :]
        return np.asarray(np.square(self.errors * gains).mean(0))


def merged(profiles: Sequence[Profile]) -> Profile:
    """One profile of all prompts."""
    first = profiles[0]
    if any((one.reuses, one.lags, one.steps) != (first.reuses, first.lags, first.steps) for one in profiles):
        raise ValueError("profiles of different settings cannot be merged")
    return dataclasses.replace(
        first, costs=tuple(np.mean([one.costs for one in profiles], 0).tolist()),
        errors=np.concatenate([one.errors for one in profiles]), gains=np.concatenate([one.gains for one in profiles]),
    )


@dataclasses.dataclass(frozen=True)
class Found:
    """A schedule.

    Attributes:
        plan: One row a step.
        cut: Share of the time of a full run that it saves, by the profile's costs.
        loss: Mean squared error at the end that is expected of it.
    """

    plan: Plan
    cut: float
    loss: float


def front(profile: Profile) -> list[Found]:
    """The best schedules, by ascending cut: none is worse than another one at the same or a higher cut.

    The first and the last step are computed in each.
    """
    steps, longest = profile.steps, profile.errors.shape[4]
    losses = np.nan_to_num(profile.losses(), nan=np.inf, posinf=np.inf)
    costs = [max(1, round(cost * _UNIT)) for cost in profile.costs]
    nearest = [min(range(len(profile.lags)), key=lambda i: abs(profile.lags[i] - lag)) for lag in range(longest + 1)]
    budgets = steps * _UNIT + 1
    # best[c, lag, b]: least loss of arriving at the computed step c with b spent, the one before it `lag` earlier
    best = np.full((steps + 1, longest + 1, budgets), np.inf)
    came = np.full((steps + 1, longest + 1, budgets, 2), -1, dtype=np.int16)  # lag there, and way to reuse
    best[0, 0, 0] = 0.0
    for c in range(steps):
        for lag in range(longest + 1):
            here = best[c, lag]
            if not np.isfinite(here).any():
                continue
            for size in range(1, min(longest, steps - c) + 1):
                if size > 1 and c + size > steps - 1:
                    continue
                for way in range(len(costs)) if size > 1 else (-1,):
                    spent = _UNIT + (costs[way] * (size - 1) if size > 1 else 0)
                    loss = losses[way, c, nearest[max(lag, 1)], size - 1] if size > 1 else 0.0
                    there, arrived = best[c + size, size], np.full(budgets, np.inf)
                    arrived[spent:] = here[: budgets - spent] + loss
                    better = arrived < there
                    there[better] = arrived[better]
                    came[c + size, size, better] = (lag, way)
    found: list[Found] = []
    for budget in range(budgets - 1, -1, -1):
        lag = int(best[steps, :, budget].argmin())
        loss = float(best[steps, lag, budget])
        if np.isfinite(loss):
            plan = _backwards(came, steps, lag, budget, profile.reuses, costs)
            found.append(Found(plan, 1 - sum(
                1.0 if row is None else profile.costs[profile.reuses.index(row)] for row in plan) / steps, loss))
    kept: list[Found] = []
    for one in sorted(found, key=lambda one: (-one.cut, one.loss)):
        if not kept or one.loss < kept[-1].loss:
            kept.append(one)
    return kept[::-1]


def _backwards(
    came: np.ndarray, steps: int, lag: int, budget: int, reuses: Sequence[Reuse], costs: Sequence[int]
) -> Plan:
    rows: list[Reuse | None] = []
    c = steps
    while c > 0:
        before, way = (int(value) for value in came[c, lag, budget])
        rows[:0] = [None, *([reuses[way]] * (lag - 1))]
        budget -= _UNIT + (costs[way] * (lag - 1) if lag > 1 else 0)
        c, lag = c - lag, before
    return tuple(rows)
