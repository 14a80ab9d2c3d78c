"""ACE-Step (host: comfy/ldm/ace/model.py, v0.30.0)."""

from blockdance_core.config import Defaults
from blockdance_core.families._record import Family, Section
from blockdance_core.interception import Port

FAMILY = Family(
    name="ACE-Step",
    classes=("ACEStepTransformer2DModel",),
    depths=(("ACE-Step", 24),),
    sections=(Section("transformer_blocks", (Port("hidden_states", 0),)),),
    defaults=Defaults(source="by analogy with the published image models; no published run on music"),
)
