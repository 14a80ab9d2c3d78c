"""The core idea: run one model call with blocks 0..boundary observed, or skipped and their output injected.

For the time of a call the `forward` of a few blocks is replaced by a hook, and put back afterwards, whatever happens. The
model's own forward runs unchanged around it, so control residuals, injectors, patches and new host versions keep working.
A skipped block hands its input on; the boundary block returns the injected feature. Nothing is left on the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Feature = tuple["Tensor | None", ...]
"""What flows from block to block, in the order the block returns it; for example (text, image) tokens [B, N, D].

Inside this pack dimension 0 of every component is the sample; a model that has the samples elsewhere is turned around
where a block receives and returns.
"""
_MISSING = object()


class Port(NamedTuple):
    """Where a block receives one component of the feature.

    Attributes:
        name: Parameter of the block's forward.
        position: Its position, without `self`.
        item: Index inside the argument, where that is a tuple of several components.
    """

    name: str
    position: int
    item: int | None = None

    def value(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a call of the block hands over here, or `_MISSING`."""
        value = kwargs.get(self.name, args[self.position] if self.position < len(args) else _MISSING)
        if self.item is None or value is _MISSING:
            return value
        return value[self.item] if isinstance(value, (tuple, list)) and self.item < len(value) else _MISSING


@dataclasses.dataclass(frozen=True)
class Block:
    """One transformer block of a model and what flows through it.

    Attributes:
        module: The block.
        ports: Where it receives the feature, in the order in which it returns it. A single port means a bare tensor.
        hook_key: The host's `patches_replace` key for this block, if it has one.
        to_boundary_layout: Maps a feature of block 0 to the layout of this block; None where that is not known.
        batch_dim: Dimension of the samples; None where they cannot be told apart: then all count as one.
        passed_on: What it returns behind the feature: a port whose argument it hands on, or None for nothing.
        feeds: Index of a later block that takes this block's output as well (a long skip connection).
        obstacle: Why a call with these keyword arguments has to run every block, or None. Asked at block 0.
    """

    module: nn.Module
    ports: tuple[Port, ...]
    hook_key: tuple[str, int] | None = None
    to_boundary_layout: Callable[[Feature], Feature] | None = lambda feature: feature
    batch_dim: int | None = 0
    passed_on: tuple[Port | None, ...] = ()
    feeds: int | None = None
    obstacle: Callable[[Mapping[str, Any]], str | None] | None = None

    def received(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Feature | None:
        """The feature in the arguments of a call, or None if they are not of the declared form."""
        return self._feature([port.value(args, kwargs) for port in self.ports])

    def returned(self, value: object) -> Feature | None:
        """The feature in a return value, or None if it is not of the declared form."""
        parts = (value,) if self._bare else value
        if not isinstance(parts, tuple) or len(parts) != len(self.ports) + len(self.passed_on):
            return None
        return self._feature(parts[: len(self.ports)])

    def to_return(self, feature: Feature, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> object:
        """The return value that carries `feature`, in a call with these arguments."""
        parts = tuple(None if part is None else self._samples_back(part) for part in feature)
        return parts[0] if self._bare else (
            *parts, *(None if port is None else port.value(args, kwargs or {}) for port in self.passed_on)
        )

    @property
    def _bare(self) -> bool:
        return len(self.ports) == 1 and not self.passed_on

    def _feature(self, values: Sequence[object]) -> Feature | None:
        parts: list[Tensor | None] = []
        for value in values:
            if value is not None and not (isinstance(value, Tensor) and value.ndim > (self.batch_dim or 0)):
                return None
            parts.append(None if value is None else self._samples_first(value))
        return tuple(parts)

    def _samples_first(self, part: Tensor) -> Tensor:
        if self.batch_dim == 0:
            return part
        return part[None] if self.batch_dim is None else part.movedim(self.batch_dim, 0)

    def _samples_back(self, part: Tensor) -> Tensor:
        if self.batch_dim == 0:
            return part
        return part[0] if self.batch_dim is None else part.movedim(0, self.batch_dim).contiguous()


def taps(blocks: Sequence[Block], boundary: int) -> tuple[int, ...]:
    """What is needed when 0..boundary are skipped: the outputs of blocks that feed a live one, and of the boundary.

    A boundary behind the last block, `len(blocks)`, is the whole model and stands for itself.
    """
    return (*(index for index in range(boundary) if (blocks[index].feeds or 0) > boundary), boundary)


class Passage(NamedTuple):
    """One run of an observed block. A feature is None where a call is not of the declared form.

    Attributes:
        received: The feature in the block's arguments; the block may have written into it.
        returned: The block's raw output, before anything of the host's is added to it.
        arguments: All arguments of the block.
    """

    received: Feature | None
    returned: Feature | None
    arguments: tuple[Any, ...]


class Visitor(Protocol):
    """What happens during one call; see `intercept`."""

    def at_input(self, feature: Feature | None, obstacle: str | None) -> Mapping[int, Feature] | None:
        """Sees the input of block 0 before it runs: once a call, or more often where another node runs the model again.

        Args:
            feature: The input; None if the call is not of the declared form.
            obstacle: Why this call must compute, if it must.

        Returns:
            What to inject at each of the `taps` of the boundary, or None to compute everything.
        """

    def at_output(self, index: int, passage: Passage) -> None:
        """Sees the passage of an observed block in a call that computes."""


class InterceptionError(RuntimeError):
    """A call did not pass the blocks as the family declares: an error in this pack, never a reason to go on."""


class FullGraphError(RuntimeError):
    """torch.compile was told to leave nothing out of its graphs, so nothing can be put between or around the blocks."""


@contextlib.contextmanager
def intercept(
    blocks: Sequence[Block], visitor: Visitor, *, observe: Iterable[int] = (), boundary: int | None = None
) -> Iterator[None]:
    """Let `visitor` watch, and possibly shorten, the model call made inside this context.

    Args:
        blocks: All blocks of the model, in the order of execution.
        visitor: Asked at block 0 whether to inject; told the outputs of observed blocks otherwise.
        observe: 0-based indices of blocks whose output is observed when the call computes.
        boundary: Last block to skip if the visitor injects; None for a call that computes in any case.

    Raises:
        FullGraphError: The model is compiled with `fullgraph`.
        InterceptionError: The visitor injected, and a block with a feature to inject was not passed exactly once.
    """
    call = _Call(blocks, visitor, frozenset(observe), boundary)
    hooked = {0, *call.observed, *range(0 if boundary is None else boundary + 1)}
    with contextlib.ExitStack() as stack:
        for index in sorted(hooked):
            stack.enter_context(_forward_replaced(blocks[index].module, call, index))
        try:
            yield
        except RuntimeError as error:
            if "fullgraph=True" in str(error) or _Hook.__name__ in str(error):
                raise FullGraphError(
                    "BlockDance cannot skip blocks of a model that is compiled with fullgraph = True: there is no place left "
                    "between its blocks. Turn fullgraph off, or compile the blocks one by one with a node of ComfyUI."
                ) from error
            raise
    call.check()


class _Call:
    """The state of one intercepted call."""

    def __init__(self, blocks: Sequence[Block], visitor: Visitor, observed: frozenset[int], boundary: int | None) -> None:
        self.blocks = blocks
        self.visitor = visitor
        self.observed = observed
        self.boundary = boundary
        self.injected: Mapping[int, Feature] | None = None
        self.injections: Counter[int] = Counter()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        """What block `index` returns instead of running, or `_RUN`."""
        block = self.blocks[index]
        if index == 0:
            self.check()
            obstacle = block.obstacle(kwargs) if block.obstacle else None
            self.injected = self.visitor.at_input(block.received(args, kwargs), obstacle)
        if self.injected is None or (self.boundary is not None and index > self.boundary):
            return _RUN
        if index in self.injected:
            self.injections[index] += 1
            return block.to_return(self.injected[index], args, kwargs)
        feature = block.received(args, kwargs)
        if feature is None:
            raise InterceptionError(f"block {index} was called with other arguments than its family declares")
        # The host adds control residuals to what a block returns, in place: never hand back the caller's own tensor.
        return block.to_return(cloned(feature) if index == 0 else feature, args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after(self, index: int, value: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Block `index` ran and returned `value`."""
        if index in self.observed and self.injected is None:
            block = self.blocks[index]
            passage = Passage(block.received(args, kwargs), block.returned(value), (*args, *kwargs.values()))
            self.visitor.at_output(index, passage)

    def check(self) -> None:
        """Every feature was injected once since block 0 was entered; from here on they are counted anew."""
        for index in self.injected or ():
            if self.injections[index] != 1:
                raise InterceptionError(
                    f"the feature of block {index} was injected {self.injections[index]} times in one pass through "
                    f"{type(self.blocks[0].module).__name__}s; please report this with the model's name"
                )
        self.injected = None
        self.injections.clear()


_RUN = object()


class _Hook:
    """Stands in for the `forward` of one block during one call. Compiled models break their graph here and nowhere inside.

    An object, not a closure: what torch.compile guards on is then the same for every call and every run.
    """

    def __init__(self, call: _Call, index: int, original: Callable[..., Any]) -> None:
        self.call, self.index, self.original = call, index, original

    @functools.partial(torch.compiler.disable, recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> object:
        instead = self.call.before(self.index, args, kwargs)
        if instead is not _RUN:
            return instead
        value = self.original(*args, **kwargs)
        self.call.after(self.index, value, args, kwargs)
        return value


@contextlib.contextmanager
def _forward_replaced(module: nn.Module, call: _Call, index: int) -> Iterator[None]:
    # Other packs leave an instance attribute `forward` on blocks; it is what runs inside ours, and it is put back.
    before = module.__dict__.get("forward", _MISSING)
    module.forward = _Hook(call, index, module.forward)
    try:
        yield
    finally:
        if before is _MISSING:
            module.__dict__.pop("forward", None)
        else:
            module.forward = before


def cloned(feature: Feature) -> Feature:
    """A copy of every component."""
    return tuple(None if part is None else part.clone() for part in feature)


def signature(feature: Feature) -> tuple[object, ...]:
    """Shape without the batch, dtype and device of every component: features of different signature never mix."""
    return tuple(None if part is None else (tuple(part.shape[1:]), part.dtype, part.device) for part in feature)


def nbytes(feature: Feature) -> int:
    """Size in bytes."""
    return sum(0 if part is None else part.numel() * part.element_size() for part in feature)
