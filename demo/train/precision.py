"""The type that networks compute in while they are trained."""

from __future__ import annotations

import functools

import torch


@functools.cache
def compute_dtype() -> torch.dtype:
    """bfloat16 where the hardware multiplies in it, else float32: emulated, it takes ten times as long."""
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = any(there for name, there in torch.cpu.get_capabilities().items() if "bf16" in name)
    return torch.bfloat16 if native else torch.float32
