"""TripoSplat, image to Gaussian splats (host: comfy/ldm/triposplat/model.py, v0.30.0)."""

from blockdance_core.config import Defaults
from blockdance_core.families._common import HIDDEN
from blockdance_core.families._record import Family, Section

FAMILY = Family(
    name="TripoSplat",
    classes=("LatentSeqMMFlowModel",),
    depths=(("TripoSplat", 24),),
    sections=(Section("blocks", HIDDEN),),
    defaults=Defaults(source="by analogy with the published image models; no 3D model was published"),
)
