"""BlockDanceLoadPolicy: a policy file -> BLOCKDANCE_POLICY."""

from __future__ import annotations

import os

from comfy_api.latest import io

from blockdance_core.host.paths import policy_files, policy_path
from blockdance_core.policy import load

from .texts import described

PolicyType = io.Custom("BLOCKDANCE_POLICY")


class BlockDanceLoadPolicy(io.ComfyNode):
    """Reads a file of `models/blockdance`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Ids and order are API. The list of files is made anew whenever the page asks for it."""
        return described(io.Schema(
            node_id="BlockDanceLoadPolicy",
            display_name="Load BlockDance Policy",
            category="model/BlockDance",
            search_aliases=["schedule", "calibration", "calibrated"],
            inputs=[
                io.Combo.Input("policy_name", options=policy_files()),
                io.Float.Input("cut", default=0.0, min=0.0, max=0.99, step=0.01, optional=True),
            ],
            outputs=[PolicyType.Output(display_name="policy")],
        ))

    @classmethod
    def validate_inputs(cls, policy_name: str | None) -> bool | str:
        """Says where files belong if there is none of that name; of one from another node nothing is known yet."""
        try:
            if policy_name is not None:
                policy_path(policy_name)
        except FileNotFoundError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, policy_name: str | None, cut: float = 0.0) -> str:
        """Changes when the file does; the page tells of the rest, and so does the node that a name comes from."""
        if policy_name is None:
            return ""
        path = policy_path(policy_name)
        state = os.stat(path)
        return f"{path} {state.st_mtime_ns} {state.st_size}"

    @classmethod
    def execute(cls, policy_name: str, cut: float = 0.0) -> io.NodeOutput:
        """Returns the policy; a damaged file is an error that names it."""
        return io.NodeOutput(load(policy_path(policy_name)).at(cut))
