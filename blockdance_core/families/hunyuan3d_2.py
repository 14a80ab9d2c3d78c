"""Hunyuan3D 2 and 2 mini (host: comfy/ldm/hunyuan3d/model.py, v0.30.0)."""

from blockdance_core.config import Defaults
from blockdance_core.families._common import DOUBLE_THEN_SINGLE
from blockdance_core.families._record import Family

FAMILY = Family(
    name="Hunyuan3D 2",
    classes=("Hunyuan3Dv2",),
    depths=(("2.0", 48), ("2.0 mini", 24)),
    sections=DOUBLE_THEN_SINGLE,
    defaults=Defaults(source="by analogy with the published image models; no published run on shapes"),
)
