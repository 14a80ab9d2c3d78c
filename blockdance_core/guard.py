"""The online guard: reuse only where the forecast has lately been right.

Whenever a step is computed, what each forecast would have injected is compared with what the blocks really gave. From that
error follows how far the same forecast may reach next, as in the step-size control of a solver of differential equations:
the error of order m grows with the product of the distances, in steps, to the m + 1 features that it uses. No model,
sampler or picture needs to be known beforehand, and easy pictures get more reuse than hard ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from blockdance_core.forecast import Forecast
from blockdance_core.interception import Feature

QUALITIES = {"off": math.inf, "near-lossless": 0.15, "balanced": 0.25, "draft": 0.4}
"""Largest error of a forecast that is injected: a share of what the blocks contribute (root mean square), in units of what
a step accepts (`host.levels.accepted_errors`). Measured: docs/benchmarks.md."""
_SAMPLES = 1 << 15
"""Values that a stream is judged by, at most."""
_ORDERS = (0, 1, 2)
_LONGEST = 8
"""So many steps may follow a computed one at most."""


@dataclasses.dataclass
class _Stream:
    """The last samples of one stream's residual, newest first, and where they were taken."""

    steps: list[int] = dataclasses.field(default_factory=list)
    sigmas: list[float] = dataclasses.field(default_factory=list)
    samples: list[Tensor] = dataclasses.field(default_factory=list)


class Guard:
    """Says for each step whether it may reuse, and with which forecast. Lives as long as a run.

    Args:
        tolerance: Largest error that is accepted, see `QUALITIES`.
        kept: Features kept of a stream: a forecast has at most one order less.
        accepted: How much of the tolerance an error may take, for each step.
        lead: So many steps at the beginning are computed.
    """

    def __init__(self, tolerance: float, kept: int, accepted: Sequence[float], lead: int = 0) -> None:
        self.tolerance, self.kept, self.accepted, self.lead = tolerance, kept, accepted, lead
        self.forecast = Forecast(anchored=True)
        self._streams: dict[Hashable, _Stream] = {}
        self._measured: dict[int, list[Tensor]] = {}  # by order: squared errors and squares, on the device, in this step
        self._reaches: dict[int, float] = {}
        self._rates: dict[int, float] = {}  # error for a reach of 1
        self._nodes: list[int] = []
        self._computed = self._step = -1
        self._allowed = False

    def observe(self, key: Hashable, step: int, sigma: float, output: Feature, base: Feature) -> None:
        """A stream was computed.

        Args:
            key: The stream.
            step: Index of the executed step.
            sigma: Noise level.
            output: Raw output of the boundary block.
            base: Input of block 0 in the same layout.
        """
        if step != self._computed:
            self._resolve()
            self._computed = step
        sample = torch.cat([
            _sampled(after).float() - _sampled(before).float()
            for after, before in zip(output, base, strict=True) if after is not None and before is not None
        ])
        stream = self._streams.setdefault(key, _Stream())
        if stream.samples and stream.samples[0].shape != sample.shape:
            stream.steps, stream.sigmas, stream.samples = [], [], []
        if sigma not in stream.sigmas:
            for order in _ORDERS[: min(len(stream.samples), self.kept)]:
                weights = Forecast(True, order).weights(stream.sigmas, sigma)
                if len(weights) == order + 1:
                    predicted = sum(weight * one for weight, one in zip(weights, stream.samples, strict=False))
                    pair = torch.stack([(predicted - sample).square().sum(), sample.square().sum()])
                    self._measured.setdefault(order, []).append(pair)
                    self._reaches[order] = _reach(stream.steps, step, order)
            stream.steps = [step, *stream.steps[:2]]
            stream.sigmas, stream.samples = [sigma, *stream.sigmas[:2]], [sample, *stream.samples[:2]]
        self._nodes = list(stream.steps)

    def allows(self, step: int, sigma: float) -> bool:
        """Whether a step may reuse; `forecast` is what to inject then. All calls of a step get the same answer."""
        if step != self._step:
            self._resolve()
            self._step = step
            self._allowed = False
            known = [order for order in self._rates if order < min(len(self._nodes), self.kept)]
            errors = {order: self._rates[order] * _reach(self._nodes, step, order) for order in known}
            if errors and step >= self.lead and 0 < step - self._computed <= _LONGEST:
                best = min(errors, key=lambda order: errors[order])
                self.forecast = Forecast(anchored=True, order=best)
                self._allowed = errors[best] <= self.tolerance * self.accepted[step]
        return self._allowed

    def restart(self) -> None:
        """Nothing seen so far holds any longer."""
        self.__init__(self.tolerance, self.kept, self.accepted, self.lead)  # type: ignore[misc]

    def _resolve(self) -> None:
        """Read the errors of the last computed step; waits for the device, which by then is done with that step."""
        for order, pairs in self._measured.items():
            error, whole = torch.stack(pairs).sum(0).tolist()
            reach = self._reaches[order]
            if whole > 0 and reach > 0:
                self._rates[order] = math.sqrt(error / whole) / reach
        self._measured = {}


def _sampled(part: Tensor) -> Tensor:
    flat = part.reshape(-1)
    return flat[:: max(1, -(-flat.numel() // _SAMPLES))]


def _reach(nodes: Sequence[int], step: int, order: int) -> int:
    """Product of the distances in steps to the computed ones that a forecast of this order uses."""
    return math.prod(abs(step - node) for node in nodes[: order + 1])
