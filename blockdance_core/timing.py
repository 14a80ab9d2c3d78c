"""Time per step without a synchronisation per step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class Stopwatch:
    """Adds up the time spent per step: events of the device where it has them (CUDA, XPU, MPS), else the wall clock."""

    def __init__(self) -> None:
        self._seconds: list[tuple[int, float]] = []
        self._events: list[tuple[int, Any, Any]] = []

    @contextlib.contextmanager
    def span(self, step: int, device: torch.device) -> Iterator[None]:
        """Time what happens inside and add it to `step`."""
        start, end = _event(device), _event(device)
        if start is None or end is None:
            begun = time.perf_counter()
            yield
            self._seconds.append((step, time.perf_counter() - begun))
        else:
            start.record()
            yield
            end.record()
            self._events.append((step, start, end))

    def milliseconds(self, steps: int) -> list[float]:
        """Milliseconds for each of `steps` steps. Waits for the device once for each event; call it after the run."""
        total = [0.0] * steps
        for step, seconds in self._seconds:
            total[step] += seconds * 1e3
        for step, start, end in self._events:
            end.synchronize()
            total[step] += start.elapsed_time(end)
        return total


def _event(device: torch.device) -> Any:
    """A timing event on the device's current stream, or None where the work is done when a call returns."""
    if device.type == "cpu":
        return None
    if device.type == "mps":
        from torch.mps.event import Event

        return Event(enable_timing=True)
    event = getattr(getattr(torch, device.type, None), "Event", None)
    return event(enable_timing=True) if event is not None else None
