"""Mochi 1 (host: comfy/ldm/genmo/joint_model/asymm_models_joint.py, v0.30.0)."""

from blockdance_core.families._common import VIDEO
from blockdance_core.families._record import Family, Section
from blockdance_core.interception import Port

FAMILY = Family(
    name="Mochi",
    classes=("AsymmDiTJoint",),
    depths=(("Mochi 1", 48),),
    sections=(Section("blocks", (Port("x", 0), Port("y", 2)), hook="double_block"),),
    defaults=VIDEO,
)
