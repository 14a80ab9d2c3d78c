"""OmniGen2 (host: comfy/ldm/omnigen/omnigen2.py, v0.30.0)."""

from blockdance_core.config import Defaults
from blockdance_core.families._record import Family, Section
from blockdance_core.interception import Port

FAMILY = Family(
    name="OmniGen2",
    classes=("OmniGen2Transformer2DModel",),
    depths=(("OmniGen2", 32),),
    sections=(Section("layers", (Port("hidden_states", 0),)),),
    defaults=Defaults(source="by analogy with the published image models"),
)
