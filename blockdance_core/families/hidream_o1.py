"""HiDream-O1 (host: comfy/ldm/hidream_o1/model.py, v0.30.0).

The first call with a prompt keeps the keys and values that every layer makes of the text; later calls carry the image tokens
alone and look the text up. With block patches in force no call keeps any, and all carry all tokens.
"""

from collections.abc import Mapping
from typing import Any

from blockdance_core.config import Defaults
from blockdance_core.families._record import Family, Section
from blockdance_core.interception import Port


def _fills_the_cache(arguments: Mapping[str, Any]) -> str | None:
    past = arguments.get("past_key_value")
    return "the model keeps the keys and values of the prompt in this call" if past is not None and not past else None


FAMILY = Family(
    name="HiDream-O1",
    classes=("HiDreamO1Transformer",),
    depths=(("HiDream-O1", 36),),
    sections=(
        Section(
            "language_model.layers", (Port("x", 0),), hook="double_block", passed_on=(None,), obstacle=_fills_the_cache
        ),
    ),
    defaults=Defaults(source="by analogy with the published image models; one stream, like PixArt"),
)
