"""The pack's nodes, as the host gets them."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="session")
def nodes(pack: ModuleType) -> dict[str, Any]:
    """By node id, in the order of the pack."""

    async def of_the_pack() -> list[Any]:
        return await (await pack.comfy_entrypoint()).get_node_list()

    with ThreadPoolExecutor(1) as apart:  # playwright keeps an event loop running in the tests' own thread
        found = apart.submit(asyncio.run, of_the_pack()).result()
    return {node.define_schema().node_id: node for node in found}
