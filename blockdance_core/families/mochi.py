"""Mochi 1 (host: comfy/ldm/genmo/joint_model/asymm_models_joint.py, v0.30.0)."""

from blockdance_core.config import Defaults
from blockdance_core.families._record import Family, Section
from blockdance_core.interception import Port

FAMILY = Family(
    name="Mochi",
    classes=("AsymmDiTJoint",),
    depths=(("Mochi 1", 48),),
    sections=(Section("blocks", (Port("x", 0), Port("y", 2)), hook="double_block"),),
    defaults=Defaults(paper_window=(0.25, 0.95), source="window by analogy with the published video model"),
)
