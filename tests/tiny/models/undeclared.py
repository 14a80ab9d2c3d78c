"""A model nobody declared: a plain class-conditional DiT, as a third-party loader wraps one."""

from __future__ import annotations

from typing import Any, ClassVar

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.supported_models_base
import torch
from torch import Tensor, nn

from tiny.case import Case


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens `[B, N, D]`, condition `[B, D]`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        h = self.attn["qkv"](self.norm1(x) * (1 + scale1) + shift1)
        q, k, v = h.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate1 * self.attn["proj"](h)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class _FinalLayer(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class PlainDiT(nn.Module):
    """DiT-XL/2 in small: patchify, adaLN blocks, learned sigma that is dropped. No hook, no transformer_options."""

    def __init__(self, width: int = 48, depth: int = 8, heads: int = 2, patch: int = 2, side: int = 4) -> None:
        """Build for latents of `4 x (side * patch) x (side * patch)` and eight classes."""
        super().__init__()
        self.dtype = torch.float32
        self.patch, self.side = patch, side
        self.x_embedder = nn.Conv2d(4, width, patch, patch)
        self.t_embedder = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder = nn.Embedding(8, width)
        self.pos_embed = nn.Parameter(torch.empty(1, side * side, width))
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.final_layer = _FinalLayer(width, patch * patch * 8)

    def forward(self, x: Tensor, timesteps: Tensor, context: Any = None, y: Tensor | None = None, **_: Any) -> Tensor:
        """Predict the noise of latents `[B, 4, H, W]`."""
        phase = timesteps[:, None] * torch.exp(-torch.arange(16) / 16 * 9.21)
        c = self.t_embedder(torch.cat([phase.cos(), phase.sin()], dim=-1)) + self.y_embedder(y)
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c).unflatten(-1, (8, self.patch, self.patch)).unflatten(1, (self.side, self.side))
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)[:, :4]


class _Config(comfy.supported_models_base.BASE):
    unet_config: ClassVar[dict[str, Any]] = {"disable_unet_model_creation": True}
    unet_extra_config: ClassVar[dict[str, Any]] = {}
    latent_format = comfy.latent_formats.SD15


class _ThirdPartyModel(comfy.model_base.BaseModel):
    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        return {"y": comfy.conds.CONDRegular(kwargs["cross_attn"])}


def _make() -> comfy.model_base.BaseModel:
    model = _ThirdPartyModel(_Config(_Config.unet_config))
    model.diffusion_model = PlainDiT().requires_grad_(False).eval()
    return model


CASES = [
    Case(
        name="undeclared",
        family="undeclared",
        make=_make,
        latent_shape=(4, 8, 8),
        patch=(2, 2),
        lists=("blocks",),
        depth=8,
        width=48,
        text=None,
        input_gain=0.2,
    )
]
