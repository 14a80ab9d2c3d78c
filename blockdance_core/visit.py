"""One model call inside a sampling run: whether it computes, caches or reuses, and what comes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from blockdance_core.families import FlowCheck
from blockdance_core.forecast import Forecast
from blockdance_core.interception import Feature, Passage, cloned, nbytes, signature
from blockdance_core.schedule import REUSE, Step
from blockdance_core.streams import NO_MEMORY, Place, StreamKey, memory_permitting

if TYPE_CHECKING:
    from blockdance_core.model_state import ModelState


class CallInfo(NamedTuple):
    """What the host says about one model call.

    Attributes:
        streams: Identity of each equal chunk of the batch, in batch order; empty where the host gives none.
        rows: Rows of the whole batch.
        device: Where the model runs.
        replaced: The host's `patches_replace` keys in force.
        condition: What else must not change between storing and reusing, such as the shapes of control residuals.
        room: How many bytes may still be stored on that device; asked once, and again after a change of size.
        wrapped: Whether something stands around the network that may answer in its place, as another cache does.
    """

    streams: tuple[Hashable, ...]
    rows: int
    device: torch.device
    replaced: frozenset[object]
    condition: Hashable
    room: Callable[[], float]
    wrapped: bool = False


class Moment(NamedTuple):
    """When a call happens.

    Attributes:
        step: Index of the executed step.
        evaluation: Number of the evaluation.
        sigma: Its noise level.
        hindered: Whether one of the calls that were computed last could not store its part, or what one stores is valid for its
            own step alone. Then none reuses: the error of a forecast that one side of guidance has alone does not cancel,
            and guidance multiplies it.
    """

    step: int
    evaluation: int
    sigma: float
    hindered: bool = False


@dataclasses.dataclass
class _Pass:
    """One pass through the blocks.

    Attributes:
        record: Blocks to store the output of if the pass computes, or to inject one at.
        boundary: Last block to skip if the pass reuses; None if it computes in any case.
        obstacle: Why nothing may be stored or reused.
        flow: Checks how the blocks are connected, on the first evaluation of a model found by structure.
        keys: The streams, with all that tells their features apart.
        input: What entered block 0, kept for storing.
    """

    record: tuple[int, ...]
    boundary: int | None
    obstacle: str | None
    flow: FlowCheck | None
    keys: tuple[StreamKey, ...] = ()
    input: Feature | None = None


class Visit:
    """One call: what is observed in it, stored from it, or injected into it. The visitor of `intercept`.

    A boundary behind the last block stands for the whole model. What it gives is kept, and forecast, as the slope of the latent
    along sigma: that has the size of a latent, and a reuse step then does not call the model at all.

    Attributes:
        observe: Blocks whose output must be seen if the call computes.
        boundary: Last block to skip if the call reuses some; None if it runs all of them, or none.
        bypass: Whether the call is to reuse what the whole model gave.
        intercepts: Whether the blocks are watched: where the plan stops at some of them, or something may answer in place of
            the network. Else nothing touches them.
        passes: How often the call ran the model: once, unless another node makes it run again.
        reused_passes: How many passes a feature was injected into.
        stored: Whether a feature was stored.
        refused: Whether one was to be, and was not.
        skipped: Number of blocks that did not run.
        fallbacks: Reasons why something planned was not done.
        warnings: What the user should know.
    """

    def __init__(
        self, state: ModelState, plan: Step, moment: Moment, info: CallInfo, streams: tuple[Hashable, ...]
    ) -> None:
        """Decide what the call may do; the decision falls at the input of block 0.

        Args:
            state: The executing model.
            plan: The row of the schedule.
            moment: When the call happens.
            info: What the host says about it.
            streams: One key for each equal chunk of the batch, in batch order.
        """
        self.state, self.plan, self.moment, self.info, self.streams = state, plan, moment, info, streams
        self.passes = self.reused_passes = self.skipped = 0
        self.stored = self.refused = False
        self.fallbacks: list[str] = []
        self.warnings: list[str] = []
        self._order: int | None = None  # of the guard's choice
        self._place = Place(moment.step, plan.group, info.condition, moment.sigma)
        state.enter(plan.group, moment)
        self.probing = state.first_evaluation == moment.evaluation
        if not self.probing:
            self.warnings += state.place(info)
        record, boundary = self._decided()
        told = bool(self.streams) and not self.info.rows % len(self.streams)
        unknown = None if told else "the host did not say which conditionings this call holds"
        if unknown and record:
            self._refuse(unknown)
            record, boundary = (), None
        self._slope_kept = state.depth in record
        self._slope_measured = self.probing and state.depth in state.tapped and not unknown
        self.bypass = boundary == state.depth
        record, boundary = tuple(index for index in record if index != state.depth), None if self.bypass else boundary
        self._tapped = tapped = tuple(index for index in state.tapped if index != state.depth)
        obstacle = unknown or self._obstacle()
        if obstacle and record:
            self._refuse(obstacle)
            record, boundary = (), None
        if moment.hindered and (self.bypass or boundary is not None):
            self.fallbacks.append("another call of this step cannot reuse, so none does")
            self.bypass, boundary = False, None
        flow = FlowCheck() if self.probing and state.family.verify and tapped else None
        self.boundary = boundary
        self._now = self._planned = _Pass(record, boundary, obstacle, flow)
        probed = range(len(state.blocks)) if flow else tapped
        self.observe = {*record, *(probed if self.probing else ())}
        self.intercepts = bool(tapped) or info.wrapped

    def _decided(self) -> tuple[tuple[int, ...], int | None]:
        """The taps to store or to inject at, and the last block to skip; None for that if the call computes."""
        state, plan = self.state, self.plan
        if plan.decision != REUSE or plan.boundary is None:
            return state.taps(*plan.record), None
        record = state.taps(plan.boundary)  # stores at them if it cannot reuse
        if state.guard is None:
            return record, plan.boundary
        self._order = state.guard.order(state.from_end(plan.boundary), self.moment.step, self.moment.sigma, state.orders(plan))
        if self._order is not None:
            return record, plan.boundary
        if state.guard.lost:
            self.warnings.append("with a quality nothing is reused while conditionings or context windows come and go: of what "
                                 "is new there is no forecast to judge; without a quality it may be")
        last = self.moment.step == len(state.schedule.steps) - 1
        return () if last else record, None

    def denoised(self, latent: Tensor, sigmas: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """The model's estimate of the clean latent: a forecast, if this call is to reuse the whole model and there is one.

        Args:
            latent: What the model is given, [B, C, ...].
            sigmas: Its noise levels, [B].
            run: Calls the model, and gives its estimate [B, C, ...].
        """
        if self._slope_measured:
            self.state.predicted_bytes += 4 * latent.numel() * self.state.cache.keep
        if not (self._slope_kept and self.moment.sigma > 0):
            self.fallbacks += ["without noise the latent has no slope"] if self.bypass else []
            return run()
        level = sigmas.reshape(-1, *[1] * (latent.ndim - 1)).float()
        rows = latent.shape[0] // len(self.streams)
        keys = tuple(StreamKey(stream, 1, rows, signature((latent,))) for stream in self.streams)
        if self.bypass:
            predicted = self._forecast(keys, self.state.depth, None)
            if not isinstance(predicted, str):
                assert predicted[0] is not None
                self.passes = self.reused_passes = 1
                self.skipped = self.state.depth
                return predicted[0].mul_(-level).add_(latent)  # in place: it is ours, and needs no further memory
            self.fallbacks.append(predicted)
        estimate = run()
        if self._answered_elsewhere:
            return estimate
        with memory_permitting():
            self._store(keys, self.state.depth, (latent.float().sub(estimate).div_(level),), None)
            return estimate
        self._refuse(NO_MEMORY)
        return estimate

    def at_input(self, feature: Feature | None, obstacle: str | None) -> Mapping[int, Feature] | None:
        """The forecasts if this pass reuses; else keeps what storing will need, and None."""
        if self.passes and self._now.flow and not self._now.flow.complete(self.state.depth):
            self._break("a block runs more than once in a row")
        self.passes += 1
        if not self._tapped:  # the blocks are watched for whether they run, and no more
            return None
        now = self._now = dataclasses.replace(self._planned, flow=FlowCheck() if self._planned.flow else None)
        if feature is None or any(part is not None and part.shape[0] != self.info.rows for part in feature):
            self._break("its blocks do not take one row per sample")
            return None
        if obstacle:
            if now.record:
                self._refuse(obstacle)
            now.obstacle, now.record = obstacle, ()
        if self.state.broken or not now.record:
            return None
        parts = tuple(part for part in feature if part is not None)
        rows = self.info.rows // len(self.streams)
        now.keys = tuple(StreamKey(stream, self.passes, rows, signature(parts)) for stream in self.streams)
        with memory_permitting():
            if now.boundary is not None:
                injected = self._forecasts(now, feature)
                if not isinstance(injected, str):
                    self.reused_passes += 1
                    self.skipped += now.boundary + 1
                    return injected
                self.fallbacks.append(injected)
            if self.state.cache.anchored:
                now.input = cloned(feature)
            return None
        self._refuse(NO_MEMORY)
        now.record = ()
        return None

    def _forecasts(self, now: _Pass, feature: Feature) -> dict[int, Feature] | str:
        """What to inject at every tap, or why there is no forecast."""
        injected = {}
        for tap in now.record:
            predicted = self._forecast(now.keys, tap, self._in_layout_of(tap, feature))
            if isinstance(predicted, str):
                return predicted
            injected[tap] = predicted
        return injected

    def _forecast(self, keys: tuple[StreamKey, ...], tap: int, current: Feature | None) -> Feature | str:
        """What stands in for a tap's output, or why there is no forecast."""
        forecast, guard, since = self.plan.forecast, self.state.guard, 0
        assert forecast is not None
        if guard is not None and self.plan.boundary is not None:
            since = guard.since(self.state.from_end(self.plan.boundary))
            if self.state.guard_alone and self._order is not None:
                forecast = Forecast(anchored=True, order=self._order)
        if forecast.guided and not self.state.sole:  # the other side of guidance is not in this cache
            forecast = dataclasses.replace(forecast, fitted=(), guided=())
        predicted = self.state.cache.predict(keys, tap, self._place, forecast, current, self.info.device, since)
        if self.state.cache.unweighed and guard is None:
            self.warnings.append("the policy was calibrated for one prompt against one negative: with these its forecasts are "
                                 "less exact; if pictures change, set a quality beside it")
        return predicted

    def at_output(self, index: int, passage: Passage) -> None:
        """Checks and measures on the first evaluation; stores where the plan wants it."""
        state, now = self.state, self._now
        if now.flow and not state.broken:
            problem = now.flow.failure(index, passage)
            if problem:
                self._break(problem)
        output = passage.returned
        if index not in state.tapped or state.broken:
            return
        if output is None or any(part is not None and part.shape[0] != self.info.rows for part in output):
            self._break("its blocks do not return one row per sample")
            return
        if self.probing and not now.obstacle:
            state.predicted_bytes += nbytes(output) * state.cache.keep
        if index in now.record:
            with memory_permitting():
                self._store(now.keys, index, output, None if now.input is None else self._in_layout_of(index, now.input))
                return
            self._refuse(NO_MEMORY)

    @property
    def reused(self) -> bool:
        """Whether a feature was injected in every pass."""
        return 0 < self.passes == self.reused_passes

    @property
    def _answered_elsewhere(self) -> bool:
        """Whether the call went through without the blocks, as far as that can be seen."""
        return self.intercepts and not self.passes and self.state.blocks[0].hook_key not in self.info.replaced

    def finish(self) -> None:
        """The call went through."""
        if self._answered_elsewhere:
            self.fallbacks.append("the blocks did not run: something else answered the call")
            self.skipped = self.state.depth
        if self.probing and not self.state.predicted_bytes:
            self.state.first_evaluation = None  # nothing to measure yet: the next evaluation is the first

    def _store(self, keys: tuple[StreamKey, ...], index: int, output: Feature, base: Feature | None) -> None:
        """Store what a tap gave: the output of a block, beside the input it is to be anchored to, or the slope."""
        whole = index == self.state.depth
        rows = next(part.shape[0] for part in output if part is not None) // len(keys)
        for number, key in enumerate(keys):
            def chunk(feature: Feature, start: int = number * rows) -> Feature:
                return tuple(None if part is None else part.narrow(0, start, rows) for part in feature)

            entry = self.state.cache.store(
                key, index, self._place, chunk(output), None if base is None else chunk(base), whole)
            if isinstance(entry, str):
                self._refuse(entry)
                continue
            self.stored = True
            self._watch(index, key, chunk(output), chunk(base) if entry.anchored and base is not None else None)
            if self.state.cache.anchored and not entry.anchored and not whole:
                self.warnings.append("block 0's input does not fit the boundary block's output: forecast 'hold' is used")

    def _watch(self, index: int, key: StreamKey, output: Feature, base: Feature | None) -> None:
        """Let the guard see what was stored."""
        guard = self.state.guard
        if guard is None or index not in self.state.schedule.boundaries:
            return
        if base is None and index != self.state.depth:
            self.warnings.append("the forecasts of this model cannot be watched: with a quality everything is computed")
            return
        with memory_permitting():
            at = self._place
            guard.observe(self.state.from_end(index), (key, at.condition), at.step, at.sigma, output, base)
            return
        guard.restart()
        self.fallbacks.append(NO_MEMORY)

    def _in_layout_of(self, index: int, feature: Feature) -> Feature | None:
        layout = self.state.blocks[index].to_boundary_layout
        return layout(feature) if layout is not None and self.state.cache.anchored else None

    def _obstacle(self) -> str | None:
        if self.state.broken:
            return f"the model cannot be accelerated: {self.state.broken}"
        needed = self._tapped if self.plan.boundary is None else self.state.taps(self.plan.boundary)
        for index in (0, *(index for index in needed if index < self.state.depth)):
            if self.state.blocks[index].hook_key in self.info.replaced:
                return f"another node replaces block {index}"
        return None

    def _refuse(self, reason: str) -> None:
        self.refused = True
        self.fallbacks.append(reason)

    def _break(self, reason: str) -> None:
        self.state.broken = reason
        self.warnings.append(f"this model cannot be accelerated: {reason}")
