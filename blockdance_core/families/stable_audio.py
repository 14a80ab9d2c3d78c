"""Stable Audio and Stable Audio 3 (host: comfy/ldm/audio/dit.py, v0.30.0)."""

from blockdance_core.config import Defaults
from blockdance_core.families._common import HIDDEN
from blockdance_core.families._record import Family, Section

FAMILY = Family(
    name="Stable Audio",
    classes=("AudioDiffusionTransformer",),
    depths=(("Open 1.0, 3", 24),),
    sections=(Section("transformer.layers", HIDDEN, hook="double_block"),),
    defaults=Defaults(source="by analogy with the published image models; no published run on sound"),
)
