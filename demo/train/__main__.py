"""Train a demo model, from nothing or further: the autoencoder, the diffusion transformer, the files, and what they can do.

``python dev.py train-demo NAME`` runs this. What is finished is not done again, so the same command goes on after an
interruption; a file named ``stop`` in the run's folder ends it after the step in hand. The shipped models are left alone:
the new ones lie in the run's folder until ``--to demo/models``.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import sys
from collections.abc import Sequence

from .. import architectures, loader
from . import autoencoder, card, diffusion, export, report


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 when everything is done."""
    parser = argparse.ArgumentParser(prog="python dev.py train-demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=architectures.ARCHITECTURES)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the runs")
    parser.add_argument("--to", type=pathlib.Path, help="where the finished files go (default: models in --out)")
    parser.add_argument("--steps", type=int, help="a trial of so many steps, in a folder of its own")
    parser.add_argument("--further", type=int, metavar="STEPS", help="train the shipped model so many steps more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=200, help="test captions of each difficulty that are judged")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile the blocks")
    options = parser.parse_args(arguments)
    if options.steps and options.further:
        parser.error("--steps is for a trial from nothing, --further for the shipped model: give one of them")
    trial = f"-{options.steps}-steps" if options.steps else f"-{options.further}-further" if options.further else ""
    first = options.out / ("autoencoder-shipped" if options.further else "autoencoder")
    run = options.out / f"{options.name}{trial}"
    to = options.to or options.out / f"models{trial}"
    if options.further:
        autoencoder.restore(loader.FOLDER / f"{loader.AUTOENCODER}.safetensors", first)
    for phase in (1, 2):
        if phase > _phases(first):
            print(f"autoencoder, phase {phase} of 2, in {first}", flush=True)
            autoencoder.main(["--out", str(first), "--phase", str(phase), "--seed", str(options.seed)])
    print(f"{options.name}, in {run}", flush=True)
    more = ["--steps", str(options.steps or options.further)] if trial else []
    if options.further:
        begin = run / "begin.safetensors"  # the shipped file may be replaced before this is finished
        if not begin.exists():
            run.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(loader.FOLDER / f"{options.name}.safetensors", begin)
        more += ["--further-from", str(begin)]
    more += ["--compile" if options.compile else "--no-compile", "--seed", str(options.seed)]
    diffusion.main([options.name, "--out", str(run), "--autoencoder", str(first), *more])
    if (run / "stop").exists():
        print(f"stopped; remove {run / 'stop'} and run this again to go on")
        return 1
    export.main([options.name, "--run", str(run), "--autoencoder", str(first), "--to", str(to)])
    figures, pictures = to / f"{options.name}-report.json", to / f"{options.name}-samples.jpg"
    compared = ["--count", str(options.count), "--compared", str(min(64, options.count))]
    report.main([
        options.name, "--models", str(to), "--split", "test", "--json", str(figures), "--sheet", str(pictures), *compared
    ])  # fmt: skip
    card.main([options.name, "--models", str(to)])
    print(f"finished: {to / options.name}.md")
    return 0


def _phases(folder: pathlib.Path) -> int:
    """How many phases of the autoencoder's training are finished."""
    path = folder / "autoencoder.json"
    return len(json.loads(path.read_text(encoding="utf-8"))["phases"]) if path.is_file() else 0


if __name__ == "__main__":
    sys.exit(main())
