"""Hunyuan-DiT (host: comfy/ldm/hydit/models.py, v0.30.0): U-shaped, with control residuals on the long skips."""

from blockdance_core.config import Defaults
from blockdance_core.families._common import HIDDEN
from blockdance_core.families._record import Family, Section

FAMILY = Family(
    name="Hunyuan-DiT",
    classes=("HunYuanDiT",),
    depths=(("Hunyuan-DiT 1.0 to 1.2", 40),),
    sections=(Section("blocks", HIDDEN, hook="double_block", long_skips=True),),
    defaults=Defaults(source="by analogy with the published image models, none of which has long skips"),
)
