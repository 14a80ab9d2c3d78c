"""The method re-stated plainly, without the engine: every block runs, and the boundary's output is replaced.

Own hooks, own step counting (the sampler's callback), own groups. Only for samplers with one evaluation per step.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from comfy.model_patcher import ModelPatcher
from tiny import Case
from tiny.case import Tokens
from torch import Tensor, nn


def plan(steps: int, start: float, end: float, group_size: int) -> dict[int, int]:
    """{step: first step of its group} of the steps to reuse, for a window in shares of the executed steps."""
    inside = [k for k in range(steps) if start - 1e-9 <= k / steps < end - 1e-9 and k != steps - 1]
    return {k: inside[0] + (k - inside[0]) // group_size * group_size
            for k in inside if (k - inside[0]) % group_size}


class Reference:
    """One run. Enter `watch` around it and pass `callback` to the sampler."""

    def __init__(
        self, case: Case, forecast: str, boundary: int, sigmas: Tensor, reuse: dict[int, int]
    ) -> None:
        self.case, self.forecast, self.boundary = case, forecast, boundary
        self.sigmas, self.reuse = [float(s) for s in sigmas], reuse
        self.step = 0
        self.calls = 0  # in this step
        self.control = False
        self.start: Tokens = ()
        self.full: dict[tuple[int, int, bool], dict[int, tuple[Tokens, Tokens]]] = {}
        skips = [early for early, late in case.skips if early < boundary < late]
        self.taps = [*skips, boundary]  # a block behind the boundary takes the output of each of them
        self.replaced: list[int] = []

    def callback(self, step: int, *_: Any) -> None:
        """The sampler finished a step."""
        self.step, self.calls = step + 1, 0

    @contextlib.contextmanager
    def watch(self, model: ModelPatcher) -> Iterator[None]:
        """Replace the boundary's output on the planned steps of the run inside."""
        diffusion_model: nn.Module = model.model.diffusion_model
        blocks = self.case.blocks(diffusion_model)
        handles = [
            diffusion_model.register_forward_pre_hook(self._call, with_kwargs=True),
            blocks[0].register_forward_pre_hook(self._enter, with_kwargs=True),
            *(blocks[tap].register_forward_hook(functools.partial(self._leave, tap)) for tap in self.taps),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _call(self, _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.calls += 1
        control = keywords.get("control", next((a for a in arguments if isinstance(a, dict) and "output" in a), None))
        self.control = control is not None

    def _enter(self, _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.start = tuple(None if t is None else t.clone() for t in self.case.entering(arguments, keywords))

    def _leave(self, tap: int, _: nn.Module, __: Any, output: Any) -> Any:
        now = output[: len(self.start)] if isinstance(output, tuple) else (output,)
        start = self.start if len(self.start) == len(now) else self.case.joining(self.start)
        full = self.full.setdefault((tap, self.calls, self.control), {})
        first = self.reuse.get(self.step)
        fresh = [k for k in full if first is not None and k >= first]
        if not fresh:
            full[self.step] = (start, tuple(None if t is None else t.clone() for t in now))
            return None
        if tap == self.boundary:
            self.replaced.append(self.step)
        predicted = tuple(
            None if tensor is None else self._predict(full, part, start[part]) for part, tensor in enumerate(now)
        )
        return (*predicted, *output[len(predicted):]) if isinstance(output, tuple) else predicted[0]

    def _predict(self, full: dict[int, tuple[Tokens, Tokens]], part: int, start: Tensor | None) -> Tensor:
        def change(step: int) -> Tensor:
            before, after = full[step]
            assert before[part] is not None
            assert after[part] is not None
            return after[part] - before[part]

        one = max(full)
        held = full[one][1][part]
        assert held is not None
        assert start is not None
        if self.forecast == "hold":
            return held.clone()
        earlier = [k for k in full if k < one]
        if self.forecast == "delta" or not earlier:
            return start + change(one)
        zero = max(earlier)
        share = (self.sigmas[self.step] - self.sigmas[one]) / (self.sigmas[one] - self.sigmas[zero])
        return start + change(one) + share * (change(one) - change(zero))
