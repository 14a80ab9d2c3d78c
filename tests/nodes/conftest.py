"""The pack's nodes, as the host gets them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import folder_paths
import pytest


@pytest.fixture(scope="session")
def nodes(pack: ModuleType) -> dict[str, Any]:
    """By node id, in the order of the pack."""

    async def of_the_pack() -> list[Any]:
        return await (await pack.comfy_entrypoint()).get_node_list()

    with ThreadPoolExecutor(1) as apart:  # playwright keeps an event loop running in the tests' own thread
        found = apart.submit(asyncio.run, of_the_pack()).result()
    return {node.define_schema().node_id: node for node in found}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only folder of policy files; it does not exist yet."""
    place = tmp_path / "models" / "blockdance"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "blockdance", ([str(place)], {".safetensors"}))
    monkeypatch.delitem(folder_paths.filename_list_cache, "blockdance", raising=False)
    yield place
    folder_paths.filename_list_cache.pop("blockdance", None)
