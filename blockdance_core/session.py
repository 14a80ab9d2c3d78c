"""One sampling run: its steps, streams, decisions and figures. Born and dead inside the host's OUTER_SAMPLE."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from blockdance_core import families
from blockdance_core.config import Config, Effective, resolve
from blockdance_core.families._structure import FlowCheck
from blockdance_core.forecast import FORECASTS
from blockdance_core.interception import Feature, Passage, cloned, intercept, nbytes, signature
from blockdance_core.schedule import COMPUTE, REUSE, Schedule, Step, build
from blockdance_core.streams import NO_MEMORY, Entry, FeatureCache, StreamKey
from blockdance_core.timing import Stopwatch

_LIMIT = 4
"""Stored bytes never exceed this many times the prediction, however many streams turn up later."""


class CallInfo(NamedTuple):
    """What the host says about one model call.

    Attributes:
        streams: Identity of each equal chunk of the batch, in batch order; empty where the host gives none.
        rows: Rows of the whole batch.
        device: Where the model runs.
        replaced: The host's `patches_replace` keys in force.
        condition: What else must not change between storing and reusing, such as the shapes of control residuals.
        room: How many bytes may be stored on that device; asked at most once a run.
    """

    streams: tuple[Hashable, ...]
    rows: int
    device: torch.device
    replaced: frozenset[object]
    condition: Hashable
    room: Callable[[], float]


@dataclasses.dataclass
class StepFigures:
    """Counts of one executed step."""

    calls: int = 0
    reused: int = 0
    stored: int = 0
    blocks: int = 0


class ModelState:
    """What a session knows of one executing model: its blocks, its plan and its cache."""

    def __init__(self, config: Config, diffusion_model: nn.Module, levels: Sequence[float]) -> None:
        """Match the model and plan the run; a model that cannot be accelerated gets a plan without reuse."""
        self.family, self.blocks = families.find(diffusion_model)
        self.effective: Effective = resolve(config, self.family.defaults, len(self.blocks))
        forecast = FORECASTS[self.effective.forecast]
        self.schedule: Schedule = build(self.effective, levels, forecast.order)
        self.cache = FeatureCache(forecast, min(forecast.order + 1, sum(bool(step.record) for step in self.schedule.steps)))
        self.broken: str | None = None
        self.first_evaluation: int | None = None
        self.predicted_bytes = 0
        self.placed = False
        self.group: int | None = None
        self.group_starts = [0, 0]

    @property
    def active(self) -> bool:
        """Whether the plan holds any reuse step."""
        return bool(self.schedule.boundaries)

    def enter(self, group: int | None, step: int) -> None:
        """A call of `group` begins; at the start of a new one, streams unseen for the whole group before are dropped."""
        if group is not None and group != self.group:
            self.group = group
            self.group_starts = [self.group_starts[-1], step]
            self.cache.drop_unseen(self.group_starts[0])

    def place(self, info: CallInfo) -> str | None:
        """Choose where features are kept, now that their size is known; returns what the user should know of it."""
        self.placed = True
        choice, predicted, cache = self.effective.cache_device, self.predicted_bytes, self.cache
        cache.limit = _LIMIT * predicted
        if choice == "cpu":
            cache.move(torch.device("cpu"), cache.keep)
            return None
        room = info.room()
        if choice == "gpu" or predicted <= room:
            cache.limit = min(cache.limit, max(room, 0.0))
            return None
        size = f"{predicted / 2**20:.0f} MiB of features do not fit the {max(room, 0) / 2**20:.0f} MiB left on {info.device}"
        if cache.keep > 1 and predicted / cache.keep <= room:
            self.predicted_bytes = predicted // cache.keep
            cache.move(info.device, 1)
            return f"{size}: no history is kept, forecasts are of order 0"
        cache.move(torch.device("cpu"), cache.keep)
        return f"{size}: kept in CPU memory"


class Session:
    """State and figures of one sampling run; holds tensors only until `close`.

    Args:
        config: The settings of the node.
        sigmas: Noise levels of the executed steps, n + 1 values; any list is tolerated.
        levels: The same as shares of the noise schedule, see `schedule.build`.
        listener: Told (step, decision) when a step is finished.
    """

    def __init__(
        self,
        config: Config,
        sigmas: Sequence[float],
        levels: Sequence[float],
        listener: Callable[[int, str], None] | None = None,
    ) -> None:
        self.config = config
        self.sigmas = list(sigmas)
        self.levels = list(levels)
        self.listener = listener
        self.figures = [StepFigures() for _ in range(max(len(self.sigmas) - 1, 0))]
        self.stopwatch = Stopwatch()
        self.evaluations = 0
        self.evaluating = False
        self.fallbacks: Counter[str] = Counter()
        self.warnings: list[str] = []
        self.models: dict[int, ModelState] = {}
        self.unsupported: dict[int, str] = {}
        self.step = 0
        self.sigma = math.nan
        self._occurrences: defaultdict[Hashable, int] = defaultdict(int)

    def begin_evaluation(self, sigma: float) -> None:
        """A new evaluation of the model at `sigma` begins; its streams are numbered afresh."""
        self._occurrences.clear()
        step = step_of(self.sigmas, sigma, self.step)
        if self.evaluations and step != self.step:
            self._tell()
        self.evaluations += 1
        self.step, self.sigma = step, sigma

    @contextlib.contextmanager
    def call(self, owner: object, diffusion_model: nn.Module, info: CallInfo) -> Iterator[None]:
        """Wraps one call of a model; the call made inside is observed, or shortened, as planned.

        Args:
            owner: The host's model object; streams of different owners never mix.
            diffusion_model: The transformer that will run.
            info: What the host says about the call.
        """
        if not self.figures:
            yield
            return
        state = self._state(owner, diffusion_model)
        figures = self.figures[self.step]
        figures.calls += 1
        with self.stopwatch.span(self.step, info.device):
            if state is None or not state.active:
                yield
            else:
                visit = _Visit(self, state, state.schedule.steps[self.step], info, self._streams(owner, info))
                with intercept(state.blocks, visit, observe=visit.observe, boundary=visit.boundary):
                    yield
                visit.finish()
                figures.reused += visit.reused
                figures.stored += visit.stored and visit.plan.group is not None
                figures.blocks -= visit.skipped
        figures.blocks += len(state.blocks) if state else 0

    def warn(self, text: str) -> None:
        """Tell the user once."""
        if text not in self.warnings:
            self.warnings.append(text)

    def close(self) -> None:
        """The run is over, however it ended: drop every tensor."""
        if self.evaluations:
            self._tell()
        self.listener = None  # it refers back to the session: a cycle would keep the model until the next collection
        for state in self.models.values():
            state.cache.clear()

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
                state = ModelState(self.config, diffusion_model, self.levels)
            except (families.UnsupportedModelError, ValueError) as error:
                self.unsupported[id(owner)] = str(error)
                self.warn(str(error))
                return None
            self.models[id(owner)] = state
            for text in state.schedule.warnings:
                self.warn(text)
        return self.models[id(owner)]

    def _streams(self, owner: object, info: CallInfo) -> tuple[Hashable, ...]:
        streams = []
        for stream in info.streams:
            identity = (id(owner), stream, info.condition)
            streams.append((*identity, self._occurrences[identity]))
            self._occurrences[identity] += 1
        return tuple(streams)


class _Visit:
    """One call: what is observed in it, stored from it, or injected into it."""

    def __init__(
        self, session: Session, state: ModelState, plan: Step, info: CallInfo, streams: tuple[Hashable, ...]
    ) -> None:
        self.session, self.state, self.plan, self.info, self.streams = session, state, plan, info, streams
        self.reused = self.stored = False
        self.skipped = 0
        self.keys: tuple[StreamKey, ...] = ()
        self.input: Feature | None = None
        self.entries = 0
        state.enter(plan.group, session.step)
        if state.first_evaluation is None:
            state.first_evaluation = session.evaluations
        self.probing = state.first_evaluation == session.evaluations
        self.flow = FlowCheck() if self.probing and state.family.verify else None
        if not self.probing and not state.placed:
            note = state.place(info)
            if note:
                session.warn(note)
        self.record, self.boundary = plan.record, None
        if plan.decision == REUSE and plan.boundary is not None:
            self.record = (plan.boundary,)  # a compute forced inside a group stores
            self.boundary = None if self.probing else plan.boundary
        self.obstacle = obstacle = self._obstacle()
        if obstacle and self.record:
            session.fallbacks[obstacle] += 1
            self.record, self.boundary = (), None
        probed = range(len(state.blocks)) if self.flow else state.schedule.boundaries
        self.observe = {*self.record, *(probed if self.probing else ())}

    def at_input(self, feature: Feature | None) -> Feature | None:
        self.entries += 1
        if self.entries > 1:
            self._break("its blocks run more than once in a call")
        if feature is None or any(part is not None and part.shape[0] != self.info.rows for part in feature):
            self._break("its blocks do not take one row per sample")
            return None
        if self.state.broken or not self.record:
            return None
        parts = tuple(part for part in feature if part is not None)
        self.keys = tuple((stream, self.info.rows // len(self.streams), signature(parts)) for stream in self.streams)
        try:
            if self.boundary is not None:
                base = self._in_layout_of(self.boundary, feature)
                injected = self.state.cache.predict(self.keys, self.boundary, self.plan.group, self.session.sigma, base)
                if not isinstance(injected, str):
                    self.reused = True
                    self.skipped = self.boundary + 1
                    return injected
                self.session.fallbacks[injected] += 1
            if self.state.cache.forecast.anchored:
                self.input = cloned(feature)
        except torch.OutOfMemoryError:
            self.session.fallbacks[NO_MEMORY] += 1
            self.record = ()
        return None

    def at_output(self, index: int, passage: Passage) -> None:
        state = self.state
        if self.flow and not state.broken:
            problem = self.flow.failure(index, passage)
            if problem:
                self._break(problem)
        output = passage.returned
        if index not in state.schedule.boundaries or state.broken:
            return
        if output is None or any(part is not None and part.shape[0] != self.info.rows for part in output):
            self._break("its blocks do not return one row per sample")
            return
        if self.probing and not self.obstacle:
            state.predicted_bytes += nbytes(output) * state.cache.keep
        if index in self.record:
            self._store(index, output)

    def finish(self) -> None:
        """The call went through."""
        if self.entries == 0 and self.state.blocks[0].hook_key not in self.info.replaced:
            self.session.fallbacks["the blocks did not run: something else answered the call"] += 1
            self.skipped = len(self.state.blocks)
            if self.probing and not self.state.predicted_bytes:
                self.state.first_evaluation = None

    def _store(self, index: int, output: Feature) -> None:
        try:
            base = None if self.input is None else self._in_layout_of(index, self.input)
        except torch.OutOfMemoryError:
            self.session.fallbacks[NO_MEMORY] += 1
            return
        rows = self.info.rows // len(self.streams)
        for number, key in enumerate(self.keys):
            def chunk(feature: Feature, start: int = number * rows) -> Feature:
                return tuple(None if part is None else part.narrow(0, start, rows) for part in feature)

            entry = Entry(self.session.step, self.plan.group, self.session.sigma, False, ())
            reason = self.state.cache.store(key, index, entry, chunk(output), None if base is None else chunk(base))
            if reason:
                self.session.fallbacks[reason] += 1
            else:
                self.stored = True
                if self.state.cache.forecast.anchored and not entry.anchored:
                    self.session.warn("block 0's input does not fit the boundary block's output: forecast 'hold' is used")

    def _in_layout_of(self, boundary: int, feature: Feature) -> Feature | None:
        layout = self.state.blocks[boundary].to_boundary_layout
        return layout(feature) if layout is not None and self.state.cache.forecast.anchored else None

    def _obstacle(self) -> str | None:
        if self.state.broken:
            return f"the model cannot be accelerated: {self.state.broken}"
        if not self.streams or self.info.rows % len(self.streams):
            return "the host did not say which conditionings this call holds"
        boundaries = {0, *self.state.schedule.boundaries} if self.plan.boundary is None else {0, self.plan.boundary}
        for index in boundaries:
            if self.state.blocks[index].hook_key in self.info.replaced:
                return f"another node replaces block {index}"
        return None

    def _break(self, reason: str) -> None:
        self.state.broken = reason
        self.session.warn(f"this model cannot be accelerated: {reason}")


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
