"""One sampling run: its steps, streams, decisions and figures. Born and dead inside the host's OUTER_SAMPLE."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from blockdance_core import families
from blockdance_core.config import QUALITIES, Config, ConfigError
from blockdance_core.guard import Guard
from blockdance_core.interception import intercept
from blockdance_core.model_state import Choice, ModelState
from blockdance_core.policy import AdaptivePolicy
from blockdance_core.policy.adaptive import parts_of
from blockdance_core.policy.network import Sight
from blockdance_core.schedule import COMPUTE, REUSE
from blockdance_core.timing import Stopwatch
from blockdance_core.visit import CallInfo, Moment, Visit

_LEAD = 1 / 8
"""Share of the steps that are computed first where nothing but the guard decides."""


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


class Session:
    """State and figures of one sampling run; holds tensors only until `close`.

    Args:
        config: The settings of the node.
        sigmas: Noise levels of the executed steps, n + 1 values; any list is tolerated.
        levels: The same as shares of the noise schedule, see `schedule.build`.
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
        sampler: str = "",
        accepted: Sequence[float] = (),
        text: torch.Tensor | None = None,
        together: bool = False,
    ) -> None:
        self.config = config
        self.sampler = sampler
        self.sigmas = list(sigmas)
        self.levels = list(levels)
        self.guard: Guard | None = None  # one for all models
        if config.guarded:
            lead = math.ceil(_LEAD * (len(self.levels) - 1)) if config.guard_alone else 0
            self.guard = Guard(QUALITIES[config.quality], list(accepted) or [1.0] * len(self.levels), lead)
        self.listener: Callable[[int, str], None] | None = None  # told (step, decision) when a step is finished
        self.figures = [StepFigures() for _ in range(max(len(self.sigmas) - 1, 0))]
        self.stopwatch = Stopwatch()
        self.announced_bytes = 0  # what the host was asked to keep free
        self.wrapped = False  # whether another node stands around the model's calls and may answer in its place
        self.evaluations = 0
        self.evaluating = False
        self.fallbacks: Counter[str] = Counter()
        self.warnings: list[str] = []
        self.models: dict[int, ModelState] = {}
        self.unsupported: set[int] = set()
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
        self._recorded = self._refused = -1  # the last steps at which something was to be stored, and at which it was not
        self._hindered = False
        self._changing = 0  # at so many steps in a row something was stored under another condition than at the one before
        self._lock = threading.Condition()  # on several GPUs the host calls one model per device, each from a thread
        self._under_way = 0
        self._closed = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        """Itself: some nodes copy the options of a run that is under way, which name it."""
        return self

    @contextlib.contextmanager
    def evaluation(
        self, sigma: float, condition: Hashable = None, latent: torch.Tensor | None = None
    ) -> Iterator[None]:
        """Wraps one evaluation of the model, of one or more calls; its streams are numbered afresh.

        Args:
            sigma: Noise level.
            condition: What else must not change between storing and reusing, such as the ControlNets in force.
            latent: The whole of it [B, C, ...], if known.
        """
        # Where a stream is evaluated more or less often than last time, numbers may have shifted: then nothing is reused.
        shifted = any(self._numbers.get(stream, count) != count for stream, count in self._occurrences.items())
        self._numbers = dict(self._occurrences)
        self._occurrences.clear()
        grown = latent is not None and latent.shape != self.shape
        self.shape = latent.shape if latent is not None else self.shape
        step = step_of(self.sigmas, sigma, self.step)
        # Further back than a sampler looks ahead goes one that adds noise anew (restart sampling).
        renoised = step < self.step - 1
        for state in self.models.values():
            if grown:
                state.restart()
            elif shifted or renoised:
                state.forget()
        if self.evaluations and step != self.step:
            self._tell()
            changed = any(state.cache.changed == self.step for state in self.models.values())
            self._changing = self._changing + 1 if changed else 0
            self._hindered = 0 <= self._refused == self._recorded or self._changing > 1
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
    ) -> Iterator[Visit | None]:
        """Wraps one call of a model; the call made inside is observed, or shortened, as planned.

        Gives the visit that says what becomes of the call, see `Visit.denoised`; None where nothing does.

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
            yield None
            return
        try:
            with self._planned(owner, diffusion_model, device, describe, part) as visit:
                yield visit
        finally:
            with self._lock:
                self._under_way -= 1
                self._lock.notify_all()

    @contextlib.contextmanager
    def _planned(
        self, owner: object, diffusion_model: nn.Module, device: torch.device, describe: Callable[[], CallInfo],
        part: int | None,
    ) -> Iterator[Visit | None]:
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
                info, moment = state.streams_of(describe()), Moment(self.step, self.evaluations, self.sigma, self._hindered)
                visit = Visit(state, state.schedule.steps[self.step], moment, info, self._streams(owner, info, part))
        with self.stopwatch.span(self.step, device):
            if state is not None and visit is not None and visit.intercepts:
                with intercept(state.blocks, visit, observe=visit.observe, boundary=visit.boundary):
                    yield visit
            else:
                yield visit
            if visit is not None:
                visit.finish()
        with self._lock:
            if visit is not None:
                self.fallbacks.update(visit.fallbacks)
                self.warn(*visit.warnings)
                if visit.stored or visit.refused:
                    self._recorded = self.step
                if visit.refused:
                    self._refused = self.step
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
                state = ModelState(self.config, diffusion_model, self.levels, self.sampler, self.guard)
            except (families.UnsupportedModelError, ConfigError) as error:
                self.unsupported.add(id(owner))
                self.warn(str(error))
                return None
            self.models[id(owner)] = state
            for one in self.models.values():
                one.sole = len(self.models) == 1
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
