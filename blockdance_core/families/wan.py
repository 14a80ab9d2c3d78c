"""Wan 2.1 and 2.2, text- and image-to-video, and their variants (host: comfy/ldm/wan/model.py, v0.30.0)."""

from blockdance_core.config import Defaults
from blockdance_core.families._common import HIDDEN
from blockdance_core.families._record import Family, Section

FAMILY = Family(
    name="Wan",
    classes=("WanModel",),
    sections=(Section("blocks", HIDDEN, hook="double_block"),),
    defaults=Defaults(paper_window=(0.25, 0.95), source="window by analogy with the published video model"),
    refused=(("CausalWanModel", "its blocks advance a key/value cache, so none of them may be skipped"),),
)
