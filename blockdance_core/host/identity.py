"""What tells one model call from another, and what must not change between storing a feature and reusing it.

Host: comfy/samplers.py, comfy/controlnet.py and comfy/hooks.py, v0.30.0.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from comfy.utils import repeat_to_batch_size

from blockdance_core.streams import Stream

if TYPE_CHECKING:
    from comfy.model_base import BaseModel


def streams(options: dict[str, Any], caller: Hashable = None) -> tuple[Stream, ...]:
    """Whose each equal chunk of a call's batch is: conditioning, region, context window, patches, and who asked.

    Args:
        options: The call's transformer_options.
        caller: The guidance function that makes the call, if one does.
    """
    window = options.get("context_window")
    frames = tuple(getattr(window, "index_list", ())) if window is not None else None
    slots = (
        tuple(sorted(name for name, patches in options.get("patches", {}).items() if patches)),
        tuple(sorted(f"{name}:{key}" for name, patches in options.get("patches_replace", {}).items() for key in patches)),
    )
    chunks = zip(options.get("uuids", ()), options.get("cond_or_uncond", ()), strict=False)
    return tuple(Stream(uuid, index, frames, (slots, caller)) for uuid, index in chunks)


def control_shapes(control: dict[str, Any] | None) -> tuple[object, ...] | None:
    """Shapes of the control residuals of a call."""
    if control is None:
        return None
    return tuple(sorted(
        (name, tuple(None if part is None else tuple(part.shape) for part in parts)) for name, parts in control.items()
    ))


def active_controls(conds: dict[str, list[dict[str, Any]]], sigma: float) -> frozenset[int]:
    """Which ControlNets of a run act at a noise level: residuals of one must not be reused under another."""
    active = set()
    level = torch.tensor(sigma, dtype=torch.float32)  # as a ControlNet compares: ranges often end exactly at a step
    for control in (entry.get("control") for entries in conds.values() for entry in entries or ()):
        while control is not None:
            start, end = getattr(control, "timestep_range", None) or (math.inf, -math.inf)
            if end <= level <= start:
                active.add(id(control))
            control = getattr(control, "previous_controlnet", None)
    return frozenset(active)


def hook_strengths(model: BaseModel) -> tuple[tuple[object, float], ...]:
    """The scheduled weights (LoRA hooks) that are patched in for this call."""
    hooks = getattr(getattr(model, "current_patcher", None), "current_hooks", None)
    return tuple((hook.hook_ref, float(hook.strength)) for hook in hooks.hooks) if hooks is not None else ()


def active_patches(options: dict[str, Any], sigma: float) -> tuple[bool, ...]:
    """Which of the patches with a range of noise levels of their own (Uni3C, LLLite) act now."""
    patches = (patch for slot in options.get("patches", {}).values() for patch in slot)
    ranges = ((getattr(patch, "sigma_start", None), getattr(patch, "sigma_end", None)) for patch in patches)
    return tuple(end <= sigma <= start for start, end in ranges if isinstance(start, float) and isinstance(end, float))


def text(conds: dict[str, list[dict[str, Any]]], rows: int) -> torch.Tensor | None:
    """The text embeddings of a run's positive conditionings, one behind the other: [rows, T, D]; None if there are none.

    Those that are as wide as the first count. Host: `cross_attn` of a converted conditioning.
    """
    entries = conds.get("positive") or next(iter(conds.values()), None) or []
    found = [one for one in (entry.get("cross_attn") for entry in entries) if isinstance(one, torch.Tensor) and one.ndim == 3]
    found = [one for one in found if one.shape[2] == found[0].shape[2]]
    if not found:
        return None
    return torch.cat([repeat_to_batch_size(one, rows).to(found[0]) for one in found], 1)
