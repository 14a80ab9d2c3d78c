"""The real page of the real server in a real Chromium, once with Nodes 2.0 (Vue) and once with the canvas renderer."""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from host import launcher, server
from playwright.sync_api import Browser, sync_playwright

sys.path.append(str(Path(__file__).parent))
from chromium import ARGUMENTS, ensure_chromium  # noqa: E402
from page import NodePage  # noqa: E402

SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Node.AlwaysShowAdvancedWidgets": True, "Comfy.Minimap.Visible": False}


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of a server with this pack and its demo nodes."""
    with server.running(sys.executable, launcher.host_path(), tmp_path_factory.mktemp("host"), arguments=["--cpu"]) as page:
        yield page


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One Chromium for all tests."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=ensure_chromium(), args=list(ARGUMENTS))
        yield chromium
        chromium.close()


@pytest.fixture(scope="session", params=[True, False], ids=["nodes2", "canvas"])
def opened(request: pytest.FixtureRequest, address: str, browser: Browser) -> Iterator[NodePage]:
    """The page in one of the two renderers. It stays open for all tests of that renderer."""
    for name, value in {**SETTINGS, "Comfy.VueNodes.Enabled": request.param}.items():
        change_setting(address, name, value)
    context = browser.new_context(viewport={"width": 1600, "height": 1400}, permissions=["clipboard-read", "clipboard-write"])
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
