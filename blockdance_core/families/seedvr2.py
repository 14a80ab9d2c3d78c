"""SeedVR2 (host: comfy/ldm/seedvr/model.py, v0.30.0).

The samples of a call lie one behind the other in one sequence, and the model exchanges the halves of its texts. The last
block leaves behind what the layer after the blocks needs, so it always runs.
"""

from blockdance_core.families._common import VIDEO
from blockdance_core.families._record import Family, Section
from blockdance_core.interception import Port

FAMILY = Family(
    name="SeedVR2",
    classes=("NaDiT",),
    depths=(("3B", 31), ("7B", 35)),
    sections=(
        Section(
            "blocks",
            (Port("vid", 0), Port("txt", 1)),
            hook="block",
            batch_dim=None,
            passed_on=(Port("vid_shape", 2), Port("txt_shape", 3)),
            live=1,
        ),
    ),
    defaults=VIDEO,
)
