"""Mage-Flow (host: comfy/ldm/mage_flow/model.py, v0.30.0); its blocks are those of Qwen-Image."""

from blockdance_core.config import Defaults
from blockdance_core.families._common import TEXT_AND_IMAGE
from blockdance_core.families._record import Family, Section

FAMILY = Family(
    name="Mage-Flow",
    classes=("MageFlowTransformer2DModel",),
    depths=(("Mage-Flow", 12),),
    sections=(Section("transformer_blocks", TEXT_AND_IMAGE, hook="double_block"),),
    defaults=Defaults(source="by analogy with the published image models; two streams in every block, like SD3"),
)
