"""Captions of the demo models, and batches of them as the tools sample them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from demo.loader import captions, empty_latent

if TYPE_CHECKING:
    from blockdance_core.host.rollout import Prompt


def texts(name: str, split: str, count: int, seed: int, difficulty: str = "mixed") -> list[str]:
    """Captions of a split; mixed means half easy and half hard, in turns."""
    if difficulty != "mixed":
        return captions(name, split, count, seed, difficulty)
    easy, hard = (captions(name, split, (count + 1) // 2, seed, one) for one in ("easy", "hard"))
    return [text for pair in zip(easy, hard, strict=True) for text in pair][:count]


def batches(
    demo: Any, options: argparse.Namespace, split: str, count: int, batch: int, seed: int, noise: int
) -> tuple[list[Prompt], list[list[str]]]:
    """Mixed captions in batches, as `Rollouts` sample them, and what they say.

    Args:
        demo: The demo model.
        options: ``steps``, ``sampler``, ``scheduler`` and ``cfg``.
        split: Where the captions come from.
        count: How many.
        batch: How many are sampled together.
        seed: Of the captions.
        noise: Seed of the first batch, one more for each of the others.
    """
    from blockdance_core.host.rollout import Prompt

    lines = texts(demo.name, split, count, seed)
    parts = [lines[start : start + batch] for start in range(0, count, batch)]
    return [
        Prompt(demo.encode(some), demo.encode([""]), empty_latent(demo.model, len(some)), noise + k, options.steps, options.cfg,
               options.sampler, options.scheduler)
        for k, some in enumerate(parts)
    ], parts
