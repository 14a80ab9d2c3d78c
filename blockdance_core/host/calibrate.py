"""Find the best schedules for a model, a sampler and a number of steps: profile, program, and proof by real runs."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from blockdance_core import families
from blockdance_core.calibration import Found, Profile, chosen, front, merged, neighbours
from blockdance_core.host import profiling
from blockdance_core.host.attach import sampler_name
from blockdance_core.host.levels import noise_levels
from blockdance_core.host.rollout import Prompt, Rollouts
from blockdance_core.policy import Calibrated
from blockdance_core.schedule import Plan

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

log = logging.getLogger(__name__)
CUTS = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8)
_LEADS = (0.0, 0.1, 0.15, 0.2, 0.3)
"""Shares of the steps that are computed first, to choose from: a program that adds errors up underrates early ones."""
_TOLERANCE = 0.02
_SATURATION = 0.1
"""Squared error, as a share of the variance, at which a picture counts as half lost."""


@dataclasses.dataclass
class Checked:
    """A schedule and what it did on the prompts it was checked on.

    Attributes:
        plan: One row a step.
        cut: Share of the time of a full run that it saves.
        loss: Squared error at the end as a share of the variance of the result, mean over the prompts.
        score: The same, saturating, so that a lost picture counts once; less is better.
    """

    plan: Plan
    cut: float
    loss: float
    score: float


def profiled(
    model: ModelPatcher, prompts: Sequence[Prompt], boundaries: Sequence[int] = (),
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[Profile, list[Rollouts]]:
    """Measure what reuse costs on some prompts.

    Args:
        model: MODEL, as the sampler would get it.
        prompts: What is sampled; all with the same sampler, scheduler and steps.
        boundaries: Boundaries to choose from; none for the last block alone.
        progress: Told how many of how many rollouts are done.
    """
    depth = len(families.find(model.get_model_object("diffusion_model")).blocks)
    boundaries = tuple(boundaries) or (depth - 1,)
    if any(not 0 <= boundary < depth for boundary in boundaries):
        raise ValueError(f"boundaries {list(boundaries)} must be 0 to {depth - 1}: this model has {depth} blocks")
    steps = prompts[0].steps
    each = len(profiling.groups(steps, len(boundaries))) + len(profiling.probes(steps)) + 2
    done = 0

    def step(count: int = 1) -> None:
        nonlocal done
        done += count
        progress(done, each * len(prompts))

    rollouts, fits = [], []
    for prompt in prompts:
        rollouts.append(Rollouts(model, prompt))
        fits.append(profiling.fit(rollouts[-1], boundaries))
        step(2)
    forecasts = chosen(np.sum(fits, 0))
    return merged([profiling.measure(one, boundaries, forecasts, progress=step) for one in rollouts]), rollouts


def calibrated(
    profile: Profile, checks: Sequence[Rollouts], cuts: Sequence[float] = CUTS, tries: int = 0,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[Checked]:
    """The best schedule for each cut that is wanted, proved by real runs.

    Args:
        profile: What reuse costs.
        checks: Prompts to check on.
        cuts: Shares of the time to save.
        tries: Further runs for each cut from .6 on, which move one computed step at a time.
        progress: Told how many of how many cuts are done.
    """
    steps = profile.steps
    leads = sorted({max(1, round(share * steps)) for share in _LEADS})
    fronts = {lead: front(profile, lead) for lead in leads}
    cost = dict(zip(profile.boundaries, profile.costs, strict=True))
    known: dict[Plan, Checked] = {}

    def check(plan: Plan) -> Checked:
        if plan not in known:
            shares = []
            for one in checks:
                error = one.distances(one.run(plan))[-1].square()
                shares.append((error / one.full.result.double().flatten(1).var(1)).numpy())
            share = np.concatenate(shares)
            cut = sum(1 - cost[row.boundary] for row in plan if row) / steps
            known[plan] = Checked(plan, cut, float(share.mean()), float((share / (share + _SATURATION)).mean()))
        return known[plan]

    found: list[Checked] = []
    for done, cut in enumerate(cuts):
        plans = {one.plan: lead for lead, of in reversed(fronts.items()) for one in _near(of, cut)}
        if plans:
            best = min((check(plan) for plan in plans), key=lambda one: one.score)
            found.append(_climbed(profile, best, check, plans[best.plan], tries if cut >= 0.6 else 0))
        progress(done + 1, len(cuts))
    kept: list[Checked] = []
    for one in sorted(found, key=lambda one: (-one.cut, one.score)):
        if not kept or (one.score < kept[-1].score and one.cut < kept[-1].cut):
            kept.append(one)
    return kept[::-1]


def _near(found: Sequence[Found], cut: float) -> list[Found]:
    near = [one for one in found if abs(one.cut - cut) <= _TOLERANCE]
    return [min(near, key=lambda one: abs(one.cut - cut))] if near else []


def _climbed(
    profile: Profile, best: Checked, check: Callable[[Plan], Checked], lead: int, tries: int
) -> Checked:
    open_ = neighbours(profile, best.plan, lead)
    rng = np.random.default_rng(0)
    for _ in range(tries):
        if not open_:
            break
        tried = check(open_.pop(int(rng.integers(len(open_)))))
        if tried.score < best.score:
            best, open_ = tried, neighbours(profile, tried.plan, lead)
    return best


def entry(model: ModelPatcher, prompt: Prompt, found: Sequence[Checked]) -> Calibrated:
    """What was found, as a policy holds it."""
    import comfy.samplers

    sampling = model.get_model_object("model_sampling")
    sampler = comfy.samplers.KSampler(
        model, prompt.steps, model.load_device, prompt.sampler, prompt.scheduler, prompt.denoise, model.model_options)
    levels = noise_levels(sampling, [float(sigma) for sigma in sampler.sigmas])
    levels = [max(levels[: k + 1]) for k in range(len(levels))]
    return Calibrated(
        sampler=sampler_name(comfy.samplers.sampler_object(prompt.sampler)), scheduler=prompt.scheduler, levels=tuple(levels),
        plans=tuple(one.plan for one in found), cuts=tuple(one.cut for one in found), losses=tuple(one.loss for one in found),
    )
