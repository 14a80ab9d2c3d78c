"""BlockDance for ComfyUI: reuse what hardly changes between denoising steps."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "./web"
__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint() -> ComfyExtension:
    """Called by the host once at start; everything is imported here, so that a failure concerns this pack alone."""
    _name_core()
    from comfy_api.latest import ComfyExtension

    from .nodes import pack_nodes

    class BlockDanceExtension(ComfyExtension):
        async def get_node_list(self) -> list:
            nodes = pack_nodes()
            if os.environ.get("BLOCKDANCE_DEMO") == "1":
                from .demo.nodes import demo_nodes

                nodes += demo_nodes()
            return nodes

    return BlockDanceExtension()


def _name_core() -> None:
    """Make this folder's core importable as `blockdance_core`, without exposing its neighbours (our `nodes` above all)."""
    if "blockdance_core" in sys.modules:
        return
    init = Path(__file__).parent / "blockdance_core" / "__init__.py"
    spec = importlib.util.spec_from_file_location("blockdance_core", init)
    assert spec is not None and spec.loader is not None
    sys.modules["blockdance_core"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
