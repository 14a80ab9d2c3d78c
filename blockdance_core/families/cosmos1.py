"""Cosmos 1, text- and image-to-video (host: comfy/ldm/cosmos/model.py, v0.30.0): tokens are [T, H, W, B, D]."""

from blockdance_core.families._common import HIDDEN, VIDEO
from blockdance_core.families._record import Family, Section

FAMILY = Family(
    name="Cosmos 1",
    classes=("GeneralDIT",),
    depths=(("7B", 28), ("14B", 36)),
    sections=(Section("blocks", HIDDEN, batch_dim=3),),
    defaults=VIDEO,
)
