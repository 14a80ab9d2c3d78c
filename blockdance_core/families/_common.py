"""What several families declare alike."""

from __future__ import annotations

import torch

from blockdance_core.families._record import Section
from blockdance_core.interception import Feature, Port

HIDDEN = (Port("x", 0),)
"""A block that receives and returns one tensor of tokens."""


def text_before_image(feature: Feature) -> Feature:
    """(image, text) of the double blocks -> the (text, image) sequence of the single blocks, along tokens."""
    image, text = feature
    if image is None or text is None:
        return (image if text is None else text,)
    return (torch.cat((text, image), 1),)


DOUBLE_THEN_SINGLE = (
    Section("double_blocks", (Port("img", 0), Port("txt", 1)), hook="double_block"),
    Section("single_blocks", HIDDEN, hook="single_block", join=text_before_image),
)
"""Flux and its relatives: two streams first, one joined stream after."""
