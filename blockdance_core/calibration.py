"""From what reuse costs, measured, to the best schedule: a dynamic program over groups.

A *group* is one computed step and the reuse steps behind it. What it costs in fidelity is measured by itself: the sampler
follows the full run up to the group, and then the group reuses, its errors piling up inside it as they would. How much an
error at some step matters in the end is measured too (`gain`). Errors of different groups are taken as independent.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from blockdance_core.forecast import LARGEST_WEIGHT, MOST_FEATURES, Forecast
from blockdance_core.schedule import Plan, Reuse

T = TypeVar("T")

CANDIDATES = (
    Forecast(True), *(Forecast(True, order, damping) for order in (1, 2) for damping in (0.25, 0.5, 0.75, 1.0))
)
"""Expansions to choose from for each step of a group; of equally good ones the first is taken."""
_RIDGE = 1e-5
"""How much fitted weights keep to the best expansion, as a share of what a stored residual weighs."""
Forecasts = Sequence[Sequence[Sequence[Sequence["Forecast | None"]]]]
"""The best forecast for the j-th step of a group, at [v][c][lag][j]; None where there is none."""
Group = tuple[int, int, int]
"""Computed step, number of steps, and way to reuse: index of a boundary."""
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
        sigmas: Noise levels of the steps.
        grams: Inner products of what forecasts weigh, of all steps, [V, 2, steps, 2, steps]: of the unconditional part, and of
            what guidance adds to it. Without guidance the second is 0. NaN of two that cannot be compared.
        errors: Distance to the full run behind a group of g steps, [prompts, V, steps, lags, longest] at [..., g - 1]. A
            group of one step has none. NaN where nothing was measured, or a step did not reuse.
        gains: What a distance of 1 at the beginning of a step becomes by the end of the run, [prompts, steps + 1].
    """

    boundaries: tuple[int, ...]
    costs: tuple[float, ...]
    lags: tuple[int, ...]
    sigmas: tuple[float, ...]
    grams: np.ndarray
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
        """Mean squared error at the end of the run that each group causes, [V, steps, lags, longest]; else infinite."""
        steps, longest = self.errors.shape[2], self.errors.shape[4]
        ends = np.minimum(np.arange(steps)[:, None] + np.arange(1, longest + 1), steps)
        gains = self.gains[:, ends][:, None, :, None, :]
        return np.asarray(np.nan_to_num(np.square(self.errors * gains).mean(0), nan=np.inf, posinf=np.inf))


def best_forecast(gram: np.ndarray, sigmas: Sequence[float], nodes: Sequence[int], step: int) -> Forecast | None:
    """The best expansion for a step, and the weights that least squares find.

    What guidance adds changes in another way than what it is added to: each has weights of its own.

    Args:
        gram: Inner products, see `Profile.grams`, [2, steps, 2, steps]: all that any forecast's error depends on.
        sigmas: Noise levels of the steps.
        nodes: The computed steps before it, newest first.
        step: The step that reuses.

    Returns:
        None if not even the newest can be compared with the step.
    """
    nodes, both = nodes[:MOST_FEATURES], gram.sum((0, 2))
    known = list(itertools.takewhile(lambda node: np.isfinite(both[node, [nodes[0], step]]).all(), nodes))
    if not known:
        return None
    inner, outer = both[np.ix_(known, known)], both[known, step]

    def weights_of(forecast: Forecast) -> np.ndarray:
        found = forecast.weights([sigmas[node] for node in known], sigmas[step])
        return np.array([*found, *[0.0] * (len(known) - len(found))])

    def error(weights: np.ndarray) -> float:
        return float(weights @ inner @ weights - 2 * weights @ outer)

    best = min((one for one in CANDIDATES if one.order < len(known)), key=lambda one: error(weights_of(one)))
    parts = [0, 1] if gram[1, step, 1, step] > 0 else [0]
    inner = gram[np.ix_(parts, known, parts, known)].reshape(2 * [len(parts) * len(known)])
    outer = gram[np.ix_(parts, known, [0, 1], [step])].sum((2, 3)).ravel()
    start = np.tile(weights_of(best), len(parts))
    ridge = _RIDGE * np.trace(inner) / len(start) + np.finfo(float).tiny
    fitted = (start + np.linalg.solve(inner + ridge * np.eye(len(start)), outer - inner @ start)).astype(np.float32)
    if not (np.abs(fitted) <= LARGEST_WEIGHT).all():
        return best
    ages, weights = [step - node for node in known], fitted.tolist()
    return dataclasses.replace(
        best, fitted=tuple(zip(ages, weights[: len(known)], strict=True)), guided=tuple(weights[len(known) :]))


def best_forecasts(grams: np.ndarray, sigmas: Sequence[float], lags: Sequence[int], longest: int) -> Forecasts:
    """The best forecast for each step of each group, after computed steps that are a lag apart."""
    steps = range(grams.shape[2])

    def of(gram: np.ndarray, c: int, lag: int, j: int) -> Forecast | None:
        nodes = [node for node in (c, c - lag, c - 2 * lag) if node >= 0]
        return best_forecast(gram, sigmas, nodes, c + j) if j and c + j in steps else None

    return [[[[of(gram, c, lag, j) for j in range(longest)] for lag in lags] for c in steps] for gram in grams]


def merged(profiles: Sequence[Profile]) -> Profile:
    """One profile of all prompts."""
    first = profiles[0]
    if any((one.boundaries, one.lags, one.sigmas) != (first.boundaries, first.lags, first.sigmas) for one in profiles):
        raise ValueError("profiles of different settings cannot be merged")
    return dataclasses.replace(
        first, costs=tuple(np.average([one.costs for one in profiles], 0, [len(one.errors) for one in profiles]).tolist()),
        grams=np.sum([one.grams for one in profiles], 0),
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


def front(profile: Profile, lead: int = 1) -> list[Found]:
    """The best schedules, by ascending cut: none is worse than another one at the same or a higher cut.

    Args:
        profile: What reuse costs.
        lead: So many steps at the beginning are computed.
    """
    steps, longest = profile.steps, profile.errors.shape[4]
    losses = profile.losses()
    costs = [min(round(cost * _UNIT), _UNIT) for cost in profile.costs]
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
                if size > 1 and c + 1 < lead:
                    continue
                for way in range(len(costs)) if size > 1 else (-1,):
                    spent = _UNIT + (costs[way] * (size - 1) if size > 1 else 0)
                    loss = losses[way, c, profile.nearest(lag), size - 1] if size > 1 else 0.0
                    there, arrived = best[c + size, size], np.full(budgets, np.inf)
                    arrived[spent:] = here[: budgets - spent] + loss
                    better = arrived < there
                    there[better] = arrived[better]
                    came[c + size, size, better] = (lag, way)
    found: list[tuple[float, float, list[Group]]] = []
    for budget in range(budgets - 1, -1, -1):
        lag = int(best[steps, :, budget].argmin())
        loss = float(best[steps, lag, budget])
        if np.isfinite(loss):
            groups = _backwards(steps, came, lag, budget, costs)
            saved = sum((size - 1) * (1 - profile.costs[way]) for _, size, way in groups if size > 1) / steps
            found.append((saved, loss, groups))
    return [Found(plan_of(profile, groups), saved, loss) for saved, loss, groups in unbeaten(found, lambda one: one[:2])]


def unbeaten(found: Iterable[T], cut_and_loss: Callable[[T], tuple[float, float]]) -> list[T]:
    """Those that lose less than every other one that cuts as much or more, by ascending cut."""
    kept: list[T] = []
    for one in sorted(found, key=lambda one: (-cut_and_loss(one)[0], cut_and_loss(one)[1])):
        if not kept or cut_and_loss(one)[1] < cut_and_loss(kept[-1])[1]:
            kept.append(one)
    return kept[::-1]


def _backwards(steps: int, came: np.ndarray, lag: int, budget: int, costs: Sequence[int]) -> list[Group]:
    groups = []
    c = steps
    while c > 0:
        before, way = (int(value) for value in came[c, lag, budget])
        groups.append((c - lag, lag, way))
        budget -= _UNIT + (costs[way] * (lag - 1) if lag > 1 else 0)
        c, lag = c - lag, before
    return groups[::-1]


def plan_of(profile: Profile, groups: Sequence[Group]) -> Plan:
    """The plan of groups, with the best forecasts for exactly these computed steps."""
    rows: list[Reuse | None] = []
    nodes: list[int] = []
    for c, size, way in groups:
        nodes = [c, *nodes[: MOST_FEATURES - 1]]
        forecasts = (best_forecast(profile.grams[way], profile.sigmas, nodes, c + j) for j in range(1, size))
        rows += [None, *(Reuse(profile.boundaries[way], forecast or Forecast(True)) for forecast in forecasts)]
    return tuple(rows)


def groups_of(profile: Profile, plan: Plan) -> list[Group]:
    """The groups of a plan."""
    behind = [(c, size, plan[c + 1] if size > 1 else None) for c, size in _sizes(plan)]
    widest = int(np.argmax(profile.boundaries))
    return [(c, size, profile.boundaries.index(row.boundary) if row else widest) for c, size, row in behind]


def _sizes(plan: Plan) -> list[tuple[int, int]]:
    """The computed steps of a plan, each with the number of steps of its group."""
    computed = [k for k, row in enumerate(plan) if row is None]
    return [(c, end - c) for c, end in zip(computed, [*computed[1:], len(plan)], strict=True)]


def refitted(profile: Profile, plan: Plan, boundary: int) -> Plan:
    """The plan with the same computed steps, the best forecasts for them, and another boundary."""
    way = profile.boundaries.index(boundary)
    return plan_of(profile, [(c, size, way) for c, size in _sizes(plan)])


def fits(profile: Profile, plan: Plan) -> bool:
    """Whether a plan begins with a computed step and is of a profile's number of steps and lengths of groups."""
    return len(plan) == profile.steps and plan[0] is None and max(size for _, size in _sizes(plan)) <= profile.errors.shape[4]


def neighbours(profile: Profile, plan: Plan) -> list[Plan]:
    """Plans in which one computed step comes one step earlier or later."""
    groups, sizes, losses = groups_of(profile, plan), range(1, profile.errors.shape[4] + 1), profile.losses()
    moved = [
        [*groups[:i], (c, size + by, way), (d + by, wide - by, wise), *groups[i + 2 :]]
        for i, ((c, size, way), (d, wide, wise)) in enumerate(itertools.pairwise(groups))
        for by in (-1, 1) if size + by in sizes and wide - by in sizes
    ]
    return [plan_of(profile, some) for some in moved if math.isfinite(_expected(losses, profile, some))]


def denser(profile: Profile, plan: Plan) -> Plan:
    """The plan with one more computed step, where that is expected to lower the error most; itself, if it reuses nothing."""
    groups = groups_of(profile, plan)
    split = [[*groups[:i], (c, j, way), (c + j, size - j, way), *groups[i + 1 :]]
             for i, (c, size, way) in enumerate(groups) for j in range(1, size)]
    return plan_of(profile, min(split, key=functools.partial(_expected, profile.losses(), profile))) if split else plan


def sparser(profile: Profile, plan: Plan) -> Iterator[Plan]:
    """Plans with one computed step less, first those that are expected to raise the error least."""
    groups, ways, longest = groups_of(profile, plan), range(len(profile.boundaries)), profile.errors.shape[4]
    joined = [[*groups[:i], (c, size + wide, way), *groups[i + 2 :]]
              for i, ((c, size, _), (_, wide, _)) in enumerate(itertools.pairwise(groups)) if size + wide <= longest
              for way in ways]
    losses = profile.losses()
    for some in sorted(joined, key=functools.partial(_expected, losses, profile)):
        if math.isfinite(_expected(losses, profile, some)):
            yield plan_of(profile, some)


def _expected(losses: np.ndarray, profile: Profile, groups: Sequence[Group]) -> float:
    """What groups are expected to lose; infinite if one of them was not measured."""
    lags = [1, *(size for _, size, _ in groups)]
    rows = zip(lags, groups, strict=False)
    return sum(float(losses[way, c, profile.nearest(lag), size - 1]) for lag, (c, size, way) in rows if size > 1)
