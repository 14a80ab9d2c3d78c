"""Statistics over prompts, and the goals. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 10_000
PSNR_CAP = 100.0
"""Decibel that stand for the infinite PSNR of equal pictures."""
MARGIN = 0.005
"""A cut counts as at least another one's where it is lower by no more than this."""


class Goal(NamedTuple):
    """A fidelity, and the cut that is wanted at it, by the number of steps."""

    name: str
    ssim: float
    psnr: float
    cuts: dict[int, float]

    def best(self, points: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """The point of the highest cut among those of this fidelity."""
        faithful = [point for point in points if point["ssim"] >= self.ssim and point["psnr"] >= self.psnr]
        return max(faithful, key=lambda point: point["cut"], default=None)


GOALS = (
    Goal("near-lossless", 0.99, 0.0, {20: 0.45, 30: 0.50, 50: 0.65}),
    Goal("headline", 0.98, 36.0, {20: 0.55, 30: 0.60, 50: 0.75}),
    Goal("stretch", 0.95, 0.0, {20: 0.62, 30: 0.70, 50: 0.80}),
)


class Duel(NamedTuple):
    """Ours against a rival's point.

    Attributes:
        rival: Its point.
        ours: Our most faithful point of at least that cut; None where we have none so fast.
        difference: Mean SSIM of ours less the rival's, over the same prompts.
        low: Lower end of its 95 % interval.
        high: Upper end.
        tenth: 95 % interval of the same of the worst tenth of the prompts.
    """

    rival: dict[str, Any]
    ours: dict[str, Any] | None
    difference: float = math.nan
    low: float = math.nan
    high: float = math.nan
    tenth: tuple[float, float] = (math.nan, math.nan)

    @property
    def outcome(self) -> str:
        """`win` or `loss` where the interval leaves out 0, else `tie`; `out of reach` without a point of ours."""
        if self.ours is None:
            return "out of reach"
        return "win" if self.low > 0 else "loss" if self.high < 0 else "tie"


def duel(rival: dict[str, Any], ours: Sequence[dict[str, Any]]) -> Duel:
    """Compare a rival's point with our best one of at least its cut, prompt by prompt.

    Which one is the best is judged for each prompt by all the others: no prompt has a say in what it is judged with.
    """
    fast = [point for point in ours if point["cut"] >= rival["cut"] - MARGIN]
    if not fast:
        return Duel(rival, None)
    best = max(fast, key=lambda point: point["ssim"])
    each = np.array([point["prompt_ssim"] for point in fast])
    others = each.sum(1, keepdims=True) - each if each.shape[1] > 1 else each
    own = each[others.argmax(0), np.arange(each.shape[1])]
    gains = np.subtract(own, rival["prompt_ssim"])
    return Duel(rival, best, float(gains.mean()), *bootstrap(gains), tenth_gain(own, rival["prompt_ssim"]))


def bootstrap(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean, by the percentiles of resampled means."""
    array = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.percentile(array[drawn].mean(1), [2.5, 97.5])
    return float(low), float(high)


def tenth_gain(own: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """95 % interval of how much better the worst tenth of the prompts is, by resampled prompts."""
    drawn = np.random.default_rng(0).integers(len(own), size=(RESAMPLES, len(own)))
    most = max(1, round(len(own) / 10))
    means = [np.sort(np.asarray(values)[drawn], axis=1)[:, :most].mean(1) for values in (own, other)]
    low, high = np.percentile(means[0] - means[1], [2.5, 97.5])
    return float(low), float(high)


def worst_tenth(values: Sequence[float]) -> float:
    """Mean of the lowest tenth, of one value at least."""
    lowest = sorted(values)[: max(1, round(len(values) / 10))]
    return sum(lowest) / len(lowest)
