"""Kandinsky 5, video and image: one class (host: comfy/ldm/kandinsky5/model.py, v0.30.0)."""

from blockdance_core.families._common import VIDEO
from blockdance_core.families._record import Family, Section
from blockdance_core.interception import Port

FAMILY = Family(
    name="Kandinsky 5",
    classes=("Kandinsky5",),
    depths=(("2B video", 32), ("image", 50), ("19B video", 60)),
    sections=(Section("visual_transformer_blocks", (Port("visual_embed", 0),), hook="double_block"),),
    defaults=VIDEO,
)
