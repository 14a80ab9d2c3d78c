"""Boogu-Image (host: comfy/ldm/boogu/model.py, v0.30.0). Its refiners stay: they run before and are few."""

from blockdance_core.config import Defaults
from blockdance_core.families._common import text_before_image
from blockdance_core.families._record import Family, Section
from blockdance_core.interception import Port

FAMILY = Family(
    name="Boogu",
    classes=("BooguTransformer2DModel",),
    depths=(("Boogu-Image", 40),),
    sections=(
        Section("double_stream_layers", (Port("img_hidden_states", 0), Port("instruct_hidden_states", 1))),
        Section("single_stream_layers", (Port("hidden_states", 0),), join=text_before_image),
    ),
    defaults=Defaults(source="by analogy with the published image models; two streams, then one, like Flux"),
)
