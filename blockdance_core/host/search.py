"""Find the best schedules for a model, a sampler and a number of steps: profile, program, and proof by real runs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from blockdance_core.calibration import Profile, best_forecasts, denser, fits, front, neighbours, refitted, sparser, unbeaten
from blockdance_core.host import profiling
from blockdance_core.host.attach import depth_of
from blockdance_core.host.rollout import Prompt, Rollouts, function_of, levels_of, sigmas_of
from blockdance_core.policy import Calibrated
from blockdance_core.schedule import CACHE, COMPUTE, Plan, expanded, unguided

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

log = logging.getLogger(__name__)
CUTS = tuple(percent / 100 for percent in (*range(15, 40, 5), *range(40, 86, 2)))
_LEADS = (0.0, 0.1, 0.15, 0.2, 0.3)
"""Shares of the steps that are computed first, to choose from: a program that adds errors up underrates early ones."""
TOLERANCE = 0.02
"""A schedule is for a wanted cut if it is as near to it."""
_HIGH = 0.4
_FEWEST = 3
_WIDE = 8
"""So many ways to compute one step less are tried at each level."""
SATURATION = 0.1
"""Squared error s, as a share of the variance, from about which on a picture counts as lost: s / (s + this)."""

_BEHIND = 1.5
"""A plan that did this many times worse than the best one on the first prompts is not run on the others."""
_FIRST = 4
"""Samples, at least, that such a judgement is made on."""


@dataclasses.dataclass
class Checked:
    """A schedule and what it did on the prompts it was checked on.

    Attributes:
        plan: One row a step.
        cut: Share of the time of a full run that it saved, mean over the prompts: a step that was computed for all that the
            plan says saves nothing.
        loss: Squared error at the end as a share of the variance of the result, mean over the prompts.
        score: The same, saturating, so that a lost picture counts once: mean of s / (s + SATURATION) over the samples; infinite
            if one is not finite. Less is better.
    """

    plan: Plan
    cut: float
    loss: float
    score: float


def profiled(
    model: ModelPatcher, prompt: Prompt, boundaries: Sequence[int] = (),
    progress: Callable[[int, int], None] = lambda done, of: None, before: np.ndarray | None = None,
) -> tuple[Profile, Rollouts]:
    """Measure what reuse costs on a prompt.

    Args:
        model: MODEL, as the sampler would get it.
        prompt: What is sampled.
        boundaries: Boundaries to choose from, the number of blocks for the whole model; none for the whole model alone.
        progress: Told how many of how many rollouts are done.
        before: `Profile.grams` of other prompts, on which forecasts are to be found, too.
    """
    depth = depth_of(model)
    boundaries = tuple(boundaries) or (depth,)
    if any(not 0 <= boundary <= depth for boundary in boundaries):
        raise ValueError(f"boundaries {list(boundaries)} must be 0 to {depth - 1}, or {depth} for the whole model: it has "
                         f"{depth} blocks")
    steps = len(sigmas_of(model, prompt)) - 1
    if steps < _FEWEST:
        raise ValueError(f"A run of {max(steps, 0)} steps is too short to find out what a reuse step costs. "
                         f"Choose {_FEWEST} or more.")
    each = len(profiling.groups(steps, len(boundaries), profiling.LAGS)) + len(profiling.probes(steps)) + 2
    done = 0

    def step(count: int = 1) -> None:
        nonlocal done
        done += count
        progress(done, each)

    rollouts = Rollouts(model, prompt)
    lost = [k + 1 for k, sample in enumerate(rollouts.full.result) if not sample.isfinite().all()]
    if lost:
        raise ValueError(f"The full run has no finite result (sample {', '.join(map(str, lost))} of "
                         f"{len(rollouts.full.result)}): nothing can be compared with it. Sample it without this node, "
                         "and take a prompt, a latent and a precision that give a picture.")
    gram = profiling.gram(rollouts, boundaries)
    step(2)
    reach = profiling.LAGS, profiling.LONGEST
    forecasts = best_forecasts(gram if before is None else gram + before, rollouts.full.record["sigmas"], *reach)
    return profiling.measure(rollouts, boundaries, forecasts, gram, *reach, step), rollouts


def best_schedules(
    profile: Profile, checks: Sequence[Rollouts], cuts: Sequence[float] = CUTS, tries: int = 0,
    progress: Callable[[int, int], None] = lambda done, of: None, before: Sequence[Plan] = (),
    proofs: Sequence[Rollouts] = (),
) -> list[Checked]:
    """The best schedule for each cut that is wanted, proved by real runs; none that saves nothing, or whose runs overflow.

    Args:
        profile: What reuse costs.
        checks: Prompts to check on.
        cuts: Shares of the time to save.
        tries: Further runs for each cut from .4 on, which move one computed step at a time.
        progress: Told how many of how many parts are done.
        before: Plans that were found before, to be tried, and proved, as well.
        proofs: Prompts that chose no schedule. What a schedule is said to lose is measured on them, and one that a faster one
            beats there is dropped: the best of many on some prompts is partly luck. None for those it was checked on.
    """
    search = _Search(profile, checks, before)
    parts = 3 * len(cuts) + len(proofs)
    best: dict[float, Plan] = {}
    for done, cut in enumerate(sorted(cuts, reverse=True), 1):
        plan = search.best(cut, best[min(best)] if best else None, len(cuts) == 1, tries if cut >= _HIGH else 0)
        if plan is not None:
            best[cut] = plan
        progress(done, parts)
    for done, (slower, cut) in enumerate(itertools.pairwise(sorted(best)), len(cuts) + 1):
        best[cut] = search.or_sparser(best[cut], cut, best[slower])
        progress(done, parts)
    plans = []
    for done, plan in enumerate(best.values(), 2 * len(cuts) + 1):
        # One step ahead the fitted weights are the best; in a run, where errors add up, others may be.
        plans.append(search.race.winner([plan, unguided(plan), expanded(plan), expanded(plan, 0)]))
        progress(done, parts)
    if proofs:
        known = (plan for plan in search.usable if min(search.off(cut, plan) for cut in cuts) <= TOLERANCE)
        plans = list(dict.fromkeys([*plans, *known]))
    last = _Race(proofs) if proofs else search.race
    for count in range(1, len(proofs) + 1):
        for plan in plans:
            last.result(plan, count)
        progress(3 * len(cuts) + count, parts)
    progress(parts, parts)
    found = [
        Checked(plan, float(np.mean([search.saved(did) for did in last.did(plan)])), *last.result(plan)) for plan in plans
    ]
    found = [one for one in found if one.cut > 0 and math.isfinite(one.loss)]
    if len(cuts) == 1:
        return sorted(found, key=lambda one: one.score)[:1]
    return unbeaten(found, lambda one: (round(one.cut, 2), one.score))  # no user tells closer cuts apart


class _Search:
    """Plans that a profile and earlier searches suggest, and the race between them.

    Args:
        profile: What reuse costs.
        checks: Prompts to check on.
        before: Plans that were found before.
    """

    def __init__(self, profile: Profile, checks: Sequence[Rollouts], before: Sequence[Plan]) -> None:
        self.profile, self.race, self._rng = profile, _Race(checks), np.random.default_rng(0)
        self._cost = dict(zip(profile.boundaries, profile.costs, strict=True))
        self._calls = checks[0].full.record["calls"]  # some samplers evaluate some steps more often than others, or never
        leads = sorted({max(1, round(share * profile.steps)) for share in _LEADS})
        self._fronts = [[one.plan for one in front(profile, lead)] for lead in leads]
        alike = [plan for plan in before if fits(profile, plan)]
        self.usable = [plan for plan in alike if all(row is None or row.boundary in self._cost for row in plan)]
        self._remade = [refitted(profile, plan, boundary) for plan in alike for boundary in profile.boundaries]

    def saved(self, plan: Plan) -> float:
        """The share of the time that a plan saves."""
        each = zip(plan, self._calls, strict=True)
        return sum((1 - self._cost[row.boundary]) * of for row, of in each if row) / sum(self._calls)

    def off(self, cut: float, plan: Plan) -> float:
        """How far a plan is from a cut."""
        return abs(self.saved(plan) - cut)

    def best(self, cut: float, faster: Plan | None, alone: bool, tries: int) -> Plan | None:
        """The best plan of about this cut; None if there is none.

        Args:
            cut: Share of the time to save.
            faster: The best one of the next higher cut; with some steps computed again it may do for this one.
            alone: Whether the nearest cut will do, as few steps have few.
            tries: Further runs, which move one computed step at a time.
        """
        missed = functools.partial(self.off, cut)
        plans = [*(min(some, key=missed) for some in self._fronts), *self.usable, *self._remade]
        beyond = [faster] if faster else [plan for plan in self.usable if self.saved(plan) > cut + TOLERANCE]
        for plan in sorted(beyond, key=self.saved)[:1]:
            while self.saved(plan) > cut + TOLERANCE:
                plan = denser(self.profile, plan)
            plans.append(plan)
        plans = [plan for plan in plans if missed(plan) <= TOLERANCE]
        if not plans and alone:
            reusing = [plan for some in (*self._fronts, self.usable) for plan in some if self.saved(plan) > 0]
            plans = [min(reusing, key=missed)] if reusing else []
        for plan in plans:
            if plan in self.usable:  # what is there already is not given up early
                self.race.result(plan)
        return self._climbed(self.race.winner(plans), missed, tries) if plans else None

    def _climbed(self, plan: Plan, missed: Callable[[Plan], float], tries: int) -> Plan:
        most = max(TOLERANCE, missed(plan))  # a move between groups of different boundaries changes the cut

        def near(plan: Plan) -> list[Plan]:
            return [one for one in neighbours(self.profile, plan) if missed(one) <= most]

        open_ = near(plan) if tries else []
        for _ in range(tries):
            if not open_:
                break
            won = self.race.winner([plan, open_.pop(int(self._rng.integers(len(open_))))])
            if won is not plan:
                plan, open_ = won, near(won)
        return plan

    def or_sparser(self, plan: Plan, cut: float, slower: Plan) -> Plan:
        """A plan, or one that is better: the best of the next lower cut, or that with fewer steps computed."""
        joined = (one for one in sparser(self.profile, slower) if self.saved(one) > self.saved(slower))
        near = (one for one in itertools.chain((slower,), joined) if self.off(cut, one) <= TOLERANCE)
        return self.race.winner([plan, *itertools.islice(near, _WIDE)])


class _Race:
    """Plans against each other, prompt by prompt, by real runs; none runs twice.

    Args:
        checks: Prompts to check on.
    """

    def __init__(self, checks: Sequence[Rollouts]) -> None:
        self.checks = checks
        self._errors: dict[Plan, list[np.ndarray]] = {}  # as shares of the variance, of each prompt so far
        self._did: dict[Plan, list[Plan]] = {}

    def winner(self, plans: Iterable[Plan]) -> Plan:
        """The best plan on all prompts. One that falls behind on the first is given up, unless it was run on all before."""
        candidates = list(dict.fromkeys(plans))
        left = candidates
        for count in range(1, len(self.checks) + 1):
            scores = [self.result(plan, count)[1] for plan in left]
            if sum(map(len, self._errors[left[0]][:count])) >= _FIRST:
                left = [plan for plan, score in zip(left, scores, strict=True) if score <= _BEHIND * min(scores)]
        best = min(filter(self._known, candidates), key=lambda plan: self.result(plan)[1])
        given_up = [plan for plan in candidates if not self._known(plan)]
        return best if math.isfinite(self.result(best)[1]) or not given_up else self.winner(given_up)

    def _known(self, plan: Plan) -> bool:
        return len(self._errors[plan]) == len(self.checks)

    def did(self, plan: Plan) -> list[Plan]:
        """What became of a plan on every prompt: without the rows that were computed instead."""
        self.result(plan)
        return self._did[plan]

    def result(self, plan: Plan, count: int | None = None) -> tuple[float, float]:
        """`Checked.loss` and `Checked.score` of a plan on the first prompts, or on all."""
        shares = self._errors.setdefault(plan, [])
        for one in self.checks[len(shares) : count]:
            run = one.run(plan)
            shares.append(one.errors(run).numpy())
            decided = zip(plan, run.record["decisions"], strict=True)
            did = tuple(None if decision in (COMPUTE, CACHE) else row for row, decision in decided)
            self._did.setdefault(plan, []).append(did)
        share = np.concatenate(shares[:count])
        finite = np.isfinite(share).all()
        return float(share.mean()), float((share / (share + SATURATION)).mean()) if finite else math.inf


def entry(model: ModelPatcher, prompt: Prompt, found: Sequence[Checked]) -> Calibrated:
    """What was found, as a policy holds it."""
    levels = itertools.accumulate(levels_of(model, prompt), max)
    return Calibrated(
        sampler=function_of(prompt.sampler), scheduler=prompt.scheduler, levels=tuple(levels),
        plans=tuple(one.plan for one in found), cuts=tuple(one.cut for one in found), losses=tuple(one.loss for one in found),
    )


def reaching(found: Sequence[Checked], fidelity: float) -> list[Checked]:
    """The schedule that saves most of those that reach a fidelity, in dB.

    Raises:
        ValueError: None does.
    """
    good = [one for one in found if decibel(one.loss) >= fidelity]
    if not good:
        best = max((decibel(one.loss) for one in found), default=-math.inf)
        raise ValueError(f"No schedule reaches {fidelity:g} dB on these prompts; the best one reaches {best:.1f} dB. "
                         "Ask for less, or for a smaller cut.")
    return [max(good, key=lambda one: one.cut)]


def decibel(loss: float) -> float:
    """A squared error relative to the variance as a distance in dB, more is better: 10 log10(1 / loss)."""
    return -10 * math.log10(loss) if loss > 0 else math.inf


def letters(plan: Plan) -> str:
    """A plan in one word: C for a computed step, and the order of the forecast of one that reuses."""
    return "".join("C" if row is None else str(row.forecast.order) for row in plan)


def table(found: Sequence[Checked]) -> list[dict[str, Any]]:
    """What was found, as plain JSON data."""
    return [
        {
            "cut": round(one.cut, 4), "loss_db": round(decibel(one.loss), 2) if one.loss > 0 else None,
            "plan": letters(one.plan), "boundaries": sorted({row.boundary for row in one.plan if row}),
        }
        for one in found
    ]
