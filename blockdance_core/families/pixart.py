"""PixArt-alpha and PixArt-Sigma (host: comfy/ldm/pixart/pixartms.py, v0.30.0)."""

from blockdance_core.config import Defaults
from blockdance_core.families._common import HIDDEN
from blockdance_core.families._record import Family, Section

FAMILY = Family(
    name="PixArt",
    classes=("PixArt", "PixArtMS"),
    depths=(("alpha, Sigma", 28),),
    sections=(Section("blocks", HIDDEN),),
    defaults=Defaults(source="published: blocks 0..20 of 28, 40 % to 95 %"),
)
