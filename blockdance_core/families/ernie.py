"""ERNIE-Image (host: comfy/ldm/ernie/model.py, v0.30.0)."""

from blockdance_core.config import Defaults
from blockdance_core.families._common import HIDDEN
from blockdance_core.families._record import Family, Section

FAMILY = Family(
    name="ERNIE-Image",
    classes=("ErnieImageModel",),
    depths=(("ERNIE-Image", 36),),
    sections=(Section("layers", HIDDEN),),
    defaults=Defaults(source="by analogy with the published image models"),
)
