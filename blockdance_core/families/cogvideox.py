"""CogVideoX 1.0 and 1.5 (host: comfy/ldm/cogvideo/model.py, v0.30.0)."""

from blockdance_core.config import Defaults
from blockdance_core.families._record import Family, Section
from blockdance_core.interception import Port

FAMILY = Family(
    name="CogVideoX",
    classes=("CogVideoXTransformer3DModel",),
    depths=(("2B", 30), ("5B", 42)),
    sections=(Section("blocks", (Port("hidden_states", 0), Port("encoder_hidden_states", 1))),),
    defaults=Defaults(paper_window=(0.25, 0.95), source="window by analogy with the published video model"),
)
