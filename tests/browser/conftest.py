"""The real page of the real server in a real Chromium, once with Nodes 2.0 (Vue) and once with the canvas renderer."""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser.chromium import ARGUMENTS, ensure_chromium
from browser.page import NodePage
from host import launcher, server
from playwright.sync_api import Browser, expect, sync_playwright

expect.set_options(timeout=20_000)  # for a busy machine

HERE = Path(__file__).parent
SETTINGS = {
    "Comfy.TutorialCompleted": True, "Comfy.Node.AlwaysShowAdvancedWidgets": True, "Comfy.Minimap.Visible": False,
}


@pytest.fixture(scope="package")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of a server with this pack and the node of tiny_nodes.py."""
    base = tmp_path_factory.mktemp("host")
    source = HERE / "tiny_nodes.py"
    nodes = base / "custom_nodes" / source.name
    nodes.parent.mkdir()
    nodes.write_text(source.read_text(encoding="utf-8").replace('"@TESTS@"', repr(str(HERE.parent))), encoding="utf-8")
    arguments = ["--cpu", "--whitelist-custom-nodes", server.REPO.name, nodes.name]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # two wait for each other where the browser computes too
    with server.running(
        sys.executable, launcher.host_path(), base, arguments=arguments, variables=one_thread
    ) as page:
        yield page


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """One Chromium for all tests."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=ensure_chromium(), args=list(ARGUMENTS))
        yield chromium
        chromium.close()


@pytest.fixture(scope="package", params=[True, False], ids=["nodes2", "canvas"])
def opened(request: pytest.FixtureRequest, address: str, browser: Browser) -> Iterator[NodePage]:
    """The page in one of the two renderers. It stays open for all tests of that renderer."""
    for name, value in {**SETTINGS, "Comfy.VueNodes.Enabled": request.param}.items():
        change_setting(address, name, value)
    context = browser.new_context(
        viewport={"width": 1200, "height": 900}, permissions=["clipboard-read", "clipboard-write"]
    )
    yield NodePage(context.new_page(), address, vue=request.param)
    context.close()


@pytest.fixture
def page(opened: NodePage) -> Iterator[NodePage]:
    """The open page with an empty graph. Afterwards nothing of ours may have been written to its console."""
    opened.clear()
    yield opened
    assert opened.messages_about_us() == []


def change_setting(address: str, name: str, value: Any) -> None:
    """Store a setting of the front end on the server, as its settings dialog does."""
    body = json.dumps(value).encode()
    request = urllib.request.Request(f"{address}/settings/{name}", body, {"Content-Type": "application/json"})
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10).close()
