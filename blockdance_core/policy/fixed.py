"""A policy of one plan, for calibrations and tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from blockdance_core.schedule import Plan, Schedule, follow


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Exactly this plan, for a run of as many steps."""

    plan: Plan
    name: str = "fixed plan"
    wanted: float = 0.0

    @property
    def boundary(self) -> int | None:
        """The largest boundary of the plan."""
        return max((row.boundary for row in self.plan if row), default=None)

    def check(self, family: str, depth: int) -> None:
        """Whoever made the plan knew the model."""

    def schedule(self, levels: Sequence[float], sampler: str, group_size: int) -> Schedule:
        """The plan."""
        return follow(self.plan)
