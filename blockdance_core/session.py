"""One sampling run: its steps, streams, decisions and figures. Born and dead inside the host's OUTER_SAMPLE."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import nn

from blockdance_core import families
from blockdance_core.config import QUALITIES, Config, Effective, resolve
from blockdance_core.guard import ORDERS, Guard
from blockdance_core.interception import intercept, taps
from blockdance_core.policy import AdaptivePolicy
from blockdance_core.policy.adaptive import Part, parts_of
from blockdance_core.policy.network import Sight
from blockdance_core.schedule import COMPUTE, REUSE, Schedule, Step, build
from blockdance_core.streams import FeatureCache
from blockdance_core.timing import Stopwatch
from blockdance_core.visit import CallInfo, Moment, Visit

_LEAD = 1 / 8
"""Share of the steps that are computed first where nothing but the guard decides."""
_LIMIT = 4
"""Stored bytes never exceed this many times the prediction, however many streams turn up later."""


@dataclasses.dataclass
class StepFigures:
    """Counts of one executed step. A call runs the model once, or more often where another node makes it.

    The runs of the model and of its blocks count with the share of the batch that is in them.
    """

    calls: int = 0
    passes: float = 0
    reused: int = 0
    stored: int = 0
    blocks: float = 0
    depth: float = 0


@dataclasses.dataclass(frozen=True)
class Choice:
    """What an adaptive policy decided.

    Attributes:
        step: Where it looked.
        wanted: What it wants of each sample.
        parts: Samples that go on together, and how.
        milliseconds: What looking and deciding took.
    """

    step: int
    wanted: tuple[Schedule, ...]
    parts: tuple[Part, ...]
    milliseconds: float


def planned(config: Config, effective: Effective, levels: Sequence[float], sampler: str) -> Schedule:
    """The plan of a run: off goes before the policy, the policy before the preset."""
    if config.active and config.policy is not None:
        return config.policy.schedule(levels, sampler, config.group_size)
    return build(effective, levels, everywhere=config.open)


def kept(config: Config, schedule: Schedule) -> int:
    """Features of one stream and boundary that a run keeps. The guard may compute, and store, any step."""
    return schedule.needed if config.guarded else schedule.kept


class ModelState:
    """What a session knows of one executing model: its blocks, its plan and its cache."""

    def __init__(
        self, config: Config, diffusion_model: nn.Module, levels: Sequence[float], accepted: Sequence[float], sampler: str
    ) -> None:
        """Match the model and plan the run; a model that cannot be accelerated gets a plan without reuse."""
        self.family, self.blocks = families.find(diffusion_model)
        self.effective: Effective = resolve(config, self.family.defaults, len(self.blocks))
        if config.active and config.policy is not None:
            config.policy.check(self.family.name, len(self.blocks))
        self.schedule: Schedule = planned(config, self.effective, levels, sampler)
        self.cache = FeatureCache(self.schedule.anchored, kept(config, self.schedule))
        self.guard: Guard | None = None
        self.open = config.open
        if config.guarded:
            lead = math.ceil(_LEAD * (len(levels) - 1)) if config.open else 0
            tolerance = QUALITIES[config.quality] if config.tolerance is None else config.tolerance
            self.guard = Guard(tolerance, self.cache.keep, accepted, lead)
        self.broken: str | None = None
        self.first_evaluation: int | None = None
        self.predicted_bytes = 0
        self.placed = False
        self.group: int | None = None
        self.group_starts = [0, 0]
        self.parts: list[ModelState] = []
        self.tapped = self.taps(*self.schedule.boundaries)

    @property
    def active(self) -> bool:
        """Whether the plan holds any reuse step."""
        return bool(self.schedule.boundaries)

    def taps(self, *boundaries: int) -> tuple[int, ...]:
        """The blocks whose outputs stand in for everything up to these boundaries, ascending."""
        return tuple(sorted({tap for boundary in boundaries for tap in taps(self.blocks, boundary)}))

    def streams_of(self, info: CallInfo) -> CallInfo:
        """The same call; as one stream, where the model's samples cannot be told apart."""
        return info if self.apart or not info.streams else info._replace(streams=(info.streams,), rows=1)

    def enter(self, group: int | None, step: int) -> None:
        """A call of `group` begins; at the start of a new one, streams unseen for the whole group before are dropped.

        Where the guard decides alone, all steps are of one group: there a group begins with each step that it computes.
        """
        if group is not None and self.open and self.guard is not None:
            group = self.guard.computed
        if group is not None and group != self.group:
            self.group = group
            self.group_starts = [self.group_starts[-1], step]
            self.cache.drop_unseen(self.group_starts[0])

    def orders(self, plan: Step) -> Sequence[int]:
        """Orders of the forecast that the guard may choose from: a plan that was made by someone keeps its own."""
        return ORDERS if self.open or plan.forecast is None else (plan.forecast.order,)

    @property
    def apart(self) -> bool:
        """Whether the samples of a batch can be told apart in the blocks."""
        return self.blocks[0].batch_dim is not None

    @property
    def divisible(self) -> bool:
        """Whether a batch may be split: not where a model keeps something of its own from one call to the next."""
        return self.apart and self.blocks[0].obstacle is None

    @property
    def peak_bytes(self) -> int:
        """Most bytes stored so far."""
        return max(self.cache.peak_bytes, sum(part.cache.peak_bytes for part in self.parts))

    def follow(self, choice: Choice) -> None:
        """From here on it goes as an adaptive policy decided."""
        parts = choice.parts if self.divisible else parts_of(choice.wanted, len(self.blocks), together=True)
        if len(parts) == 1:
            self.replan(parts[0][1], choice.step)
            return
        caches = self.cache.divided([rows for rows, _ in parts], len(choice.wanted))
        for (_, schedule), cache in zip(parts, caches, strict=True):
            part = copy.copy(self)
            part.cache, part.parts = cache, []
            part.replan(schedule, choice.step)
            self.parts.append(part)
        self.schedule = Schedule((Step(),) * len(self.schedule.steps))

    def replan(self, schedule: Schedule, step: int) -> None:
        """Follow another plan from a step on. What was stored goes on, unless the plan is for features of another kind."""
        groups = [row.group for row in schedule.steps]
        before, cache = self.schedule, self.cache
        self.schedule, self.tapped = schedule, self.taps(*schedule.boundaries)
        if schedule.boundaries and (schedule.anchored != cache.anchored or schedule.needed > before.needed):
            self.cache = FeatureCache(schedule.anchored, schedule.needed if cache.keep >= before.needed else cache.keep)
            self.cache.device, self.cache.limit = cache.device, cache.limit
        self.cache.regroup(groups)
        self.cache.retain(self.tapped)
        if groups[step - 1] is not None:  # that group has begun
            self.group, self.group_starts = groups[step - 1], [0, step - 1]

    def forget(self) -> None:
        """Nothing stored holds any longer."""
        for part in self.parts:
            part.forget()
        self.cache.clear()
        if self.guard is not None:
            self.guard.restart()

    def restart(self) -> None:
        """The latent has another size from here on: nothing stored fits, and the new features have to be measured."""
        self.forget()
        for part in self.parts:
            part.restart()
        self.cache.limit = math.inf
        self.first_evaluation, self.predicted_bytes, self.placed = None, 0, False

    def place(self, info: CallInfo) -> tuple[str, ...]:
        """Choose where features are kept, now that their size is known; returns warnings."""
        self.placed = True
        choice, predicted, cache = self.effective.cache_device, self.predicted_bytes, self.cache
        cache.limit = _LIMIT * predicted
        if choice == "cpu":
            return cache.move(torch.device("cpu"), cache.keep)
        room = info.room() + cache.stored_bytes  # what is stored by now has its place already
        if choice == "gpu" or predicted <= room:
            cache.limit = min(cache.limit, max(room, 0.0))
            return ()
        size = f"{predicted / 2**20:.0f} MiB of features do not fit the {max(room, 0) / 2**20:.0f} MiB left on {info.device}"
        if cache.keep > 1 and predicted / cache.keep <= room:
            self.predicted_bytes = predicted // cache.keep
            cache.limit = min(_LIMIT * self.predicted_bytes, room)
            return (f"{size}: no history is kept, forecasts are of order 0", *cache.move(info.device, 1))
        return (f"{size}: kept in CPU memory", *cache.move(torch.device("cpu"), cache.keep))


class Session:
    """State and figures of one sampling run; holds tensors only until `close`.

    Args:
        config: The settings of the node.
        sigmas: Noise levels of the executed steps, n + 1 values; any list is tolerated.
        levels: The same as shares of the noise schedule, see `schedule.build`.
        listener: Told (step, decision) when a step is finished.
        sampler: Name of the sampler, for a policy.
        accepted: How much of the guard's tolerance an error may take at each noise level; none for all of it.
        text: Text embedding [B, T, D], for a policy that looks at it.
        together: Whether the samples of a batch must go on together, whatever such a policy wants of each.
    """

    def __init__(
        self,
        config: Config,
        sigmas: Sequence[float],
        levels: Sequence[float],
        listener: Callable[[int, str], None] | None = None,
        sampler: str = "",
        accepted: Sequence[float] = (),
        text: torch.Tensor | None = None,
        together: bool = False,
    ) -> None:
        self.config = config
        self.sampler = sampler
        self.sigmas = list(sigmas)
        self.levels = list(levels)
        self.accepted = list(accepted) or [1.0] * len(self.levels)
        self.listener = listener
        self.figures = [StepFigures() for _ in range(max(len(self.sigmas) - 1, 0))]
        self.stopwatch = Stopwatch()
        self.announced_bytes = 0  # what the host was asked to keep free
        self.evaluations = 0
        self.evaluating = False
        self.fallbacks: Counter[str] = Counter()
        self.warnings: list[str] = []
        self.models: dict[int, ModelState] = {}
        self.unsupported: dict[int, str] = {}
        self.step = 0
        self.sigma = math.nan
        self.condition: Hashable = None
        self.caller: Hashable = None  # the guidance function that makes the current calls
        self.shape: Sequence[int] | None = None
        self.text = text
        self.together = together or config.guarded
        self.choice: Choice | None = None
        self._estimates: deque[torch.Tensor] = deque(maxlen=2)
        self._occurrences: defaultdict[Hashable, int] = defaultdict(int)
        self._numbers: dict[Hashable, int] = {}  # of the evaluation before
        self._lock = threading.Condition()  # on several GPUs the host calls one model per device, each from a thread
        self._under_way = 0
        self._closed = False

    @contextlib.contextmanager
    def evaluation(
        self, sigma: float, condition: Hashable = None, shape: Sequence[int] | None = None,
        latent: torch.Tensor | None = None,
    ) -> Iterator[None]:
        """Wraps one evaluation of the model, of one or more calls; its streams are numbered afresh.

        Args:
            sigma: Noise level.
            condition: What else must not change between storing and reusing, such as the ControlNets in force.
            shape: Of the whole latent, if known.
            latent: [B, C, ...], if known.
        """
        # Where a stream is evaluated more or less often than last time, numbers may have shifted: then nothing is reused.
        shifted = any(self._numbers.get(stream, count) != count for stream, count in self._occurrences.items())
        self._numbers = dict(self._occurrences)
        self._occurrences.clear()
        grown = shape is not None and shape != self.shape
        self.shape = shape if grown else self.shape
        for state in self.models.values():
            if grown:
                state.restart()
            elif shifted:
                state.forget()
        step = step_of(self.sigmas, sigma, self.step)
        if self.evaluations and step != self.step:
            self._tell()
        self.evaluations += 1
        self.step, self.sigma, self.condition = step, sigma, condition
        if self.looks_at is not None and step >= self.looks_at:
            self._decide(latent)
            self._estimates.clear()
        self.evaluating = True
        try:
            yield
        finally:
            self.evaluating = False

    @property
    def looks_at(self) -> int | None:
        """The step at which a policy is still to look at the picture."""
        return next((k for state in self.models.values() if (k := state.schedule.looks_at) is not None), None)

    def saw(self, estimate: torch.Tensor) -> None:
        """An evaluation gave this estimate of the clean latent [B, C, ...]."""
        if self.looks_at is not None:
            self._estimates.append(estimate)

    def _decide(self, latent: torch.Tensor | None) -> None:
        begun, step, policy = time.perf_counter(), self.step, self.config.policy
        assert isinstance(policy, AdaptivePolicy)
        states = list(self.models.values())
        if latent is None or [one.shape for one in self._estimates] != [latent.shape] * 2:
            self.warn("the latent was not seen where the policy looks at the picture: its static schedule is used")
            for state in states:
                state.replan(policy.base.schedule(self.levels, self.sampler, self.config.group_size), step)
            return
        before, last = self._estimates
        sight = Sight(latent, last, last - before, self.text)
        wanted = policy.decide(sight, self.levels, self.config.group_size, step)
        together = self.together or not all(state.divisible for state in states)
        parts = parts_of(wanted, policy.base.depth, together)
        self.choice = Choice(step, wanted, parts, (time.perf_counter() - begun) * 1000)
        for state in states:
            state.follow(self.choice)
        figures = self.figures[step - 1]
        if figures.calls and any(schedule.steps[step - 1].group is not None for _, schedule in parts):
            figures.stored += 1  # what it stored now serves a group

    def split(self, owner: object, rows: int, chunks: int) -> list[list[int]] | None:
        """The rows of a call that go together, one list for each part of the batch; None for all in one.

        Args:
            owner: The host's model object.
            rows: Rows of the call.
            chunks: How many conditionings are in it, one after the other.
        """
        state = self.models.get(id(owner))
        if state is None or not state.parts or self.choice is None:
            return None
        batch = len(self.choice.wanted)
        if rows != batch * chunks:
            return None
        return [[chunk * batch + row for chunk in range(chunks) for row in samples] for samples, _ in self.choice.parts]

    @contextlib.contextmanager
    def calls_of(self, caller: Hashable) -> Iterator[None]:
        """The model calls made inside are those of a guidance function, not the prompt's own."""
        before, self.caller = self.caller, caller
        try:
            yield
        finally:
            self.caller = before

    @contextlib.contextmanager
    def call(
        self, owner: object, diffusion_model: nn.Module, device: torch.device, describe: Callable[[], CallInfo],
        part: int | None = None,
    ) -> Iterator[None]:
        """Wraps one call of a model; the call made inside is observed, or shortened, as planned.

        Args:
            owner: The host's model object; streams of different owners never mix.
            diffusion_model: The transformer that will run.
            device: Where it runs.
            describe: Gathers what the host says about the call; asked only in a run that plans to reuse.
            part: Which part of the batch it is, see `split`.
        """
        with self._lock:
            planned = bool(self.figures) and not self._closed
            self._under_way += planned
        if not planned:
            yield
            return
        try:
            with self._planned(owner, diffusion_model, device, describe, part):
                yield
        finally:
            with self._lock:
                self._under_way -= 1
                self._lock.notify_all()

    @contextlib.contextmanager
    def _planned(
        self, owner: object, diffusion_model: nn.Module, device: torch.device, describe: Callable[[], CallInfo],
        part: int | None,
    ) -> Iterator[None]:
        figures = self.figures[self.step]
        with self._lock:
            state = self._state(owner, diffusion_model)
            figures.calls += 1
            share = 1.0  # of the batch
            if state is not None and state.parts:
                if part is None:
                    self.fallbacks["the samples of this call cannot be told apart"] += 1
                elif self.choice is not None:
                    state, share = state.parts[part], len(self.choice.parts[part][0]) / len(self.choice.wanted)
            visit = None
            if state is not None and state.active:
                info, moment = state.streams_of(describe()), Moment(self.step, self.evaluations, self.sigma)
                visit = Visit(state, state.schedule.steps[self.step], moment, info, self._streams(owner, info, part))
        with self.stopwatch.span(self.step, device):
            if state is None or visit is None:
                yield
            else:
                with intercept(state.blocks, visit, observe=visit.observe, boundary=visit.boundary):
                    yield
                visit.finish()
        with self._lock:
            if visit is not None:
                self.fallbacks.update(visit.fallbacks)
                self.warn(*visit.warnings)
                figures.reused += visit.reused
                figures.stored += visit.stored and visit.plan.group is not None
                figures.blocks -= share * visit.skipped
            if state is not None:
                passes = share * (max(visit.passes, 1) if visit is not None else 1)
                figures.passes += passes
                figures.blocks += passes * len(state.blocks)
                figures.depth += passes * len(state.blocks)

    def warn(self, *texts: str) -> None:
        """Tell the user, each thing once."""
        self.warnings += [text for text in dict.fromkeys(texts) if text not in self.warnings]

    def close(self) -> None:
        """The run is over, however it ended: drop every tensor.

        Waits for calls that other threads still make. After an error on one GPU the host does not, and the next run may
        not begin before they have put back the blocks.
        """
        with self._lock:
            self._closed = True
            self._lock.wait_for(lambda: not self._under_way)
        if self.evaluations:
            self._tell()
        self._estimates.clear()
        self.text = None
        self.listener = None  # it refers back to the session: a cycle would keep the model until the next collection
        for state in self.models.values():
            state.forget()

    def decision(self, step: int) -> str:
        """What a step did: `compute`, `cache`, `reuse`, or `mixed` where its calls differ."""
        figures = self.figures[step]
        if figures.reused:
            return REUSE if figures.reused == figures.calls else "mixed"
        return "cache" if figures.stored else COMPUTE

    def _tell(self) -> None:
        if self.listener is not None and self.figures:
            self.listener(self.step, self.decision(self.step))

    def _state(self, owner: object, diffusion_model: nn.Module) -> ModelState | None:
        if id(owner) in self.unsupported:
            return None
        if id(owner) not in self.models:
            try:
                state = ModelState(self.config, diffusion_model, self.levels, self.accepted, self.sampler)
            except (families.UnsupportedModelError, ValueError) as error:
                self.unsupported[id(owner)] = str(error)
                self.warn(str(error))
                return None
            self.models[id(owner)] = state
            first = next(iter(self.models.values()))
            if (state.effective, state.schedule.window) != (first.effective, first.schedule.window):
                self.warn("two models ran: window, boundary and settings are those of the first")
            self.warn(*state.schedule.warnings)
            if self.choice is not None:
                state.follow(self.choice)
        return self.models[id(owner)]

    def _streams(self, owner: object, info: CallInfo, part: int | None) -> tuple[Hashable, ...]:
        streams = []
        for stream in info.streams:
            identity = (id(owner), stream)
            counted = (*identity, part)  # parts have caches of their own
            streams.append((*identity, self._occurrences[counted]))
            self._occurrences[counted] += 1
        return tuple(streams)


def step_of(sigmas: Sequence[float], sigma: float, current: int) -> int:
    """The executed step that an evaluation at `sigma` belongs to.

    Args:
        sigmas: n + 1 noise levels of n steps, in any order.
        sigma: Noise level of the evaluation.
        current: Step of the evaluation before; decides between equal levels.

    Returns:
        A step index 0..n-1: the step that starts at this level (relative tolerance 1e-4), else the one whose interval
        holds it, else the nearer end.
    """
    last = max(len(sigmas) - 2, 0)
    starts = [k for k in range(last + 1) if k < len(sigmas) and math.isclose(sigmas[k], sigma, rel_tol=1e-4, abs_tol=1e-9)]
    if starts:
        nearest = min(abs(sigmas[k] - sigma) for k in starts)
        starts = [k for k in starts if abs(sigmas[k] - sigma) == nearest]
        return next((k for k in starts if k >= current), starts[-1])
    holding = [k for k in range(len(sigmas) - 1) if min(sigmas[k : k + 2]) <= sigma <= max(sigmas[k : k + 2])]
    if holding:
        return next((k for k in holding if k >= current), holding[-1])
    return 0 if sigmas and abs(sigma - sigmas[0]) < abs(sigma - sigmas[-1]) else last
