"""Find the best schedules for a demo model and keep them in a policy file; started again, it goes on where it ended.

For each number of steps: profile what reuse would cost on captions of the train split, let the program find the schedules,
prove them on further captions, and add them to the file. The test split is for figures only and never seen here.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from demo import options as common
from demo.bench.runner import batches
from demo.loader import MODELS, load_demo

BATCH = 4
_SEEDS = {"profile": 1_000_000, "checks": 2_000_000}
"""Noise of neither the benchmark nor each other."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python dev.py calibrate", description=__doc__)
    top.add_argument("--model", choices=MODELS, default="sd3-mini", help="default: %(default)s")
    top.add_argument("--steps", type=int, nargs="+", help="numbers of steps; one after the other")
    common.add(top)
    top.add_argument("--prompts", type=int, default=8, help="captions to profile on, half of them hard (default %(default)s)")
    top.add_argument("--checks", type=int, default=8, help="further captions to prove schedules on (default %(default)s)")
    top.add_argument("--boundaries", default="", metavar="LIST",
                     help="block indices, or shares such as 0.75, with commas between (default: the last block)")
    top.add_argument("--cut", type=float, default=0.0, help="share of the time to save; 0: a range of levels")
    top.add_argument("--fidelity", type=float, default=0.0, metavar="DB",
                     help="only the cheapest schedule that is as close to the full run as this; 0: all")
    top.add_argument("--effort", type=int, default=0, metavar="N", help="N further runs for every high level, to improve it")
    top.add_argument("--seed", type=int, default=0, help="of captions and noise")
    top.add_argument("--out", type=Path, metavar="PATH", help="the policy file (default: demo/policies/<model>.safetensors)")
    top.add_argument("--again", action="store_true", help="also calibrate what the file holds already")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Calibrate; 0 on success."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(given)
    common.begin(options, *(() if torch.cuda.is_available() else ("--cpu",)))
    demo = load_demo(options.model)
    out = options.out or common.POLICIES / f"{options.model}.safetensors"
    for steps in options.steps or [None]:
        calibrate(demo, common.fitted(options, options.model, steps), out, common.command("calibrate", given))
    return 0


def calibrate(demo: Any, options: argparse.Namespace, out: Path, command: str) -> None:
    """One number of steps, from the profile to the file; nothing if the file holds it already."""
    from blockdance_core.calibration import merged, save_profile
    from blockdance_core.host.calibrate import CUTS, calibrated, depth_of, entry, profiled, reaching, table
    from blockdance_core.host.measured import keep, kept, parse_boundaries
    from blockdance_core.host.rollout import Rollouts
    from blockdance_core.host.versions import versions

    settings = {
        "model": options.model, "split": "train", "seed": options.seed, "noise_seeds": _SEEDS, "sampler": options.sampler,
        "scheduler": options.scheduler, "steps": options.steps, "cfg": options.cfg, "prompts": options.prompts, "batch": BATCH,
        "boundaries": list(parse_boundaries(options.boundaries, depth_of(demo.model)) or (depth_of(demo.model) - 1,)),
    }
    how = {"checks": options.checks, "effort": options.effort, "cut": options.cut, "fidelity_db": options.fidelity}
    title = f"{options.model}, {options.steps} steps of {options.sampler} {options.scheduler}"
    policy = kept(out, demo.model)
    records = policy.record.get("calibrations", {}).values() if policy else ()
    if not options.again and any((settings | how).items() <= record.items() for record in records):
        print(f"{title}: already in {out}")
        return
    beside = out.with_name(f"{out.name}.{options.sampler}-{options.steps}.npz")
    profile, done, cost = _resumed(beside, settings)
    prompts = _prompts(demo, options, "profile")
    for number, prompt in enumerate(prompts[done:], done + 1):
        begun = time.perf_counter()
        with _bar(f"{title}: profile {number} of {len(prompts)}") as progress:
            one, rollouts = profiled(
                demo.model, [prompt], settings["boundaries"], progress, None if profile is None else profile.grams)
        profile = one if profile is None else merged([profile, one])
        cost = _sum(cost, _cost(rollouts, begun))
        save_profile(profile, beside, settings | {"batches": number, "cost": cost})
    begun = time.perf_counter()
    checks = [Rollouts(demo.model, one) for one in _prompts(demo, options, "checks")]
    with _bar(f"{title}: schedules") as progress:
        levels = calibrated(profile, checks, (options.cut,) if options.cut else CUTS, options.effort, progress)
    if not levels:
        raise SystemExit(f"{title}: no schedule was found; take more steps, or another cut")
    try:
        levels = reaching(levels, options.fidelity) if options.fidelity else levels
    except ValueError as error:
        raise SystemExit(f"{title}: {error}") from error
    cost = _sum(cost, _cost(checks, begun))
    rows = table(levels)
    record = {
        **settings, **how, "costs": [round(value, 4) for value in profile.costs], "levels": rows, "cost": cost,
        "versions": versions(), "threads": options.threads, "command": command,
    }
    keep(out, demo.model, entry(demo.model, checks[0].prompt, levels), record)
    beside.unlink(missing_ok=True)
    print(f"{title}\n" + "\n".join(lines(rows)))
    print(f"{cost['rollouts']} rollouts, {cost['calls']} calls of the model, {cost['seconds']:.0f} s; in {out}", flush=True)


def lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The levels as text."""
    yield f"{'cut':>7}{'loss':>9}  plan"
    for row in rows:
        loss = "-" if row["loss_db"] is None else f"{row['loss_db']:.1f} dB"
        yield f"{row['cut']:>7.1%}{loss:>9}  {row['plan']}  {','.join(map(str, row['boundaries']))}"


def _prompts(demo: Any, options: argparse.Namespace, part: str) -> list[Any]:
    """Prompts to profile or to check on, in batches."""
    first = _SEEDS[part] + 1000 * options.seed
    count = options.prompts if part == "profile" else options.checks
    return batches(demo, options, "train", count, BATCH, first, first)[0]


def _resumed(path: Path, settings: dict[str, Any]) -> tuple[Any, int, dict[str, float]]:
    """The profile that an earlier call left, of how many batches it is, and what it took; None, and nothing."""
    from blockdance_core.calibration import load_profile

    nothing: tuple[Any, int, dict[str, float]] = None, 0, {}
    if not path.is_file():
        return nothing
    try:
        profile, kept = load_profile(path)
    except ValueError:  # of another version
        return nothing
    return (profile, kept["batches"], kept["cost"]) if settings.items() <= kept.items() else nothing


def _sum(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {name: round(value + one.get(name, 0), 2) for name, value in other.items()}


def _cost(rollouts: Sequence[Any], begun: float) -> dict[str, float]:
    return {
        "rollouts": sum(one.count for one in rollouts), "calls": sum(one.calls for one in rollouts),
        "seconds": round(time.perf_counter() - begun, 2),
    }


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, told how many of how many are done."""
    from tqdm import tqdm

    with tqdm(desc=title, file=sys.stderr) as bar:
        def show(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        yield show


if __name__ == "__main__":
    raise SystemExit(main())
