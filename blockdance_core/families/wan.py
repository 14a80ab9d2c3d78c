"""Wan 2.1 and 2.2 and their variants (host: comfy/ldm/wan/{model,model_animate,model_wandancer,ar_model}.py, v0.30.0).

What VACE, S2V, Animate, WanDancer and Uni3C add between the blocks is added by the model's own loop, behind skipped blocks too.
"""

from blockdance_core.families._common import HIDDEN, VIDEO
from blockdance_core.families._record import Family, Section

FAMILY = Family(
    name="Wan",
    classes=("WanModel",),
    depths=(("1.3B, 5B", 30), ("14B", 40)),
    sections=(Section("blocks", HIDDEN, hook="double_block"),),
    defaults=VIDEO,
    refused=(("CausalWanModel", "its blocks advance a key/value cache, so none of them may be skipped"),),
)
