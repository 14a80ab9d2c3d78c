"""Several processes or machines that work together under torchrun; alone, everything here does next to nothing."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from typing import Any

from torch import distributed

_PATIENCE = datetime.timedelta(days=1)
"""One process may sample for hours while the others wait for it."""


def select_gpu() -> None:
    """Leave this process the GPU of its number on this machine; must come before CUDA is first asked for anything."""
    local = os.environ.get("LOCAL_RANK")
    if local is not None:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[int(local)] if int(local) < len(visible) else local


def device_arguments() -> list[str]:
    """What the host is started with: nothing, or the CPU where there is no GPU."""
    import torch

    return [] if torch.cuda.is_available() else ["--cpu"]


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the other processes, if torchrun started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        yield
        return
    distributed.init_process_group("gloo", timeout=_PATIENCE)  # outcomes are a few numbers: no GPU talks to another
    try:
        yield
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """Number of this process."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def mine(numbers: Sequence[int]) -> list[int]:
    """Those that this process is to do; a number always falls to the same process."""
    return [number for number in numbers if number % world() == rank()]


def gathered(own: dict[Any, Any]) -> dict[Any, Any]:
    """The entries of all processes."""
    if not distributed.is_initialized():
        return own
    found: list[dict[Any, Any]] = [{} for _ in range(world())]
    distributed.all_gather_object(found, own)
    return {key: value for one in found for key, value in one.items()}


def of_the_first(value: Any) -> Any:
    """What the first process has."""
    if not distributed.is_initialized():
        return value
    held = [value if rank() == 0 else None]
    distributed.broadcast_object_list(held)
    return held[0]
