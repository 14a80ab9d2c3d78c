"""Tiny models built through the host's own classes, for tests that have to hold for every family."""

from .case import Case, Conditioning
from .control import FakeControl, fake_control, with_control
from .images import CASES as _IMAGES
from .sampling import count_calls, record_outputs, sample, sample_custom, split_calls
from .undeclared import CASES as _UNDECLARED
from .videos import CASES as _VIDEOS

CASES: dict[str, Case] = {case.name: case for case in [*_IMAGES, *_VIDEOS, *_UNDECLARED]}

__all__ = [
    "CASES",
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
