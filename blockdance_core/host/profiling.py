"""Measure what reuse costs, through the host's own sampler: fills a `calibration.Profile`."""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from comfy.k_diffusion.sampling import to_d
from torch import Tensor

from blockdance_core.calibration import CANDIDATES, Forecasts, Profile
from blockdance_core.forecast import Forecast
from blockdance_core.guard import sample
from blockdance_core.host.attach import KEY, match_of
from blockdance_core.host.rollout import Rollouts
from blockdance_core.interception import Block, Feature, Passage, cloned, intercept
from blockdance_core.schedule import CACHE, COMPUTE, Plan, Reuse

LAGS = (1, 2, 3, 4, 6)
LONGEST = 10
_PROBES = 10
_FIRST = 4
"""If nothing was reused up to this step, nothing will be."""
_SAMPLES = 1 << 17
"""Values of a conditioning's feature, at most, that forecasts are fitted to."""


def gram(rollouts: Rollouts, boundaries: Sequence[int]) -> np.ndarray:
    """Inner products of what the full run gives at all steps, in two parts: see `calibration.Profile.grams`.

    Returns:
        [boundaries, 2, steps, 2, steps]; NaN of two steps that hold different conditionings, which come and go in mid-run.
    """
    steps = rollouts.steps
    blocks = match_of(rollouts.model).blocks
    recorder = _Recorder(blocks, boundaries, rollouts.prompt.cfg)
    rollouts.run([None] * steps, around=recorder)
    found = np.full((len(boundaries), 2, steps, 2, steps), np.nan)
    for v, boundary in enumerate(boundaries):
        taken = [recorder.parts(boundary, step) for step in range(steps)]
        for (k, one), (j, other) in itertools.product(enumerate(taken), repeat=2):
            if one is not None and other is not None and one[0] == other[0]:
                found[v, :, k, :, j] = one[1] @ other[1].T
    return found


def measure(
    rollouts: Rollouts, boundaries: Sequence[int], forecasts: Forecasts, grams: np.ndarray, lags: Sequence[int] = LAGS,
    longest: int = LONGEST, progress: Callable[[], None] = lambda: None,
) -> Profile:
    """What every group costs, and what becomes of an error, on one prompt or batch of prompts.

    Args:
        rollouts: The prompt; its full run is there.
        boundaries: Boundaries to measure.
        forecasts: The forecast of each step of each group.
        grams: What `gram` found, to be kept with the rest.
        lags: Distances to the computed step before a group.
        longest: Longest group, steps.
        progress: Called after every rollout.

    Raises:
        ValueError: No step reuses; the message says why.
    """
    steps, batch = rollouts.steps, rollouts.full.result.shape[0]
    errors = np.full((batch, len(boundaries), steps, len(lags), longest), np.nan)
    errors[..., 0] = 0.0
    shares: list[list[float]] = [[] for _ in boundaries]  # of the time of a computed step
    reasons: dict[str, None] = {}
    for v, c, i in groups(steps, len(boundaries), lags):
        stop = min(c + longest, steps)
        plan, replayed = _alone(c, stop, lags[i], boundaries[v], forecasts[v][c][i], steps)
        run = rollouts.run(plan, replayed, until=stop)
        reused = _reused(run.record, range(c + 1, stop))
        errors[:, v, c, i, 1 : 1 + reused] = rollouts.distances(run)[c + 2 : c + 2 + reused].T
        times = run.record["dit_ms"]  # of one run: the device may be busier, or slower, in the next
        computed = [ms for k, ms in enumerate(times[: c + 1]) if ms and k not in replayed]
        shares[v] += [ms / statistics.median(computed) for ms in times[c + 1 : c + 1 + reused] if ms and computed]
        reasons |= dict.fromkeys([*run.record["fallbacks"], *run.record["warnings"]])
        progress()
        if c >= min(_FIRST, steps - 2) and not any(shares):
            raise ValueError(f"Nothing can be reused with this model and prompt: {'; '.join(reasons) or 'no reason is known'}.")
    costs = tuple(statistics.median(of) if of else 1.0 for of in shares)
    gains = _gains(rollouts, boundaries, forecasts, lags[0], progress)
    sigmas = tuple(rollouts.full.record["sigmas"])
    return Profile(tuple(boundaries), costs, tuple(lags), sigmas, grams, errors, gains)


def _reused(record: dict[str, Any], planned: Sequence[int]) -> int:
    """How many of the steps that are planned to reuse did so, up to the first that did not; some samplers leave steps out.

    In a step that is mixed some calls reuse; others, such as those of a conditioning that is new, cannot.
    """
    kept = itertools.takewhile(
        lambda step: record["decisions"][step] not in (COMPUTE, CACHE) or not record["calls"][step], planned)
    return len(list(kept))


def groups(steps: int, ways: int, lags: Sequence[int] = LAGS) -> list[tuple[int, int, int]]:
    """The groups to measure: boundary, computed step and lag, as indices."""
    return [(v, c, i) for v in range(ways) for c in range(steps - 1) for i, lag in enumerate(lags) if lag <= max(c, 1)]


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
        if end not in at and (distance[end] > 0).all():
            at.append(end)
            gains.append((distance[-1] / distance[end].clamp(min=1e-12)).numpy())
        progress()
    logs = np.log(np.maximum(np.array([*gains, np.ones(rollouts.full.result.shape[0])]), 1e-6))
    return np.exp([np.interp(np.arange(steps + 1), [*at, steps], row) for row in logs.T])


class _Recorder:
    """Keeps a sample of the residuals of some blocks, and of slopes, of the first evaluation of each step.

    A visitor of `intercept`.
    """

    def __init__(self, blocks: Sequence[Block], boundaries: Sequence[int], cfg: float) -> None:
        self.blocks, self.boundaries, self.cfg = blocks, boundaries, cfg
        self.step = 0
        self._kinds: Sequence[int] = ()  # of the chunks of a call: 0 conditional, 1 unconditional
        self._taken: defaultdict[tuple[int, int], list[tuple[int, Tensor]]] = defaultdict(list)
        self._first: dict[int, int] = {}  # number of the first evaluation of each step
        self._input: Feature | None = None

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Watches one call of the model: a wrapper of the host's type APPLY_MODEL."""
        session = args[5][KEY]
        self.step, self._kinds = session.step, args[5].get("cond_or_uncond") or (0,)
        if self._first.setdefault(self.step, session.evaluations) != session.evaluations:
            return executor(*args, **kwargs)
        latent, sigmas = args[:2]
        watched = [boundary for boundary in self.boundaries if boundary < len(self.blocks)]
        with intercept(self.blocks, self, observe=watched) if watched else contextlib.nullcontext():
            estimate = executor(*args, **kwargs)
        slope = to_d(latent, sigmas, estimate)
        self._take(len(self.blocks), [[sample(one, _SAMPLES).float().cpu()] for one in slope.chunk(len(self._kinds))])
        return estimate

    def at_input(self, feature: Feature | None, obstacle: str | None) -> None:
        """Keeps the input: blocks may write into it."""
        self._input = None if feature is None else cloned(feature)

    def at_output(self, index: int, passage: Passage) -> None:
        """Takes a sample of the residual of every conditioning."""
        layout = self.blocks[index].to_boundary_layout
        if self._input is None or passage.returned is None or layout is None:
            return
        chunks: list[list[Tensor]] = [[] for _ in self._kinds]
        for output, base in zip(passage.returned, layout(self._input), strict=True):
            if output is not None and base is not None and output.shape == base.shape:
                for chunk, after, before in zip(chunks, output.chunk(len(chunks)), base.chunk(len(chunks)), strict=False):
                    chunk.append((sample(after, _SAMPLES).float() - sample(before, _SAMPLES).float()).cpu())
        self._take(index, chunks)

    def _take(self, index: int, chunks: Sequence[Sequence[Tensor]]) -> None:
        for kind, chunk in zip(self._kinds, chunks, strict=True):
            if chunk:
                self._taken[index, self.step].append((kind, torch.cat(list(chunk))))

    def parts(self, boundary: int, step: int) -> tuple[Any, Tensor] | None:
        """What forecasts weigh at a step, [2, values], behind a mark that others like it bear.

        Of one conditional and one unconditional stream of the same size: the unconditional one, and the difference times the
        guidance, so that an error counts as it does in the end. Of others: one behind the other, and nothing.
        """
        taken = sorted(self._taken[boundary, step], key=lambda pair: pair[0])
        if not taken:
            return None
        mark = tuple((kind, len(one)) for kind, one in taken)
        (kind, first), *others = taken
        if kind == 0 and [(other, len(one)) for other, one in others] == [(1, len(first))]:
            negative = others[0][1].double()
            return mark, torch.stack([negative, self.cfg * (first.double() - negative)])
        values = torch.cat([one for _, one in taken]).double()
        return mark, torch.stack([values, torch.zeros_like(values)])
