"""Tiny models whose blocks carry one sequence: Lumina 2, Z-Image, OmniGen2, Krea 2, ERNIE-Image, Ideogram 4, Cosmos,
Anima, TripoSplat, Hunyuan-DiT; and PixelDiT with its (image, text) pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_base
import comfy.supported_models as models
import torch
from torch import Tensor

from tiny.case import Case, Extras, from_config

TEXT = (8, 32)
ODD_TEXT = (9, 32)
"""For models whose texts the host repeats to a common length, as it would eight and six tokens, but not nine and seven."""


def _lumina(config: str, **extra: Any) -> comfy.model_base.BaseModel:
    size = {"n_layers": 8, "n_refiner_layers": 1, "multiple_of": 32, "norm_eps": 1e-5, "qk_norm": True}
    ports = {"patch_size": 2, "in_channels": 16, "cap_feat_dim": TEXT[1], "axes_lens": [64, 64, 64]}
    return from_config(getattr(models, config), {**size, **ports, **extra})


def _lumina2(**extra: Any) -> comfy.model_base.BaseModel:
    heads = {"n_heads": 2, "n_kv_heads": 1, "axes_dims": [8, 12, 12], "rope_theta": 10000.0}
    return _lumina("Lumina2", dim=64, ffn_dim_multiplier=1.0, **heads, **extra)


def _z_image(config: str = "ZImage", **extra: Any) -> comfy.model_base.BaseModel:
    # The modulation reads 256 channels, fixed in the host (lumina/model.py:535), from a width that must not be less.
    heads = {"n_heads": 4, "n_kv_heads": 4, "axes_dims": [16, 24, 24], "rope_theta": 256.0}
    z_image = {"z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 4}
    return _lumina(config, dim=256, ffn_dim_multiplier=0.25, **{**heads, **z_image, **extra})


def _omnigen2() -> comfy.model_base.BaseModel:
    size = {"hidden_size": 64, "num_layers": 8, "num_refiner_layers": 1, "multiple_of": 32}
    heads = {"num_attention_heads": 4, "num_kv_heads": 2, "axes_dim_rope": (4, 6, 6), "axes_lens": (64, 64, 64)}
    model = from_config(models.Omnigen2, {**size, **heads, "text_feat_dim": TEXT[1]})
    host = model.extra_conds

    def extra_conds(**kwargs: Any) -> dict[str, Any]:
        # The text encoder cuts the padding off and always says so; any other mask does not fit the host's positions
        # (omnigen2.py:437 counts the tokens of the mask, the text keeps them all).
        return host(**kwargs, attention_mask=torch.ones(kwargs["cross_attn"].shape[:2], dtype=torch.long))

    model.extra_conds = extra_conds
    return model


def _krea2(**extra: Any) -> comfy.model_base.BaseModel:
    size = {"features": 64, "heads": 4, "kvheads": 2, "multiplier": 2, "layers": 8, "tdim": 32}
    text = {"txtdim": TEXT[1] // 2, "txtlayers": 2, "txtheads": 2, "txtkvheads": 2}
    return from_config(models.Krea2, {**size, **text, "channels": 16, "patch": 2, **extra})


def _ernie() -> comfy.model_base.BaseModel:
    size = {"hidden_size": 64, "num_attention_heads": 2, "num_layers": 8, "ffn_hidden_size": 96}
    return from_config(models.ErnieImage, {**size, "text_in_dim": TEXT[1], "rope_axes_dim": (8, 12, 12)})


def _ideogram4() -> comfy.model_base.BaseModel:
    # The sizes are part of the host's class, not of what is detected.
    size = {"num_attention_heads": 2, "attention_head_dim": 32, "intermediate_size": 96, "adaln_dim": 16}
    rope = {"rope_theta": 10000, "mrope_section": [6, 5, 5], "norm_eps": 1e-5}
    extra = {"unet_extra_config": {**size, **rope, "llm_features_dim": TEXT[1]}}
    return from_config(type("Ideogram4", (models.Ideogram4,), extra), {"num_layers": 8, "in_channels": 128})


COSMOS = {
    "max_img_h": 16,
    "max_img_w": 16,
    "max_frames": 8,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "concat_padding_mask": True,
    "model_channels": 48,
    "num_blocks": 8,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "crossattn_emb_channels": TEXT[1],
    "pos_emb_cls": "rope3d",
    "pos_emb_interpolation": "crop",
    "use_adaln_lora": True,
    "adaln_lora_dim": 16,
}


def _cosmos1(config: str) -> comfy.model_base.BaseModel:
    blocks = {"block_config": "FA-CA-MLP", "block_x_format": "THWBD", "affline_emb_norm": True}
    positions = {"extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable"}
    return from_config(getattr(models, config), {**COSMOS, **blocks, **positions})


def _predict2(config: str, **extra: Any) -> comfy.model_base.BaseModel:
    return from_config(getattr(models, config), {**COSMOS, "rope_enable_fps_modulation": False, **extra})


def _anima() -> comfy.model_base.BaseModel:
    import comfy.ops
    from comfy.ldm.anima.model import LLMAdapter

    model = _predict2("Anima", in_channels=16)
    # Its sizes are fixed in the host (anima/model.py:180): 1024 channels, six blocks.
    small = {"source_dim": TEXT[1], "target_dim": TEXT[1], "model_dim": 32, "num_layers": 1, "num_heads": 2}
    adapter = LLMAdapter(**small, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    model.diffusion_model.llm_adapter = adapter.requires_grad_(False).eval()
    return model


def _triposplat() -> comfy.model_base.BaseModel:
    size = {"q_token_length": 16, "model_channels": 48, "num_head_channels": 12, "num_blocks": 8}
    ports = {"cond_channels": TEXT[1], "cond2_channels": 8, "mlp_ratio": 2, "num_refiner_blocks": 1}
    return from_config(models.TripoSplat, {**size, **ports})


def _pixeldit(config: str, **extra: Any) -> comfy.model_base.BaseModel:
    size = {"hidden_size": 64, "num_groups": 2, "patch_depth": 8, "patch_size": 4}
    pixels = {"pixel_hidden_size": 8, "pixel_attn_hidden_size": 32, "pixel_num_groups": 2, "pixel_depth": 1}
    text = {"txt_embed_dim": ODD_TEXT[1], "txt_max_length": ODD_TEXT[0]}
    return from_config(getattr(models, config), {**size, **pixels, **text, **extra})


def _pid() -> comfy.model_base.BaseModel:
    degraded = {"lq_latent_channels": 16, "lq_hidden_dim": 16, "lq_num_res_blocks": 1, "lq_interval": 2}
    scale = {"sr_scale": 2, "latent_spatial_down_factor": 4, "rope_ref_h": 32, "rope_ref_w": 32}
    return _pixeldit("PiD", **degraded, **scale)


def _hunyuan_dit(config: str, **extra: Any) -> comfy.model_base.BaseModel:
    size = {"hidden_size": 48, "num_heads": 2, "depth": 8, "mlp_ratio": 2.0, "in_channels": 4, "input_size": None}
    # The host replaces the padding of the last `text_len` tokens, so a text must not be shorter than that.
    text = {"text_states_dim": TEXT[1], "text_states_dim_t5": 32, "text_len": TEXT[0] - 2, "text_len_t5": 4}
    return from_config(getattr(models, config), {**size, **text, **extra})


def _two_texts(draw: Callable[..., Tensor], batch: int) -> dict[str, Any]:
    return {
        "attention_mask": torch.tensor([[1] * 5 + [0] * 3]),
        "conditioning_mt5xl": draw("t5", 1, 4, 32),
        "attention_mask_mt5xl": torch.tensor([[1, 1, 1, 0]]),
    }


def _first_frame_kept(batch: int) -> Tensor:
    """A mask that is zero on the first frame, which gets a timestep of its own in Predict2."""
    mask = torch.ones(batch, 1, 3, 6, 6)
    mask[:, :, 0] = 0
    return mask


def _image_case(
    name: str,
    config: str,
    make: Callable[[], comfy.model_base.BaseModel],
    lists: tuple[str, ...],
    latent_shape: tuple[int, ...] = (16, 8, 8),
    patch: tuple[int, ...] = (2, 2),
    width: int = 64,
    extras: Extras = lambda draw, batch: {},
    **rest: Any,
) -> Case:
    return Case(
        name=name,
        make=make,
        lists=lists,
        latent_shape=latent_shape,
        patch=patch,
        width=width,
        extras=extras,
        depth=8,
        **{"family": name, "text": TEXT, "classes": (config,), **rest},
    )


def _cosmos_case(name: str, config: str, make: Callable[[str], comfy.model_base.BaseModel], **rest: Any) -> Case:
    video = {"latent_shape": (16, 3, 6, 6), "patch": (1, 2, 2), "width": 48}
    return _image_case(name, config, lambda: make(config), ("blocks",), **{**video, **rest})


def _pixeldit_case(name: str, config: str, make: Callable[[], comfy.model_base.BaseModel], **rest: Any) -> Case:
    pair = {"entering": lambda args, kwargs: (args[0], args[1]), "text": ODD_TEXT}  # (image, text)
    return _image_case(name, config, make, ("patch_blocks",), (3, 16, 16), (4, 4), family="pixeldit", **pair, **rest)


def _hunyuan_dit_case(name: str, config: str, **extra: Any) -> Case:
    return _image_case(
        name,
        config,
        lambda: _hunyuan_dit(config, **extra),
        ("blocks",),
        latent_shape=(4, 8, 8),
        width=48,
        extras=_two_texts,
        family="hunyuan_dit",
        skips=((0, 7), (1, 6), (2, 5)),
        control=("output",),
        input_gain=0.1,
    )


CASES = [
    _image_case("lumina2", "Lumina2", _lumina2, ("layers",), family="lumina"),
    _image_case(  # NewBie
        "lumina2_pooled",
        "Lumina2",
        lambda: _lumina2(clip_text_dim=16),
        ("layers",),
        family="lumina",
        extras=lambda draw, batch: {"pooled_output": draw("pooled", 1, 16)},
    ),
    _image_case("z_image", "ZImage", _z_image, ("layers",), width=256, family="lumina"),
    _image_case(  # reference tokens of image, text and vision before the image's own, with a timestep of their own
        "z_image_omni",
        "ZImage",
        lambda: _z_image(siglip_feat_dim=16),
        ("layers",),
        width=256,
        family="lumina",
        extras=lambda draw, batch: {
            "reference_latents": [draw("reference", 1, 16, 4, 8)],
            "reference_latents_text_embeds": [draw("reference text", 1, 4, TEXT[1])],
        },
    ),
    _image_case(
        "z_image_pixel",
        "ZImagePixelSpace",
        lambda: _z_image(
            "ZImagePixelSpace",
            patch_size=4,
            in_channels=3,
            decoder_in_channels=48,
            decoder_hidden_size=16,
            decoder_num_res_blocks=1,
            decoder_max_freqs=2,
        ),
        ("layers",),
        latent_shape=(3, 16, 16),
        patch=(4, 4),
        width=256,
        family="lumina",
    ),
    _image_case("omnigen2", "Omnigen2", _omnigen2, ("layers",)),
    _image_case(  # two reference images before the image
        "omnigen2_references",
        "Omnigen2",
        _omnigen2,
        ("layers",),
        family="omnigen2",
        extras=lambda draw, batch: {
            "reference_latents": [draw("reference 0", 1, 16, 8, 8), draw("reference 1", 1, 16, 4, 8)]
        },
    ),
    _image_case("krea2", "Krea2", _krea2, ("blocks",), (16, 1, 8, 8), (1, 2, 2), family="krea_2"),
    *(
        _image_case(  # a reference image behind the image, with the image's timestep or with timestep zero
            name,
            "Krea2",
            lambda method=method: _krea2(default_ref_method=method),
            ("blocks",),
            (16, 1, 8, 8),
            (1, 2, 2),
            family="krea_2",
            classes=("Krea2", "JoyImage"),  # as new as its references
            extras=lambda draw, batch: {"reference_latents": [draw("reference", 1, 16, 1, 8, 8)]},
        )
        for name, method in (("krea2_reference", "index"), ("krea2_reference_timestep", "index_timestep_zero"))
    ),
    _image_case("ernie", "ErnieImage", _ernie, ("layers",), (128, 4, 4), (1, 1)),
    _image_case(
        "ideogram4",
        "Ideogram4",
        _ideogram4,
        ("layers",),
        (128, 4, 4),
        (1, 1),
        family="ideogram_4",
        extras=lambda draw, batch: {"attention_mask": torch.tensor([[1] * 5 + [0] * 3])},
    ),
    _cosmos_case("cosmos_t2v", "CosmosT2V", _cosmos1, family="cosmos_1", extras=lambda draw, batch: {"frame_rate": 12}),
    _cosmos_case("cosmos_i2v", "CosmosI2V", _cosmos1, family="cosmos_1", noise_mask=_first_frame_kept),
    _cosmos_case("predict2_t2i", "CosmosT2IPredict2", _predict2, family="cosmos_predict2"),
    _cosmos_case(
        "predict2_i2v", "CosmosI2VPredict2", _predict2, family="cosmos_predict2", noise_mask=_first_frame_kept
    ),
    _cosmos_case(
        "anima",
        "Anima",
        lambda config: _anima(),
        latent_shape=(16, 1, 6, 6),
        family="cosmos_predict2",
        extras=lambda draw, batch: {
            "t5xxl_ids": (100 * draw("ids", 6).abs()).long(),
            "t5xxl_weights": torch.tensor([1.0, 1.0, 1.2, 1.0, 0.8, 1.0]),
        },
    ),
    _image_case(
        "triposplat",
        "TripoSplat",
        _triposplat,
        ("blocks",),
        (1, 16 * 16 + 5),
        (1,),
        width=48,
        extras=lambda draw, batch: {"reference_latents": [draw("image", 1, 8, 2, 2)]},
        parts=((16, 16), (1, 5)),  # tokens of the shape, and the camera
    ),
    _pixeldit_case("pixeldit", "PixelDiTT2I", lambda: _pixeldit("PixelDiTT2I")),
    _pixeldit_case(  # the degraded image comes in before every second block
        "pid",
        "PiD",
        _pid,
        extras=lambda draw, batch: {"lq_latent": draw("degraded", 1, 16, 2, 2), "degrade_sigma": torch.tensor([0.3])},
    ),
    _hunyuan_dit_case("hunyuan_dit", "HunyuanDiT"),
    _hunyuan_dit_case("hunyuan_dit1", "HunyuanDiT1", size_cond=True, use_style_cond=True),
]
