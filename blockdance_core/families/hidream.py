"""HiDream-I1 and E1 (host: comfy/ldm/hidream/model.py, v0.30.0).

Each block gets text of its own from one layer of the language model, behind all else; the model cuts it off what the block
returns. So a feature ends in the text of the block it comes from, and that part is never read again.
"""

import torch

from blockdance_core.config import Defaults
from blockdance_core.families._record import Family, Section
from blockdance_core.interception import Feature, Port


def _image_before_text(feature: Feature) -> Feature:
    image, text = feature
    if image is None or text is None:
        return (text if image is None else image,)
    return (torch.cat((image, text), 1),)


FAMILY = Family(
    name="HiDream",
    classes=("HiDreamImageTransformer2DModel",),
    depths=(("HiDream-I1, E1", 48),),
    sections=(
        Section("double_stream_blocks", (Port("image_tokens", 0), Port("text_tokens", 2))),
        Section("single_stream_blocks", (Port("image_tokens", 0),), join=_image_before_text),
    ),
    defaults=Defaults(source="by analogy with the published image models; two streams, then one, like Flux"),
)
