"""The nodes of this pack: schema, one call into the core, output."""

from __future__ import annotations

from comfy_api.latest import io

from .accelerate import BlockDanceAccelerate
from .report import BlockDanceReport


def pack_nodes() -> list[type[io.ComfyNode]]:
    """Every node of the pack."""
    return [BlockDanceAccelerate, BlockDanceReport]
