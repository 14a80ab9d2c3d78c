"""LTX-Video 2, video with sound (host: comfy/ldm/lightricks/av_model.py, v0.30.0)."""

from blockdance_core.families._common import VIDEO
from blockdance_core.families._record import Family, Section
from blockdance_core.interception import Port

FAMILY = Family(
    name="LTX-2",
    classes=("LTXAVModel",),
    depths=(("LTX-2", 48),),
    sections=(Section("transformer_blocks", (Port("x", 0, 0), Port("x", 0, 1)), hook="double_block"),),
    defaults=VIDEO,
)
