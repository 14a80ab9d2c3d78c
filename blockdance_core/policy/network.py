"""The decision network of an adaptive policy: from what a run knows at one step to what its remaining steps do.

Source: BlockDance-Ada, Zhang et al., arXiv 2503.15927.

Latents of any shape are read as a coarse grid of cells, texts of any length as tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from blockdance_core.config import ConfigError

GRID = (4, 8, 8)
"""At most so many cells along time, height and width; each says mean and spread of its part of the latent."""
_WAVES = 4
_LEAST = 1e-4
_MOST = {"channels": 4096, "text_width": 65536, "outputs": 65536, "maps": 3, "width": 4096, "depth": 64, "heads": 64}


class Sight(NamedTuple):
    """What the network looks at.

    Attributes:
        latent: The latent at the step of the decision [B, C, ...].
        denoised: The sampler's estimate of the clean latent at the evaluation before, same shape.
        change: How that differs from the estimate before it.
        text: Text embedding [B, T, D]; None where the model takes no text.
    """

    latent: Tensor
    denoised: Tensor
    change: Tensor
    text: Tensor | None


@dataclasses.dataclass(frozen=True)
class NetworkShape:
    """Size of a decision network.

    Attributes:
        channels: C of the latent.
        text_width: D of the text embedding, 0 for none.
        outputs: Number of logits.
        maps: 3 looks at latent, estimate and its change; 1 at the latent alone, as published.
        width: Width of its tokens.
        depth: Number of transformer blocks.
        heads: Number of attention heads.

    Raises:
        ConfigError: A value is out of its range.
    """

    channels: int
    text_width: int
    outputs: int
    maps: int = 3
    width: int = 64
    depth: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            value = getattr(self, name)
            least = 0 if name == "text_width" else 1
            if type(value) is not int or not least <= value <= most:
                raise ConfigError(f"{name} = {value!r} of the decision network must be a whole number, {least} to {most}")
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} of the decision network must be a multiple of its {self.heads} heads")

    @property
    def parameters(self) -> int:
        """Number of parameters, without making the network."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in DecisionNetwork(self).parameters())


class DecisionNetwork(nn.Module):
    """Transformer blocks over the cells of the latent and the tokens of the text, then an MLP.

    The last layer begins at zero, so that an untrained network says what its bias says.
    """

    def __init__(self, shape: NetworkShape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.width
        self.cells = nn.Linear(2 * shape.maps * shape.channels, width)
        self.place = nn.Linear(2 * _WAVES * len(GRID), width)
        wide = shape.text_width
        self.text = nn.Sequential(nn.LayerNorm(wide), nn.Linear(wide, width)) if wide else None
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, shape.heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True,
                                       norm_first=True)
            for _ in range(shape.depth)
        )
        self.norm = nn.LayerNorm(width)
        self.centre: Tensor
        self.spread: Tensor
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, shape.outputs)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, cells: Tensor, places: Tensor, text: Tensor | None) -> Tensor:
        """Logits [B, outputs].

        Args:
            cells: From `read`, [B, cells, 2 * maps * C].
            places: From `read`, [cells, 3].
            text: [B, T, D], or None.
        """
        pooled = (self._pooled(cells, places, text) - self.centre) / self.spread
        logits: Tensor = self.out(nn.functional.gelu(self.hidden(pooled)))
        return logits

    def _pooled(self, cells: Tensor, places: Tensor, text: Tensor | None) -> Tensor:
        waves = places[:, :, None] * (2 ** torch.arange(_WAVES, device=places.device)) * torch.pi
        tokens = self.cells(cells) + self.place(torch.cat([waves.sin(), waves.cos()], 2).flatten(1))
        if self.text is not None:
            assert text is not None
            tokens = torch.cat([tokens, self.text(text)], 1)
        for block in self.blocks:
            tokens = block(tokens)
        pooled: Tensor = self.norm(tokens).mean(1)
        return pooled

    @torch.no_grad()
    def settle(self, pictures: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> None:
        """Before it is taught: centre and scale what the blocks make of these pictures, given as `forward` takes them.

        All pictures are much alike to random blocks; the MLP shall see in what they differ.
        """
        pooled = torch.cat([self._pooled(*picture) for picture in pictures])
        self.centre.copy_(pooled.mean(0))
        if len(pooled) > 1:
            self.spread.copy_(pooled.std(0).clamp(min=_LEAST))

    def read(self, sight: Sight) -> tuple[Tensor, Tensor, Tensor | None]:
        """The arguments of `forward`, float32: a few hundred numbers of each channel, however large the latent is.

        A latent on an Apple GPU, which has no such operation, is pooled on the CPU.

        Raises:
            ConfigError: Channels or text width are not those of the network.
        """
        text = sight.text if self.shape.text_width else None
        self.require(sight.latent.shape[1], None if text is None else text.shape[2])
        maps = (sight.latent, sight.denoised, sight.change)[: self.shape.maps]
        pooled_on = "cpu" if sight.latent.device.type == "mps" else sight.latent.device
        cells = torch.cat([_cells(one.to(pooled_on, torch.float32)) for one in maps], 2).to(sight.latent.device)
        return (cells, _places(sight.latent.shape[2:]).to(cells.device),
                None if text is None else text.to(cells.device, torch.float32))

    def require(self, channels: int, text_width: int | None) -> None:
        """Raise a `ConfigError` unless the network is for latents of so many channels and texts of this width."""
        if channels != self.shape.channels:
            raise ConfigError(f"it was trained on latents of {self.shape.channels} channels, this model has {channels}")
        if self.shape.text_width and text_width != self.shape.text_width:
            given = "this run has no text" if text_width is None else f"this run has {text_width}"
            raise ConfigError(f"it was trained on text embeddings of width {self.shape.text_width}, {given}")

    @torch.no_grad()
    def decide(self, sight: Sight) -> Tensor:
        """Logits [B, outputs] on the CPU, computed where the latent is; the network itself stays where it is."""
        device = sight.latent.device
        state = {name: value.detach().to(device) for name, value in self.state_dict().items()}
        logits: Tensor = torch.func.functional_call(self, state, self.read(sight))
        return logits.float().cpu()


def _grid(dims: tuple[int, ...]) -> tuple[int, int, int]:
    """Cells along each of the last three axes."""
    shape = (*[1] * (len(GRID) - len(dims)), *dims)
    time, height, width = (min(size, most) for size, most in zip(shape, GRID, strict=True))
    return time, height, width


def _three(dims: torch.Size) -> tuple[int, ...]:
    """The axes of a latent as at most three: those before the last two are one."""
    return (math.prod(dims[:-2]), *dims[-2:]) if len(dims) > len(GRID) else tuple(dims)


def _cells(latent: Tensor) -> Tensor:
    """Mean and logarithm of the standard deviation of every cell and channel: [B, cells, 2 C]."""
    dims = _three(latent.shape[2:])
    volume = latent.reshape(*latent.shape[:2], *[1] * (len(GRID) - len(dims)), *dims)
    mean, square = (nn.functional.adaptive_avg_pool3d(one, _grid(dims)) for one in (volume, volume.square()))
    spread = (square - mean.square()).clamp(min=0).sqrt()
    return torch.cat([mean, (spread + _LEAST).log()], 1).flatten(2).transpose(1, 2)


def _places(dims: torch.Size) -> Tensor:
    """Centre of every cell along time, height and width, shares 0..1: [cells, 3]."""
    axes = [(torch.arange(size) + 0.5) / size for size in _grid(_three(dims))]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
