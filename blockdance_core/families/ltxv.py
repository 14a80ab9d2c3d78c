"""LTX-Video (host: comfy/ldm/lightricks/model.py, v0.30.0)."""

from blockdance_core.config import Defaults
from blockdance_core.families._common import HIDDEN
from blockdance_core.families._record import Family, Section

FAMILY = Family(
    name="LTXV",
    classes=("LTXVModel",),
    depths=(("2B", 28), ("13B", 48)),
    sections=(Section("transformer_blocks", HIDDEN, hook="double_block"),),
    defaults=Defaults(paper_window=(0.25, 0.95), source="window by analogy with the published video model"),
)
