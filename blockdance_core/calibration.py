"""From what reuse costs, measured, to the best schedule: a dynamic program over groups.

A *group* is one computed step and the reuse steps behind it. What it costs in fidelity is measured by itself: the sampler
follows the full run up to the group, and then the group reuses, its errors piling up inside it as they would. How much an
error at some step matters in the end is measured too (`gain`). Errors of different groups are taken as independent.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blockdance_core.forecast import Forecast
from blockdance_core.schedule import Plan, Reuse

CANDIDATES = (
    Forecast(True), *(Forecast(True, order, damping) for order in (1, 2) for damping in (0.25, 0.5, 0.75, 1.0))
)
"""Forecasts to choose from for each step of a group; of equally good ones the first is taken."""
Forecasts = Sequence[Sequence[Sequence[Sequence["Forecast | None"]]]]
_UNIT = 24
"""Budgets are counted in this many parts of a step."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """What reuse costs on some prompts, for one sampler and number of steps.

    A group is told by its boundary, its computed step c and its lag, the distance from c to the computed step before it.

    Attributes:
        boundaries: The boundaries that were measured, V of them.
        costs: Time of a reuse step of each, as a share of a computed one, [V].
        lags: The lags that were measured, ascending.
        forecasts: The best forecast for the j-th step of a group, at [v][c][lag][j]; None where there is none.
        errors: Distance to the full run behind a group of g steps, [prompts, V, steps, lags, longest] at [..., g - 1]. A
            group of one step has none. NaN where nothing was measured.
        gains: What a distance of 1 at the beginning of a step becomes by the end of the run, [prompts, steps + 1].
    """

    boundaries: tuple[int, ...]
    costs: tuple[float, ...]
    lags: tuple[int, ...]
    forecasts: Forecasts
    errors: np.ndarray
    gains: np.ndarray

    @property
    def steps(self) -> int:
        """Number of steps of the run."""
        return int(self.gains.shape[1]) - 1

    def nearest(self, lag: int) -> int:
        """The index of the measured lag that is nearest."""
        return min(range(len(self.lags)), key=lambda i: abs(self.lags[i] - lag))

    def losses(self) -> np.ndarray:
        """Mean squared error at the end of the run that each group causes, [V, steps, lags, longest]."""
        steps, longest = self.errors.shape[2], self.errors.shape[4]
        ends = np.minimum(np.arange(steps)[:, None] + np.arange(1, longest + 1), steps)
        gains = self.gains[:, ends][:, None, :, None, :]
        return np.asarray(np.square(self.errors * gains).mean(0))


def chosen(errors: np.ndarray) -> Forecasts:
    """The best candidates.

    Args:
        errors: Squared error of every candidate, [V, steps, lags, longest, candidates]; NaN where it does not apply.
    """
    indices = np.nan_to_num(errors, nan=np.inf).argmin(-1)
    known = np.isfinite(errors).any(-1)

    def named(index: np.ndarray, there: np.ndarray) -> list[Any]:
        if index.ndim == 1:
            return [CANDIDATES[one] if yes else None for one, yes in zip(index, there, strict=True)]
        return [named(*pair) for pair in zip(index, there, strict=True)]

    return named(indices, known)


def merged(profiles: Sequence[Profile]) -> Profile:
    """One profile of all prompts."""
    first = profiles[0]
    if any((one.boundaries, one.lags, one.forecasts) != (first.boundaries, first.lags, first.forecasts) for one in profiles):
        raise ValueError("profiles of different settings cannot be merged")
    return dataclasses.replace(
        first, costs=tuple(np.mean([one.costs for one in profiles], 0).tolist()),
        errors=np.concatenate([one.errors for one in profiles]), gains=np.concatenate([one.gains for one in profiles]),
    )


def save_profile(profile: Profile, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
    """Write a profile, whole or not at all, as a NumPy archive; what it was measured with beside it, as JSON."""
    rows = np.array(profile.forecasts, dtype=object)
    fields = {
        name: np.vectorize(lambda one, name=name: -1 if one is None else getattr(one, name), otypes=[float])(rows)
        for name in ("anchored", "order", "damping")
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(path.name + ".part")
    with written.open("wb") as file:
        np.savez_compressed(
            file, settings=json.dumps(dict(settings)), boundaries=profile.boundaries, costs=profile.costs, lags=profile.lags,
            errors=profile.errors, gains=profile.gains, **fields,
        )
    os.replace(written, path)


def load_profile(path: str | os.PathLike[str]) -> tuple[Profile, dict[str, Any]]:
    """A profile and its settings, as `save_profile` wrote them; nothing in the file is executed."""
    with np.load(path, allow_pickle=False) as file:
        found = {name: file[name] for name in file.files}
    rows = np.stack([found[name] for name in ("anchored", "order", "damping")], -1)

    def named(of: np.ndarray) -> Any:
        if of.ndim > 1:
            return [named(one) for one in of]
        anchored, order, damping = of.tolist()
        return None if order < 0 else Forecast(bool(anchored), int(order), damping)

    boundaries, costs, lags = (tuple(found[name].tolist()) for name in ("boundaries", "costs", "lags"))
    settings: dict[str, Any] = json.loads(str(found["settings"]))
    return Profile(boundaries, costs, lags, named(rows), found["errors"], found["gains"]), settings


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


def front(profile: Profile, lead: int = 1) -> list[Found]:
    """The best schedules, by ascending cut: none is worse than another one at the same or a higher cut.

    Args:
        profile: What reuse costs.
        lead: So many steps at the beginning are computed, and so is the last.
    """
    steps, longest = profile.steps, profile.errors.shape[4]
    losses = np.nan_to_num(profile.losses(), nan=np.inf, posinf=np.inf)
    costs = [max(1, round(cost * _UNIT)) for cost in profile.costs]
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
                if size > 1 and (c + size > steps - 1 or c + 1 < lead):
                    continue
                for way in range(len(costs)) if size > 1 else (-1,):
                    spent = _UNIT + (costs[way] * (size - 1) if size > 1 else 0)
                    loss = losses[way, c, profile.nearest(lag), size - 1] if size > 1 else 0.0
                    there, arrived = best[c + size, size], np.full(budgets, np.inf)
                    arrived[spent:] = here[: budgets - spent] + loss
                    better = arrived < there
                    there[better] = arrived[better]
                    came[c + size, size, better] = (lag, way)
    cost = dict(zip(profile.boundaries, profile.costs, strict=True))
    found: list[Found] = []
    for budget in range(budgets - 1, -1, -1):
        lag = int(best[steps, :, budget].argmin())
        loss = float(best[steps, lag, budget])
        if np.isfinite(loss):
            plan = _backwards(profile, came, lag, budget, costs)
            found.append(Found(plan, sum(1 - cost[row.boundary] for row in plan if row) / steps, loss))
    kept: list[Found] = []
    for one in sorted(found, key=lambda one: (-one.cut, one.loss)):
        if not kept or one.loss < kept[-1].loss:
            kept.append(one)
    return kept[::-1]


def _backwards(profile: Profile, came: np.ndarray, lag: int, budget: int, costs: Sequence[int]) -> Plan:
    groups = []
    c = profile.steps
    while c > 0:
        before, way = (int(value) for value in came[c, lag, budget])
        groups.append((c - lag, lag, way))
        budget -= _UNIT + (costs[way] * (lag - 1) if lag > 1 else 0)
        c, lag = c - lag, before
    return plan_of(profile, groups[::-1])


def plan_of(profile: Profile, groups: Sequence[tuple[int, int, int]]) -> Plan:
    """The plan of groups (computed step, size, way), with the forecasts that were chosen for them."""
    rows: list[Reuse | None] = []
    lag = 1
    for c, size, way in groups:
        forecasts = profile.forecasts[way][c][profile.nearest(lag)]
        reused = [forecasts[min(j, len(forecasts) - 1)] or Forecast(True) for j in range(1, size)]
        rows += [None, *(Reuse(profile.boundaries[way], forecast) for forecast in reused)]
        lag = size
    return tuple(rows)


def neighbours(profile: Profile, plan: Plan, lead: int = 1) -> list[Plan]:
    """Plans in which one computed step comes one step earlier or later."""
    computed = [k for k, row in enumerate(plan) if row is None]
    ways = {k: profile.boundaries.index(plan[k + 1].boundary) for k in computed[:-1] if plan[k + 1] is not None}  # type: ignore[union-attr]
    default = int(np.argmax(profile.boundaries))
    found = []
    for index, k in enumerate(computed[1:-1], 1):
        for to in (k - 1, k + 1):
            if lead <= min(k, to) and to not in computed:
                moved = [*computed[:index], to, *computed[index + 1 :]]
                ends = [*moved[1:], profile.steps]
                found.append(plan_of(profile, [
                    (c, end - c, ways.get(computed[i], default)) for i, (c, end) in enumerate(zip(moved, ends, strict=True))
                ]))
    return found
