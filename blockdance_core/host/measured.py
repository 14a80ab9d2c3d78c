"""A profile with all that it was measured on: what the nodes and the program hand on."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from blockdance_core.calibration import Profile, merged
from blockdance_core.host.rollout import Prompt, sigmas_of
from blockdance_core.host.search import profiled

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


@dataclasses.dataclass(frozen=True)
class Measured:
    """What reuse costs, with everything that a calibration needs besides.

    Attributes:
        model: MODEL that was sampled.
        prompts: What was sampled, one after the other.
        profile: Of all prompts.
        rollouts: Number of runs that it took.
        calls: Calls of the model in them.
        seconds: Time that they took.
    """

    model: ModelPatcher
    prompts: tuple[Prompt, ...]
    profile: Profile
    rollouts: int
    calls: int
    seconds: float

    def report(self) -> dict[str, Any]:
        """What was measured, as plain JSON data; `errors` is the mean distance that one reuse step adds, for every step."""
        first, profile = self.prompts[0], self.profile
        errors = profile.errors[:, :, :, 0, 1].mean(0)  # [boundaries, steps]
        return {
            "steps": profile.steps, "sampler": first.sampler, "scheduler": first.scheduler, "denoise": first.denoise,
            "prompts": len(self.prompts), "samples": int(profile.errors.shape[0]), "boundaries": list(profile.boundaries),
            "costs": [round(cost, 4) for cost in profile.costs],
            "errors": [[value if math.isfinite(value) else None for value in row] for row in errors.tolist()],
            "rollouts": self.rollouts, "calls": self.calls, "seconds": round(self.seconds, 2),
        }


def extended(
    before: Measured | None, model: ModelPatcher, prompt: Prompt, boundaries: Sequence[int] = (),
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Measured:
    """Measure one more prompt, with the boundaries of the first one; or the first.

    Raises:
        ValueError: It is another model than before, or is sampled in another way.
    """
    begun = time.perf_counter()
    grams = None
    if before is not None:
        _require_alike(before, model, prompt, boundaries)
        boundaries, grams = before.profile.boundaries, before.profile.grams
    profile, rollouts = profiled(model, prompt, boundaries, progress, grams)
    runs, calls, seconds = rollouts.count, rollouts.calls, time.perf_counter() - begun
    if before is None:
        return Measured(model, (prompt,), profile, runs, calls, seconds)
    return Measured(
        before.model, (*before.prompts, prompt), merged([before.profile, profile]), before.rollouts + runs,
        before.calls + calls, before.seconds + seconds,
    )


def _require_alike(before: Measured, model: ModelPatcher, prompt: Prompt, boundaries: Sequence[int]) -> None:
    first = before.prompts[0]
    for name, one, other in (
        ("model", (id(before.model.model), before.model.patches_uuid), (id(model.model), model.patches_uuid)),
        ("sampler", first.sampler, prompt.sampler),
        ("noise levels (steps, scheduler, denoise)", sigmas_of(before.model, first), sigmas_of(model, prompt)),
        ("boundaries", before.profile.boundaries, tuple(boundaries) or before.profile.boundaries),
    ):
        if one != other:
            raise ValueError(f"The profile of the prompts before was measured with another {name}: all prompts of a profile "
                             "must have the same.")


def parse_boundaries(text: str, depth: int) -> tuple[int, ...]:
    """Boundaries from a list such as `0.75, 27`: block indices, or shares of the depth as round(share * depth) - 1.

    An index behind the last block is the whole model.

    Raises:
        ValueError: Something in the list is neither.
    """
    found = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            index = int(part) if part.isdecimal() else round(float(part) * depth) - 1
        except (ValueError, OverflowError):
            index = -1
        if not 0 <= index <= depth:
            raise ValueError(f"boundaries holds {part!r}: expected block indices 0 to {depth - 1}, {depth} for the whole "
                             "model, or shares such as 0.75, with commas between them.")
        found.add(index)
    return tuple(sorted(found))
