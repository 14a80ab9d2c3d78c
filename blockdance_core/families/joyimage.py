"""JoyImage (host: comfy/ldm/joyimage/model.py, v0.30.0); returns the image first, unlike its relatives."""

from blockdance_core.config import Defaults
from blockdance_core.families._record import Family, Section
from blockdance_core.interception import Port

FAMILY = Family(
    name="JoyImage",
    classes=("JoyImageTransformer3DModel",),
    sections=(
        Section("double_blocks", (Port("hidden_states", 0), Port("encoder_hidden_states", 1)), hook="double_block"),
    ),
    defaults=Defaults(source="by analogy with the published image models; two streams in every block, like SD3"),
)
