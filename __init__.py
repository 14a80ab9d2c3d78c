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
    _name("blockdance_core")
    from comfy_api.latest import ComfyExtension

    from .nodes import pack_nodes

    class BlockDanceExtension(ComfyExtension):
        async def get_node_list(self) -> list:
            nodes = pack_nodes()
            if os.environ.get("BLOCKDANCE_DEMO") == "1":
                _name("demo")
                from demo.nodes import demo_nodes

                nodes += demo_nodes()
            return nodes

    return BlockDanceExtension()


def _name(package: str) -> None:
    """Make a package of this folder importable by its own name, without exposing its neighbours (our `nodes` above all)."""
    if package in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(package, Path(__file__).parent / package / "__init__.py")
    assert spec is not None and spec.loader is not None
    sys.modules[package] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
