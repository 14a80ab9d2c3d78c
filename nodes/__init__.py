"""The nodes of this pack: schema, one call into the core, output."""

from __future__ import annotations

from comfy_api.latest import io

from blockdance_core.host import paths

from .accelerate import BlockDanceAccelerate
from .calibrate import BlockDanceCalibrate
from .load_policy import BlockDanceLoadPolicy
from .profile import BlockDanceProfile
from .report import BlockDanceReport
from .train_policy import BlockDanceTrainPolicy


def pack_nodes() -> list[type[io.ComfyNode]]:
    """Every node of the pack. Registers the folder of policy files, which the loader lists."""
    paths.register()
    return [
        BlockDanceAccelerate, BlockDanceReport, BlockDanceLoadPolicy, BlockDanceProfile, BlockDanceCalibrate,
        BlockDanceTrainPolicy,
    ]
