"""Time per step without a synchronisation per step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class Stopwatch:
    """Adds up the time spent per step: CUDA events on a CUDA device, the wall clock elsewhere."""

    def __init__(self) -> None:
        self._seconds: list[tuple[int, float]] = []
        self._events: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def span(self, step: int, device: torch.device) -> Iterator[None]:
        """Time what happens inside and add it to `step`."""
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            yield
            end.record(stream)
            self._events.append((step, start, end))
        else:
            begun = time.perf_counter()
            yield
            self._seconds.append((step, time.perf_counter() - begun))

    def milliseconds(self, steps: int) -> list[float]:
        """Milliseconds for each of `steps` steps. Waits for the GPU once for each event; call it after the run."""
        total = [0.0] * steps
        for step, seconds in self._seconds:
            total[step] += seconds * 1e3
        for step, start, end in self._events:
            end.synchronize()
            total[step] += start.elapsed_time(end)
        return total
