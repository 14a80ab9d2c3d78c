"""LTX-Video 2, video with sound (host: comfy/ldm/lightricks/av_model.py, v0.30.0)."""

from blockdance_core.config import Defaults
from blockdance_core.families._record import Family, Section
from blockdance_core.interception import Port

FAMILY = Family(
    name="LTX-2",
    classes=("LTXAVModel",),
    depths=(("LTX-2", 48),),
    sections=(Section("transformer_blocks", (Port("x", 0, 0), Port("x", 0, 1)), hook="double_block"),),
    defaults=Defaults(paper_window=(0.25, 0.95), source="window by analogy with the published video model"),
)
