"""The demo's tiny convolutional autoencoder: 64x64x3 pictures to 16x16x8 latents. Only torch is imported."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

DOWNSCALE = 4
LATENT_CHANNELS = 8


class Residual(nn.Module):
    """Two 3x3 convolutions around a skip; the second starts at zero, so no normalisation is needed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, C, H, W]`` to the same shape."""
        return x + self.conv2(nn.functional.silu(self.conv1(nn.functional.silu(x))))


class Autoencoder(nn.Module):
    """Space-to-depth encoder and decoder of residual blocks.

    Pictures are ``[B, 3, H, W]`` in -1..1 with H and W multiples of 4, latents ``[B, 8, H/4, W/4]`` with mean 0 and
    variance 1 in every channel.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(LATENT_CHANNELS))  # of what the encoder gives, before normalisation
        self.register_buffer("std", torch.ones(LATENT_CHANNELS))
        wide, narrow = 64, 32
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(DOWNSCALE),
            nn.Conv2d(3 * DOWNSCALE**2, wide, 3, padding=1),
            Residual(wide),
            nn.Conv2d(wide, LATENT_CHANNELS, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(LATENT_CHANNELS, wide, 3, padding=1),
            Residual(wide),
            Residual(wide),
            nn.Conv2d(wide, 4 * narrow, 3, padding=1),
            nn.PixelShuffle(2),
            Residual(narrow),
            Residual(narrow),
            nn.Conv2d(narrow, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def fingerprint(self) -> str:
        """Names the latent space: a hash of everything that encodes, in bfloat16 as the files have it. Decoders may differ."""
        digest = hashlib.sha256()
        for part in (*self.encoder.state_dict().values(), self.mean, self.std):
            digest.update(part.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Pictures ``[B, 3, H, W]`` in -1..1 to latents ``[B, 8, H/4, W/4]``."""
        return (self.encoder(x) - self.mean[:, None, None]) / self.std[:, None, None]

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents to pictures, which may leave -1..1 a little."""
        return self.decoder(z * self.std[:, None, None] + self.mean[:, None, None])
