"""What a tiny model is, and how its weights and conditionings are drawn."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_base
import comfy.supported_models_base
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

Conditioning = list[list[Any]]  # comfy's format: [[text [1, L, C], {"pooled_output": ..., ...}], ...]
Extras = Callable[[Callable[..., Tensor], int], dict[str, Any]]
Tokens = tuple["Tensor | None", ...]
Entering = Callable[[tuple[Any, ...], dict[str, Any]], Tokens]


def first_argument(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tokens:
    """What flows into a block that takes and returns one tensor, its first argument."""
    return (arguments[0],)


def image_and_text(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tokens:
    """What flows into a double block that is called with `img=` and `txt=`, and returns them in this order."""
    return keywords["img"], keywords["txt"]


def text_first(tokens: Tokens) -> Tokens:
    """(image, text) of a double block -> the one sequence of the single blocks, text before image."""
    image, text = tokens
    assert image is not None
    assert text is not None
    return (torch.cat([text, image], 1),)


@dataclass(frozen=True)
class Case:
    """One tiny model of a family, with everything needed to sample from it.

    Attributes:
        name: Key in `CASES`.
        family: Model family, shared by variants.
        make: Builds the host's BaseModel in fp32 with unset weights.
        latent_shape: Shape of one latent without the batch, `[C, H, W]` or `[C, T, H, W]`.
        patch: Patch size along the latent's spatial (and temporal) dimensions.
        lists: Attribute paths of the block lists (or dicts), in execution order.
        depth: Number of blocks in all lists, without any at the end that always run.
        width: Channels of the token stream.
        text: Shape `[L, C]` of one text, or None where the condition is a class label.
        extras: `(draw, batch)` to further conditioning entries; `draw(name, *shape)` is a seeded normal.
        noise_mask: `batch` to a denoise mask, where the family treats masked samples in its own way.
        control: Keys of the control residuals, one per block list, or None where the family takes no control.
        input_gain: Factor of the patch embedding. Noise-predicting models need a small one: random weights do not
            denoise, so their input grows as sigma falls, and would drown what the blocks add.
        entering: What flows into block 0, from its positional and keyword arguments, in the order in which the block
            returns it. Stated here by hand: it must not come from the family's record, which it tests.
        joining: What entered the blocks of the first list, in the layout of the second list.
        skips: Long skip connections: pairs (block, later block that takes its output, too).
        max_batch: Most samples the host's own code takes in one run.
        together: Whether the host runs positive and negative conditioning in one call.
        noisy: Whether the host starts from noise; one model starts from the latent alone.
        separable: Whether the rows of a call can be told apart inside the blocks.
        classes: Names of the host classes that have to exist (`comfy.supported_models`), else the case is left out:
            older releases of the host do not have every model.
        fits: Whether the host can run the case, asked where the classes exist: older releases have faults of their own.
        parts: Shapes of the latents, each without the batch, that the host carries in one nested tensor. Empty for a
            plain one. The tests see them packed as the host does it: `latent_shape` is then `[1, sum of all sizes]`.
    """

    name: str
    family: str
    make: Callable[[], comfy.model_base.BaseModel]
    latent_shape: tuple[int, ...]
    patch: tuple[int, ...]
    lists: tuple[str, ...]
    depth: int
    width: int
    text: tuple[int, int] | None
    extras: Extras = lambda draw, batch: {}
    noise_mask: Callable[[int], Tensor] | None = None
    control: tuple[str, ...] | None = None
    input_gain: float = 1.0
    entering: Entering = first_argument
    joining: Callable[[Tokens], Tokens] = text_first
    skips: tuple[tuple[int, int], ...] = ()
    max_batch: int = 8
    together: bool = True
    noisy: bool = True
    separable: bool = True
    classes: tuple[str, ...] = ()
    fits: Callable[[], bool] = lambda: True
    parts: tuple[tuple[int, ...], ...] = ()

    def build(self, seed: int = 0) -> ModelPatcher:
        """A fresh model on the CPU; equal seeds give equal weights."""
        model = self.make()
        initialise(model.diffusion_model, seed)
        if self.input_gain != 1:
            next(model.diffusion_model.x_embedder.parameters()).mul_(self.input_gain)
        return ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))

    def blocks(self, diffusion_model: nn.Module) -> list[nn.Module]:
        """Every block in execution order."""
        lists = [diffusion_model.get_submodule(path) for path in self.lists]
        return [block for blocks in lists for block in blocks.children()][: self.depth]

    def rows(self, batch: int) -> int:
        """`batch`, or as many samples as the host's code takes."""
        return min(batch, self.max_batch)

    def calls(self, different_lengths: bool = False) -> int:
        """Model calls of one evaluation with positive and negative conditioning."""
        return 2 if not self.together or (different_lengths and self.text is not None) else 1

    def latent(self, batch: int = 1, seed: int = 0) -> Tensor:
        """A normal latent `[batch, *latent_shape]`."""
        return 0.5 * normal((batch, *self.latent_shape), "latent", seed)

    def tokens(self, shape: torch.Size | None = None) -> int:
        """Number of image tokens of a latent; `shape` is `[B, C, ...]`, by default that of `latent_shape`."""
        sizes = self.latent_shape[1:] if shape is None else shape[2:]
        return math.prod(math.ceil(size / patch) for size, patch in zip(sizes, self.patch, strict=True))

    def conds(
        self, model: ModelPatcher, batch: int = 1, seed: int = 0, different_lengths: bool = False
    ) -> tuple[Conditioning, Conditioning]:
        """Positive and negative conditioning.

        Args:
            model: What `build` returned.
            batch: Number of latents, for entries that carry one image each.
            seed: Seed of every value; the two conditionings differ.
            different_lengths: Give the negative text two tokens less, so that the host cannot run both in one call.
                Without effect where `text` is None.
        """
        return (
            self._cond("positive", batch, seed, 0),
            self._cond("negative", batch, seed, 2 if different_lengths else 0),
        )

    def _cond(self, sign: str, batch: int, seed: int, cut: int) -> Conditioning:
        def draw(name: str, *shape: int) -> Tensor:
            return normal(shape, f"{sign} {name}", seed)

        extras = self.extras(draw, batch)
        if self.text is None:  # a class label, as [1] int64
            return [[torch.tensor([(2 * seed + (sign == "positive")) % 8]), extras]]
        length = self.text[0] - cut
        if "attention_mask" in extras:
            extras["attention_mask"] = extras["attention_mask"][:, :length]
        return [[draw("text", *(1, *self.text))[:, :length], extras]]


def normal(shape: tuple[int, ...] | torch.Size, name: str, seed: int) -> Tensor:
    """A standard normal that depends on the name and the seed alone, not on what was drawn before."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.randn(tuple(shape), generator=generator)


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> None:
    """Draw every weight so that the signal keeps its scale and no gate and no output layer is zero.

    The host allocates weights without setting them, to be filled from a checkpoint. Older releases leave gradients on,
    as their server runs every node in inference mode.
    """
    module.requires_grad_(False)
    for name, value in module.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = normal(value.shape, name, seed)
        if name.endswith("weight") and value.ndim > 1:  # linear, convolution, embedding: keep the variance
            value.copy_(noise * (value.numel() / value.shape[0]) ** -0.5)
        elif name.endswith(("weight", "scale")):  # a norm
            value.copy_(1 + 0.1 * noise)
        elif name.endswith("bias"):
            value.copy_(0.1 * noise)
        else:  # modulation tables, positions, registers
            value.copy_(0.3 * noise)


def from_config(config: type[comfy.supported_models_base.BASE], unet_config: dict[str, Any]) -> comfy.model_base.BaseModel:
    """Build a model as the host's loader does once it has detected `unet_config`."""
    chosen = config({**config.unet_config, **unet_config})
    chosen.set_inference_dtype(torch.float32, None)
    return chosen.get_model({}, "")
