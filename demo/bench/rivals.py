"""Published methods, re-stated: plans for our engine, and two indicators that decide while they run.

What each has in common with its publication, and what not, is said where it is defined. All of them see a conditional and
an unconditional half in one batch and decide once for both, as published packs do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blockdance_core.forecast import Forecast
from blockdance_core.interception import Block, Feature, Passage, cloned, intercept, nbytes
from blockdance_core.schedule import Plan, Reuse

KEY = "blockdance_rival"
RESIDUAL = Forecast(anchored=True)


def uniform(steps: int, interval: int, reuse: Reuse, first: int = 0) -> Plan:
    """Compute every `interval`-th step from step `first` on, and every step before it."""
    return tuple(None if k < first or (k - first) % interval == 0 else reuse for k in range(steps))


def fora(steps: int, depth: int, interval: int) -> Plan:
    """FORA (Selvaraju et al., arXiv 2407.01425): every N-th step is computed, the others reuse what the blocks added.

    Restated with the sum of what all blocks added, where the original keeps the output of each attention and MLP and gates
    it anew for the current step.
    """
    return uniform(steps, interval, Reuse(depth - 1, RESIDUAL))


def deepcache(steps: int, depth: int, interval: int) -> Plan:
    """DeepCache (Ma et al., CVPR 2024): the deep feature is held, and only the outermost layers run.

    The original is for U-Nets, whose outermost layers are the first and the last. In a plain stack, without long skips,
    a held feature makes the first blocks useless; so the last block alone runs, on the output of the one before.
    """
    return uniform(steps, interval, Reuse(depth - 2, Forecast(anchored=False)))


def delta_dit(steps: int, depth: int, interval: int) -> Plan:
    """Delta-DiT (Chen et al., arXiv 2406.01125): what the front blocks added is reused while details are drawn.

    Restated for the front half of the blocks in the last two thirds of the steps. The original also reuses the back blocks
    in early steps, which our engine, made to skip from the front, cannot do.
    """
    return uniform(steps, interval, Reuse(depth // 2 - 1, RESIDUAL), first=round(steps / 3))


def taylorseer(steps: int, depth: int, interval: int, order: int) -> Plan:
    """TaylorSeer (Liu et al., ICCV 2025): what the blocks added is extrapolated; the first two or three steps are computed.

    Restated with the sum over all blocks, where the original extrapolates every attention and MLP by itself, and along
    sigma with divided differences, where the original counts steps.
    """
    return uniform(steps, interval, Reuse(depth - 1, Forecast(anchored=True, order=order)), first=order)


def magcache(ratios: Sequence[float], depth: int, threshold: float, skips: int) -> Plan:
    """MagCache (Ma et al., NeurIPS 2025, arXiv 2506.09045): reuse what the blocks added while its magnitude has hardly changed.

    What a skip is off by is estimated as |1 - product of the ratios since the last computed step|, and added up; a step is
    computed when the sum passes the threshold or `skips` steps were skipped in a row. The first fifth of the steps
    is computed. The ratios are measured once for a model, so the decisions are the same for every prompt, and this is a plan.
    The original decides for the two halves of guidance apart, each by its own ratios.

    Args:
        ratios: At each step, magnitude of what the blocks add by that of the step before.
        depth: Number of blocks.
        threshold: E of the publication.
        skips: K of the publication.
    """
    plan: list[Reuse | None] = []
    product, total, skipped = 1.0, 0.0, 0
    for k, ratio in enumerate(ratios):
        computed = True
        if k >= max(1, round(0.2 * len(ratios))):
            product, skipped = product * ratio, skipped + 1
            total += abs(1 - product)
            computed = total > threshold or skipped > skips
        if computed:
            product, total, skipped = 1.0, 0.0, 0
        plan.append(None if computed else Reuse(depth - 1, RESIDUAL))
    return tuple(plan)


def magnitude_ratios(gram: np.ndarray, cfg: float) -> list[float]:
    """What `magcache` goes by, of the conditional half of a full run; the original takes the mean of every token's ratio.

    Args:
        gram: Inner products of what all blocks added, see `blockdance_core.calibration.Profile.grams`, [2, steps, 2, steps].
        cfg: Guidance of the run.
    """
    parts = np.array([1, 1 / cfg])
    magnitudes = np.sqrt(np.einsum("a,akbk,b->k", parts, gram, parts))
    return [1.0, *(magnitudes[1:] / magnitudes[:-1]).tolist()]


def change(now: Tensor, before: Tensor) -> float:
    """Relative L1 change, as TeaCache and First Block Cache measure it."""
    return float((now - before).abs().mean() / before.abs().mean())


class TeaCache:
    """The decision of TeaCache (Liu et al., CVPR 2025): add up the input's relative change; compute when it is enough.

    The original looks at block 0's input after the modulation by the time, and rescales by a polynomial fitted for each
    model. Restated with the input itself and without rescaling. The first and the last step are computed.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold, self.total = threshold, 0.0
        self.before: Tensor | None = None

    def computes(self, indicator: Tensor, last: bool) -> bool:
        """Whether this call computes, given block 0's input."""
        self.total += 0.0 if self.before is None else change(indicator, self.before)
        due = self.before is None or last or self.total >= self.threshold
        self.before = indicator.clone()
        if due:
            self.total = 0.0
        return due


class FirstBlock:
    """The decision of First Block Cache (ParaAttention): compute where what block 0 adds has changed since the last time.

    Block 0 always runs. As in the original no step but the first is computed for its place.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.before: Tensor | None = None

    def computes(self, indicator: Tensor, last: bool) -> bool:
        """Whether this call computes, given what block 0 added."""
        due = self.before is None or change(indicator, self.before) >= self.threshold
        if due:
            self.before = indicator.clone()
        return due


class Indicated:
    """Adds the residual of the blocks from the last computed call, unless an indicator says to compute anew.

    Attributes:
        threshold: Of the indicator.
        first: Whether block 0 always runs and is the indicator; else its input is, and all blocks are skipped.
        stored_bytes: Most bytes held in a run.
    """

    def __init__(self, blocks: tuple[Block, ...], threshold: float, first: bool) -> None:
        self.blocks, self.threshold, self.first = blocks, threshold, first
        self.states: dict[object, _State] = {}
        self.stored_bytes = 0

    def patch(self, model: Any) -> Any:
        """A clone of the host's MODEL with this method on it."""
        from comfy.patcher_extension import WrappersMP

        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, self._sample)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self._call)
        return model

    def _sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        self.states.clear()
        self.stored_bytes = 0
        try:
            return executor(*args, **kwargs)
        finally:
            self.stored_bytes = sum(state.nbytes for state in self.states.values())
            self.states.clear()

    def _call(
        self, executor: Any, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
        transformer_options: dict[str, Any] | None = None, **kwargs: Any,
    ) -> Any:
        options = transformer_options or {}
        state = self.states.setdefault(tuple(options["uuids"]), _State(self.threshold, self.first))
        state.last = bool(options["sigmas"][0] <= options["sample_sigmas"][-2])
        with ExitStack() as stack:
            skippable = self.blocks[1:] if self.first else self.blocks
            if self.first:
                stack.enter_context(intercept(self.blocks[:1], _Entry(state)))
            stack.enter_context(intercept(skippable, state, observe={len(skippable) - 1}, boundary=len(skippable) - 1))
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)


class _Entry:
    """Keeps what enters block 0."""

    def __init__(self, state: _State) -> None:
        self.state = state

    def at_input(self, feature: Feature | None, obstacle: str | None) -> None:
        self.state.entered = None if feature is None else cloned(feature)

    def at_output(self, index: int, passage: Passage) -> None:
        """Not asked for."""


class _State:
    """What is known of one batch of conditionings; the visitor of its calls."""

    def __init__(self, threshold: float, first: bool) -> None:
        self.decision: TeaCache | FirstBlock = FirstBlock(threshold) if first else TeaCache(threshold)
        self.last = False
        self.entered: Feature | None = None
        self.input: Feature | None = None
        self.residual: Feature | None = None

    @property
    def nbytes(self) -> int:
        before = self.decision.before
        return nbytes(self.residual or ()) + nbytes((before,))

    def at_input(self, feature: Feature | None, obstacle: str | None) -> Mapping[int, Feature] | None:
        assert feature is not None
        indicator = feature[-1]  # the picture's tokens, where the text's stand beside them
        if self.entered is not None:
            indicator = indicator - self.entered[-1]
        if self.decision.computes(indicator, self.last) or self.residual is None:
            self.input = cloned(feature)
            return None
        return {self.index: tuple(_sum(part, more) for part, more in zip(feature, self.residual, strict=True))}

    def at_output(self, index: int, passage: Passage) -> None:
        assert self.input is not None
        assert passage.returned is not None
        self.index = index
        self.residual = tuple(
            None if after is None else after - before for after, before in zip(passage.returned, self.input, strict=True)
        )
        self.input = None


def _sum(part: Tensor | None, residual: Tensor | None) -> Tensor | None:
    return None if residual is None else torch.add(part, residual)
