"""Tiny models built through the host's own classes, for tests that have to hold for every family."""

import importlib
import pkgutil

import comfy.supported_models

from . import models
from .case import Case, Conditioning
from .control import FakeControl, fake_control, with_control
from .sampling import count_calls, record_outputs, sample, sample_custom, split_calls

_MODULES = [importlib.import_module(f"{models.__name__}.{found.name}") for found in pkgutil.iter_modules(models.__path__)]
DECLARED: tuple[Case, ...] = tuple(case for module in _MODULES for case in module.CASES)
"""Every case, also those that this release of the host does not have."""
CASES: dict[str, Case] = {
    case.name: case
    for case in DECLARED
    if all(hasattr(comfy.supported_models, name) for name in case.classes) and case.fits()
}

__all__ = [
    "CASES",
    "DECLARED",
    "Case",
    "Conditioning",
    "FakeControl",
    "count_calls",
    "fake_control",
    "record_outputs",
    "sample",
    "sample_custom",
    "split_calls",
    "with_control",
]
