"""A ControlNet without a network: residuals of the right shape and place."""

from __future__ import annotations

from typing import Any

from comfy.controlnet import ControlBase
from torch import Tensor

from .case import Case, Conditioning, normal


class FakeControl(ControlBase):
    """Residuals that depend on each latent row alone, so that batching cannot change them.

    The host adds them in place behind each block (ComfyUI v0.30.0: mmdit.py:985, flux/model.py:256 and :303,
    hunyuan_video/model.py:414 and :439).
    """

    def __init__(self, case: Case, strength: float, seed: int, percent: tuple[float, float]) -> None:
        """Draw the residuals; see `fake_control`."""
        super().__init__()
        if case.control is None:
            raise ValueError(f"{case.name} takes no control")
        self.case = case
        self.seed = seed
        self.strength = strength
        self.timestep_percent_range = percent
        self.calls = 0

    def get_control(
        self, x_noisy: Tensor, t: Tensor, cond: dict[str, Any], batched_number: int, transformer_options: dict[str, Any]
    ) -> dict[str, list[Tensor]] | None:
        """Residuals `[rows, tokens, width]` for every block, with those of the control before this one in the chain.

        None outside the percent range of every one.
        """
        before = self.previous_controlnet
        previous = before.get_control(x_noisy, t, cond, batched_number, transformer_options) if before else None
        if self.timestep_range is not None and not self.timestep_range[1] <= t[0] <= self.timestep_range[0]:
            return previous
        self.calls += 1
        case = self.case
        assert case.control is not None
        row = 1 + x_noisy.flatten(1).mean(1)[:, None, None]
        control: dict[str, list[Tensor]] = {}
        for key, length in zip(case.control, self.lengths, strict=True):
            shape = (1, case.tokens(x_noisy.shape), case.width)
            control[key] = [0.3 * normal(shape, f"{key} {i}", self.seed) * row for i in range(length)]
        return self.control_merge(control, previous, output_dtype=None)

    def copy(self) -> FakeControl:
        """What the host's nodes attach to a conditioning, with an image, a strength and a range of its own."""
        copied = FakeControl(self.case, self.strength, self.seed, self.timestep_percent_range)
        self.copy_to(copied)
        return copied

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        """Read the lengths of the block lists off the model, as the host calls it before sampling."""
        super().pre_run(model, percent_to_timestep_function)
        lists = [len(model.diffusion_model.get_submodule(name)) for name in self.case.lists]
        self.lengths = [len(self.case.skips)] if self.case.skips else lists  # HunyuanDiT adds one to each long skip


def fake_control(case: Case, strength: float = 1.0, seed: int = 0, percent: tuple[float, float] = (0.0, 1.0)) -> FakeControl:
    """A control object for `sample(..., control=...)` or `with_control`.

    Args:
        case: A case whose `control` is not None.
        strength: Factor of the residuals.
        seed: Seed of the residuals.
        percent: First and last share of the schedule, as noise level, at which there is control.
    """
    return FakeControl(case, strength, seed, percent)


def with_control(control: FakeControl, conditioning: Conditioning) -> Conditioning:
    """Attach a control as the ControlNetApplyAdvanced node does."""
    return [[text, {**extras, "control": control, "control_apply_to_uncond": False}] for text, extras in conditioning]
