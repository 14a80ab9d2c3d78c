"""Model families: each module here without a leading underscore declares one `FAMILY`. See docs/adding-a-model.md."""

from __future__ import annotations

import functools
import importlib
import logging
import pkgutil
from typing import NamedTuple

from torch import nn

from blockdance_core.families._record import Family, Section
from blockdance_core.families._structure import FlowCheck, UnsupportedModelError, undeclared
from blockdance_core.interception import Block

__all__ = ["Family", "FlowCheck", "Match", "Section", "UnsupportedModelError", "declared", "find"]

log = logging.getLogger(__name__)
# What importing a module raises where a symbol is missing, means something else, or is newer than this Python.
_UNUSABLE = (ImportError, AttributeError, NameError, TypeError, LookupError, ValueError, SyntaxError)


class Match(NamedTuple):
    """A model and the family that fits it."""

    family: Family
    blocks: tuple[Block, ...]


@functools.cache
def declared() -> tuple[Family, ...]:
    """All declared families. One that cannot be loaded is left out and named in the log; the others stay."""
    found = []
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("_"):
            continue
        try:
            found.append(importlib.import_module(f"{__name__}.{module.name}").FAMILY)
        except _UNUSABLE as error:
            log.warning("BlockDance: the model family '%s' is not available: %s", module.name, error)
    return tuple(found)


def find(diffusion_model: nn.Module) -> Match:
    """The family of a model, declared or by structure.

    Args:
        diffusion_model: The transformer itself (the host's `BaseModel.diffusion_model`); a compiled one is looked through.

    Raises:
        UnsupportedModelError: No list of blocks that can be skipped was found; the message says what was looked for.
    """
    model = getattr(diffusion_model, "_orig_mod", diffusion_model)
    names = [base.__name__ for base in type(model).__mro__]
    # by the nearest class first: LTX-Video 2 is a subclass of LTX-Video, and has a record of its own
    for family in (family for name in names for family in declared() if name in family.classes):
        for refused, reason in family.refused:
            if refused in names:
                raise UnsupportedModelError(f"{type(model).__name__} cannot be accelerated: {reason}.")
        blocks = family.blocks(model)
        if len(blocks) > 1:
            return Match(family, blocks)
    family = undeclared(model, sorted({section.path for family in declared() for section in family.sections}))
    return Match(family, family.blocks(model))
