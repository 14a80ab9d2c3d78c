"""Lumina Image 2.0, Z-Image and its pixel-space variant (host: comfy/ldm/lumina/model.py, v0.30.0)."""

from blockdance_core.config import Defaults
from blockdance_core.families._common import HIDDEN
from blockdance_core.families._record import Family, Section

FAMILY = Family(
    name="Lumina 2 / Z-Image",
    classes=("NextDiT",),
    depths=(("Lumina 2", 26), ("Z-Image", 30)),
    sections=(Section("layers", HIDDEN),),
    defaults=Defaults(source="by analogy with the published image models"),
)
