"""BlockDanceProfile: MODEL and a prompt -> BLOCKDANCE_PROFILE, what reuse costs at every step."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from blockdance_core.host import notify
from blockdance_core.host.calibrate import depth_of
from blockdance_core.host.measured import Measured, extended, parse_boundaries
from blockdance_core.host.rollout import choices, prompt_of

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

ProfileType = io.Custom("BLOCKDANCE_PROFILE")


class BlockDanceProfile(io.ComfyNode):
    """Samples a prompt some hundred times; several nodes in a row measure several prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Ids and order are API. Those of the sampling are the host's KSampler's."""
        samplers, schedulers = choices()
        return io.Schema(
            node_id="BlockDanceProfile",
            display_name="BlockDance Profile",
            category="model/BlockDance",
            description="Measures on a prompt what reuse would cost at every step, for BlockDance Calibrate. Takes long.",
            search_aliases=["calibrate", "measure", "policy"],
            inputs=[
                io.Model.Input("model", tooltip="The model to calibrate, as the sampler gets it."),
                io.Conditioning.Input("positive", tooltip="A prompt like those that will be sampled."),
                io.Conditioning.Input("negative", tooltip="What is not wanted."),
                io.Latent.Input("latent_image", tooltip="The latent to start from; a batch counts as so many samples."),
                io.Int.Input(  # fixed: another seed is another profile, which takes long
                    "seed", default=0, min=0, max=0xffffffffffffffff, control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Seed of the noise."),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="The number of steps that the policy is for."),
                io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Guidance."),
                io.Combo.Input("sampler_name", options=samplers, tooltip="The sampler that the policy is for."),
                io.Combo.Input("scheduler", options=schedulers, tooltip="The scheduler that the policy is for."),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=(
                    "Share of the noise schedule that is run.")),
                io.String.Input("boundaries", default="", tooltip=(
                    "Last blocks that reuse may skip up to, with commas between: indices from 0, or shares such as 0.75. "
                    "The number of blocks, or empty: the whole model. Each takes as long again.")),
                ProfileType.Input("profile", optional=True, tooltip="Of the prompts before: another BlockDance Profile."),
            ],
            outputs=[
                ProfileType.Output(display_name="profile", tooltip="Of all prompts so far."),
                io.String.Output(display_name="report", tooltip="JSON; its keys are described in the help page."),
            ],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, positive: Any, negative: Any, latent_image: dict[str, Any], seed: int, steps: int, cfg: float,
        sampler_name: str, scheduler: str, denoise: float, boundaries: str = "", profile: Measured | None = None,
    ) -> io.NodeOutput:
        """Returns the profile of the prompts before and this one, and what it says as JSON."""
        prompt = prompt_of(model, positive, negative, latent_image, seed, steps, cfg, sampler_name, scheduler, denoise)
        chosen = parse_boundaries(boundaries, depth_of(model))
        measured = extended(profile, model, prompt, chosen, notify.progress_bar())
        text = json.dumps(measured.report(), allow_nan=False)
        return io.NodeOutput(measured, text, ui=ui.PreviewText(text))
