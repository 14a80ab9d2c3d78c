"""BlockDanceTrainPolicy: BLOCKDANCE_PROFILE -> an adaptive policy file, and how its training went."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui

from blockdance_core import plots
from blockdance_core.host import notify
from blockdance_core.host.measured import Measured
from blockdance_core.host.paths import new_policy_path
from blockdance_core.host.rewards import by_name
from blockdance_core.host.training import CHOICES, Design, further, parse_tradeoffs, train
from blockdance_core.policy.training import Settings

from .load_policy import PolicyType
from .profile import ProfileType
from .texts import described


class BlockDanceTrainPolicy(io.ComfyNode):
    """Trains a network that decides for each picture; queued again after a stop, it goes on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Ids and order are API."""
        return described(io.Schema(
            node_id="BlockDanceTrainPolicy",
            display_name="BlockDance Train Policy",
            category="model/BlockDance",
            search_aliases=["ada", "adaptive", "policy", "reinforce"],
            is_output_node=True,
            inputs=[
                ProfileType.Input("profile"),
                PolicyType.Input("policy", optional=True),
                io.String.Input("policy_name", default="my-adaptive-policy"),
                io.Combo.Input("choices", options=list(CHOICES), default=CHOICES[0]),
                io.Float.Input("start", default=Design.start, min=0.0, max=0.9, step=0.01),
                io.String.Input("tradeoffs", default="1, 2, 4, 8, 16"),
                io.String.Input("reward", default="fidelity"),
                io.Int.Input("epochs", default=Settings.epochs, min=1, max=100000),
                io.Int.Input("seed", default=0, min=0, max=0xffffffffffffffff, control_after_generate=False),
                io.String.Input("prompts", default="", multiline=True),
                io.Clip.Input("clip", optional=True),
                io.Vae.Input("vae", optional=True),
                io.ClipVision.Input("clip_vision", optional=True),
            ],
            outputs=[
                PolicyType.Output(display_name="policy"),
                io.String.Output(display_name="report"),
                io.Image.Output(display_name="curve"),
            ],
        ))

    @classmethod
    def validate_inputs(cls, policy_name: str | None, tradeoffs: str | None) -> bool | str:
        """Says what a name and trade-offs may be; of what comes from another node nothing is known yet."""
        try:
            if policy_name is not None:
                new_policy_path(policy_name)
            if tradeoffs is not None:
                parse_tradeoffs(tradeoffs)
        except (ValueError, OSError) as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, profile: Measured, policy_name: str, choices: str, start: float, tradeoffs: str, reward: str, epochs: int,
        seed: int, prompts: str = "", policy: Any = None, clip: Any = None, vae: Any = None, clip_vision: Any = None,
    ) -> io.NodeOutput:
        """Returns the policy, its record as JSON and the curve [1, 300, 960, 3]."""
        judge = by_name(reward, vae, clip, clip_vision)
        more, lines = further(profile.prompts[0], prompts, clip)
        known = () if judge.reads else profile.prompts  # what these say is not known
        if judge.reads and not more:
            raise ValueError(f"The reward {judge.name} reads the prompts: write them into prompts, and connect clip.")
        sampled = [*known, *more]
        texts = [*([""] * prompt.latent.shape[0] for prompt in known), *([line] for line in lines)]
        bar = notify.picture_bar()
        trained, record = train(
            profile.model, sampled, new_policy_path(policy_name), policy, Design(choices=choices, start=start),
            Settings(tradeoffs=parse_tradeoffs(tradeoffs), epochs=epochs, seed=seed), judge, texts,
            dict(zip(profile.profile.boundaries, profile.profile.costs, strict=True)),
            progress=lambda what, done, of, curve: bar(done, of, lambda: plots.curve(curve) if curve else None),
        )
        picture = torch.from_numpy(np.asarray(plots.curve(record["curve"]), dtype=np.float32) / 255)[None]
        return io.NodeOutput(trained, json.dumps(record, allow_nan=False), picture, ui=ui.PreviewImage(picture, cls=cls))
