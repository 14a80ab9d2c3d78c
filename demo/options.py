"""What the programs of the demo models have in common: how a model is sampled, what the record says."""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Sequence
from typing import Any

import torch

from blockdance_core.host.processes import device_arguments, select_gpu
from demo.architectures import ARCHITECTURES
from demo.hosting import launcher

PLACES = ("--out", "--json", "--resume", "--policy")
"""Options that say where files lie on this machine, which is of no interest to others."""


def add(top: argparse.ArgumentParser) -> None:
    """How a model is sampled, in place of its own way, and on how many threads."""
    for name, kind in (("sampler", str), ("scheduler", str), ("cfg", float)):
        top.add_argument(f"--{name}", type=kind, help="in place of the model's own")
    top.add_argument("--threads", type=int, default=torch.get_num_threads())


def count(text: str) -> int:
    """A number of steps or captions."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few: expected 1 or more")
    return number


def fitted(options: argparse.Namespace, name: str, steps: int | None = None) -> argparse.Namespace:
    """The options, with the model's own sampling where none is given."""
    own: dict[str, Any] = ARCHITECTURES[name].sampling
    given = {key: value for key, value in vars(options).items() if value is not None or key not in own}
    return argparse.Namespace(**{**own, **given, "steps": own["steps"] if steps is None else steps})


def begin(options: argparse.Namespace) -> None:
    """Put the host on the path, started for the GPU where there is one."""
    select_gpu()
    launcher.enter(*device_arguments())
    torch.set_num_threads(options.threads)
    logging.getLogger().setLevel(logging.WARNING)
    from blockdance_core.host.rollout import choices

    for name, known in zip(("sampler", "scheduler"), choices(), strict=True):
        if getattr(options, name) not in (None, *known):
            raise SystemExit(f"There is no {name} {getattr(options, name)!r}. Known: {', '.join(known)}.")


def command(name: str, given: Sequence[str]) -> str:
    """The command line of `python dev.py NAME`, without `PLACES`."""
    kept = list(given)
    for place in PLACES:
        if place in kept:
            del kept[kept.index(place) : kept.index(place) + 2]
    return shlex.join(["python", "dev.py", name, *kept])
