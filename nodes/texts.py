"""The nodes' texts: they stand in `locales/en/nodeDefs.json` alone, where the host finds those of other languages, too."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from comfy_api.latest import io

_FILE = Path(__file__).parent.parent / "locales" / "en" / "nodeDefs.json"


def described(schema: io.Schema) -> io.Schema:
    """The same schema with its description and the tooltips of its inputs and outputs."""
    texts = _texts()[schema.node_id]
    schema.description = texts["description"]
    for entry in schema.inputs:
        entry.tooltip = texts["inputs"][entry.id]["tooltip"]
    for index, output in enumerate(schema.outputs):
        output.tooltip = texts["outputs"][str(index)]["tooltip"]
    return schema


@functools.cache
def _texts() -> dict[str, Any]:
    texts: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return texts
