"""Hunyuan3D 2.1 (host: comfy/ldm/hunyuan3dv2_1/hunyuandit.py, v0.30.0).

The model exchanges the halves of the conditionings of a call, so that its rows are not those the host names.
"""

from blockdance_core.config import Defaults
from blockdance_core.families._record import Family, Section
from blockdance_core.interception import Port

FAMILY = Family(
    name="Hunyuan3D 2.1",
    classes=("HunYuanDiTPlain",),
    depths=(("2.1", 21),),
    sections=(Section("blocks", (Port("hidden_states", 0),), hook="block", batch_dim=None, long_skips=True),),
    defaults=Defaults(source="by analogy with the published image models; no published run on shapes"),
)
