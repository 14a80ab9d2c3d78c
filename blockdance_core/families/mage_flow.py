"""Mage-Flow (host: comfy/ldm/mage_flow/model.py, v0.30.0); its blocks are those of Qwen-Image."""

from blockdance_core.config import Defaults
from blockdance_core.families._record import Family, Section
from blockdance_core.interception import Port

FAMILY = Family(
    name="Mage-Flow",
    classes=("MageFlowTransformer2DModel",),
    depths=(("Mage-Flow", 12),),
    sections=(
        Section(
            "transformer_blocks", (Port("encoder_hidden_states", 1), Port("hidden_states", 0)), hook="double_block"
        ),
    ),
    defaults=Defaults(source="by analogy with the published image models; two streams in every block, like SD3"),
)
