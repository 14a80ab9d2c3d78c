"""What is injected at a reuse step, as weights over the stored features.

Every forecast is a linear combination of what a stream has stored, newest first, optionally added to the current input
of block 0 (`anchored`). The stored quantity is the boundary output F itself (`hold`), or the residual F - x0 against the
input x0 of block 0 at the same step (`delta`, `taylor`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

_SIGMA_TOLERANCE = 1e-6
_MAX_REACH = 8.0
"""No extrapolation further than this many times the distance of the stored sigmas: off-grid samplers store close pairs."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """A way to predict the boundary feature of a reuse step.

    Attributes:
        anchored: Whether residuals are stored, and added to the current input of block 0.
        order: Highest order of the extrapolation along sigma; costs one stored tensor each.
        damping: Factor 0..1 on the extrapolated part; 1 is the plain expansion.
    """

    anchored: bool
    order: int = 0
    damping: float = 1.0

    def weights(self, stored_at: Sequence[float], sigma: float) -> tuple[float, ...]:
        """Weights of the stored features for a forecast at `sigma`.

        Args:
            stored_at: Sigmas of the stored features, newest first, at least one.
            sigma: Noise level of the reuse step.

        Returns:
            One weight per feature used, newest first; they sum to 1. Order 1 is
            r(sigma) = r1 + damping * (sigma - s1) / (s1 - s0) * (r1 - r0). Falls back to the newest feature alone where
            there is no second one, its sigma is the same, or `sigma` is too far beyond the two.
        """
        if self.order == 0 or len(stored_at) < 2 or abs(stored_at[0] - stored_at[1]) <= _SIGMA_TOLERANCE:
            return (1.0,)
        reach = (sigma - stored_at[0]) / (stored_at[0] - stored_at[1])
        if abs(reach) > _MAX_REACH:
            return (1.0,)
        return (1.0 + self.damping * reach, -self.damping * reach)


FORECASTS = {
    "hold": Forecast(anchored=False),
    "delta": Forecast(anchored=True),
    "taylor": Forecast(anchored=True, order=1),
}
"""By the name of the widget. `hold` is the published method (section 2); the others see the current latent."""
