"""What several families declare alike."""

from __future__ import annotations

import torch

from blockdance_core.config import Defaults
from blockdance_core.families._record import Section
from blockdance_core.interception import Feature, Port

HIDDEN = (Port("x", 0),)
"""A block that receives and returns one tensor of tokens."""

TEXT_AND_IMAGE = (Port("encoder_hidden_states", 1), Port("hidden_states", 0))
"""A block that receives image and text, and returns the text first: Qwen-Image and its relatives."""

VIDEO = Defaults(paper_window=(0.25, 0.95), source="window by analogy with the published video model")


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
