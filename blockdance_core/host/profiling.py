"""Measure what reuse costs, through the host's own sampler: fills a `calibration.Profile`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import numpy as np

from blockdance_core.calibration import Profile
from blockdance_core.host.rollout import Rollouts
from blockdance_core.schedule import Reuse

_PROBES = 10


def profile(
    rollouts: Rollouts, reuses: Sequence[Reuse], lags: Sequence[int] = (1, 2, 3, 4, 6), longest: int = 7,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Profile:
    """Measure one prompt (or batch of prompts).

    Args:
        rollouts: The prompt; its full run is there.
        reuses: Ways to reuse.
        lags: Distances to the computed step before a group.
        longest: Longest group, steps.
        progress: Told how many of how many rollouts are done.
    """
    steps = rollouts.prompt.steps
    batch = rollouts.full.result.shape[0]
    longest = min(longest, steps - 1)
    errors = np.full((batch, len(reuses), steps, len(lags), longest), np.nan)
    work = [(way, c, i) for way in range(len(reuses)) for c in range(steps - 2) for i in range(len(lags)) if lags[i] <= max(c, 1)]
    probes = sorted({round(k) for k in np.linspace(0, steps - 3, min(_PROBES, steps - 2))})
    total = len(work) + len(probes)
    times: list[list[float]] = [[] for _ in reuses]
    for done, (way, c, i) in enumerate(work):
        before = c - lags[i]
        stop = min(c + longest, steps - 1)
        plan = [None if k <= c else reuses[way] for k in range(steps)]
        replayed = [k for k in range(steps) if k < c and k != before]
        run = rollouts.run(plan, replayed, until=stop)
        times[way] += [ms for k, ms in enumerate(run.record["dit_ms"]) if c < k < stop]
        errors[:, way, c, i, 0] = 0.0
        errors[:, way, c, i, 1 : stop - c] = rollouts.distances(run)[c + 2 : stop + 1].T
        progress(done + 1, total)
    way = max(range(len(reuses)), key=lambda way: reuses[way].boundary)
    at, values = [], []
    for done, c in enumerate(probes):
        end = min(c + 3, steps - 1)
        plan = [reuses[way] if c < k < end else None for k in range(steps)]
        run = rollouts.run(plan, [k for k in range(steps) if k < c - 1])
        distance = rollouts.distances(run)
        at.append(end)
        values.append((distance[-1] / distance[end].clamp(min=1e-12)).numpy())
        progress(len(work) + done + 1, total)
    logs = np.log(np.maximum(np.array(values), 1e-6)).T
    known = [*at, steps] if at[-1] < steps else at
    gains = np.stack([
        np.exp(np.interp(np.arange(steps + 1), known, [*row, 0.0][: len(known)])) for row in logs
    ])
    full = statistics.median(rollouts.full.record["dit_ms"])
    costs = tuple(statistics.median(of) / full for of in times)
    return Profile(tuple(reuses), costs, tuple(lags), errors, gains)
