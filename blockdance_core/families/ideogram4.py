"""Ideogram 4 (host: comfy/ldm/ideogram4/model.py, v0.30.0). Without a text its sequence is the image alone."""

from blockdance_core.config import Defaults
from blockdance_core.families._common import HIDDEN
from blockdance_core.families._record import Family, Section

FAMILY = Family(
    name="Ideogram 4",
    classes=("Ideogram4Transformer2DModel",),
    depths=(("Ideogram 4", 34),),
    sections=(Section("layers", HIDDEN),),
    defaults=Defaults(source="by analogy with the published image models"),
)
