"""Tiny image models: SD3, PixArt, Flux, Chroma."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_base
import comfy.supported_models as models

from tiny.case import Case, Extras, from_config, image_and_text

TEXT = (8, 32)


def _sd3(**extra: Any) -> comfy.model_base.BaseModel:
    config: dict[str, Any] = {
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "depth": 1,  # the width in units of 64, and the number of heads
        "num_blocks": 8,
        "input_size": None,
        "adm_in_channels": 16,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 64}},
        "num_patches": 64,
        "pos_embed_max_size": 8,
        "x_block_self_attn_layers": [],
    }
    return from_config(models.SD3, config | extra)


def _pixart(config: type[models.PixArtAlpha], micro_condition: bool) -> comfy.model_base.BaseModel:
    size = {"patch_size": 2, "in_channels": 4, "hidden_size": 48, "depth": 8, "num_heads": 2}
    text = {"caption_channels": TEXT[1], "model_max_length": TEXT[0]}
    return from_config(config, {**size, **text, "micro_condition": micro_condition})


def _flux(config: type[models.Flux]) -> comfy.model_base.BaseModel:
    size = {"hidden_size": 64, "num_heads": 2, "mlp_ratio": 2.0, "depth": 3, "depth_single_blocks": 5}
    ports = {"in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 16, "context_in_dim": TEXT[1]}
    rest = {"axes_dim": [8, 12, 12], "theta": 10000, "qkv_bias": True, "txt_ids_dims": []}
    return from_config(config, {**size, **ports, **rest})


def _chroma() -> comfy.model_base.BaseModel:
    size = {"hidden_size": 64, "num_heads": 2, "mlp_ratio": 2.0, "depth": 3, "depth_single_blocks": 5}
    ports = {"in_channels": 64, "out_channels": 64, "patch_size": 2, "vec_in_dim": 16, "context_in_dim": TEXT[1]}
    rest = {"axes_dim": [8, 12, 12], "theta": 10000, "qkv_bias": True, "txt_ids_dims": []}
    # 64 inputs are fixed in the host (chroma/model.py: 16 + 16 + 32), and so are 344 modulation tokens
    modulation = {"in_dim": 64, "out_dim": 64, "hidden_dim": 16, "n_layers": 1}
    return from_config(models.Chroma, {**size, **ports, **rest, **modulation})


def _sd3_case(name: str, **extra: Any) -> Case:
    return Case(
        name=name,
        family="sd3",
        make=lambda: _sd3(**extra),
        latent_shape=(16, 8, 8),
        patch=(2, 2),
        lists=("joint_blocks",),
        depth=8,
        width=64,
        text=TEXT,
        extras=lambda draw, batch: {"pooled_output": draw("pooled", 1, 16)},
        control=("output",),
        entering=lambda args, kwargs: (args[0], args[1]),  # (context, x)
    )


def _pixart_case(name: str, config: type[models.PixArtAlpha], micro_condition: bool) -> Case:
    # The mean of height and width must be over 32: below, pixartms.py (v0.30.0) divides by a base size of zero.
    return Case(
        name=name,
        family="pixart",
        make=lambda: _pixart(config, micro_condition),
        latent_shape=(4, 6, 60),
        patch=(2, 2),
        lists=("blocks",),
        depth=8,
        width=48,
        text=TEXT,
        input_gain=0.03,
    )


def _flux_case(
    name: str,
    make: Callable[[], comfy.model_base.BaseModel],
    extras: Extras = lambda draw, batch: {},
    family: str = "flux",
) -> Case:
    return Case(
        name=name,
        family=family,
        make=make,
        latent_shape=(16, 8, 12),
        patch=(2, 2),
        lists=("double_blocks", "single_blocks"),
        depth=8,
        width=64,
        text=TEXT,
        extras=extras,
        control=("input", "output"),
        entering=image_and_text,
    )


CASES = [
    _sd3_case("sd3"),
    _sd3_case("sd35", qk_norm="rms", x_block_self_attn_layers=[0, 1, 2]),
    _pixart_case("pixart_alpha", models.PixArtAlpha, True),
    _pixart_case("pixart_sigma", models.PixArtSigma, False),
    _flux_case(
        "flux",
        lambda: _flux(models.FluxSchnell),
        lambda draw, batch: {"pooled_output": draw("pooled", 1, 16)},
    ),
    _flux_case(
        "flux_guidance",
        lambda: _flux(models.Flux),
        lambda draw, batch: {"pooled_output": draw("pooled", 1, 16), "guidance": 3.5},
    ),
    _flux_case(  # reference tokens behind the image tokens; control residuals cover the latter only
        "flux_kontext",
        lambda: _flux(models.Flux),
        lambda draw, batch: {
            "pooled_output": draw("pooled", 1, 16),
            "guidance": 2.5,
            "reference_latents": [draw("reference", 1, 16, 8, 8)],
        },
    ),
    _flux_case("chroma", _chroma, lambda draw, batch: {"pooled_output": None}, family="chroma"),  # older hosts ask for it
]
