"""The demo's text encoder: a learned vector for each word and each place in the caption. Only torch is imported."""

from __future__ import annotations

import torch
from torch import nn

from . import scenes

WIDTH = 128


class TextEncoder(nn.Module):
    """Word embedding plus position embedding; the pooled vector is the mean over the places."""

    def __init__(self, words: int = len(scenes.VOCABULARY), places: int = scenes.TOKENS, width: int = WIDTH) -> None:
        super().__init__()
        self.word = nn.Embedding(words, width)
        self.place = nn.Parameter(torch.randn(places, width))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode token ids ``[B, T]`` into a context ``[B, T, width]`` and a pooled vector ``[B, width]``."""
        context = self.word(tokens) + self.place
        return context, context.mean(dim=1)
