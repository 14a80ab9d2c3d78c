"""Measure what reuse costs, through the host's own sampler: fills a `calibration.Profile`."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blockdance_core import families
from blockdance_core.calibration import CANDIDATES, Forecasts, Profile
from blockdance_core.forecast import Forecast
from blockdance_core.host.attach import KEY
from blockdance_core.host.rollout import Rollouts
from blockdance_core.interception import Block, Feature, Passage, cloned, intercept, sample
from blockdance_core.schedule import Plan, Reuse

LAGS = (1, 2, 3, 4, 6)
LONGEST = 7
_PROBES = 10
_SAMPLES = 1 << 18
"""Values of a feature, at most, that forecasts are fitted to."""


def fit(rollouts: Rollouts, boundaries: Sequence[int], lags: Sequence[int] = LAGS, longest: int = LONGEST) -> np.ndarray:
    """How far each candidate forecast is from the full run's residuals, for each step of each group.

    Returns:
        Squared errors, [boundaries, steps, lags, longest, candidates]; NaN where a step or its history is not there.
    """
    steps = rollouts.steps
    recorder = _Recorder(families.find(rollouts.model.get_model_object("diffusion_model")).blocks, boundaries)
    rollouts.run([None] * steps, around=recorder)
    sigmas = rollouts.full.record["sigmas"]
    errors = np.full((len(boundaries), steps, len(lags), longest, len(CANDIDATES)), np.nan)
    for v, boundary in enumerate(boundaries):
        taken = recorder.taken[boundary]
        for c, (i, lag), j in itertools.product(range(steps), enumerate(lags), range(1, longest)):
            if c not in taken or c + j not in taken:
                continue
            # Conditionings come and go in mid-run: what differs in size is of others.
            alike = [k in taken and taken[k].shape == taken[c + j].shape for k in (c, c - lag, c - 2 * lag)]
            history = [c, c - lag, c - 2 * lag][: [*alike, False].index(False)]
            for index, forecast in enumerate(CANDIDATES):
                if forecast.order < len(history):
                    weights = forecast.weights([sigmas[k] for k in history], sigmas[c + j])
                    predicted = sum(weight * taken[k] for weight, k in zip(weights, history, strict=False))
                    errors[v, c, i, j, index] = (predicted - taken[c + j]).square().sum()
    return errors


def measure(
    rollouts: Rollouts, boundaries: Sequence[int], forecasts: Forecasts, lags: Sequence[int] = LAGS, longest: int = LONGEST,
    progress: Callable[[], None] = lambda: None,
) -> Profile:
    """What every group costs, and what becomes of an error, on one prompt or batch of prompts.

    Args:
        rollouts: The prompt; its full run is there.
        boundaries: Boundaries to measure.
        forecasts: The forecast of each step of each group.
        lags: Distances to the computed step before a group.
        longest: Longest group, steps.
        progress: Called after every rollout.
    """
    steps, batch = rollouts.steps, rollouts.full.result.shape[0]
    errors = np.full((batch, len(boundaries), steps, len(lags), longest), np.nan)
    errors[..., 0] = 0.0
    times: list[list[float]] = [[] for _ in boundaries]
    for v, c, i in groups(steps, len(boundaries), lags):
        stop = min(c + longest, steps - 1)
        plan, replayed = _alone(c, stop, lags[i], boundaries[v], forecasts[v][c][i], steps)
        run = rollouts.run(plan, replayed, until=stop)
        errors[:, v, c, i, 1 : stop - c] = rollouts.distances(run)[c + 2 : stop + 1].T
        times[v] += run.record["dit_ms"][c + 1 : stop]
        progress()
    full = statistics.median(rollouts.full.record["dit_ms"])
    costs = tuple(statistics.median(of) / full if of else 1.0 for of in times)
    gains = _gains(rollouts, boundaries, forecasts, lags[0], progress)
    return Profile(tuple(boundaries), costs, tuple(lags), forecasts, errors, gains)


def groups(steps: int, ways: int, lags: Sequence[int] = LAGS) -> list[tuple[int, int, int]]:
    """The groups to measure: boundary, computed step and lag, as indices."""
    return [(v, c, i) for v in range(ways) for c in range(steps - 2) for i, lag in enumerate(lags) if lag <= max(c, 1)]


def probes(steps: int) -> list[int]:
    """Where an error is made and followed to the end of the run."""
    return sorted({round(k) for k in np.linspace(0, steps - 3, min(_PROBES, steps - 2))}) if steps > 2 else []


def _alone(
    c: int, stop: int, lag: int, boundary: int, forecasts: Sequence[Forecast | None], steps: int
) -> tuple[Plan, list[int]]:
    """A plan in which one group reuses, from c + 1 up to `stop`, and the steps to replay.

    Before c, only its history runs, the steps c - lag and c - 2 lag. A replayed step stores nothing: its row says `Reuse`,
    so that none is taken for history in their place. Those before the first one that runs count as computed all the same,
    and stand for a history that there is not.
    """
    replayed = [k for k in range(c) if k not in (c - lag, c - 2 * lag)]
    plan: list[Reuse | None] = [Reuse(boundary, CANDIDATES[0]) if k in replayed else None for k in range(steps)]
    plan[c + 1 : stop] = [Reuse(boundary, one or CANDIDATES[0]) for one in forecasts[1 : stop - c]]
    return plan, replayed


def _gains(
    rollouts: Rollouts, boundaries: Sequence[int], forecasts: Forecasts, lag: int, progress: Callable[[], None]
) -> np.ndarray:
    steps = rollouts.steps
    deepest = int(np.argmax(boundaries))
    at, gains = [], []
    for c in probes(steps):
        end = min(c + 3, steps - 1)
        plan, replayed = _alone(c, end, lag, boundaries[deepest], forecasts[deepest][c][0], steps)
        distance = rollouts.distances(rollouts.run(plan, replayed))
        if end not in at:
            at.append(end)
            gains.append((distance[-1] / distance[end].clamp(min=1e-12)).numpy())
        progress()
    logs = np.log(np.maximum(np.array([*gains, np.ones(rollouts.full.result.shape[0])]), 1e-6))
    return np.exp([np.interp(np.arange(steps + 1), [*at, steps], row) for row in logs.T])


class _Recorder:
    """Keeps a sample of the residuals of some blocks; a visitor of `intercept`.

    Attributes:
        taken: Residuals of a step's first evaluation, all calls in one row, by boundary and step.
    """

    def __init__(self, blocks: Sequence[Block], boundaries: Sequence[int]) -> None:
        self.blocks, self.boundaries = blocks, boundaries
        self.taken: dict[int, dict[int, Tensor]] = {boundary: {} for boundary in boundaries}
        self.step = 0
        self._first: dict[int, int] = {}  # number of the first evaluation of each step
        self._input: Feature | None = None

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Watches one call of the model: a wrapper of the host's type APPLY_MODEL."""
        session = args[5][KEY]
        self.step = session.step
        if self._first.setdefault(self.step, session.evaluations) != session.evaluations:
            return executor(*args, **kwargs)
        with intercept(self.blocks, self, observe=self.boundaries):
            return executor(*args, **kwargs)

    def at_input(self, feature: Feature | None, obstacle: str | None) -> None:
        """Keeps the input: blocks may write into it."""
        self._input = None if feature is None else cloned(feature)

    def at_output(self, index: int, passage: Passage) -> None:
        """Takes a sample of the residual."""
        layout = self.blocks[index].to_boundary_layout
        if self._input is None or passage.returned is None or layout is None:
            return
        parts = []
        for output, base in zip(passage.returned, layout(self._input), strict=True):
            if output is not None and base is not None and output.shape == base.shape:
                parts.append((sample(output, _SAMPLES).float() - sample(base, _SAMPLES).float()).cpu())
        if parts:
            taken = self.taken[index]
            taken[self.step] = torch.cat([*([taken[self.step]] if self.step in taken else []), *parts])
