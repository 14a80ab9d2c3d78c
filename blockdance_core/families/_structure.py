"""Models that nobody declared: find the list of blocks by structure, and check the flow between them by running."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from blockdance_core.config import Defaults
from blockdance_core.families._record import BLOCK_LISTS, Family, Section
from blockdance_core.interception import Passage, Port, signature

_MIN_BLOCKS = 4
_MIN_SHARE = 0.5
_UNET_LISTS = (("input_blocks", "output_blocks"), ("down_blocks", "up_blocks"))
_ADVICE = "See docs/adding-a-model.md."


class UnsupportedModelError(ValueError):
    """No list of transformer blocks that can be skipped was found in a model."""


def undeclared(model: nn.Module, paths: Sequence[str] = ()) -> Family:
    """A family for a model of unknown class with one plain list of like blocks, such as a third party's DiT.

    Args:
        model: The diffusion model.
        paths: Lists that the declared families were looked for by; named in the error.

    Raises:
        UnsupportedModelError: It is a U-Net, or there is no such list, or more than one.
    """
    name = type(model).__name__
    for lists in _UNET_LISTS:
        if all(hasattr(model, path) for path in lists):
            raise UnsupportedModelError(
                f"{name} is a U-Net ({' and '.join(lists)}): BlockDance accelerates diffusion transformers only."
            )
    total = sum(parameter.numel() for parameter in model.parameters())
    candidates = {path: size for path, modules in model.named_modules()
                  if isinstance(modules, BLOCK_LISTS) and (size := _size_of_like_blocks(modules)) > 0.1 * total}
    candidates = {path: size for path, size in candidates.items()
                  if not any(path.startswith(f"{outer}.") for outer in candidates)}
    if not candidates:
        children = ", ".join(child for child, _ in model.named_children()) or "none"
        looked_for = ", ".join(paths) or "none by name"
        raise UnsupportedModelError(
            f"No block list found in {name} (children: {children}; looked for {looked_for}). Supported: a list of "
            f"{_MIN_BLOCKS} or more like blocks that holds most of the model, or a declared family. {_ADVICE}"
        )
    if len(candidates) > 1 or max(candidates.values()) < _MIN_SHARE * total:
        raise UnsupportedModelError(
            f"The block lists of {name} are ambiguous ({', '.join(candidates)}): without a declaration only a single list "
            f"that holds most of the model is accelerated. {_ADVICE}"
        )
    (path,) = candidates
    block = next(model.get_submodule(path).children())
    # of the class: another pack may have put its own forward, of other parameters, on the block
    parameters = [parameter.name for parameter in inspect.signature(type(block).forward).parameters.values()
                  if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)]
    port = Port(parameters[1] if len(parameters) > 1 else "x", 0)
    return Family(
        name=f"undeclared ({name})", classes=(name,), sections=(Section(path, (port,)),),
        defaults=Defaults(source="by analogy with the published models; found by structure"), verify=True,
    )


def _size_of_like_blocks(modules: nn.Module) -> int:
    blocks = list(modules.children())
    if len(blocks) < _MIN_BLOCKS or len({type(block) for block in blocks}) > 1:
        return 0
    return sum(parameter.numel() for parameter in modules.parameters())


class FlowCheck:
    """Checks on one full call that each block takes what the one before returned, and nothing else of the others."""

    def __init__(self) -> None:
        self._returned: list[weakref.ref[Tensor]] = []
        self._constant: list[weakref.ref[Tensor]] = []

    def complete(self, blocks: int) -> bool:
        """Whether each of so many blocks ran."""
        return len(self._returned) == blocks

    def failure(self, index: int, passage: Passage) -> str | None:
        """Why skipping would be wrong, judged after block `index` ran; None as long as nothing speaks against it."""
        if passage.received is None or passage.returned is None or passage.returned[0] is None:
            return f"block {index} does not take and return one tensor"
        received, returned = passage.received[0], passage.returned[0]
        if received is None or signature(passage.received) != signature(passage.returned):
            return f"block {index} returns another shape than it takes"
        if index and not (self._returned and _same(received, self._returned[-1]())):
            return f"block {index} does not take what block {index - 1} returned"
        # A skip may reach the block as a new tensor (HunyuanDiT with a control), so whatever looks like the hidden state
        # counts as one unless every block is given the same.
        others = [argument for argument in _tensors(passage.arguments)
                  if argument is not received and argument.shape == received.shape]
        if not index:
            self._constant = [weakref.ref(other) for other in others]
        if any(not any(_same(other, constant()) for constant in self._constant) for other in others):
            return f"block {index} also takes the output of an earlier block (a long skip connection)"
        self._returned.append(weakref.ref(returned))
        return None


def _tensors(values: Iterable[object]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def _same(one: Tensor, other: Tensor | None) -> bool:
    return one is other or (other is not None and one.shape == other.shape and bool(torch.equal(one, other)))
