"""PixelDiT and PiD (host: comfy/ldm/pixeldit/model.py and pid.py, v0.30.0). The pixel blocks behind always run."""

from blockdance_core.config import Defaults
from blockdance_core.families._record import Family, Section
from blockdance_core.interception import Port

FAMILY = Family(
    name="PixelDiT",
    classes=("PixDiT_T2I",),
    depths=(("PixelDiT, PiD", 14),),
    sections=(Section("patch_blocks", (Port("x", 0), Port("y", 1))),),
    defaults=Defaults(source="by analogy with the published image models"),
)
