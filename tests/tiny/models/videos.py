"""Tiny video models: Wan 2.1 and 2.2, HunyuanVideo, LTXV. Three latent frames each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.clip_vision
import comfy.model_base
import comfy.supported_models as models
import torch
from torch import Tensor

from tiny.case import Case, Extras, from_config, image_and_text

TEXT = (8, 32)
CLIP_TOKENS = 5  # 257 in a real CLIP vision output; the width of 1280 is fixed in the host (wan/model.py, MLPProj)


def _wan(config: type[models.WAN21_T2V], **extra: Any) -> comfy.model_base.BaseModel:
    size = {"dim": 48, "ffn_dim": 96, "num_heads": 2, "num_layers": 8, "freq_dim": 32, "text_dim": TEXT[1]}
    return from_config(config, {**size, "in_dim": 16, "out_dim": 16, **extra})


def _hunyuan_video(config: type[models.HunyuanVideo], **extra: Any) -> comfy.model_base.BaseModel:
    size = {"hidden_size": 64, "num_heads": 2, "mlp_ratio": 2.0, "depth": 3, "depth_single_blocks": 5}
    ports = {"in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "vec_in_dim": 16}
    rest = {"context_in_dim": TEXT[1], "axes_dim": [8, 12, 12], "theta": 256, "qkv_bias": True, "guidance_embed": True}
    absent = {"byt5": False, "meanflow": False, "use_cond_type_embedding": False}
    vision = {"vision_in_dim": None, "meanflow_sum": False}
    return from_config(config, {**size, **ports, **rest, **absent, **vision, **extra})


def _ltxv() -> comfy.model_base.BaseModel:
    size = {"num_attention_heads": 2, "attention_head_dim": 32, "cross_attention_dim": 64, "num_layers": 8}
    return from_config(models.LTXV, {**size, "in_channels": 128, "caption_channels": TEXT[1]})


def _image(draw: Callable[..., Tensor], batch: int, clip: bool) -> dict[str, Any]:
    """What the node WanImageToVideo adds: the encoded first frame, its mask, and CLIP's view of it."""
    image = draw("image", 1, 16, 3, 6, 6)
    entries: dict[str, Any] = {"concat_latent_image": image, "concat_mask": _first_frame_kept(1)}
    if clip:
        clip_states = draw("clip", 1, CLIP_TOKENS, 1280)
        entries["clip_vision_output"] = _clip_vision("penultimate_hidden_states", clip_states)
    return entries


def _clip_vision(key: str, states: Tensor) -> comfy.clip_vision.Output:
    output = comfy.clip_vision.Output()
    output[key] = states
    return output


def _first_frame_kept(batch: int) -> Tensor:
    """A mask that is zero on the first frame; as denoise mask of Wan 2.2 5B, it gives each frame its own timestep."""
    mask = torch.ones(batch, 1, 3, 6, 6)
    mask[:, :, 0] = 0
    return mask


def _modulates_a_batch() -> bool:
    """Whether the host can modulate the tokens of one frame apart in more than one sample (v0.16.3 cannot)."""
    from comfy.ldm.flux.layers import apply_mod

    try:
        apply_mod(torch.ones(2, 3, 4), torch.ones(2, 2, 4), None, [(0, 1, 0), (1, None, 1)])
    except RuntimeError:
        return False
    return True


def _wan_case(
    name: str,
    make: Callable[[], comfy.model_base.BaseModel],
    extras: Extras = lambda draw, batch: {},
    channels: int = 16,
    noise_mask: Callable[[int], Tensor] | None = None,
) -> Case:
    return Case(
        name=name,
        family="wan",
        make=make,
        latent_shape=(channels, 3, 6, 6),
        patch=(1, 2, 2),
        lists=("blocks",),
        depth=8,
        width=48,
        text=TEXT,
        extras=extras,
        noise_mask=noise_mask,
    )


def _hunyuan_case(
    name: str, make: Callable[[], comfy.model_base.BaseModel], extras: Extras, channels: int = 16, **rest: Any
) -> Case:
    return Case(
        name=name,
        family="hunyuan_video",
        make=make,
        latent_shape=(channels, 3, 6, 6),
        patch=(1, 2, 2),
        lists=("double_blocks", "single_blocks"),
        depth=8,
        width=64,
        text=TEXT,
        extras=extras,
        control=("input", "output"),
        entering=image_and_text,
        **rest,
    )


CASES = [
    _wan_case("wan_t2v", lambda: _wan(models.WAN21_T2V)),
    _wan_case(
        "wan_i2v",
        lambda: _wan(models.WAN21_I2V, in_dim=36),
        lambda draw, batch: _image(draw, batch, clip=True),
    ),
    _wan_case(  # the 14B image-to-video models of Wan 2.2 have no CLIP branch and are detected as t2v
        "wan22_i2v",
        lambda: _wan(models.WAN21_T2V, in_dim=36),
        lambda draw, batch: _image(draw, batch, clip=False),
    ),
    _wan_case(
        "wan22_ti2v",
        lambda: _wan(models.WAN22_T2V, in_dim=48, out_dim=48),
        channels=48,
        noise_mask=_first_frame_kept,
    ),
    _wan_case(  # two contexts: the second shows whether a skipped block 0 handed out its own input
        "wan_vace",
        lambda: _wan(models.WAN21_Vace, vace_layers=4, vace_in_dim=96),
        lambda draw, batch: {
            "vace_frames": [draw(f"frames {i}", 1, 32, 3, 6, 6) for i in range(2)],
            "vace_mask": [draw(f"mask {i}", 1, 64, 3, 6, 6) for i in range(2)],
            "vace_strength": [1.0, 0.7],
        },
    ),
    _hunyuan_case(
        "hunyuan_video",
        lambda: _hunyuan_video(models.HunyuanVideo),
        lambda draw, batch: {"pooled_output": draw("pooled", 1, 16), "guidance": 6.0},
    ),
    _hunyuan_case(
        # "v2 (replace)": other modulation for the tokens of the first frame. No guidance embedding: with one, the
        # host (v0.30.0, hunyuan_video/model.py:349) adds [B, D] to [B, 2, D], which only works for B up to 2.
        "hunyuan_video_i2v",
        lambda: _hunyuan_video(models.HunyuanVideoI2V, in_channels=33, guidance_embed=False),
        lambda draw, batch: {
            "pooled_output": draw("pooled", 1, 16),
            "guiding_frame_index": 0,
            "concat_latent_image": draw("image", 1, 16, 3, 6, 6),
            "concat_mask": _first_frame_kept(1),
        },
        fits=_modulates_a_batch,
    ),
    _hunyuan_case(  # double blocks only
        "hunyuan_video_15",
        lambda: _hunyuan_video(
            models.HunyuanVideo15,
            in_channels=65,
            out_channels=32,
            depth=8,
            depth_single_blocks=0,
            vec_in_dim=None,
            vision_in_dim=1152,
            use_cond_type_embedding=True,
            meanflow_sum=True,
            guidance_embed=False,
        ),
        lambda draw, batch: {
            "pooled_output": None,
            "clip_vision_output": _clip_vision("last_hidden_state", draw("clip", 1, CLIP_TOKENS, 1152)),
            "concat_latent_image": draw("image", 1, 32, 3, 6, 6),
            "concat_mask": _first_frame_kept(1),
        },
        channels=32,
    ),
    Case(
        name="ltxv",
        family="ltxv",
        make=_ltxv,
        latent_shape=(128, 3, 4, 4),
        patch=(1, 1, 1),
        lists=("transformer_blocks",),
        depth=8,
        width=64,
        text=TEXT,
        extras=lambda draw, batch: {"attention_mask": torch.tensor([[1] * 5 + [0] * 3]), "frame_rate": 25},
    ),
]
