"""LTX-Video (host: comfy/ldm/lightricks/model.py, v0.30.0)."""

from blockdance_core.families._common import HIDDEN, VIDEO
from blockdance_core.families._record import Family, Section

FAMILY = Family(
    name="LTXV",
    classes=("LTXVModel",),
    depths=(("2B", 28), ("13B", 48)),
    sections=(Section("transformer_blocks", HIDDEN, hook="double_block"),),
    defaults=VIDEO,
)
