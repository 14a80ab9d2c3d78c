"""The declaration of a model family: where its blocks are and what flows through them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from blockdance_core.config import Defaults
from blockdance_core.interception import Block, Feature, Port

BLOCK_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclasses.dataclass(frozen=True)
class Section:
    """A list of like blocks inside a model.

    Attributes:
        path: Attribute of the diffusion model that holds the list, or the dict, of blocks.
        ports: Parameters of the block's forward that carry the feature, in the order in which the block returns them;
            a name and its position.
        hook: First part of the host's `patches_replace` key, such as `double_block`.
        join: Maps the feature of the section before to the layout of this one; None where that is not known.
        batch_dim: Dimension of the samples in the feature. None where they cannot be told apart: no such dimension,
            several samples in one, or a model that reorders the conditionings of a call.
        passed_on: What a block returns behind the feature: a port whose argument it hands on, or None for nothing.
        long_skips: Whether block j of the first half also feeds block L-1-j, its mirror image in the second half.
        obstacle: Tells from block 0's keyword arguments why a call has to run every block, or None.
        live: How many blocks at the end of the list always run, and do not count.
    """

    path: str
    ports: tuple[Port, ...]
    hook: str | None = None
    join: Callable[[Feature], Feature] | None = None
    batch_dim: int | None = 0
    passed_on: tuple[Port | None, ...] = ()
    long_skips: bool = False
    obstacle: Callable[[Mapping[str, Any]], str | None] | None = None
    live: int = 0


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family as data. See docs/adding-a-model.md.

    Attributes:
        name: Shown to the user and written to reports.
        classes: Names of the diffusion model classes, subclasses included.
        sections: The lists of blocks, in the order of execution.
        defaults: Recommended values and where they come from.
        refused: Subclasses that do not fit, with the reason.
        depths: Known models of the family and how many blocks they have, for documents.
        verify: Whether the flow between blocks is checked on the first evaluation of every run.
    """

    name: str
    classes: tuple[str, ...]
    sections: tuple[Section, ...]
    defaults: Defaults = dataclasses.field(default_factory=Defaults)
    refused: tuple[tuple[str, str], ...] = ()
    depths: tuple[tuple[str, int], ...] = ()
    verify: bool = False

    def blocks(self, diffusion_model: nn.Module) -> tuple[Block, ...]:
        """All blocks in the order of execution; empty if a declared list is missing."""
        blocks: list[Block] = []
        layout: Callable[[Feature], Feature] | None = _same
        for position, section in enumerate(self.sections):
            try:
                modules = diffusion_model.get_submodule(section.path)
            except AttributeError:
                return ()
            if not isinstance(modules, BLOCK_LISTS):
                return ()
            if position:
                layout = _then(layout, section.join) if blocks else _same
            listed = list(modules.children())
            listed = listed[: len(listed) - section.live]
            start, mirrored = len(blocks), (len(listed) - 1) // 2 if section.long_skips else 0
            blocks += [
                Block(
                    module, section.ports, (section.hook, index) if section.hook else None, layout,
                    batch_dim=section.batch_dim, passed_on=section.passed_on, obstacle=section.obstacle,
                    feeds=start + len(listed) - 1 - index if index < mirrored else None,
                )
                for index, module in enumerate(listed)
            ]
        return tuple(blocks)


def _same(feature: Feature) -> Feature:
    return feature


def _then(
    first: Callable[[Feature], Feature] | None, second: Callable[[Feature], Feature] | None
) -> Callable[[Feature], Feature] | None:
    if first is None or second is None:
        return None
    return lambda feature: second(first(feature))
