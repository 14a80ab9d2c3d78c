"""Help pages and translations, as the server hands them out."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import pytest
from browser.page import EXTENSION, NodePage, accelerate
from playwright.sync_api import expect

NODES = (
    "BlockDanceAccelerate", "BlockDanceReport", "BlockDanceLoadPolicy", "BlockDanceProfile", "BlockDanceCalibrate",
    "BlockDanceTrainPolicy",
)


def fetch(url: str) -> str:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as answer:
        text: str = answer.read().decode()
    return text


@pytest.fixture(scope="module", params=NODES)
def definition(request: pytest.FixtureRequest, address: str) -> dict[str, Any]:
    """A node as the server describes it."""
    described: dict[str, Any] = json.loads(fetch(f"{address}/object_info/{request.param}"))[request.param]
    return described


def inputs(definition: dict[str, Any]) -> list[str]:
    return [name for group in ("required", "optional") for name in definition["input"].get(group, {})]


def translation(address: str, definition: dict[str, Any]) -> dict[str, Any]:
    translated: dict[str, Any] = json.loads(fetch(f"{address}/i18n"))["en"]["nodeDefs"][definition["name"]]
    return translated


def test_help_page_names_every_input_and_output(address: str, definition: dict[str, Any]) -> None:
    translated = translation(address, definition)
    text = fetch(f"{address}{EXTENSION}docs/{definition['name']}.md")
    for entry in [*translated["inputs"].values(), *translated["outputs"].values()]:
        assert f"**{entry['name']}**" in text


def test_translation_covers_exactly_the_nodes_inputs_and_outputs(address: str, definition: dict[str, Any]) -> None:
    translated = translation(address, definition)
    assert list(translated["inputs"]) == inputs(definition)
    assert list(translated["outputs"]) == [str(index) for index in range(len(definition["output"]))]
    for entry in [*translated["inputs"].values(), *translated["outputs"].values()]:
        assert entry["name"] and entry["tooltip"]


def test_help_opens_in_the_page(page: NodePage) -> None:
    page.load(accelerate())
    page.js("() => { const { canvas, graph } = window.app; canvas.selectNode(graph.getNodeById(1)); }")
    page.page.locator('[data-testid="info-button"]').click()
    expect(page.page.get_by_text("The speed dial").first).to_be_visible()
