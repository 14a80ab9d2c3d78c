"""Train an adaptive policy for a demo model; started again, it goes on where it ended, and under torchrun it is shared out.

Captions are those of the train split, half of them hard. The test split is for figures only and never seen here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blockdance_core.host import processes
from blockdance_core.host import train_policy as command
from demo import options as common
from demo.loader import MODELS, POLICIES, load_demo
from demo.prompts import batches

_SEED = 5_000_000
"""Noise of neither the calibration nor the benchmark."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python dev.py train-policy", description=__doc__)
    top.add_argument("--model", choices=MODELS, default="sd3-mini", help="default: %(default)s")
    top.add_argument("--steps", type=common.count, help="number of steps (default: the model's own)")
    common.add(top)
    top.add_argument("--prompts", type=common.count, default=96, help="captions (default %(default)s)")
    top.add_argument("--batch", type=common.count, default=4, help="captions sampled together (default %(default)s)")
    top.add_argument("--policy", type=Path, help="calibrated schedules (default: demo/policies/<model>.safetensors)")
    top.add_argument("--reward", default="fidelity", help="fidelity, or ssim (default: %(default)s)")
    top.add_argument("--out", type=Path, metavar="PATH", help="the file (default: demo/policies/<model>-ada.safetensors)")
    command.add_arguments(top)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; 0 on success."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(given)
    common.begin(options)
    with processes.processes():
        try:
            record = _train(common.fitted(options, options.model, options.steps), common.command("train-policy", given))
        except (ValueError, OSError) as error:
            raise SystemExit(f"{options.model}: {error}") from error
    if record is not None:
        sys.stdout.write(command.told(record) + "\n")
    return 0


def _train(options: argparse.Namespace, line: str) -> dict[str, Any] | None:
    from blockdance_core.host.attach import depth_of
    from blockdance_core.host.rewards import by_name
    from blockdance_core.host.training import train
    from blockdance_core.policy import load

    demo = load_demo(options.model)
    base = load(options.policy or POLICIES / f"{options.model}.safetensors")
    design, settings = command.chosen(options, depth_of(demo.model))
    first = _SEED + 1000 * options.seed
    prompts, texts = batches(demo, options, "train", options.prompts, options.batch, first, first)
    out = options.out or POLICIES / f"{options.model}-ada.safetensors"
    with command.console() as progress:
        _, record = train(
            demo.model, prompts, out, base, design, settings, by_name(options.reward, demo.vae), texts,
            record={"model": options.model, "split": "train", "captions": options.prompts, "noise": first, "command": line},
            progress=progress)
    return None if processes.rank() else record


if __name__ == "__main__":
    raise SystemExit(main())
