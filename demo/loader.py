"""Load a demo model in process: ``load_demo()`` gives the host's own objects, ready for ``comfy.sample``.

The host (``comfy``) is imported inside the functions, so this module can be imported without it.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from . import autoencoder, scenes, text

FOLDER = pathlib.Path(__file__).parent / "models"
SCHEMA_VERSION = 1
MODELS = ("sd3-mini",)
MODEL_PREFIX, AUTOENCODER_PREFIX, TEXT_PREFIX = "diffusion_model.", "autoencoder.", "text_encoder."


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
        empty = torch.zeros(1, scenes.TOKENS, dtype=torch.long)
        tokens = torch.cat([scenes.parse(one).tokens() if one.strip() else empty for one in batch])
        with torch.no_grad():
            context, pooled = self.encoder(tokens)
        return [[context, {"pooled_output": pooled}]]


@dataclasses.dataclass(frozen=True)
class DemoModel:
    """A loaded demo model.

    Attributes:
        model: The host's ModelPatcher.
        vae: The host's VAE.
        text: The text encoder.
        metadata: Training record and configuration stored in the file.
    """

    model: Any
    vae: Any
    text: DemoText
    metadata: dict[str, Any]

    def encode(self, caption: str | Sequence[str]) -> list[list[Any]]:
        """Captions to host CONDITIONING, see ``DemoText.encode``."""
        return self.text.encode(caption)


def load_demo(name: str = "sd3-mini") -> DemoModel:
    """Load a demo model from ``demo/models``.

    On the CPU it runs in float32; elsewhere the host chooses the dtype.

    Raises:
        ValueError: Unknown name, or a file that is damaged or of another schema version.
        FileNotFoundError: The file is missing.
    """
    if name not in MODELS:
        raise ValueError(f"Unknown demo model {name!r}. Known: {', '.join(MODELS)}.")
    metadata, state = _read(FOLDER / f"{name}.safetensors")
    encoder = text.TextEncoder()
    encoder.load_state_dict(_part(state, TEXT_PREFIX))
    return DemoModel(
        model=_model_patcher(metadata, _part(state, MODEL_PREFIX)),
        vae=_vae(_part(state, AUTOENCODER_PREFIX)),
        text=DemoText(name, encoder.eval().requires_grad_(False)),
        metadata=metadata,
    )


def empty_latent(demo: DemoModel, batch_size: int = 1) -> torch.Tensor:
    """Zeros ``[B, C, h, w]`` in the shape of the model's latents."""
    latent_format = demo.model.get_model_object("latent_format")
    side = scenes.SIZE // latent_format.spacial_downscale_ratio
    return torch.zeros(batch_size, latent_format.latent_channels, side, side)


def captions(name: str, split: str, count: int, seed: int) -> list[str]:
    """``count`` captions for a demo model, the same for the same seed.

    Args:
        name: One of ``MODELS``.
        split: One of ``scenes.SPLITS``.
        count: Number of captions.
        seed: Seed of the draw.
    """
    if name not in MODELS:
        raise ValueError(f"Unknown demo model {name!r}. Known: {', '.join(MODELS)}.")
    return scenes.captions(count, seed, split)


def _read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
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
    if metadata["vocabulary"] != list(scenes.VOCABULARY):
        raise ValueError(f"{path} was trained on another vocabulary than demo/scenes.py has. Update the pack.")
    return metadata, state


def _part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _model_patcher(metadata: dict[str, Any], state: dict[str, torch.Tensor]) -> Any:
    """The steps of the host's ``load_diffusion_model_state_dict``, with a configuration it cannot detect."""
    from comfy import latent_formats, model_management, model_patcher, supported_models

    statistics = metadata["latent_format"]

    class Latent(latent_formats.LatentFormat):
        latent_channels = autoencoder.LATENT_CHANNELS
        spacial_downscale_ratio = autoencoder.DOWNSCALE
        latent_rgb_factors = statistics["rgb_factors"]
        latent_rgb_factors_bias = statistics["rgb_bias"]
        mean = torch.tensor(statistics["mean"])[:, None, None]
        std = torch.tensor(statistics["std"])[:, None, None]

        def process_in(self, latent: torch.Tensor) -> torch.Tensor:
            return (latent - self.mean.to(latent)) / self.std.to(latent)

        def process_out(self, latent: torch.Tensor) -> torch.Tensor:
            return latent * self.std.to(latent) + self.mean.to(latent)

    class Config(supported_models.SD3):
        latent_format = Latent
        sampling_settings: ClassVar = {"shift": metadata["shift"]}

    device = model_management.get_torch_device()
    config = Config(metadata["unet_config"])
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


def _vae(state: dict[str, torch.Tensor]) -> Any:
    """The host's VAE, built in its pass-through form, around the demo's autoencoder."""
    from comfy import model_patcher, sd

    vae = sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
    network = autoencoder.Autoencoder()
    network.load_state_dict(state)
    vae.first_stage_model = network.eval().requires_grad_(False)
    vae.downscale_ratio = vae.upscale_ratio = autoencoder.DOWNSCALE
    vae.latent_channels = autoencoder.LATENT_CHANNELS
    vae.memory_used_encode = lambda shape, dtype: 500 * shape[2] * shape[3] * dtype.itemsize
    vae.memory_used_decode = lambda shape, dtype: 500 * 16 * shape[2] * shape[3] * dtype.itemsize
    vae.patcher = model_patcher.ModelPatcher(vae.first_stage_model, vae.device, vae.patcher.offload_device)
    vae.size = None
    return vae
