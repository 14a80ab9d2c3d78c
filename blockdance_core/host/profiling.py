"""Measure what reuse costs, through the host's own sampler: fills a `calibration.Profile`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blockdance_core import families
from blockdance_core.calibration import Forecasts, Profile
from blockdance_core.forecast import Forecast
from blockdance_core.host.attach import KEY
from blockdance_core.host.rollout import Rollouts
from blockdance_core.interception import Block, Feature, Passage, cloned, intercept
from blockdance_core.schedule import Reuse

LAGS = (1, 2, 3, 4, 6)
LONGEST = 7
_PROBES = 10
_SAMPLES = 1 << 18
"""Values of a feature, at most, that forecasts are fitted to."""
_DAMPINGS = (0.25, 0.5, 0.75, 1.0)


def profile(
    rollouts: Rollouts, boundaries: Sequence[int], lags: Sequence[int] = LAGS, longest: int = LONGEST,
    forecasts: Forecasts | None = None, progress: Callable[[int, int], None] = lambda done, of: None,
) -> Profile:
    """Measure one prompt, or one batch of prompts.

    Args:
        rollouts: The prompt; its full run is there.
        boundaries: Boundaries to measure.
        lags: Distances to the computed step before a group.
        longest: Longest group, steps.
        forecasts: Those of a profile that this one is to be merged with; None to fit them to this prompt.
        progress: Told how many of how many rollouts are done.
    """
    steps, batch = rollouts.prompt.steps, rollouts.full.result.shape[0]
    longest = max(1, min(longest, steps - 1))
    if forecasts is None:
        forecasts = _fitted(rollouts, boundaries, lags, longest)
    errors = np.full((batch, len(boundaries), steps, len(lags), longest), np.nan)
    errors[..., 0] = 0.0
    places = [(c, i) for c in range(steps - 2) for i, lag in enumerate(lags) if lag <= max(c, 1)]
    groups = [(v, *place) for v in range(len(boundaries)) for place in places]
    probes = sorted({round(k) for k in np.linspace(0, steps - 3, min(_PROBES, steps - 2))})
    times: list[list[float]] = [[] for _ in boundaries]
    for done, (v, c, i) in enumerate(groups):
        stop = min(c + longest, steps - 1)
        rows = [Reuse(boundaries[v], one or Forecast(True)) for one in forecasts[v][c][i][1 : stop - c]]
        computed = {c, c - lags[i], c - 2 * lags[i]}
        run = rollouts.run(
            [None] * (c + 1) + rows + [None] * (steps - stop), [k for k in range(c) if k not in computed], until=stop
        )
        errors[:, v, c, i, 1 : stop - c] = rollouts.distances(run)[c + 2 : stop + 1].T
        times[v] += run.record["dit_ms"][c + 1 : stop]
        progress(done + 1, len(groups) + len(probes))
    deepest = int(np.argmax(boundaries))
    at, gains = [], []
    for done, c in enumerate(probes):
        end = min(c + 3, steps - 1)
        rows = [Reuse(boundaries[deepest], one or Forecast(True)) for one in forecasts[deepest][c][0][1 : end - c]]
        run = rollouts.run([None] * (c + 1) + rows + [None] * (steps - end), range(c - 2))
        distance = rollouts.distances(run)
        at.append(end)
        gains.append((distance[-1] / distance[end].clamp(min=1e-12)).numpy())
        progress(len(groups) + done + 1, len(groups) + len(probes))
    logs = np.log(np.maximum(np.array([*gains, np.ones(batch)]), 1e-6))
    between = np.exp([np.interp(np.arange(steps + 1), [*at, steps], row) for row in logs.T])
    full = statistics.median(rollouts.full.record["dit_ms"])
    costs = tuple(statistics.median(of) / full if of else 1.0 for of in times)
    return Profile(tuple(boundaries), costs, tuple(lags), forecasts, errors, between)


def _fitted(rollouts: Rollouts, boundaries: Sequence[int], lags: Sequence[int], longest: int) -> Forecasts:
    """The order and damping that come nearest to the full run's residuals, for each step of each group."""
    steps = rollouts.prompt.steps
    recorder = _Recorder(families.find(rollouts.model.get_model_object("diffusion_model")).blocks, boundaries)
    rollouts.run([None] * steps, around=recorder)
    sigmas = rollouts.full.record["sigmas"]
    return [
        [[_best(recorder.taken[boundary], sigmas, c, lag, longest) for lag in lags] for c in range(steps)]
        for boundary in boundaries
    ]


def _best(
    taken: Mapping[int, Tensor], sigmas: Sequence[float], c: int, lag: int, longest: int
) -> list[Forecast | None]:
    history = [k for k in (c, c - lag, c - 2 * lag) if k in taken]
    best: list[Forecast | None] = [None] * longest
    for j in range(1, longest):
        if c + j not in taken or c not in taken:
            continue
        errors = {}
        for order in range(len(history)):
            for damping in _DAMPINGS if order else (1.0,):
                forecast = Forecast(True, order, damping)
                weights = forecast.weights([sigmas[k] for k in history], sigmas[c + j])
                predicted = sum(weight * taken[k] for weight, k in zip(weights, history, strict=False))
                errors[forecast] = float((predicted - taken[c + j]).square().sum())
        best[j] = min(errors, key=lambda one: (errors[one], one.order))
    return best


class _Recorder:
    """Keeps a sample of the residuals of some blocks; a visitor of `intercept`.

    Attributes:
        taken: Residuals of a step, all calls in one row, by boundary and step.
    """

    def __init__(self, blocks: Sequence[Block], boundaries: Sequence[int]) -> None:
        self.blocks, self.boundaries = blocks, boundaries
        self.taken: dict[int, dict[int, Tensor]] = {boundary: {} for boundary in boundaries}
        self.step = 0
        self._input: Feature | None = None

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Watches one call of the model: a wrapper of the host's type APPLY_MODEL."""
        self.step = args[5][KEY].step
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
                residual = (output.float() - base.float()).flatten()
                parts.append(residual[:: -(-residual.numel() // _SAMPLES)].cpu())
        taken = self.taken[index]
        taken[self.step] = torch.cat([*([taken[self.step]] if self.step in taken else []), *parts])
