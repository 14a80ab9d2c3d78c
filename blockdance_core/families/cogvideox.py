"""CogVideoX 1.0 and 1.5 (host: comfy/ldm/cogvideo/model.py, v0.30.0)."""

from blockdance_core.families._common import VIDEO
from blockdance_core.families._record import Family, Section
from blockdance_core.interception import Port

FAMILY = Family(
    name="CogVideoX",
    classes=("CogVideoXTransformer3DModel",),
    depths=(("2B", 30), ("5B", 42)),
    sections=(Section("blocks", (Port("hidden_states", 0), Port("encoder_hidden_states", 1))),),
    defaults=VIDEO,
)
