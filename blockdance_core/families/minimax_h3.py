"""MiniMax H3, video with sound (host: comfy/ldm/minimax/model.py, v0.30.0).

One sequence of text, references, sound and video, without a dimension of samples: the model takes one sample a call.
"""

from blockdance_core.families._common import HIDDEN, VIDEO
from blockdance_core.families._record import Family, Section

FAMILY = Family(
    name="MiniMax H3",
    classes=("MiniMaxH3Model",),
    depths=(("MiniMax H3", 50),),
    sections=(Section("blocks", HIDDEN, hook="double_block", batch_dim=None),),
    defaults=VIDEO,
)
