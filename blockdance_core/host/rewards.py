"""How good results are: one number for every picture, by which a policy is trained that decides picture by picture.

A reward gets latents and may decode them; rewards that are combined share what is decoded.
"""

from __future__ import annotations

import abc
import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from comfy.clip_model import CLIPTextModel
from comfy.sd1_clip import SDClipModel
from torch import Tensor

from blockdance_core.host.search import SATURATION
from blockdance_core.metrics import ssim

if TYPE_CHECKING:
    from comfy.clip_vision import ClipVisionModel
    from comfy.sd import CLIP, VAE

_FRAMES = 8
"""So many frames of a clip are looked at where each costs a run of a model."""


class Reward(Protocol):
    """Judges results.

    Attributes:
        name: What records and messages call it.
        reads: Whether it goes by the prompts.
    """

    name: str
    reads: bool

    def __call__(self, results: Tensor, full: Tensor, texts: Sequence[str]) -> Tensor:
        """Judge one batch.

        Args:
            results: Latents [B, C, ...] as the sampler returned them; rewards that decode need what a VAE Decode node gets.
            full: The full run's latents, same shape.
            texts: B prompts, '' where unknown.

        Returns:
            Quality [B], float64 on the CPU, of the order of 0..1; more is better.
        """


class Batch:
    """What is judged; latents are decoded once for each VAE, when a reward first asks.

    Args:
        results: Latents [B, C, ...]. Of nested ones (a clip with its sound) the first part counts, as for a VAE Decode node.
        full: The full run's latents, same shape.
        texts: B prompts.

    Raises:
        ValueError: The sizes do not fit together.
    """

    def __init__(self, results: Tensor, full: Tensor, texts: Sequence[str]) -> None:
        self.results, self.full = (latents.unbind()[0] if latents.is_nested else latents for latents in (results, full))
        self.texts = tuple(texts)
        if self.results.shape != self.full.shape:
            raise ValueError(f"expected results of the full run's shape {tuple(self.full.shape)}, "
                             f"got {tuple(self.results.shape)}")
        if len(self.texts) != len(self.results):
            raise ValueError(f"expected one text for each of {len(self.results)} results, got {len(self.texts)}")
        self._decoded: dict[tuple[int, int], Tensor] = {}

    def pictures(self, vae: VAE) -> Tensor:
        """The results, decoded: [B, F, H, W, C], float32 0..1 on the CPU; a picture is a clip of one frame."""
        return self._decode(vae, self.results)

    def references(self, vae: VAE) -> Tensor:
        """The full run's, decoded in the same way."""
        return self._decode(vae, self.full)

    def frames(self, vae: VAE) -> Tensor:
        """The results, at most 8 evenly spread frames of each in a row: [B * F, H, W, C]."""
        pictures = self.pictures(vae)
        count = pictures.shape[1]
        chosen = torch.linspace(0, count - 1, min(count, _FRAMES)).round().long()
        return pictures[:, chosen].flatten(0, 1)

    def _decode(self, vae: VAE, latents: Tensor) -> Tensor:
        key = id(vae), id(latents)
        if key not in self._decoded:
            pictures = vae.decode(latents)
            if pictures.ndim not in (4, 5) or len(pictures) != len(latents):
                raise ValueError(f"The VAE decoded latents {tuple(latents.shape)} to {tuple(pictures.shape)}: expected "
                                 f"pictures [{len(latents)}, H, W, C] or clips [{len(latents)}, F, H, W, C]. "
                                 "Connect the VAE of the model.")
            pictures = pictures.cpu().float().nan_to_num(0.0)  # black, as where such pictures are saved
            self._decoded[key] = pictures.unsqueeze(1) if pictures.ndim == 4 else pictures
        return self._decoded[key]


class _Judge(abc.ABC):
    """A reward that shares what is decoded with those beside it."""

    reads = False

    def __call__(self, results: Tensor, full: Tensor, texts: Sequence[str]) -> Tensor:
        """See `Reward`."""
        with torch.inference_mode():  # as the host runs its nodes: weights that were loaded so cannot be moved otherwise
            values = self.judge(Batch(results, full, texts))
        return values.cpu().double().clone()  # made outside of it: a loss may hold them

    @abc.abstractmethod
    def judge(self, batch: Batch) -> Tensor:
        """Quality [B] of a batch, in inference mode."""


class Fidelity(_Judge):
    """How close a result comes to the full run's, in latent space: it needs neither weights nor decoding.

    It is 1 - s / (s + 0.1), where s is the squared error as a share of the variance of the full run's sample. It saturates,
    so that a lost picture counts once; one that is not finite counts 0.
    """

    name = "fidelity"

    def judge(self, batch: Batch) -> Tensor:
        """Quality [B], 0..1; 1 where the two are equal."""
        results, full = (latents.cpu().double().flatten(1) for latents in (batch.results, batch.full))
        error = (results - full).square().mean(1)
        lost = error / (error + SATURATION * full.var(1))
        return torch.where(error == 0, 1.0, 1 - lost).nan_to_num(0.0)


class Similarity(_Judge):
    """SSIM of the decoded pictures to the full run's; a clip counts with the mean of its frames.

    Args:
        vae: VAE of the model.
    """

    name = "ssim"

    def __init__(self, vae: VAE) -> None:
        self.vae = vae

    def judge(self, batch: Batch) -> Tensor:
        """Quality [B], at most 1."""
        pictures, references = (decoded.unbind(1) for decoded in (batch.pictures(self.vae), batch.references(self.vae)))
        return torch.stack([ssim(one, other) for one, other in zip(pictures, references, strict=True)]).mean(0)


class ClipScore(_Judge):
    """How well pictures show what their prompts say: the cosine between the embeddings that CLIP gives both.

    A clip counts with the mean of at most 8 evenly spread frames. Of a long prompt CLIP reads the first 75 tokens. Cosines
    of good pictures are about 0.2 to 0.4; without a prompt they mean nothing.

    Args:
        vae: VAE of the model.
        clip: CLIP with a CLIP text encoder that has its projection: not every file of CLIP-L has. Of several, the one is
            taken that fits.
        clip_vision: The vision model of the same CLIP.

    Raises:
        ValueError: The two are not of one CLIP.
    """

    name, reads = "clip", True

    def __init__(self, vae: VAE, clip: CLIP, clip_vision: ClipVisionModel) -> None:
        self.vae, self.clip_vision = vae, clip_vision
        self.clip = _projecting(clip, clip_vision)
        self._embeddings: dict[str, Tensor] = {}

    def judge(self, batch: Batch) -> Tensor:
        """Quality [B], -1..1."""
        images = self.clip_vision.encode_image(batch.frames(self.vae))["image_embeds"].cpu().double()
        texts = torch.stack([self._embedding(text) for text in batch.texts])
        return torch.cosine_similarity(images.unflatten(0, (len(texts), -1)), texts.unsqueeze(1), dim=-1).mean(1)

    def _embedding(self, text: str) -> Tensor:
        if text not in self._embeddings:
            pooled = self.clip.encode_from_tokens(self.clip.tokenize(text), return_pooled=True)[1]
            self._embeddings[text] = pooled[0].cpu().double()
        return self._embeddings[text]


class _TextEncoder:
    """One text encoder of a CLIP in place of all of them, and with its projection.

    In ComfyUI v0.30.0 the embedding of CLIP-L in SD1, SD3 and Flux is not projected, and in SD3 stands beside that of CLIP-G
    (comfy/sd1_clip.py, SD1CheckpointClipModel; comfy/text_encoders/sd3_clip.py and flux.py).
    """

    def __init__(self, encoder: SDClipModel, key: str) -> None:
        self.encoder, self.key = encoder, key

    def reset_clip_options(self) -> None:
        self.encoder.reset_clip_options()

    def set_clip_options(self, options: dict[str, Any]) -> None:
        self.encoder.set_clip_options({**options, "projected_pooled": True})

    def encode_token_weights(self, tokens: dict[str, Any]) -> Any:
        return self.encoder.encode_token_weights(tokens[self.key])


_PAIRS = (
    "Models of one CLIP fit together: CLIP-L (width 768; SD1, SDXL, SD3, Flux) and CLIP-ViT-L-14; CLIP-H (1024; SD2) and "
    "CLIP-ViT-H-14; CLIP-G (1280; SDXL, SD3) and CLIP-ViT-bigG-14."
)


def _projecting(clip: CLIP, clip_vision: ClipVisionModel) -> CLIP:
    """A copy of a CLIP that gives the text embedding that a vision model's can be compared with."""
    width = getattr(getattr(clip_vision.model, "visual_projection", None), "out_features", None)
    if width is None:
        raise ValueError(f"The CLIP vision model ({type(clip_vision.model).__name__}, {clip_vision.model_type}) has no "
                         f"projection into a space that it shares with texts, as SigLIP and DINO have none. {_PAIRS}")
    children = clip.cond_stage_model.named_children()
    encoders = {name: child for name, child in children
                if isinstance(child, SDClipModel) and isinstance(child.transformer, CLIPTextModel)}
    widths = {name: encoder.transformer.text_projection.out_features for name, encoder in encoders.items()}
    fitting = [name for name, of in widths.items() if of == width]
    if not fitting:
        found = ", ".join(f"{name} with width {of}" for name, of in widths.items()) or "no CLIP text encoder"
        raise ValueError(f"The CLIP vision model gives embeddings of width {width}, and the CLIP has {found}. {_PAIRS}")
    weight = encoders[fitting[0]].transformer.text_projection.weight
    if weight is None or not weight.float().any() or not weight.float().isfinite().all():  # the host fills in nothing sensible
        raise ValueError(f"{fitting[0]} has no text projection: text_projection.weight was missing in the file that the CLIP "
                         "was loaded from. Load the whole CLIP, such as openai/clip-vit-large-patch14.")
    clip = clip.clone()
    clip.cond_stage_model = _TextEncoder(encoders[fitting[0]], fitting[0].removeprefix("clip_"))
    return clip


class ImageReward(_Judge):
    """What people would prefer: ImageReward v1.0, squashed into 0..1 by the logistic function.

    Unsquashed, its mean over the pictures that people compared is about 0 and the deviation 1. A clip counts with the mean of
    at most 8 evenly spread frames. The first batch downloads the weights, about 1.8 GB.

    Args:
        vae: VAE of the model.

    Raises:
        ImportError: The package is missing.

    Source: J. Xu et al., "ImageReward", NeurIPS 2023.
    """

    name, reads = "image-reward", True

    def __init__(self, vae: VAE) -> None:
        self.vae = vae
        try:
            self._package: Any = importlib.import_module("ImageReward")
        except ImportError as error:
            raise ImportError(
                f"image-reward needs two packages that ComfyUI does not bring ({error}). Install them into ComfyUI's Python: "
                "pip install image-reward git+https://github.com/openai/CLIP.git"
            ) from error

    @functools.cached_property
    def model(self) -> Any:
        """The model, on the host's device; loaded when first asked for."""
        from comfy.model_management import get_torch_device

        try:
            return self._package.load("ImageReward-v1.0", device=str(get_torch_device()))
        except OSError as error:
            raise RuntimeError(
                f"image-reward cannot load its weights, 1.8 GB that it downloads from Hugging Face when first used: {error}"
            ) from error

    def judge(self, batch: Batch) -> Tensor:
        """Quality [B], 0..1."""
        from PIL import Image

        clips = (batch.frames(self.vae)[..., :3].clamp(0, 1) * 255).round().byte().unflatten(0, (len(batch.texts), -1))
        values = []
        for text, clip in zip(batch.texts, clips, strict=True):
            scores = self.model.score(text, [Image.fromarray(frame.numpy()) for frame in clip])  # a number, if it is one
            values.append(torch.as_tensor(scores, dtype=torch.float64).sigmoid().mean())
        return torch.stack(values)


class FromFunction(_Judge):
    """Any function of pictures and prompts.

    Args:
        function: Gets pictures [N, H, W, C], float32 0..1 on the CPU, and N prompts; returns N numbers of the order of 0..1,
            more is better. Of a clip it gets at most 8 evenly spread frames, each with the prompt; their mean counts.
        vae: VAE of the model.
        name: What records and messages call it.
    """

    reads = True

    def __init__(self, function: Callable[[Tensor, Sequence[str]], Any], vae: VAE, name: str) -> None:
        self.function, self.vae, self.name = function, vae, name

    def judge(self, batch: Batch) -> Tensor:
        """What the function returns, [B].

        Raises:
            ValueError: It returned something else than a finite number for each picture.
        """
        frames = batch.frames(self.vae)
        each = len(frames) // len(batch.texts)
        returned = self.function(frames, [text for text in batch.texts for _ in range(each)])
        values = torch.as_tensor(returned, dtype=torch.float64, device="cpu")
        if values.numel() != len(frames) or not values.isfinite().all():
            raise ValueError(f"The reward {self.name} returned {values.numel()} numbers for {len(frames)} pictures, "
                             f"{int(values.isfinite().sum())} of them finite: expected a finite one for each.")
        return values.reshape(-1, each).mean(1)


class Combined(_Judge):
    """The weighted mean of rewards, which decode each batch once.

    Args:
        parts: Weights and rewards.

    Raises:
        ValueError: There are none, or a weight is not positive and finite.
    """

    def __init__(self, parts: Sequence[tuple[float, Reward]]) -> None:
        if not parts:
            raise ValueError("expected at least one reward, got none")
        for weight, reward in parts:
            _require_weight(weight, reward.name)
        self.parts = tuple(parts)
        self.reads = any(reward.reads for _, reward in parts)
        self.name = " + ".join(f"{weight:g} {reward.name}" for weight, reward in parts)

    def judge(self, batch: Batch) -> Tensor:
        """Quality [B]."""
        total = torch.zeros(len(batch.texts), dtype=torch.float64)
        for weight, reward in self.parts:
            judged = reward.judge(batch) if isinstance(reward, _Judge) else reward(batch.results, batch.full, batch.texts)
            total += weight * judged.cpu().double()
        return total / sum(weight for weight, _ in self.parts)


_INPUTS = {"vae": "a VAE", "clip": "a CLIP", "clip_vision": "a CLIP vision model"}
_KNOWN: dict[str, tuple[Callable[..., Reward], tuple[str, ...]]] = {
    "fidelity": (Fidelity, ()),
    "ssim": (Similarity, ("vae",)),
    "clip": (ClipScore, ("vae", "clip", "clip_vision")),
    "image-reward": (ImageReward, ("vae",)),
}


def by_name(text: str, vae: VAE | None = None, clip: CLIP | None = None, clip_vision: ClipVisionModel | None = None) -> Reward:
    """The reward that a user names, such as `fidelity`, or `fidelity + 0.5 clip` for a weighted mean.

    Args:
        text: Names out of fidelity, ssim, clip and image-reward, with + between them and a weight in front where it is not 1.
        vae: For all but fidelity.
        clip: For clip.
        clip_vision: For clip.

    Raises:
        ValueError: A name is unknown, a weight is not positive and finite, or something that a reward needs is missing.
        ImportError: A package that a reward needs is missing.
    """
    given = {"vae": vae, "clip": clip, "clip_vision": clip_vision}
    parts: list[tuple[float, Reward]] = []
    for weight, name in [_parsed(term) for term in text.split("+")]:
        make, needs = _KNOWN[name]
        if missing := [_INPUTS[need] for need in needs if given[need] is None]:
            raise ValueError(f"{name} needs {_listed([_INPUTS[need] for need in needs])}: connect {_listed(missing)}.")
        parts.append((weight, make(**{need: given[need] for need in needs})))
    return parts[0][1] if len(parts) == 1 else Combined(parts)


def _parsed(term: str) -> tuple[float, str]:
    """Weight and name of a term such as `0.5 clip`."""
    *weights, name = term.replace("*", " ").lower().split() or [""]
    if name not in _KNOWN:
        raise ValueError(f"Unknown reward {name!r}. Known: {', '.join(_KNOWN)}; or several with weights, such as "
                         "fidelity + 0.5 clip.")
    try:
        weight = float(" ".join(weights)) if weights else 1.0
    except ValueError:
        raise ValueError(f"The reward {term.strip()!r} has no number in front of {name}: expected terms such as 0.5 {name}, "
                         "with + between them.") from None
    _require_weight(weight, name)
    return weight, name


def _require_weight(weight: float, name: str) -> None:
    if not 0 < weight < math.inf:
        raise ValueError(f"The weight of {name} is {weight:g}: expected a positive, finite number.")


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
