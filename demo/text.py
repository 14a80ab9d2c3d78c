"""The demo's text encoder: one vector for each phrase of a caption. Only torch is imported."""

from __future__ import annotations

import torch
from torch import nn

from . import scenes

WIDTH = 128


class TextEncoder(nn.Module):
    """The words of a phrase are embedded and added to a vector of its place, then mixed; the pooled vector is the mean."""

    def __init__(self, words: int = len(scenes.VOCABULARY), places: int = scenes.PHRASES, width: int = WIDTH) -> None:
        super().__init__()
        self.word = nn.Embedding(words, width, padding_idx=0)
        self.place = nn.Parameter(torch.randn(places, width))
        self.mix = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode word ids ``[B, P, A]`` into a context ``[B, P, width]`` and a pooled vector ``[B, width]``."""
        phrases = self.word(tokens).sum(2) + self.place
        context = phrases + self.mix(phrases)
        return context, context.mean(dim=1)
