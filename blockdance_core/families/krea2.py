"""Krea 2 (host: comfy/ldm/krea2/model.py, v0.30.0)."""

from blockdance_core.config import Defaults
from blockdance_core.families._common import HIDDEN
from blockdance_core.families._record import Family, Section

FAMILY = Family(
    name="Krea 2",
    classes=("SingleStreamDiT",),
    depths=(("Krea 2", 28),),
    sections=(Section("blocks", HIDDEN),),
    defaults=Defaults(source="by analogy with the published image models"),
)
