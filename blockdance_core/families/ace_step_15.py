"""ACE-Step 1.5 (host: comfy/ldm/ace/ace_step15.py, v0.30.0)."""

from blockdance_core.config import Defaults
from blockdance_core.families._record import Family, Section
from blockdance_core.interception import Port

FAMILY = Family(
    name="ACE-Step 1.5",
    classes=("AceStepConditionGenerationModel",),
    depths=(("ACE-Step 1.5", 24),),
    sections=(Section("decoder.layers", (Port("hidden_states", 0),)),),
    defaults=Defaults(source="by analogy with the published image models; no published run on music"),
)
