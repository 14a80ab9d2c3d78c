"""What each demo model is: the host's class and its configuration, the size of its pictures, and how its latents lie.

The host (``comfy``) is imported inside the functions, so this module can be imported without it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from . import autoencoder, scenes, text

_CHANNELS = autoencoder.LATENT_CHANNELS


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A demo model's form.

    Attributes:
        base: Name of the host's class in ``comfy.supported_models``.
        module: Module of the host's network class.
        cls: The network class.
        unet_config: Its arguments.
        objective: What it predicts: ``flow`` (noise - x0) or ``epsilon`` (noise).
        sampling_settings: The host's schedule.
        sampling: Sampler, scheduler, guidance and steps of its card and of all figures.
        size: Side of its pictures in pixels.
        moving: Whether it makes clips.
        shuffle: Side of the square of pixels among which a latent's channels are spread.
    """

    base: str
    module: str
    cls: str
    unet_config: dict[str, Any]
    objective: str
    sampling_settings: dict[str, Any]
    sampling: dict[str, Any]
    size: int = 64
    moving: bool = False
    shuffle: int = 1

    @property
    def frames(self) -> int:
        """Frames of what it makes: 1 for pictures."""
        return scenes.FRAMES if self.moving else 1

    def network(self) -> Any:
        """The host's network class."""
        import importlib

        return getattr(importlib.import_module(self.module), self.cls)

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return _CHANNELS // self.shuffle**2

    @property
    def downscale(self) -> int:
        """Pixels of a picture to one of its latent."""
        return autoencoder.DOWNSCALE // self.shuffle

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent: ``(C, H, W)``, for clips ``(C, F, H, W)``."""
        side = self.size // self.downscale
        return (self.channels, *([self.frames] if self.moving else []), side, side)

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents of frames ``[B, F, 8, h, w]`` as the model takes them: ``[B, C, F, h, w]``, or ``[B, C, H, W]`` of one."""
        if self.moving:
            return latents.transpose(1, 2)
        return torch.nn.functional.pixel_shuffle(latents[:, 0], self.shuffle)

    def unpack(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of ``pack``."""
        if self.moving:
            return latents.transpose(1, 2)
        return torch.nn.functional.pixel_unshuffle(latents, self.shuffle)[:, None]


ARCHITECTURES = {
    "sd3-mini": Architecture(
        base="SD3",
        module="comfy.ldm.modules.diffusionmodules.mmdit",
        cls="OpenAISignatureMMDITWrapper",
        unet_config={
            "in_channels": _CHANNELS,
            "patch_size": 2,
            "input_size": None,
            "depth": 2,  # the host's width is 64 * depth
            "num_blocks": 16,
            "adm_in_channels": text.WIDTH,
            "context_size": text.WIDTH,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": text.WIDTH, "out_features": 128},
            },
            "qk_norm": "rms",
            "pos_embed_scaling_factor": None,
        },
        objective="flow",
        sampling_settings={"shift": 1.0},
        sampling={"sampler": "euler", "scheduler": "simple", "cfg": 4.5, "steps": 30},
    ),
    # This class counts places in units of 64 latent pixels, and 32 round to none of them: so its pictures are a little
    # larger, and the channels of a latent are spread over squares of two by two.
    "pixart-mini": Architecture(
        base="PixArtAlpha",
        module="comfy.ldm.pixart.pixartms",
        cls="PixArtMS",
        unet_config={
            "in_channels": _CHANNELS // 4,
            "patch_size": 4,
            "hidden_size": 96,
            "depth": 28,
            "num_heads": 2,
            "caption_channels": text.WIDTH,
            "model_max_length": scenes.PHRASES,
            "pred_sigma": False,
            "micro_condition": False,
            "qk_norm": True,
        },
        objective="epsilon",
        sampling_settings={"beta_schedule": "sqrt_linear", "linear_start": 0.0001, "linear_end": 0.02, "timesteps": 1000},
        sampling={"sampler": "ddim", "scheduler": "normal", "cfg": 4.5, "steps": 30},
        size=72,
        shuffle=2,
    ),
    "wan-mini": Architecture(
        base="WAN21_T2V",
        module="comfy.ldm.wan.model",
        cls="WanModel",
        unet_config={
            "model_type": "t2v",
            "patch_size": [3, 2, 2],
            "text_len": scenes.PHRASES,
            "in_dim": _CHANNELS,
            "out_dim": _CHANNELS,
            "dim": 160,
            "ffn_dim": 480,
            "freq_dim": 160,
            "text_dim": text.WIDTH,
            "num_heads": 4,
            "num_layers": 16,
        },
        objective="flow",
        sampling_settings={"shift": 3.0},
        # Not uni_pc, the choice of many: at this guidance it throws some clips to and fro between neighbouring steps.
        sampling={"sampler": "euler", "scheduler": "simple", "cfg": 4.5, "steps": 30},
        moving=True,
    ),
}
