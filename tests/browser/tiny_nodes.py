"""A custom node for the server under test: a model that samples in no time, with what a sampler needs beside it."""

from __future__ import annotations

import sys
from typing import Any

TESTS = "@TESTS@"  # filled in by conftest.py, which copies this file into the host


class TinyModel:
    """A model of tests/tiny with its conditionings and an empty latent."""

    CATEGORY = "testing"
    RETURN_TYPES = ("MODEL", "CONDITIONING", "CONDITIONING", "LATENT")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def load(self) -> tuple[Any, ...]:
        if TESTS not in sys.path:
            sys.path.append(TESTS)
        from tiny import CASES

        case = CASES["sd3"]
        model = case.build()
        return (model, *case.conds(model), {"samples": 0 * case.latent()})


NODE_CLASS_MAPPINGS = {"TinyModel": TinyModel}
