"""HunyuanVideo 1.0 and 1.5, SkyReels and HunyuanImage 2.1 (host: comfy/ldm/hunyuan_video/model.py, v0.30.0)."""

from blockdance_core.families._common import DOUBLE_THEN_SINGLE, VIDEO
from blockdance_core.families._record import Family

FAMILY = Family(
    name="HunyuanVideo",
    classes=("HunyuanVideo",),
    depths=(("HunyuanVideo, SkyReels", 60), ("1.5", 54)),
    sections=DOUBLE_THEN_SINGLE,
    defaults=VIDEO,
)
