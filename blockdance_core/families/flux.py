"""Flux, Flux 2 and LongCat-Image (host: comfy/ldm/flux/model.py, v0.30.0)."""

from blockdance_core.families._common import DOUBLE_THEN_SINGLE
from blockdance_core.families._record import Family

FAMILY = Family(
    name="Flux",
    classes=("Flux",),
    depths=(("Flux.1 dev, schnell, Fill, Kontext", 57), ("Flux.2 dev", 56)),
    sections=DOUBLE_THEN_SINGLE,
)
