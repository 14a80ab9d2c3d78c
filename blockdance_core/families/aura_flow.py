"""AuraFlow (host: comfy/ldm/aura/mmdit.py, v0.30.0)."""

import torch

from blockdance_core.config import Defaults
from blockdance_core.families._record import Family, Section
from blockdance_core.interception import Feature, Port


def _text_before_image(feature: Feature) -> Feature:
    return (torch.cat([part for part in feature if part is not None], 1),)


FAMILY = Family(
    name="AuraFlow",
    classes=("MMDiT",),
    depths=(("AuraFlow", 36),),
    sections=(
        Section("double_layers", (Port("c", 0), Port("x", 1)), hook="double_block"),
        Section("single_layers", (Port("cx", 0),), hook="single_block", join=_text_before_image),
    ),
    defaults=Defaults(source="by analogy with the published image models; two streams, then one, like Flux"),
)
