"""Tiny models of sound, of sound with video, and of 3D shapes; and SeedVR2, whose samples lie in one sequence."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import comfy.model_base
import comfy.supported_models as models
import torch
from torch import Tensor

from tiny.case import Case, Extras, from_config, image_and_text, initialise, normal

TEXT = (8, 32)
Parts = tuple[tuple[int, ...], ...]


class Entry(dict[str, Any]):
    """A dict in a conditioning. `+ 1` gives another one, with the same counts and shapes."""

    def __add__(self, other: int) -> Entry:
        return Entry({key: value + other if isinstance(value, (Tensor, float)) else value for key, value in self.items()})


# ACE-Step


def _ace() -> comfy.model_base.BaseModel:
    from comfy.ldm.ace import model

    size = {"inner_dim": 64, "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 8, "mlp_ratio": 1.0}
    ports = {"in_channels": 8, "out_channels": 8, "max_position": 64, "text_embedding_dim": TEXT[1]}
    lyrics = {"lyric_hidden_size": 32, "lyric_encoder_vocab_size": 32, "ssl_latent_dims": [8]}
    small = {"output_size": 32, "attention_heads": 2, "linear_units": 32, "num_blocks": 1}
    # The host asks for its lyric encoder, of 75 M parameters, without a size; its patch embedding takes 8 channels only.
    with mock.patch.object(model, "LyricEncoder", functools.partial(model.LyricEncoder, **small)):
        return from_config(models.ACEStep, {**size, **ports, **lyrics})


def _ace_15() -> comfy.model_base.BaseModel:
    from comfy.ldm.ace.ace_step15 import AceStepConditionGenerationModel

    # 16 heads are fixed in the tokenizer, as are 64 latent channels in the silence that stands in for a reference.
    size = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "intermediate_size": 64}
    depth = {"num_dit_layers": 8, "num_lyric_layers": 1, "num_timbre_layers": 1, "num_tokenizer_layers": 1}
    codes = {"fsq_dim": 64, "fsq_levels": [4, 4]}
    # Older releases make the encoder as wide as the decoder.
    encoder = {"encoder_hidden_size": 64, "encoder_intermediate_size": 64, "encoder_num_heads": 4}
    encoder = {key: value for key, value in encoder.items()
               if key in inspect.signature(AceStepConditionGenerationModel).parameters}
    model = from_config(models.ACEStep15, {**size, **depth, **codes, **encoder, "text_hidden_dim": TEXT[1]})
    # The host takes the reference of every sample of a call for one of the first (comfy/ldm/ace/ace_step15.py, v0.30.0,
    # line 1129), so that a sample depends on what else is in the call.
    model.diffusion_model.encoder.timbre_encoder.unpack_timbre_embeddings = lambda packed, order: (packed[:, None], None)
    return model


def _ace_15_case(name: str, extras: Extras) -> Case:
    return Case(
        name=name,
        family="ace_step_15",
        make=_ace_15,
        latent_shape=(64, 10),
        patch=(2,),
        lists=("decoder.layers",),
        depth=8,
        width=64,
        text=TEXT,
        extras=lambda draw, batch: {"conditioning_lyrics": draw("lyrics", 1, 5, TEXT[1]), **extras(draw, batch)},
        entering=lambda args, kwargs: (kwargs["hidden_states"],),
        classes=("ACEStep15",),
    )


# Stable Audio


def _audio(config: type[models.StableAudio], seconds: tuple[str, ...], **extra: Any) -> comfy.model_base.BaseModel:
    # The width of 768 of the text and of the embedded seconds is fixed in the host.
    size = {"embed_dim": 64, "num_heads": 2, "depth": 8, "io_channels": 8, "ff_kwargs": {"mult": 1}}
    chosen = config({**config.unet_config, **size, "project_cond_tokens": True, **extra})
    chosen.set_inference_dtype(torch.float32, None)
    return chosen.get_model(_embedders(seconds, **_features(extra)), "")


def _features(config: dict[str, Any]) -> dict[str, Any]:
    kind = config.get("timestep_features_type")
    return {} if kind is None else {"fourier_features_type": kind}


def _embedders(seconds: tuple[str, ...], **kind: Any) -> dict[str, Tensor]:
    """Weights of the embeddings of numbers of seconds. They sit beside the diffusion model, and the host demands them."""
    from comfy.ldm.audio.embedders import NumberConditioner

    weights = {}
    for seed, name in enumerate(seconds):
        conditioner = NumberConditioner(768, **kind)
        initialise(conditioner, seed)
        weights.update({f"conditioner.conditioners.{name}.{key}": value for key, value in conditioner.state_dict().items()})
    return weights


def _stable_audio() -> comfy.model_base.BaseModel:
    return _audio(models.StableAudio, ("seconds_start", "seconds_total"))


def _stable_audio_3() -> comfy.model_base.BaseModel:
    kind = {"global_cond_type": "adaLN", "timestep_features_type": "expo", "norm_type": "rms_norm"}
    rest = {"attn_kwargs": {"qk_norm": "rms", "differential": True}, "num_memory_tokens": 3, "global_cond_dim": 768}
    return _audio(models.StableAudio3, ("seconds_total",), **kind, **rest, local_add_cond_dim=9)


# Hunyuan3D


def _hunyuan3d(config: type[models.Hunyuan3Dv2], guidance: bool) -> comfy.model_base.BaseModel:
    size = {"in_channels": 16, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2.0, "context_in_dim": TEXT[1]}
    return from_config(config, {**size, "depth": 3, "depth_single_blocks": 5, "guidance_embed": guidance})


def _hunyuan3d_21() -> comfy.model_base.BaseModel:
    size = {"in_channels": 16, "hidden_size": 48, "num_heads": 2, "context_dim": TEXT[1], "depth": 9}
    return from_config(models.Hunyuan3Dv2_1, {
        **size, "num_moe_layers": 2, "num_experts": 3, "qkv_bias": False, "guidance_cond_proj_dim": None,
    })


def _hunyuan3d_case(name: str, config: str, extras: Extras = lambda draw, batch: {}, guidance: bool = False) -> Case:
    return Case(
        name=name,
        family="hunyuan3d_2",
        make=lambda: _hunyuan3d(getattr(models, config), guidance),
        latent_shape=(16, 12),
        patch=(1,),
        lists=("double_blocks", "single_blocks"),
        depth=8,
        width=64,
        text=TEXT,
        extras=extras,
        entering=image_and_text,
        classes=(config,),
    )


# LTX-AV


def _ltxav(**extra: Any) -> comfy.model_base.BaseModel:
    video = {"in_channels": 16, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32}
    # 128 audio channels (8 of 16 bins) are fixed in the host.
    audio = {"audio_num_attention_heads": 2, "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16}
    connector = {"connector_attention_head_dim": 16, "connector_num_attention_heads": 2, "connector_num_layers": 1}
    return from_config(models.LTXAV, {"num_layers": 8, "caption_channels": 32, **video, **audio, **connector, **extra})


def _ltxav_case(name: str, text: int = 64, parts: Parts = ((16, 3, 4, 4), (8, 5, 16)), **rest: Any) -> Case:
    extra = rest.pop("extra", {})
    return Case(
        name=name,
        family="ltx_2",
        make=lambda: _ltxav(**extra),
        lists=("transformer_blocks",),
        depth=8,
        width=32,
        text=(TEXT[0], text),
        entering=lambda args, kwargs: args[0],
        parts=parts,
        **{"latent_shape": _packed(parts), "patch": (1,), "classes": ("LTXAV",), **rest},
    )


def _packed(parts: Parts) -> tuple[int, int]:
    return 1, sum(map(math.prod, parts))


def _first_frame_kept(batch: int) -> Tensor:
    """A mask that is zero on the first video frame, which gives each frame its own timestep."""
    mask = torch.ones(batch, 1, 3, 4, 4)
    mask[:, :, 0] = 0
    return mask


# MiniMax H3

H3_PARTS = ((8, 3, 4, 4), (8, 2, 5))


def _minimax(**extra: Any) -> comfy.model_base.BaseModel:
    size = {"hidden_size": 64, "num_layers": 8, "num_attention_heads": 2, "attention_head_dim": 32, "ffn_hidden_size": 64}
    time = {"timestep_input_dim": 32, "time_embed_hidden_size": 32, "time_embed_dim": 16, "rope_inv_freq_len": 4}
    ports = {"latents_dim": 8, "audio_latents_dim": 8, "text_dim": TEXT[1], "token_refiner_num_layers": 1}
    return from_config(models.MiniMaxH3, {**size, **time, **ports, **extra})


def _minimax_case(name: str, extras: Extras = lambda draw, batch: {}, **extra: Any) -> Case:
    return Case(
        name=name,
        family="minimax_h3",
        make=lambda: _minimax(**extra),
        latent_shape=_packed(H3_PARTS),
        patch=(1,),
        lists=("blocks",),
        depth=8,
        width=64,
        text=TEXT,
        extras=extras,
        max_batch=1,
        together=False,
        separable=False,
        classes=("MiniMaxH3",),
        parts=H3_PARTS,
    )


# SeedVR2


def _seedvr2(**extra: Any) -> comfy.model_base.BaseModel:
    size = {"vid_dim": 24, "heads": 2, "head_dim": 12, "rope_dim": 12, "num_layers": 8, "expand_ratio": 2}
    # No weights shared by text and video (`mm_layers`): such a block runs its first layer twice, and the tests count it.
    rest = {"norm_eps": 1e-5, "txt_in_dim": TEXT[1], "mm_layers": 8}
    model = from_config(models.SeedVR2, {**size, **rest, **extra})
    for module in model.diffusion_model.modules():
        if "freqs" in module._buffers:  # equal in all blocks of a checkpoint; drawn at random, they would differ
            module.register_buffer("freqs", module._buffers.pop("freqs"), persistent=False)
    return model


def _seedvr2_7b() -> comfy.model_base.BaseModel:
    with mock.patch("comfy.ldm.seedvr.model.SEEDVR2_7B_VID_DIM", 24):  # the host knows this version by its width
        return _seedvr2(mlp_type="normal", rope_type="rope3d")


def _seedvr2_case(name: str, make: Callable[[], comfy.model_base.BaseModel], frames: int) -> Case:
    return Case(
        name=name,
        family="seedvr2",
        make=make,
        latent_shape=(16, frames, 8, 8),
        patch=(1, 2, 2),
        lists=("blocks",),
        depth=7,  # of 8: the last one fills a cache that the layer behind it reads (seedvr/model.py, v0.30.0, line 1033)
        width=24,
        text=(7, TEXT[1]),  # the host repeats texts to a common length if that is not too long: 7 and 5 are
        # The same for both conditionings, as from the host's node: of a call with both, the host swaps the texts only.
        extras=lambda draw, batch: {"condition": normal((1, 17, frames, 8, 8), "condition", 0)},
        entering=lambda args, kwargs: (kwargs["vid"], kwargs["txt"]),
        separable=False,
        classes=("SeedVR2",),
    )


CASES = [
    Case(
        name="ace_step",
        family="ace_step",
        make=_ace,
        latent_shape=(8, 16, 12),
        patch=(16, 1),
        lists=("transformer_blocks",),
        depth=8,
        width=64,
        text=TEXT,
        extras=lambda draw, batch: {
            "conditioning_lyrics": draw("lyrics", 1, 5).abs().mul(8).long().clamp(max=15),
            "lyrics_strength": 0.7,
        },
        entering=lambda args, kwargs: (kwargs["hidden_states"],),
        classes=("ACEStep",),
    ),
    _ace_15_case("ace_step_15", lambda draw, batch: {"audio_codes": [[3, 9]]}),
    _ace_15_case("ace_step_15_cover", lambda draw, batch: {
        "reference_audio_timbre_latents": [draw("reference", 1, 64, 10)],
    }),
    Case(
        name="stable_audio",
        family="stable_audio",
        make=_stable_audio,
        latent_shape=(8, 12),
        patch=(1,),
        lists=("transformer.layers",),
        depth=8,
        width=64,
        text=(TEXT[0], 768),
        extras=lambda draw, batch: {"seconds_start": 2, "seconds_total": 47},
        classes=("StableAudio",),
    ),
    Case(  # three memory tokens before the sound, and a second sound to go by
        name="stable_audio_3",
        family="stable_audio",
        make=_stable_audio_3,
        latent_shape=(8, 12),
        patch=(1,),
        lists=("transformer.layers",),
        depth=8,
        width=64,
        text=(TEXT[0], 768),
        extras=lambda draw, batch: {
            "seconds_total": 47,
            "concat_latent_image": draw("sound", 1, 8, 12),
            "concat_mask": (torch.arange(12) < 4).float()[None, None],
        },
        classes=("StableAudio3",),
    ),
    _hunyuan3d_case("hunyuan3d_2", "Hunyuan3Dv2"),
    _hunyuan3d_case("hunyuan3d_2mini", "Hunyuan3Dv2mini", lambda draw, batch: {"guidance": 5.0}, guidance=True),
    Case(
        name="hunyuan3d_21",
        family="hunyuan3d_21",
        make=_hunyuan3d_21,
        latent_shape=(16, 12),
        patch=(1,),
        lists=("blocks",),
        depth=9,
        width=48,
        text=TEXT,
        skips=((0, 8), (1, 7), (2, 6), (3, 5)),
        separable=False,
        classes=("Hunyuan3Dv2_1", "StableAudio3"),  # releases before it fail on a call with one sample
    ),
    _ltxav_case("ltxav"),
    _ltxav_case("ltxav_video", parts=(), latent_shape=(16, 3, 4, 4), patch=(1, 1, 1)),
    _ltxav_case(  # 2.3: the first frame is given, the last one guides, and a voice to go by stands before the sound
        "ltxav_23",
        text=48,
        extra={"caption_proj_before_connector": True, "cross_attention_adaln": True, "apply_gated_attention": True},
        extras=lambda draw, batch: {
            "keyframe_idxs": 8 * normal((1, 3, 16, 2), "guide", 0).abs(),
            "guide_attention_entries": [Entry(pre_filter_count=16, strength=0.5)],
            "ref_audio": Entry(tokens=normal((1, 3, 128), "voice", 0)),
        },
        noise_mask=_first_frame_kept,
        classes=("LTXAV", "ErnieImage"),  # releases before it do not know the voice
    ),
    _minimax_case("minimax_h3"),
    _minimax_case(
        "minimax_h3_frames",
        lambda draw, batch: {
            "minimax_token_tags": torch.tensor([[1, 1, 0, 0, 0, 1, 1, 1]]),
            "minimax_keyframes": [Entry(resolved_frame_index=0, latent=draw("first", 1, 8, 1, 4, 4))],
        },
        adaln_curve_grid=8,
    ),
    _minimax_case("minimax_h3_references", lambda draw, batch: {
        "minimax_refs": [
            Entry(kind="image", latent=draw("image", 1, 8, 1, 4, 4), latent_h=4, latent_w=4),
            Entry(kind="audio", audio_latent=draw("audio", 1, 8, 2, 3), ref_audio_t=3),
        ],
    }),
    # One frame is one window: of several, and in a call with several texts, the host gives every sample queries and keys
    # of the first text (comfy/ldm/seedvr/model.py, v0.30.0, line 687). Its own texts differ in length and run apart.
    _seedvr2_case("seedvr2", lambda: _seedvr2(mlp_type="swiglu", vid_out_norm=True), frames=1),
    _seedvr2_case("seedvr2_7b", _seedvr2_7b, frames=5),
]
