"""A workflow as the front end saves it: `SavedWorkflow`, and its conversion to what the host's /prompt takes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Node = dict[str, Any]
Definitions = Mapping[str, Any]

NOTES = ("Note", "MarkdownNote")  # of the front end alone; the host does not know them
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
TITLE = 30  # px above a node's position
GROUP_TITLE = 34  # px below a group's upper edge


class Link(NamedTuple):
    """A link of the saved form (litegraph 0.4)."""

    number: int
    source: int
    output: int
    target: int
    input: int
    type: str


class Box(NamedTuple):
    """A rectangle on the canvas, in px."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        return self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom

    def holds(self, other: Box) -> bool:
        inside = self.left <= other.left and other.right <= self.right
        return inside and self.top <= other.top and other.bottom <= self.bottom


class SavedWorkflow:
    """A saved workflow without subgraphs, reroutes or muted nodes.

    Attributes:
        name: File name without the suffix; the template browser shows it.
        nodes: The nodes by id, notes included.
        links: The links by number.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.stem
        content = json.loads(path.read_text(encoding="utf-8"))
        self.nodes: dict[int, Node] = {node["id"]: node for node in content["nodes"]}
        self.links: dict[int, Link] = {link[0]: Link(*link) for link in content["links"]}
        self.groups: list[dict[str, Any]] = content["groups"]

    def all(self, *types: str) -> list[Node]:
        """The nodes of the given types."""
        return [node for node in self.nodes.values() if node["type"] in types]

    def one(self, kind: str) -> Node:
        """The only node of a type."""
        (node,) = self.all(kind)
        return node

    def source(self, node: Node, name: str) -> tuple[Node, int]:
        """The node and the output that an input is linked to."""
        (slot,) = [slot for slot in node["inputs"] if slot["name"] == name]
        link = self.links[slot["link"]]
        return self.nodes[link.source], link.output

    def models(self) -> Iterator[tuple[str, str]]:
        """(folder, file name) of every model file that the loaders say they need."""
        for node in self.nodes.values():
            for model in node["properties"].get("models", ()):
                yield model["directory"], model["name"]

    def prompt(self, definitions: Definitions) -> dict[str, Any]:
        """The workflow in the form that POST /prompt takes.

        Args:
            definitions: The host's /object_info.
        """
        return {
            str(number): {"class_type": node["type"], "inputs": self._inputs(node, definitions[node["type"]]["input"])}
            for number, node in self.nodes.items()
            if node["type"] not in NOTES
        }

    def _inputs(self, node: Node, declared: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        linked = {slot["name"]: self.links[slot["link"]] for slot in node["inputs"] if slot.get("link") is not None}
        inputs: dict[str, Any] = {name: [str(link.source), link.output] for name, link in linked.items()}
        inputs |= {name: value for name, value in widgets(node, declared).items() if name not in linked}
        return inputs


def widgets(node: Node, declared: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The saved widget values of a node by name; they are saved by position, so every one must be accounted for.

    Args:
        node: A saved node.
        declared: The inputs of its definition.
    """
    values = list(node["widgets_values"])
    named = {}
    for name, spec in {**declared.get("required", {}), **declared.get("optional", {})}.items():
        kind, options = spec[0], spec[1] if len(spec) > 1 else {}
        if not (isinstance(kind, list) or kind in WIDGET_TYPES) or options.get("forceInput"):
            continue
        assert values, f"{node['type']}: no value is saved for '{name}'"
        named[name] = values.pop(0)
        if options.get("control_after_generate"):
            assert values.pop(0) in ("fixed", "increment", "decrement", "randomize")
    assert not values, f"{node['type']}: the saved values {values} belong to no widget"
    return named


def box(node: Node) -> Box:
    """The area of a node with its title."""
    (x, y), (width, height) = node["pos"], node["size"]
    return Box(x, y - TITLE, x + width, y + height)


def group_box(group: Mapping[str, Any]) -> Box:
    """The area of a group below its title."""
    x, y, width, height = group["bounding"]
    return Box(x, y + GROUP_TITLE, x + width, y + height)
