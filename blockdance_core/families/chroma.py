"""Chroma and Chroma Radiance (host: comfy/ldm/chroma/ and chroma_radiance/model.py, v0.30.0)."""

from blockdance_core.families._common import DOUBLE_THEN_SINGLE
from blockdance_core.families._record import Family

FAMILY = Family(name="Chroma", classes=("Chroma",), sections=DOUBLE_THEN_SINGLE, depths=(("Chroma, Chroma Radiance", 57),))
