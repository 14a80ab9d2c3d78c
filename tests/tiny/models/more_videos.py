"""Tiny video models, continued: the variants of Wan, Mochi, CogVideoX, Kandinsky 5. Three latent frames each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.clip_vision
import comfy.model_base
import comfy.ops
import comfy.supported_models as models
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from tiny.case import Case, Extras, Tokens, from_config, initialise, normal

TEXT = (8, 32)
CLIP_TOKENS = 5  # 257 in a real CLIP vision output; the width of 1280 is fixed in the host (wan/model.py, MLPProj)
Draw = Callable[..., Tensor]


def _clip(draw: Draw, name: str = "clip") -> comfy.clip_vision.Output:
    output = comfy.clip_vision.Output()
    output["penultimate_hidden_states"] = draw(name, 1, CLIP_TOKENS, 1280)
    return output


def _first_frame_kept(side: int, batch: int = 1) -> Tensor:
    mask = torch.ones(batch, 1, 3, side, side)
    mask[:, :, 0] = 0
    return mask


def _first_frame(draw: Draw, side: int) -> dict[str, Any]:
    return {"concat_latent_image": draw("image", 1, 16, 3, side, side), "concat_mask": _first_frame_kept(side)}


def _wan_case(
    name: str,
    config: str,  # a name, because older releases of the host lack some; `since` names further ones
    extras: Extras = lambda draw, batch: {},
    *,
    side: int = 6,
    channels: int = 16,
    depth: int = 8,
    noise_mask: Callable[[int], Tensor] | None = None,
    shrink: Callable[[nn.Module], None] = lambda diffusion_model: None,
    since: tuple[str, ...] = (),
    kind: type[Case] = Case,
    noisy: bool = True,
    **size: Any,
) -> Case:
    def make() -> comfy.model_base.BaseModel:
        like = {"dim": 48, "ffn_dim": 96, "num_heads": 2, "num_layers": depth, "freq_dim": 32, "text_dim": TEXT[1]}
        model = from_config(getattr(models, config), {**like, "in_dim": channels, "out_dim": channels, **size})
        shrink(model.diffusion_model)
        return model

    return kind(
        name=name,
        family="wan",
        make=make,
        latent_shape=(channels, 3, side, side),
        patch=(1, 2, 2),
        lists=("blocks",),
        depth=depth,
        width=48,
        text=TEXT,
        extras=extras,
        noise_mask=noise_mask,
        noisy=noisy,
        classes=(config, *since),
    )


def _humo_audio(diffusion_model: nn.Module) -> None:
    """Channels and width of HuMo's audio projection, 39 M parameters, are constants of its constructor (wan/model.py:1617)."""
    from comfy.ldm.wan.model import AudioProjModel

    diffusion_model.audio_proj = AudioProjModel(
        seq_len=8, blocks=5, channels=8, intermediate_dim=16, operations=comfy.ops.disable_weight_init
    )


class _Motion(nn.Module):
    """For the host's motion encoder: 23 M parameters, images of 512 x 512, both constants (wan/model_animate.py:435)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 4 * 4, 8)

    def get_motion(self, image: Tensor) -> Tensor:
        return self.linear(image.flatten(1))


def _animate_motion(diffusion_model: nn.Module) -> None:
    diffusion_model.motion_encoder = _Motion()  # the face encoder stays: 1024 channels are constants there, 6 M parameters


@dataclass(frozen=True)
class _WithUni3C(Case):
    """With the host's own Uni3C patch: a network beside the model that adds to what a block returned, in place."""

    def build(self, seed: int = 0) -> ModelPatcher:
        from comfy.ldm.wan.uni3c import WanUni3CControlnet
        from comfy_extras.nodes_model_patch import WanUni3CCnetPatch

        patcher, cpu = super().build(seed), torch.device("cpu")
        network = WanUni3CControlnet(
            conv_out_dim=48, dim=32, ffn_dim=64, num_heads=2, num_layers=6, time_embed_dim=48, out_proj_dim=48,
            mid_channels=16, operations=comfy.ops.disable_weight_init,
        )
        initialise(network, seed)
        patch = WanUni3CCnetPatch(ModelPatcher(network, cpu, cpu), None, None, None, 1.0, float("inf"), 0.0)
        patch.prepared_render = normal((1, 16, *self.latent_shape[1:]), "render", seed)
        patcher.set_model_double_block_patch(patch)
        return patcher


def _cogvideo_case(name: str, config: str, extras: Extras, **size: Any) -> Case:
    def make() -> comfy.model_base.BaseModel:
        like = {"num_attention_heads": 3, "attention_head_dim": 16, "time_embed_dim": 32, "num_layers": 8}
        text = {"text_embed_dim": TEXT[1], "max_text_seq_length": 7}
        return from_config(getattr(models, config), {**like, **text, **size})

    return Case(
        name=name,
        family="cogvideox",
        make=make,
        latent_shape=(16, 3, 6, 6),
        patch=(size.get("patch_size_t", 1), 2, 2),
        lists=("blocks",),
        depth=8,
        width=48,
        # Up to four times the length, the host repeats the shorter text rather than make two calls (conds.py:77), which
        # this joint attention sees: 7 against 5 tokens is beyond that.
        text=(7, TEXT[1]),
        extras=extras,
        entering=_cogvideo_entering,
        classes=(config,),
    )


def _cogvideo_entering(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tokens:
    return keywords["hidden_states"], keywords["encoder_hidden_states"]


def _mochi() -> comfy.model_base.BaseModel:
    # The blocks take one width of their MLP alone, 12288 (asymm_models_joint.py:199): built with it, then made narrow.
    from comfy.ldm.genmo.joint_model.layers import FeedForward

    size = {"hidden_size_x": 48, "hidden_size_y": 32, "depth": 8, "num_heads": 2, "mlp_ratio_x": 256.0}
    ports = {"in_channels": 12, "learn_sigma": False, "use_t5": True, "t5_feat_dim": TEXT[1], "t5_token_length": TEXT[0]}
    rest = {"qk_norm": True, "qkv_bias": False, "timestep_scale": 1000.0}
    model = from_config(models.GenmoMochi, {**size, **ports, **rest})
    for block in model.diffusion_model.blocks:
        block.mlp_x = FeedForward(48, 96, multiple_of=16, ffn_dim_multiplier=None, operations=comfy.ops.disable_weight_init)
    return model


def _kandinsky_case(name: str, config: str, latent_shape: tuple[int, ...], channels: int, extras: Extras) -> Case:
    def make() -> comfy.model_base.BaseModel:
        size = {"model_dim": 48, "ff_dim": 96, "time_dim": 32, "axes_dims": (4, 6, 6), "num_text_blocks": 1,
                "num_visual_blocks": 8, "visual_embed_dim": 4 * channels}
        return from_config(getattr(models, config), {**size, "in_text_dim": TEXT[1], "in_text_dim2": 16})

    return Case(
        name=name,
        family="kandinsky",
        make=make,
        latent_shape=latent_shape,
        patch=(1, 2, 2)[-len(latent_shape) + 1:],
        lists=("visual_transformer_blocks",),
        depth=8,
        width=48,
        text=TEXT,
        extras=lambda draw, batch: {"pooled_output": draw("pooled", 1, 16), **extras(draw, batch)},
        classes=(config,),
    )


CASES = [
    _wan_case(
        "wan_camera",
        "WAN21_Camera",
        lambda draw, batch: {
            "concat_latent_image": draw("image", 1, 16, 3, 6, 6),  # without a mask: 16 further channels
            "clip_vision_output": _clip(draw),
            "camera_conditions": draw("camera", 1, 2, 3, 48, 48),
        },
        in_dim=32,
        in_dim_control_adapter=2,
    ),
    _wan_case(
        "wan22_camera",
        "WAN22_Camera",
        lambda draw, batch: {**_first_frame(draw, 6), "camera_conditions": draw("camera", 1, 2, 3, 48, 48)},
        in_dim=36,
        in_dim_control_adapter=2,
    ),
    _wan_case(  # a reference image as tokens before the video's
        "wan_fun_control",
        "WAN21_FunControl2V",
        lambda draw, batch: {
            "concat_latent_image": draw("control and image", 1, 32, 3, 6, 6),
            "clip_vision_output": _clip(draw),
            "reference_latents": [draw("reference", 1, 16, 1, 6, 6)],
        },
        in_dim=48,
        in_dim_ref_conv=16,
    ),
    _wan_case(  # the same in the 5B layout, where each frame has its own timestep and the reference has none
        "wan22_fun_control",
        "WAN22_T2V",
        lambda draw, batch: {
            "concat_latent_image": draw("control and image", 1, 96, 3, 6, 6),
            "concat_mask": _first_frame_kept(6),
            "concat_mask_index": 48,
            "reference_latents": [draw("reference", 1, 48, 1, 6, 6)],
        },
        channels=48,
        noise_mask=lambda batch: _first_frame_kept(6, batch),
        in_dim=148,
        in_dim_ref_conv=48,
    ),
    _wan_case("wan22_t2v", "WAN22_T2V", channels=48),
    _wan_case(  # subjects as further frames behind the video, as the node WanPhantomSubjectToVideo adds them
        "wan_phantom",
        "WAN21_T2V",
        lambda draw, batch: {"time_dim_concat": draw("subjects", 1, 16, 2, 6, 6)},
    ),
    _wan_case(  # references of other sizes as tokens behind the video's
        "wan_context_latents",
        "WAN21_T2V",
        lambda draw, batch: {"context_latents": [draw("first", 1, 16, 1, 6, 4), draw("second", 1, 16, 2, 4, 4)]},
        since=("WAN21_SCAIL2",),  # as new as these
    ),
    _wan_case("wan_flow_rvs", "WAN21_FlowRVS", noisy=False),
    _wan_case(  # 17B: the reference is one more frame behind the video
        "wan_humo",
        "WAN21_HuMo",
        lambda draw, batch: {
            "audio_embed": draw("audio", 1, 3, 8, 5, 8),
            "reference_latents": [draw("reference", 1, 16, 1, 6, 6)],
        },
        in_dim=36,
        shrink=_humo_audio,
    ),
    _wan_case(  # a reference before the video, the poses at half its size behind it
        "wan_scail",
        "WAN21_SCAIL",
        lambda draw, batch: {
            "clip_vision_output": _clip(draw),
            "reference_latents": [draw("reference", 1, 16, 1, 8, 8)],
            "pose_video_latent": draw("pose", 1, 16, 3, 4, 4),
        },
        side=8,
        in_dim=20,
    ),
    _wan_case(  # replacement mode: two references, a mask for each and for the poses, a first frame that is kept
        "wan_scail2",
        "WAN21_SCAIL2",
        lambda draw, batch: {
            "clip_vision_output": _clip(draw),
            "reference_latents": [draw(f"reference {i}", 1, 16, 1, 8, 8) for i in range(2)],
            "pose_video_latent": draw("pose", 1, 16, 3, 4, 4),
            "driving_mask_28ch": draw("driving mask", 1, 3, 28, 4, 4),
            "ref_mask_28ch": draw("reference mask", 1, 5, 28, 8, 8),
            "ref_mask_flag": False,
        },
        side=8,
        noise_mask=lambda batch: _first_frame_kept(8, batch),
        since=("SeedVR2",),  # as new as several references
        in_dim=20,
    ),
    _wan_case(  # the audio is added behind blocks 0 and 4, in place, to the video's tokens alone
        "wan22_s2v",
        "WAN22_S2V",
        lambda draw, batch: {
            "audio_embed": draw("audio", 1, 25, 16, 12),
            "control_video": draw("control", 1, 16, 3, 8, 8),
            "reference_latents": [draw("reference", 1, 16, 1, 8, 8)],
            "reference_motion": draw("motion", 1, 16, 3, 8, 8),
        },
        side=8,  # the motion is patched by 8 x 8
        audio_dim=16,
        audio_inject_layers=[0, 4],
    ),
    _wan_case(  # the face is added behind blocks 0 and 5; a depth that is no multiple of 5 fails (wan/model_animate.py:440)
        "wan22_animate",
        "WAN22_Animate",
        lambda draw, batch: {
            **_first_frame(draw, 6),
            "clip_vision_output": _clip(draw),
            "pose_video_latent": draw("pose", 1, 16, 2, 6, 6),
            "face_video_pixels": draw("face", 1, 3, 5, 4, 4),
        },
        depth=10,
        in_dim=36,
        motion_encoder_dim=8,
        shrink=_animate_motion,
    ),
    _wan_case(  # the music is added behind blocks 0 and 4, in place: 8 groups of tokens a frame, so a side of 8
        "wan22_dancer",
        "WAN22_WanDancer",
        lambda draw, batch: {
            **_first_frame(draw, 8),
            "clip_vision_output": _clip(draw),
            "clip_vision_output_ref": _clip(draw, "clip of the reference"),
            "audio_embed": draw("music", 1, 10, 35),
            "audio_inject_scale": 1.0,
            "fps": 30.0,
        },
        side=8,
        since=("JoyImage",),  # releases before that cannot run it in a batch
        in_dim=36,
        audio_inject_layers=[0, 4],
        music_dim=16,
        music_heads=2,
        music_latent_dim=16,
    ),
    _wan_case("wan_uni3c", "WAN21_T2V", kind=_WithUni3C, since=("JoyImage",)),  # as new as Uni3C
    Case(
        name="mochi",
        family="mochi",
        make=_mochi,
        latent_shape=(12, 3, 6, 6),
        patch=(1, 2, 2),
        lists=("blocks",),
        depth=8,
        width=48,
        text=TEXT,
        extras=lambda draw, batch: {"attention_mask": torch.tensor([[1] * 5 + [0] * 3])},
        entering=lambda args, kwargs: (args[0], args[2]),  # (video, text); the time between them
        classes=("GenmoMochi",),
    ),
    _cogvideo_case(  # 2B: positions learned, in the weights
        "cogvideox_t2v",
        "CogVideoX_T2V",
        lambda draw, batch: {},
        use_learned_positional_embeddings=True,
        sample_width=6,
        sample_height=6,
        sample_frames=9,
    ),
    _cogvideo_case(  # 1.5: pairs of frames (three are padded to four), and an offset that is embedded like the time
        "cogvideox_i2v",
        "CogVideoX_I2V",
        lambda draw, batch: {"concat_latent_image": draw("image", 1, 16, 1, 6, 6), "ofs": torch.tensor([1.5])},
        use_rotary_positional_embeddings=True,
        patch_size_t=2,
        ofs_embed_dim=32,
    ),
    _cogvideo_case(  # 5B
        "cogvideox_inpaint",
        "CogVideoX_Inpaint",
        lambda draw, batch: {"concat_latent_image": draw("mask and video", 1, 32, 3, 6, 6)},
        use_rotary_positional_embeddings=True,
    ),
    _kandinsky_case("kandinsky5_t2v", "Kandinsky5", (16, 3, 6, 6), 33, lambda draw, batch: {}),
    _kandinsky_case(
        "kandinsky5_i2v",
        "Kandinsky5",
        (16, 3, 6, 6),
        33,
        lambda draw, batch: {"time_dim_replace": draw("image", 1, 16, 1, 6, 6), "concat_mask": _first_frame_kept(6)},
    ),
    _kandinsky_case("kandinsky5_image", "Kandinsky5Image", (16, 6, 6), 16, lambda draw, batch: {}),
]
