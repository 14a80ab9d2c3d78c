"""Cosmos Predict2, image and video, and Anima (host: comfy/ldm/cosmos/predict2.py, comfy/ldm/anima/model.py, v0.30.0)."""

from blockdance_core.config import Defaults
from blockdance_core.families._record import Family, Section
from blockdance_core.interception import Port

FAMILY = Family(
    name="Cosmos Predict2 / Anima",
    classes=("MiniTrainDIT",),
    depths=(("Predict2 2B, Anima", 28), ("Predict2 14B", 36)),
    sections=(Section("blocks", (Port("x_B_T_H_W_D", 0),)),),
    defaults=Defaults(source="by analogy with the published image models: Anima and Predict2 mostly make images"),
)
