"""Tiny models whose blocks carry image and text: Qwen-Image and its kin, HiDream, AuraFlow, Flux 2, HunyuanImage, others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import comfy.clip_vision
import comfy.latent_formats
import comfy.model_base
import comfy.supported_models as models
import torch
from torch import Tensor, nn

from tiny.case import Case, Entering, Extras, Tokens, from_config, image_and_text, normal

TEXT = (8, 32)
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
AXES = [4, 6, 6]
FLUX = {  # also Chroma and HunyuanVideo
    "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2.0, "depth": 3, "depth_single_blocks": 5,
    "context_in_dim": TEXT[1], "axes_dim": [8, 12, 12], "theta": 256, "qkv_bias": True, "guidance_embed": True,
}
HUNYUAN = {"byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False}
CLIP_TOKENS = 5


def _qwen_image(**extra: Any) -> comfy.model_base.BaseModel:
    size = {"num_layers": 8, **HEADS, "joint_attention_dim": TEXT[1], "axes_dims_rope": AXES}
    return from_config(models.QwenImage, {**size, "in_channels": 64, "out_channels": 16, **extra})


def _mage_flow() -> comfy.model_base.BaseModel:
    size = {"num_layers": 8, **HEADS, "joint_attention_dim": TEXT[1], "axes_dims_rope": AXES}
    return from_config(models.MageFlow, {**size, "in_channels": 128, "out_channels": 128})


def _lens() -> comfy.model_base.BaseModel:
    size = {"num_layers": 8, **HEADS, "enc_hidden_dim": TEXT[1] // 4, "axes_dims_rope": AXES}
    return from_config(models.Lens, {**size, "in_channels": 128, "out_channels": 32})


def _joyimage() -> comfy.model_base.BaseModel:
    size = {"hidden_size": 32, "num_attention_heads": 2, "num_layers": 8, "text_dim": TEXT[1], "mlp_width_ratio": 2.0}
    # The host's config class has the last word on the sizes of the rotary embedding.
    config = type("Small", (models.JoyImage,), {"unet_extra_config": {"rope_dim_list": AXES}})
    return from_config(config, size)


def _boogu() -> comfy.model_base.BaseModel:
    size = {"hidden_size": 32, "num_double_stream_layers": 3, "num_layers": 5, "num_refiner_layers": 1, "multiple_of": 8}
    heads = {"num_attention_heads": 2, "num_kv_heads": 1, "axes_dim_rope": AXES, "axes_lens": [64, 64, 64]}
    model = from_config(models.Boogu, {**size, **heads, "instruction_feat_dim": TEXT[1]})
    entries = model.extra_conds
    # The host counts the text by its mask, and knows no padding: rotary_emb is as long as the mask says (boogu/model.py:274)
    ones = functools.partial(torch.ones, dtype=torch.long)
    model.extra_conds = lambda **given: entries(attention_mask=ones(given["cross_attn"].shape[:2]), **given)
    return model


def _hidream() -> comfy.model_base.BaseModel:
    size = {"num_layers": 3, "num_single_layers": 5, **HEADS, "text_emb_dim": 16, "caption_channels": [TEXT[1], 24]}
    # All experts are chosen: the result is to depend continuously on the input. Their width of 256 is fixed in the host.
    experts = {"num_routed_experts": 2, "num_activated_experts": 2}
    ports = {"patch_size": 2, "in_channels": 16, "max_resolution": [64, 64], "axes_dims_rope": AXES}
    return from_config(models.HiDream, {**size, **experts, **ports, "llama_layers": [0, 1, 2, 3, 3, 2, 1, 0]})


def _hidream_o1(hook: Callable[..., Any]) -> comfy.model_base.BaseModel:
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 2, "head_dim": 16, "rope_dims": [4, 2, 2]}  # 151936 words: the host fixes some of them
    vision = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "depth": 1, "num_position_embeddings": 64}
    model = from_config(models.HiDreamO1, {"text_config_overrides": text | heads, "vision_config_overrides": vision})
    model.diffusion_model.register_forward_pre_hook(hook, with_kwargs=True)
    return model


class _NewRun:
    """Empties the prefix cache where a run begins, which the host never does (hidream_o1/model.py:132)."""

    def __init__(self) -> None:
        self.sigmas: Tensor | None = None

    def __call__(self, model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        sigmas = keywords["transformer_options"]["sample_sigmas"]
        if sigmas is not self.sigmas:
            self.sigmas = sigmas
            model.clear_kv_cache()


def _without_prefix_cache(model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    # As any block patch does. With references the host keys the cache by id() of a tensor it makes anew for every call.
    options = keywords["transformer_options"]
    return arguments, {**keywords, "transformer_options": {**options, "patches_replace": {"dit": {("none", 0): None}}}}


def _words(draw: Callable[..., Tensor]) -> Tensor:
    time_token = 151673  # the timestep takes its place
    return torch.cat([(10 * draw("words", 1, 8)).abs().long(), torch.tensor([[time_token]])], 1)


def _aura_flow() -> comfy.model_base.BaseModel:
    size = {"dim": 32, "n_layers": 8, "n_double_layers": 3, "n_heads": 2, "global_conddim": 32, "max_seq": 64}
    return from_config(models.AuraFlow, {**size, "cond_seq_dim": TEXT[1]})


def _flux(config: type[models.Flux], **extra: Any) -> comfy.model_base.BaseModel:
    ports = {"in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 16, "txt_ids_dims": []}
    return from_config(config, {**FLUX, **ports, **extra})


def _flux2(**extra: Any) -> comfy.model_base.BaseModel:
    ports = {"in_channels": 128, "out_channels": 128, "patch_size": 1, "vec_in_dim": None, "txt_ids_dims": [3]}
    shared = {"global_modulation": True, "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False}
    references = {"default_ref_method": "index", "ref_index_scale": 10.0}
    rest = {"hidden_size": 32, "num_heads": 1, "depth": 2, "depth_single_blocks": 6, "axes_dim": [8, 8, 8, 8]}
    return from_config(models.Flux2, {**FLUX, **ports, **shared, **references, **rest, **extra})


def _chroma_radiance(x0: bool) -> comfy.model_base.BaseModel:
    from comfy.ldm.chroma_radiance.model import ChromaRadianceParams

    size = {key: value for key, value in FLUX.items() if key != "guidance_embed"}
    ports = {"in_channels": 3, "out_channels": 3, "patch_size": 4, "vec_in_dim": 16, "txt_ids_dims": []}
    modulation = {"in_dim": 64, "out_dim": 64, "hidden_dim": 16, "n_layers": 1}  # 64 inputs are fixed in the host
    nerf = {"nerf_hidden_size": 8, "nerf_mlp_ratio": 1, "nerf_depth": 1, "nerf_max_freqs": 2, "nerf_tile_size": 512}
    head = {"nerf_final_head_type": "conv", "nerf_embedder_dtype": torch.float32}
    variant = {"use_x0": x0}
    if "use_sequential_txt_ids" in ChromaRadianceParams.__dataclass_fields__:  # not before v0.24
        variant["use_sequential_txt_ids"] = x0
    return from_config(models.ChromaRadiance, {**size, **ports, **modulation, **nerf, **head, **variant})


def _hunyuan(config: type[models.HunyuanVideo], **extra: Any) -> comfy.model_base.BaseModel:
    ports = {"in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "vec_in_dim": 16}
    return from_config(config, {**FLUX, **HUNYUAN, **ports, **extra})


def _hunyuan_image(byt5: bool, meanflow: bool) -> comfy.model_base.BaseModel:
    image = {"in_channels": 64, "out_channels": 64, "patch_size": [1, 1], "vec_in_dim": None, "axes_dim": [16, 16]}
    # byt5_in has seven million weights, fixed in the host.
    return _hunyuan(models.HunyuanImage21, **image, byt5=byt5, meanflow=meanflow, guidance_embed=meanflow)


def _hunyuan_refiner() -> comfy.model_base.BaseModel:
    ports = {"in_channels": 128, "out_channels": 64, "patch_size": [1, 1, 1], "vec_in_dim": None, "meanflow": True}
    model = _hunyuan(models.HunyuanImage21Refiner, **ports)
    # The host's own format folds two frames into the channels of a latent but not of its noise: only empty latents fit.
    model.latent_format = comfy.latent_formats.LatentFormat()
    return model


def _text_and_image(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tokens:
    return keywords["encoder_hidden_states"], keywords["hidden_states"]


def _first_two(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tokens:
    return arguments[0], arguments[1]


def _in_order(tokens: Tokens) -> Tokens:
    return (torch.cat([part for part in tokens if part is not None], 1),)


def _case(
    name: str,
    host: str,
    make: Callable[[], comfy.model_base.BaseModel],
    latent_shape: tuple[int, ...],
    patch: tuple[int, ...],
    extras: Extras = lambda draw, batch: {},
    *,
    family: str = "",
    entering: Entering = _text_and_image,
    lists: tuple[str, ...] = ("transformer_blocks",),
    width: int = 32,
    text: tuple[int, int] = TEXT,
    **rest: Any,
) -> Case:
    return Case(
        name=name, family=family or name, make=make, latent_shape=latent_shape, patch=patch, lists=lists, depth=8,
        width=width, text=text, extras=extras, entering=entering, classes=(host,), **rest,
    )


def _two_lists(
    name: str,
    host: str,
    make: Callable[[], comfy.model_base.BaseModel],
    latent_shape: tuple[int, ...],
    patch: tuple[int, ...],
    extras: Extras = lambda draw, batch: {},
    *,
    family: str,
    width: int = 64,
    **rest: Any,
) -> Case:
    return _case(
        name, host, make, latent_shape, patch, extras, family=family, width=width, control=("input", "output"),
        entering=image_and_text, lists=("double_blocks", "single_blocks"), **rest,
    )


def _boogu_case(name: str, extras: Extras = lambda draw, batch: {}) -> Case:
    lists = ("double_stream_layers", "single_stream_layers")
    return _case(
        name, "Boogu", _boogu, (16, 8, 12), (2, 2), extras, family="boogu", entering=_first_two, lists=lists
    )


def _hidream_case(name: str, image: bool) -> Case:
    def extras(draw: Callable[..., Tensor], batch: int) -> dict[str, Any]:
        entries = {"pooled_output": draw("pooled", 1, 16), "conditioning_llama3": draw("llama", 1, 4, 6, 24)}
        return entries | ({"concat_latent_image": draw("image", 1, 16, 8, 12)} if image else {})

    return _case(
        name, "HiDream", _hidream, (16, 8, 12), (2, 2), extras, family="hidream",
        entering=lambda arguments, keywords: (keywords["image_tokens"], keywords["text_tokens"]),
        joining=_in_order,  # the image first; both end in the tokens of one llama layer, of which each block has its own
        lists=("double_stream_blocks", "single_stream_blocks"),
    )


def _hidream_o1_case(name: str, hook: Callable[[], Callable[..., Any]], extras: Extras, **rest: Any) -> Case:
    return _case(
        name, "HiDreamO1", lambda: _hidream_o1(hook()), (3, 64, 96), (32, 32), extras, family="hidream_o1",
        entering=lambda arguments, keywords: (keywords["x"],), lists=("language_model.layers",),
        text=(9, 1),  # what the host's text encoder gives along with the words, and the model does not read
        **rest,
    )


def _flux2_case(name: str, make: Callable[[], comfy.model_base.BaseModel], extras: Extras) -> Case:
    return _two_lists(
        name, "Flux2", make, (128, 4, 6), (1, 1),
        lambda draw, batch: {"pooled_output": None, **extras(draw, batch)},  # older releases ask for it
        family="flux", width=32, text=(514, TEXT[1]),  # the host pads to 512, so that shorter ones would be of one length
    )


def _reference(*shape: int) -> Extras:
    return lambda draw, batch: {"reference_latents": [draw("reference", 1, *shape)]}


def _clip_vision(states: Tensor) -> comfy.clip_vision.Output:
    output = comfy.clip_vision.Output()
    output["last_hidden_state"] = states
    return output


CASES = [
    _case("qwen_image", "QwenImage", _qwen_image, (16, 1, 8, 12), (1, 2, 2), control=("input",)),
    _case(  # text of which some is padding
        "qwen_image_masked", "QwenImage", _qwen_image, (16, 1, 8, 12), (1, 2, 2),
        lambda draw, batch: {"attention_mask": torch.tensor([[1] * 5 + [0] * 3])}, family="qwen_image",
    ),
    _case(  # reference tokens behind the image tokens, which get other timesteps: two rows of it for every sample
        "qwen_image_edit", "QwenImage", lambda: _qwen_image(default_ref_method="index_timestep_zero"),
        (16, 1, 8, 12), (1, 2, 2), _reference(16, 1, 8, 8), family="qwen_image", control=("input",),
    ),
    _case("mage_flow", "MageFlow", _mage_flow, (128, 4, 6), (1, 1), control=("input",)),
    _case("mage_flow_edit", "MageFlow", _mage_flow, (128, 4, 6), (1, 1), _reference(128, 4, 4), family="mage_flow"),
    _case(
        "lens", "Lens", _lens, (128, 4, 6), (1, 1),
        lambda draw, batch: {"attention_mask": torch.tensor([[1] * 5 + [0] * 3])}, control=("input",),
    ),
    _case(
        "joyimage", "JoyImage", _joyimage, (16, 1, 8, 12), (1, 2, 2),
        entering=lambda arguments, keywords: (keywords["hidden_states"], keywords["encoder_hidden_states"]),
        lists=("double_blocks",),
    ),
    _case(
        "joyimage_edit", "JoyImage", _joyimage, (16, 1, 8, 12), (1, 2, 2), _reference(16, 1, 8, 8), family="joyimage",
        entering=lambda arguments, keywords: (keywords["hidden_states"], keywords["encoder_hidden_states"]),
        lists=("double_blocks",),
    ),
    _boogu_case("boogu"),
    _boogu_case("boogu_edit", _reference(16, 8, 8)),  # reference tokens before the image tokens
    _hidream_case("hidream", image=False),
    _hidream_case("hidream_edit", image=True),
    _hidream_o1_case(
        "hidream_o1", _NewRun, lambda draw, batch: {"text_input_ids": _words(draw)},
        separable=False,  # the prefix cache is kept for a call of the same make-up; any other call fills it anew
    ),
    _hidream_o1_case(
        "hidream_o1_edit", lambda: _without_prefix_cache,
        lambda draw, batch: {
            "text_input_ids": _words(draw),
            # The same for both conditionings: the host looks at the first row's only (hidream_o1/model.py:172).
            "reference_latents": [normal((1, 64, 64, 3), "reference", 0).sigmoid()],
        },
    ),
    _case(
        "aura_flow", "AuraFlow", _aura_flow, (4, 8, 12), (2, 2), entering=_first_two, joining=_in_order,
        lists=("double_layers", "single_layers"),
    ),
    _flux2_case("flux2", _flux2, lambda draw, batch: {"guidance": 3.5}),
    _flux2_case("flux2_edit", _flux2, lambda draw, batch: {"guidance": 3.5, **_reference(128, 4, 4)(draw, batch)}),
    _flux2_case(  # references with a timestep of their own; the host then takes no guidance (flux/model.py:173)
        "flux2_references_at_zero", lambda: _flux2(guidance_embed=False, default_ref_method="index_timestep_zero"),
        _reference(128, 4, 4),
    ),
    _two_lists(
        "flux_inpaint", "FluxInpaint", lambda: _flux(models.FluxInpaint, in_channels=96), (16, 8, 12), (2, 2),
        lambda draw, batch: {
            "pooled_output": draw("pooled", 1, 16),
            "guidance": 3.5,
            "concat_latent_image": draw("image", 1, 16, 8, 12),
            "concat_mask": (draw("mask", 1, 1, 64, 96) > 0).float(),
        },
        family="flux",
    ),
    _two_lists(
        "longcat_image", "LongCatImage",
        lambda: _flux(models.LongCatImage, guidance_embed=False, vec_in_dim=None, txt_ids_dims=[1, 2]),
        (16, 8, 12), (2, 2), family="flux",
    ),
    _two_lists(
        "chroma_radiance", "ChromaRadiance", lambda: _chroma_radiance(x0=False), (3, 16, 24), (4, 4),
        lambda draw, batch: {"pooled_output": None, "guidance": 1.0}, family="chroma",  # older releases ask for the first
    ),
    _two_lists(
        "chroma_radiance_x0", "ChromaRadiance", lambda: _chroma_radiance(x0=True), (3, 16, 24), (4, 4),
        lambda draw, batch: {"pooled_output": None}, family="chroma",
    ),
    _two_lists(  # text of two encoders, one behind the other
        "hunyuan_image_21", "HunyuanImage21", lambda: _hunyuan_image(byt5=True, meanflow=False), (64, 4, 6), (1, 1),
        lambda draw, batch: {"conditioning_byt5small": draw("byt5", 1, 4, 1472)}, family="hunyuan_video",
    ),
    _two_lists(  # distilled: the model looks its next noise level up
        "hunyuan_image_21_distilled", "HunyuanImage21", lambda: _hunyuan_image(byt5=False, meanflow=True),
        (64, 4, 6), (1, 1), lambda draw, batch: {"guidance": 3.5}, family="hunyuan_video",
    ),
    _two_lists(
        "hunyuan_image_21_refiner", "HunyuanImage21Refiner", _hunyuan_refiner, (64, 1, 4, 6), (1, 1, 1),
        lambda draw, batch: {
            "guidance": 6.0, "concat_latent_image": draw("image", 1, 64, 1, 4, 6), "noise_augmentation": 0.1,
        },
        family="hunyuan_video",
    ),
    _two_lists(
        "hunyuan_video_15_sr", "HunyuanVideo15_SR_Distilled",
        lambda: _hunyuan(
            models.HunyuanVideo15_SR_Distilled, in_channels=98, out_channels=32, depth=8, depth_single_blocks=0,
            vec_in_dim=None, vision_in_dim=1152, use_cond_type_embedding=True, meanflow=True, meanflow_sum=True,
            guidance_embed=False,
        ),
        (32, 3, 6, 6), (1, 2, 2),
        lambda draw, batch: {
            "pooled_output": None,
            "clip_vision_output": _clip_vision(draw("clip", 1, CLIP_TOKENS, 1152)),
            "concat_latent_image": draw("image", 1, 66, 3, 6, 6),
            "noise_augmentation": 0.1,
        },
        family="hunyuan_video",
    ),
    _two_lists(
        "hunyuan_video_skyreels_i2v", "HunyuanVideoSkyreelsI2V",
        lambda: _hunyuan(models.HunyuanVideoSkyreelsI2V, in_channels=32), (16, 3, 6, 6), (1, 2, 2),
        lambda draw, batch: {
            "pooled_output": draw("pooled", 1, 16),
            "guidance": 6.0,
            "concat_latent_image": draw("image", 1, 16, 3, 6, 6),
        },
        family="hunyuan_video",
    ),
]
