"""BlockDanceCalibrate: BLOCKDANCE_PROFILE -> a policy file, and what it saves and costs."""

from __future__ import annotations

import json

from comfy_api.latest import io, ui

from blockdance_core.host import notify
from blockdance_core.host.calibrate import calibrate
from blockdance_core.host.measured import Measured
from blockdance_core.host.paths import new_policy_path
from blockdance_core.host.search import CUTS

from .load_policy import PolicyType
from .profile import ProfileType
from .texts import described


class BlockDanceCalibrate(io.ComfyNode):
    """Finds the schedules, proves them on the profile's prompts and saves them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Ids and order are API."""
        return described(io.Schema(
            node_id="BlockDanceCalibrate",
            display_name="BlockDance Calibrate",
            category="model/BlockDance",
            search_aliases=["policy", "schedule", "optimise"],
            is_output_node=True,
            inputs=[
                ProfileType.Input("profile"),
                io.String.Input("policy_name", default="my-policy"),
                io.Float.Input("cut", default=0.0, min=0.0, max=0.9, step=0.01),
                io.Float.Input("fidelity", default=0.0, min=0.0, max=200.0, step=0.5),
                io.Int.Input("effort", default=0, min=0, max=10000),
            ],
            outputs=[
                PolicyType.Output(display_name="policy"),
                io.String.Output(display_name="report"),
            ],
        ))

    @classmethod
    def validate_inputs(cls, policy_name: str | None) -> bool | str:
        """Says what a name may be; of one that comes from another node nothing is known yet."""
        try:
            if policy_name is not None:
                new_policy_path(policy_name)
        except (ValueError, OSError) as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, profile: Measured, policy_name: str, cut: float, fidelity: float, effort: int) -> io.NodeOutput:
        """Returns the policy as it stands in the file, and what was found as JSON."""
        policy, report = calibrate(
            profile, new_policy_path(policy_name), (cut,) if cut else CUTS, fidelity, effort, notify.progress_bar())
        text = json.dumps(report, allow_nan=False)
        return io.NodeOutput(policy, text, ui=ui.PreviewText(text))
