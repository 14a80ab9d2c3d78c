"""Load a demo model in process: ``load_demo()`` gives the host's own objects, ready for ``comfy.sample``.

The host (``comfy``) is imported inside the functions, so this module can be imported without it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from . import autoencoder, scenes, text
from .architectures import ARCHITECTURES, Architecture

FOLDER = pathlib.Path(__file__).parent / "models"
POLICIES = pathlib.Path(__file__).parent / "policies"
SCHEMA_VERSION = 2
MODELS = tuple(name for name in ARCHITECTURES if (FOLDER / f"{name}.safetensors").is_file())
AUTOENCODER = "autoencoder"  # shared by all models
MODEL_PREFIX, TEXT_PREFIX = "diffusion_model.", "text_encoder."


@dataclasses.dataclass(frozen=True)
class DemoText:
    """A text encoder and what it produces.

    Attributes:
        name: The demo model it belongs to.
        encoder: Module on the CPU, float32.
    """

    name: str
    encoder: text.TextEncoder

    def encode(self, caption: str | Sequence[str]) -> list[list[Any]]:
        """One caption, or one for each picture of a batch, to host CONDITIONING; an empty one is the unconditional.

        Raises:
            ValueError: A caption is outside the grammar; the message names the word and the known words.
        """
        batch = [caption] if isinstance(caption, str) else caption
        moving = ARCHITECTURES[self.name].moving
        empty = torch.zeros(1, scenes.PHRASES, len(scenes.ATTRIBUTES), dtype=torch.long)
        tokens = torch.cat([scenes.parse(one, moving).tokens() if one.strip() else empty for one in batch])
        with torch.no_grad():
            context, pooled = self.encoder(tokens)
        return [[context, {"pooled_output": pooled}]]


@dataclasses.dataclass(frozen=True)
class DemoModel:
    """A loaded demo model.

    Attributes:
        name: One of ``MODELS``.
        model: The host's ModelPatcher.
        vae: The host's VAE.
        text: The text encoder.
        metadata: Training record and configuration stored in the file.
    """

    name: str
    model: Any
    vae: Any
    text: DemoText
    metadata: dict[str, Any]

    @property
    def sampling(self) -> dict[str, Any]:
        """What its card and all figures use: ``sampler``, ``scheduler``, ``cfg``, ``steps``."""
        return dict(ARCHITECTURES[self.name].sampling)

    def encode(self, caption: str | Sequence[str]) -> list[list[Any]]:
        """Captions to host CONDITIONING, see ``DemoText.encode``."""
        return self.text.encode(caption)


def load_demo(name: str = "sd3-mini", folder: pathlib.Path | None = None) -> DemoModel:
    """Load a demo model from ``demo/models``, or from another folder.

    On the CPU it runs in float32; elsewhere the host chooses the dtype.

    Raises:
        ValueError: Unknown name, or a file that is damaged or of another schema version.
        FileNotFoundError: The file is missing.
    """
    architecture = _architecture(name)
    folder = folder or FOLDER
    metadata, state = read(folder / f"{name}.safetensors")
    first_metadata, first = read(folder / f"{AUTOENCODER}.safetensors")
    for key, value in (
        ("vocabulary", list(scenes.VOCABULARY)),
        ("unet_config", architecture.unet_config),
        ("sampling_settings", architecture.sampling_settings),
        ("objective", architecture.objective),
        ("encoder", first_metadata["encoder"]),
    ):
        if metadata[key] != value:
            raise ValueError(f"{name} in {folder} was trained with another {key} than this pack has. Update the pack.")
    encoder = text.TextEncoder()
    encoder.load_state_dict(part(state, TEXT_PREFIX))
    return DemoModel(
        name=name,
        model=_model_patcher(architecture, metadata, part(state, MODEL_PREFIX)),
        vae=_vae(architecture, first),
        text=DemoText(name, encoder.eval().requires_grad_(False)),
        metadata={**metadata, "autoencoder_training": first_metadata["training"]},
    )


def empty_latent(model: Any, batch_size: int = 1) -> torch.Tensor:
    """Zeros ``[B, C, h, w]``, for clips ``[B, C, F, h, w]``, in the shape of a demo model's latents.

    Args:
        model: ``DemoModel.model``, or a clone of it that other nodes have patched.
        batch_size: B.

    Raises:
        ValueError: The model is no demo model.
    """
    shape = getattr(model.get_model_object("latent_format"), "demo_shape", None)
    if shape is None:
        raise ValueError("The model is no BlockDance demo model. Use an empty latent that fits it.")
    return torch.zeros(batch_size, *shape)


def captions(name: str, split: str, count: int, seed: int, difficulty: str | None = None) -> list[str]:
    """``count`` captions for a demo model, the same for the same seed.

    Args:
        name: One of ``MODELS``.
        split: One of ``scenes.SPLITS``.
        count: Number of captions.
        seed: Seed of the draw.
        difficulty: One of ``scenes.DIFFICULTIES``; None mixes them.
    """
    return scenes.captions(split, count, seed, _architecture(name).moving, difficulty)


def _architecture(name: str) -> Architecture:
    if name not in ARCHITECTURES:
        raise ValueError(f"Unknown demo model {name!r}. Known: {', '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[name]


def read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata and weights, in float32, of a file of this pack.

    Raises:
        ValueError: It is damaged, or of another schema version.
        FileNotFoundError: It is missing.
    """
    import safetensors

    if not path.is_file():
        raise FileNotFoundError(f"The demo model {path.name} is not in {path.parent}. Get it from the repository again.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118, not a dict
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}). Get it from the repository again.") from error
    if metadata.get("schema_version") != SCHEMA_VERSION:
        found = metadata.get("schema_version")
        raise ValueError(f"{path} has schema version {found}, this loader reads {SCHEMA_VERSION}. Update the pack.")
    return metadata, state


def part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The weights under a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _model_patcher(architecture: Architecture, metadata: dict[str, Any], state: dict[str, torch.Tensor]) -> Any:
    """The steps of the host's ``load_diffusion_model_state_dict``, with a configuration it cannot detect."""
    from comfy import latent_formats, model_management, model_patcher, supported_models

    class Latent(latent_formats.LatentFormat):
        latent_channels = architecture.channels
        latent_dimensions = 3 if architecture.moving else 2
        spacial_downscale_ratio = architecture.downscale
        demo_shape = architecture.latent_shape
        latent_rgb_factors = metadata["rgb_factors"]
        latent_rgb_factors_bias = metadata["rgb_bias"]

    class Config(getattr(supported_models, architecture.base)):  # type: ignore[misc]
        latent_format = Latent
        sampling_settings: ClassVar = architecture.sampling_settings

    device = model_management.get_torch_device()
    config = Config(dict(architecture.unet_config))
    if model_management.is_device_cpu(device):
        dtype = torch.float32
    else:
        parameters = sum(value.numel() for value in state.values())
        dtype = model_management.unet_dtype(model_params=parameters, supported_dtypes=config.supported_inference_dtypes)
    cast = model_management.unet_manual_cast(dtype, device, config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, cast)
    model = config.get_model(state, "")
    missing, unexpected = model.diffusion_model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ValueError(f"The demo model does not fit this ComfyUI: missing {missing}, unexpected {unexpected}.")
    return model_patcher.ModelPatcher(model, device, model_management.unet_offload_device())


class Codec(torch.nn.Module):
    """The autoencoder as a host VAE's network: pictures ``[B, 3, H, W]`` or clips ``[B, 3, F, H, W]`` in -1..1."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.autoencoder = autoencoder.Autoencoder()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels to latents as the model takes them."""
        step = autoencoder.DOWNSCALE
        x = x[..., : x.shape[-2] // step * step, : x.shape[-1] // step * step]
        frames = x.transpose(1, 2) if x.ndim == 5 else x[:, None]
        return self.architecture.pack(self.autoencoder.encode(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents to pixels, which may leave -1..1 a little."""
        height, width = (side * self.architecture.downscale for side in z.shape[-2:])
        odd = [-side % self.architecture.shuffle for side in z.shape[-2:]]
        z = torch.nn.functional.pad(z, (0, odd[1], 0, odd[0]), mode="replicate") if any(odd) else z
        latents = self.architecture.unpack(z)
        frames = self.autoencoder.decode(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])
        frames = frames[..., :height, :width]
        return frames.transpose(1, 2) if self.architecture.moving else frames[:, 0]


def _vae(architecture: Architecture, state: dict[str, torch.Tensor]) -> Any:
    """The host's VAE, built in its pass-through form, around the demo's autoencoder."""
    from comfy import model_patcher, sd

    vae = sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
    network = Codec(architecture)
    network.autoencoder.load_state_dict(state)
    vae.first_stage_model = network.eval().requires_grad_(False)
    ratio = architecture.downscale
    vae.downscale_ratio = vae.upscale_ratio = (lambda frames: frames, ratio, ratio) if architecture.moving else ratio
    vae.downscale_index_formula = vae.upscale_index_formula = (1, ratio, ratio) if architecture.moving else None
    vae.latent_channels = architecture.channels
    vae.latent_dim = 3 if architecture.moving else 2
    vae.memory_used_encode = lambda shape, dtype: 500 * math.prod(shape[2:]) * dtype.itemsize
    vae.memory_used_decode = lambda shape, dtype: 500 * ratio**2 * math.prod(shape[2:]) * dtype.itemsize
    vae.patcher = model_patcher.ModelPatcher(vae.first_stage_model, vae.device, vae.patcher.offload_device)
    vae.size = None
    return vae
