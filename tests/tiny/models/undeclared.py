"""Models nobody declared: class-conditional DiTs as third-party loaders wrap them, one of them that of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
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
        x = self.final_layer(self.run(x, c), c).unflatten(-1, (8, self.patch, self.patch)).unflatten(1, (self.side, self.side))
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)[:, :4]

    def run(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens through the blocks."""
        for block in self.blocks:
            x = block(x, c)
        return x


class _Diffusers(nn.Module):
    """The DiT class of diffusers, one level down, as a loader of its checkpoints hands it to the host."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import DiTTransformer2DModel  # takes seconds to import

        self.dtype = torch.float32
        self.transformer = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=8, sample_size=8,
            patch_size=2, num_embeds_ada_norm=8,
        )

    def forward(self, x: Tensor, timesteps: Tensor, context: Any = None, y: Tensor | None = None, **_: Any) -> Tensor:
        return self.transformer(x, timestep=timesteps, class_labels=y).sample[:, :4]


class _InPlace(_Block):
    """A block that writes into its input and returns it, is called by keyword, and takes the condition first."""

    def forward(self, hidden: Tensor, c: Tensor) -> Tensor:  # type: ignore[override]
        hidden += super().forward(hidden, c) - hidden
        return hidden


class DictDiT(PlainDiT):
    """Its blocks are in a dict, deeper down, beside two small refiners of another class."""

    def __init__(self) -> None:
        """Build as its base class."""
        super().__init__()
        self.refiners = nn.ModuleList(nn.Linear(48, 48) for _ in range(4))
        self.core = nn.Module()
        self.core.stages = nn.ModuleDict({f"stage{index}": _InPlace(48, 2) for index in range(8)})
        del self.blocks

    def run(self, x: Tensor, c: Tensor) -> Tensor:
        for refiner in self.refiners:
            x = x + refiner(x)
        for stage in self.core.stages.values():
            x = stage(c=c, hidden=x)
        return x


class _Alone(_Block):
    """A block that gets the condition from elsewhere, so that it can stand in a Sequential."""

    def __init__(self, elsewhere: SimpleNamespace) -> None:
        super().__init__(48, 2)
        self.elsewhere = elsewhere

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, self.elsewhere.c)


class SequentialDiT(PlainDiT):
    """Its blocks are one Sequential, called once."""

    def __init__(self) -> None:
        """Build as its base class."""
        super().__init__()
        self.elsewhere = SimpleNamespace(c=None)
        self.blocks = nn.Sequential(*(_Alone(self.elsewhere) for _ in range(8)))

    def run(self, x: Tensor, c: Tensor) -> Tensor:
        self.elsewhere.c = c
        return self.blocks(x)


class _Config(comfy.supported_models_base.BASE):
    unet_config: ClassVar[dict[str, Any]] = {"disable_unet_model_creation": True}
    unet_extra_config: ClassVar[dict[str, Any]] = {}
    latent_format = comfy.latent_formats.SD15


class _ThirdPartyModel(comfy.model_base.BaseModel):
    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        return {"y": comfy.conds.CONDRegular(kwargs["cross_attn"])}


def _make(model: Callable[[], nn.Module]) -> comfy.model_base.BaseModel:
    base = _ThirdPartyModel(_Config(_Config.unet_config))
    base.diffusion_model = model().requires_grad_(False).eval()
    return base


def _case(name: str, model: Callable[[], nn.Module], blocks: str, **more: Any) -> Case:
    return Case(
        name=name,
        family="undeclared",
        make=lambda: _make(model),
        latent_shape=(4, 8, 8),
        patch=(2, 2),
        lists=(blocks,),
        depth=8,
        width=48,
        text=None,
        **more,
    )


CASES = [
    _case("undeclared", PlainDiT, "blocks", input_gain=0.2),
    _case("undeclared_diffusers", _Diffusers, "transformer.transformer_blocks"),
    _case("undeclared_dict", DictDiT, "core.stages", input_gain=0.2, entering=lambda args, kwargs: (kwargs["hidden"],)),
    _case("undeclared_sequential", SequentialDiT, "blocks", input_gain=0.2),
]
