"""BlockDanceProfile: MODEL and a prompt -> BLOCKDANCE_PROFILE, what reuse costs at every step."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from blockdance_core.host import notify
from blockdance_core.host.attach import depth_of
from blockdance_core.host.measured import Measured, extended, parse_boundaries
from blockdance_core.host.rollout import choices, prompt_of

from .texts import described

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

ProfileType = io.Custom("BLOCKDANCE_PROFILE")


class BlockDanceProfile(io.ComfyNode):
    """Samples a prompt some hundred times; several nodes in a row measure several prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Ids and order are API. Those of the sampling are the host's KSampler's."""
        samplers, schedulers = choices()
        return described(io.Schema(
            node_id="BlockDanceProfile",
            display_name="BlockDance Profile",
            category="model/BlockDance",
            search_aliases=["calibrate", "measure", "policy"],
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent_image"),
                io.Int.Input(  # fixed: another seed is another profile, which takes long
                    "seed", default=0, min=0, max=0xffffffffffffffff, control_after_generate=io.ControlAfterGenerate.fixed),
                io.Int.Input("steps", default=20, min=1, max=10000),
                io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01),
                io.Combo.Input("sampler_name", options=samplers),
                io.Combo.Input("scheduler", options=schedulers),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01),
                io.String.Input("boundaries", default=""),
                ProfileType.Input("profile", optional=True),
            ],
            outputs=[
                ProfileType.Output(display_name="profile"),
                io.String.Output(display_name="report"),
            ],
        ))

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
