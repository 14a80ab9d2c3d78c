"""What the tests do with the page: `NodePage`; and a run to show in it: `RUN`."""

from __future__ import annotations

import contextlib
import json
import uuid
from typing import Any

from host.server import REPO
from playwright.sync_api import ConsoleMessage, Locator, Page
from playwright.sync_api import TimeoutError as PlaywrightTimeout

EXTENSION = f"/extensions/{REPO.name}/"
STEPS = 30
DECISIONS = ["compute"] * 12 + ["cache", "reuse"] * 8 + ["compute"] * 2
EFFECTIVE: dict[str, Any] = {
    "preset": "auto", "group_size": 2, "start_percent": 0.4, "end_percent": 0.95, "window": "noise_level",
    "boundary": 20, "depth": 28, "boundary_label": "21 of 28 blocks", "forecast": "taylor", "cache_device": "auto",
    "model_family": "PixArt", "quality": "off",
}
RUN: dict[str, Any] = {
    "schema_version": 1, "completed": True, "steps": STEPS,
    "sigmas": [round(14.6 * (1 - step / STEPS) ** 2, 4) for step in range(STEPS + 1)], "evaluations": STEPS,
    "window": {"first": 12, "last": 28, "covered": 17, "steps": STEPS, "text": "window covers 17 of 30 steps"},
    "decisions": DECISIONS, "boundary": [None if kind == "compute" else 20 for kind in DECISIONS], "blocks_total": 28,
    "blocks_run": [7 if kind == "reuse" else 28 for kind in DECISIONS], "calls": [1] * STEPS, "reused_steps": 8,
    "reused_calls": 8, "fallbacks": {"a patch replaces block 0": 2, "new stream": 1},
    "dit_ms": [900.0, *(20.0 if kind == "reuse" else 60.0 for kind in DECISIONS[1:])], "cached_bytes": 18_874_368,
    "predicted_bytes": 18_874_368, "cut_arithmetic": 0.2, "model_family": "PixArt", "config": EFFECTIVE,
    "warnings": ["40 % noise level is reached after 3 steps"],
}
SUMMARY = "BlockDance: PixArt, window covers 17 of 30 steps, 8 reused"


def node(number: int, kind: str, values: list[Any] | None = None, x: int = 0) -> dict[str, Any]:
    """A node of a saved workflow."""
    return {
        "id": number, "type": kind, "pos": [x, 0], "size": [320, 120], "flags": {}, "order": number, "mode": 0,
        "inputs": [], "outputs": [], "properties": {}, "widgets_values": values or [],
    }


def accelerate(number: int = 1, preset: str = "auto") -> dict[str, Any]:
    """An Accelerate node whose saved values all differ from the defaults."""
    return node(number, "BlockDanceAccelerate", [True, preset, 3, 0.3, 0.9, "steps", 11, "delta", "cpu"])


def report(number: int = 2) -> dict[str, Any]:
    """A Report node."""
    return node(number, "BlockDanceReport", x=400)


class NodePage:
    """The page of the front end, in one of its two renderers.

    Attributes:
        page: Playwright's page.
        vue: Whether nodes are drawn by Vue (Nodes 2.0) and not on the canvas.
    """

    def __init__(self, page: Page, address: str, vue: bool) -> None:
        self.page, self.address, self.vue = page, address, vue
        self.messages: list[tuple[str, str]] = []
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.messages.append(("pageerror", f"{error} {error.stack}")))
        page.goto(address)
        page.wait_for_function("window.app?.extensionManager && window.app.isGraphReady", timeout=120_000)
        page.wait_for_function("window.app.graph?.nodes?.length > 0", timeout=60_000)  # the default workflow

    def _note(self, message: ConsoleMessage) -> None:
        self.messages.append((message.type, f"{message.text} {message.location.get('url', '')}"))

    def messages_about_us(self) -> list[tuple[str, str]]:
        """Console messages that come from our files or name them, whatever their level, and every page error."""
        lookup = f"404 (Not Found) {self.address}{EXTENSION}docs/"  # for a help page in the page's own language
        return [
            (kind, text) for kind, text in self.messages
            if kind == "pageerror" or (("blockdance" in text.lower() or EXTENSION in text) and lookup not in text)
        ]

    def js(self, code: str, argument: Any = None) -> Any:
        """Run a JavaScript function in the page."""
        return self.page.evaluate(code, argument)

    def clear(self) -> None:
        """Empty the graph and forget the messages."""
        self.js(
            "() => { const { app } = window; app.canvas.setGraph(app.rootGraph); app.clean(); app.rootGraph.clear(); }"
        )
        self.messages.clear()

    def load(self, *nodes: dict[str, Any]) -> None:
        """Load a new workflow of these nodes, without links."""
        self.load_workflow({
            "id": str(uuid.uuid4()), "revision": 0, "last_node_id": 100, "last_link_id": 0, "nodes": list(nodes),
            "links": [], "groups": [], "config": {}, "version": 0.4,
            "extra": {"ds": {"scale": 1, "offset": [150, 120]}},
        })

    def load_workflow(self, workflow: dict[str, Any]) -> None:
        """Load a workflow and wait until its first node shows its panel."""
        self.js("workflow => window.app.loadGraphData(workflow)", workflow)
        self.panel().first.wait_for()

    def saved(self) -> dict[str, Any]:
        """The workflow as it would be saved."""
        text: str = self.js("() => JSON.stringify(window.app.rootGraph.serialize())")
        return json.loads(text)

    def send(self, event: str, **data: Any) -> None:
        """Hand an event to the page as if it came from the server."""
        self.js(
            "([event, detail]) => window.app.api.dispatchEvent(new CustomEvent(event, { detail }))",
            [f"blockdance.{event}", data],
        )

    def panel(self, number: int | None = None) -> Locator:
        """The panel of a node, where it is visible; of any node without a number."""
        if number is None:
            return self.page.locator(".blockdance:visible")
        if self.vue:
            return self.page.locator(f'[data-node-id="{number}"] .blockdance')
        # on the canvas the panels lie beside each other in the page: mark the one of this node
        self.js(
            "number => { for (const node of window.app.canvas.graph.nodes) for (const widget of node.widgets ?? []) "
            "if (widget.type === 'blockdance_panel') widget.element.dataset.testNode = node.id; }", number,
        )
        return self.page.locator(f'.blockdance[data-test-node="{number}"]')

    def widgets(self, number: int) -> dict[str, dict[str, Any]]:
        """Value, label and state of a node's widgets."""
        listed: dict[str, dict[str, Any]] = self.js(
            "number => Object.fromEntries(window.app.rootGraph.getNodeById(number).widgets.map(w => "
            "[w.name, { value: w.value, label: w.label, disabled: !!w.disabled }]))", number,
        )
        return {name: widget for name, widget in listed.items() if name != "blockdance_panel"}

    def choose(self, number: int, name: str, value: str) -> None:
        """Choose a value of a combo widget with the mouse."""
        if self.vue:
            rows = self.page.locator(f'[data-node-id="{number}"] [data-testid="node-widget"]')
            rows.filter(has_text=name).first.get_by_role("combobox").click()
            self.page.get_by_role("option", name=value, exact=True).click()
            return
        entry = self.page.locator(".litecontextmenu .litemenu-entry").filter(has_text=value)
        for _ in range(10):  # a click finds the widget where it was last drawn: not yet, on a page just opened or busy
            x, y = self.js(
                "([number, name]) => { const { canvas } = window.app, node = canvas.graph.getNodeById(number); "
                "const widget = node.widgets.find(w => w.name === name), box = canvas.canvas.getBoundingClientRect(); "
                "const at = (x, y) => [(x + canvas.ds.offset[0]) * canvas.ds.scale + box.left, "
                "(y + canvas.ds.offset[1]) * canvas.ds.scale + box.top]; "
                "return at(node.pos[0] + node.size[0] / 2, node.pos[1] + widget.y + 10); }", [number, name],
            )
            self.page.mouse.click(x, y)
            with contextlib.suppress(PlaywrightTimeout):
                entry.wait_for(timeout=2_000)
                break
        entry.click()
