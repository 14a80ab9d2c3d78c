"""Stable Diffusion 3 and 3.5 (host: comfy/ldm/modules/diffusionmodules/mmdit.py, v0.30.0)."""

from blockdance_core.config import Defaults
from blockdance_core.families._record import Family, Section
from blockdance_core.interception import Port

FAMILY = Family(
    name="SD3",
    classes=("MMDiT",),
    depths=(("SD3 and SD3.5 medium", 24), ("SD3.5 large", 38)),
    sections=(Section("joint_blocks", (Port("context", 0), Port("x", 1)), hook="double_block"),),
    defaults=Defaults(source="by analogy; the published SD3 run states neither window nor boundary"),
)
