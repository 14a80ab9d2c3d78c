"""The online guard: reuse only where the forecast has lately been right.

Whenever a step is computed, what each forecast would have injected is compared with what the blocks really gave. From that
error follows how far the same forecast may reach next, as in the step-size control of a solver of differential equations:
the error of order m grows with the product of the distances, in steps, to the m + 1 features that it uses. No model,
sampler or picture needs to be known beforehand, and easy pictures get more reuse than hard ones.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from blockdance_core.forecast import Forecast
from blockdance_core.interception import Feature

_SAMPLES = 1 << 15
"""Values that a stream is judged by, at most."""
ORDERS = (0, 1, 2)
_KEPT = len(ORDERS)
_LONGEST = 8
"""So many steps may follow a computed one at most."""
_SLACK = 2.0
"""So many times more than in steps a reach may have grown along sigma: where steps become much larger, errors do too."""
_PATIENCE = 4
"""After so many steps with streams that were never seen before, it is no longer the beginning."""


@dataclasses.dataclass
class _Stream:
    """What is known of one stream at one boundary.

    Attributes:
        steps: The last steps that were computed, newest first.
        sigmas: Their noise levels.
        samples: Samples of the residual there.
        measured: Squared error of every order at the newest step, and the square of the residual; on the device.
        reaches: How far each order had to reach for that, in steps and along sigma.
        errors: The root of that error as a share of the residual, and those reaches, by order.
        whole: Square of the residual.
    """

    steps: list[int] = dataclasses.field(default_factory=list)
    sigmas: list[float] = dataclasses.field(default_factory=list)
    samples: list[Tensor] = dataclasses.field(default_factory=list)
    measured: Tensor | None = None
    reaches: dict[int, tuple[float, float]] = dataclasses.field(default_factory=dict)
    errors: dict[int, tuple[float, tuple[float, float]]] = dataclasses.field(default_factory=dict)
    whole: float = 0.0

    def add(self, step: int, sigma: float, sample: Tensor) -> None:
        """The stream was computed; only earlier steps tell of it, and some samplers look ahead and come back."""
        alike = bool(self.samples) and self.samples[0].shape == sample.shape
        older = [k for k, node in enumerate(self.steps) if node < step and alike]
        self.steps, self.sigmas = [self.steps[k] for k in older], [self.sigmas[k] for k in older]
        self.samples = [self.samples[k] for k in older]
        self.reaches, errors = {}, [torch.dot(sample, sample)]
        for order in range(min(len(self.steps), _KEPT)):
            weights = Forecast(True, order).weights(self.sigmas, sigma)
            if len(weights) == order + 1:
                self.reaches[order] = self._reach(step, sigma, order)
                off = torch.neg(sample)
                for weight, one in zip(weights, self.samples, strict=False):
                    off.add_(one, alpha=weight)
                errors.append(torch.dot(off, off))
        self.measured = torch.stack(errors)
        keep = slice(0, _KEPT)  # one more than a forecast takes: the next evaluation may be of this step again
        self.steps, self.sigmas = [step, *self.steps[keep]], [sigma, *self.sigmas[keep]]
        self.samples = [sample, *self.samples[keep]]

    def resolve(self) -> None:
        """Read what was measured; waits for the device, which by the next step is done with it."""
        if self.measured is not None:
            self.whole, *errors = self.measured.tolist()
            self.errors = {
                order: (math.sqrt(error / self.whole), reach)
                for (order, reach), error in zip(self.reaches.items(), errors, strict=True) if self.whole > 0
            }
            self.measured = None

    def error(self, order: int, step: int, sigma: float) -> float:
        """What a forecast of this order would be off by at a step, as a share of the residual.

        It grows as the reach does in steps, which most schedules make of even weight; along sigma where
        that has grown far more.
        """
        error, (steps, sigmas) = self.errors[order]
        in_steps, along_sigma = self._reach(step, sigma, order)
        return error * max(in_steps / steps, along_sigma / (_SLACK * sigmas) if sigmas > 0 else 0.0)

    def _reach(self, step: int, sigma: float, order: int) -> tuple[float, float]:
        """Product of the distances to the computed steps that a forecast of this order uses."""
        nodes = zip(self.steps[: order + 1], self.sigmas, strict=False)
        distances = [(abs(step - node), abs(sigma - level)) for node, level in nodes]
        return math.prod(steps for steps, _ in distances), math.prod(sigmas for _, sigmas in distances)


class Guard:
    """Says for each step whether it may reuse, and with which forecast. Lives as long as a run, and speaks for all its models.

    What guidance sets against each other must be forecast alike, or not at all: an error that both sides share nearly cancels,
    one that only one side has is multiplied. So all streams get one answer, also where each side has a model or a GPU of its
    own.

    Args:
        tolerance: Largest error that is accepted, see `config.QUALITIES`.
        accepted: How much of the tolerance an error may take, for each step.
        lead: So many steps at the beginning are computed.
    """

    def __init__(self, tolerance: float, accepted: Sequence[float], lead: int = 0) -> None:
        self.tolerance, self.accepted, self.lead = tolerance, accepted, lead
        self._streams: dict[tuple[int, Hashable], _Stream] = {}
        self._computed: dict[int, int] = {}
        self._step: int | None = None
        self._answers: dict[int, int | None] = {}  # at that step, by boundary
        self._new = 0
        self._lock = threading.RLock()  # on several GPUs each calls from a thread

    @property
    def computed(self) -> int:
        """The last step that was computed, at any boundary."""
        with self._lock:
            return max(self._computed.values(), default=0)

    @property
    def lost(self) -> bool:
        """Whether at many steps there were streams that had nothing before to compare with."""
        return self._new >= _PATIENCE

    def observe(
        self, boundary: int, key: Hashable, step: int, sigma: float, output: Feature, base: Feature | None
    ) -> None:
        """A stream was computed and stored.

        Args:
            boundary: Of the output, counted from the end of the model: 0 for the slope that the whole model gives, in models of
                any depth.
            key: The stream, and what its features are valid under.
            step: Index of the executed step.
            sigma: Noise level.
            output: Raw output of the boundary block, or the slope that the whole model gives.
            base: Input of block 0 in the same layout; None for a slope.
        """
        taken = torch.cat([
            sample(after, _SAMPLES).float() - (0.0 if base is None else sample(before, _SAMPLES).float())
            for after, before in zip(output, base or output, strict=True) if after is not None and before is not None
        ])
        with self._lock:
            if step != self._computed.get(boundary):
                since = self._computed.get(boundary, 0)
                for name in [name for name, one in self._streams.items() if name[0] == boundary and one.steps[0] < since]:
                    del self._streams[name]
                self._computed[boundary] = step
            self._streams.setdefault((boundary, key), _Stream()).add(step, sigma, taken)

    def since(self, boundary: int) -> int:
        """The last step that was computed: a feature from before it may not be injected."""
        return self._computed.get(boundary, 0)

    def order(self, boundary: int, step: int, sigma: float, orders: Sequence[int] = ORDERS) -> int | None:
        """The order of the forecast that a step may inject; None to compute it. All calls of a step get the same answer.

        Args:
            boundary: Of the features that would be injected, see `observe`.
            step: Index of the executed step.
            sigma: Its noise level.
            orders: Orders to choose from.
        """
        with self._lock:
            if step != self._step:
                self._step, self._answers = step, {}
            if boundary not in self._answers:
                self._answers[boundary] = self._best(boundary, step, sigma, orders)
            return self._answers[boundary]

    def _best(self, boundary: int, step: int, sigma: float, orders: Sequence[int]) -> int | None:
        computed = self._computed.get(boundary)
        if computed is None or step < self.lead or not 0 < step - computed <= _LONGEST:
            return None
        errors = self._errors(boundary, computed, step, sigma, orders)
        best = min(errors, key=lambda order: errors[order], default=None)
        return best if best is not None and errors[best] <= self.tolerance * self.accepted[step] else None

    def _errors(
        self, boundary: int, computed: int, step: int, sigma: float, orders: Sequence[int]
    ) -> dict[int, float]:
        """The error to expect of each order that every stream of the last computed step has measured; root mean square."""
        streams = [one for name, one in self._streams.items() if name[0] == boundary and one.steps[0] == computed]
        for one in streams:
            one.resolve()
        self._new += not all(one.errors for one in streams)
        known = [order for order in orders if all(order in one.errors for one in streams)]
        whole = sum(one.whole for one in streams)
        if not whole > 0:
            return {}
        return {
            order: math.sqrt(sum(one.error(order, step, sigma) ** 2 * one.whole for one in streams) / whole)
            for order in known
        }

    def restart(self) -> None:
        """Nothing seen so far holds any longer."""
        with self._lock:
            self._streams.clear()
            self._computed.clear()
            self._step = None


def sample(part: Tensor, most: int) -> Tensor:
    """Some of the values, evenly spread and from every channel, as a row; of the same shape always the same places.

    Args:
        part: A component of a feature, of any size.
        most: So many values at most.
    """
    stride = max(1, -(-part.numel() // most))
    while part.ndim and math.gcd(stride, part.shape[-1]) > 1:  # else it would meet the same channels again and again
        stride += 1
    if part.is_contiguous() or stride == 1:
        return part.reshape(-1)[::stride]
    places = torch.arange(0, part.numel(), stride, device=part.device)
    return part[torch.unravel_index(places, part.shape)]
