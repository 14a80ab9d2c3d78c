"""What stands in for the model, or for a part of it, at a reuse step: weights over the stored features.

Every forecast is a linear combination of what a stream has stored, newest first, optionally added to the current input
of block 0 (`anchored`). The stored quantity is the boundary output F itself (`hold`), or the residual F - x0 against the
input x0 of block 0 at the same step (the others). Where the whole model is skipped it is the slope of the latent along sigma,
d = (x - denoised) / sigma, whatever the model predicts (Karras et al., arXiv 2206.00364, section 2).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

_SIGMA_TOLERANCE = 1e-6
_MAX_REACH = 8.0
"""No extrapolation further than this many times the distance of the stored sigmas: off-grid samplers store close pairs."""


MOST_FEATURES = 3
"""Stored features, at most, that a forecast weighs."""
LARGEST_WEIGHT = 100.0
"""Fitted weights beyond it are not taken: they would amplify every rounding of the stored features."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """A way to predict the boundary feature of a reuse step.

    Attributes:
        anchored: Whether residuals are stored, and added to the current input of block 0. Slopes never are.
        order: Highest order of the extrapolation along sigma; costs one stored tensor each.
        damping: Factor 0..1 on the extrapolated part; 1 is the plain expansion.
        fitted: Weights that a calibration found, newest first, each with how many steps before the feature was stored. They
            hold where exactly those features are stored; elsewhere the expansion does.
        guided: Weights of the same features for what guidance amplifies, the difference between a conditional stream and its
            unconditional one; `fitted` are then those of the unconditional stream. Empty where one set holds for all.
    """

    anchored: bool
    order: int = 0
    damping: float = 1.0
    fitted: tuple[tuple[int, float], ...] = ()
    guided: tuple[float, ...] = ()

    @property
    def features(self) -> int:
        """Most stored features that it weighs."""
        return max(self.order + 1, len(self.fitted))

    def fits(self, ages: Sequence[int]) -> bool:
        """Whether features that were stored so many steps before, newest first, are those that weights were fitted to."""
        return bool(self.fitted) and tuple(ages[: len(self.fitted)]) == tuple(age for age, _ in self.fitted)

    def weights(self, stored_at: Sequence[float], sigma: float, ages: Sequence[int] = ()) -> tuple[float, ...]:
        """Weights of the stored features for a forecast at `sigma`.

        Args:
            stored_at: Sigmas of the stored features, newest first, at least one.
            sigma: Noise level of the reuse step.
            ages: How many steps before the reuse step each was stored, if that is known.

        Returns:
            One weight per feature used, newest first. They are `fitted`, or sum to 1 and are those of Newton's interpolation
            r(s) = r1 + d (s - s1) r[1,2] + d^2 (s - s1) (s - s2) r[1,2,3], with the divided differences r[...] and the damping
            d. The order is lower where features are missing, have the same sigma, or `sigma` is too far beyond them.
        """
        if self.fits(ages):
            return tuple(weight for _, weight in self.fitted)
        weights = [1.0]
        product = 1.0
        for order in range(1, min(self.order, len(stored_at) - 1) + 1):
            nodes = stored_at[: order + 1]
            gaps = [abs(one - nodes[-1]) for one in nodes[:-1]]
            if min(gaps) <= _SIGMA_TOLERANCE or abs(sigma - nodes[0]) > _MAX_REACH * min(gaps):
                break
            product *= self.damping * (sigma - nodes[order - 1])
            weights.append(0.0)
            for j, node in enumerate(nodes):
                weights[j] += product / math.prod(node - other for i, other in enumerate(nodes) if i != j)
        return tuple(weights)


FORECASTS = {
    "taylor": Forecast(anchored=True, order=1),
    "taylor2": Forecast(anchored=True, order=2),
    "delta": Forecast(anchored=True),
    "hold": Forecast(anchored=False),
}
"""As the widget has them. `hold` is the published method; the others see the current latent."""
