"""Find the best schedules for a demo model and keep them in a policy file; started again, it goes on where it ended.

For each number of steps: profile what reuse would cost on captions of the train split, let the program find schedules, choose
among them on further captions, prove them on captions that chose nothing, and add them to the file. The test split is for
figures only and never seen here.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blockdance_core.calibration import Profile
from demo import options as common
from demo.loader import MODELS, POLICIES, load_demo
from demo.prompts import batches

BATCH = 4
_SEEDS = {"profile": 1_000_000, "checks": 2_000_000, "proofs": 3_000_000}
"""Noise of neither the benchmark nor each other."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python dev.py calibrate", description=__doc__)
    top.add_argument("--model", choices=MODELS, default="sd3-mini", help="default: %(default)s")
    top.add_argument("--steps", type=common.count, nargs="+", help="numbers of steps; one after the other")
    common.add(top)
    top.add_argument("--prompts", type=common.count, default=8,
                     help="captions to profile on, half of them hard (default %(default)s)")
    top.add_argument("--checks", type=common.count, default=8,
                     help="further captions to choose schedules on (default %(default)s)")
    top.add_argument("--proofs", type=int, default=8, help=(
        "further captions that choose none: what a schedule loses is measured on them (default %(default)s; 0: on the others)"))
    top.add_argument("--boundaries", default="", metavar="LIST",
                     help="block indices, or shares such as 0.75, with commas between (default: the whole model)")
    top.add_argument("--cut", type=float, default=0.0, help="share of the time to save; 0: a range of levels")
    top.add_argument("--fidelity", type=float, default=0.0, metavar="DB",
                     help="only the cheapest schedule that is as close to the full run as this; 0: all")
    top.add_argument("--effort", type=int, default=0, metavar="N", help="N further runs for every high level, to improve it")
    top.add_argument("--seed", type=int, default=0, help="of captions and noise")
    top.add_argument("--out", type=Path, metavar="PATH", help="the policy file (default: demo/policies/<model>.safetensors)")
    top.add_argument("--add", action="store_true", help="keep what the file holds for other cuts of the same run")
    top.add_argument("--again", action="store_true", help="also calibrate what the file holds already")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Calibrate; 0 on success."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(given)
    common.begin(options)
    demo = load_demo(options.model)
    out = options.out or POLICIES / f"{options.model}.safetensors"
    try:
        for steps in options.steps or [None]:
            calibrate(demo, common.fitted(options, options.model, steps), out, common.command("calibrate", given))
    except (ValueError, OSError) as error:
        raise SystemExit(f"{options.model}: {error}") from error
    return 0


def calibrate(demo: Any, options: argparse.Namespace, out: Path, command: str) -> None:
    """One number of steps, from the profile to the file; nothing if the file holds it already."""
    from blockdance_core.host import calibrate as host
    from blockdance_core.host.attach import depth_of
    from blockdance_core.host.measured import extended, parse_boundaries
    from blockdance_core.host.search import CUTS

    settings = {
        "model": options.model, "split": "train", "seed": options.seed, "noise_seeds": _SEEDS, "sampler": options.sampler,
        "scheduler": options.scheduler, "steps": options.steps, "cfg": options.cfg, "prompts": options.prompts, "batch": BATCH,
        "boundaries": list(parse_boundaries(options.boundaries, depth_of(demo.model)) or (depth_of(demo.model),)),
    }
    how = {"checks": options.checks, "proofs": options.proofs, "effort": options.effort, "cut": options.cut,
           "fidelity_db": options.fidelity}
    title = f"{options.model}, {options.steps} steps of {options.sampler} {options.scheduler}"
    policy = host.policy_in(out, demo.model)
    records = policy.record.get("calibrations", {}).values() if policy else ()
    recorded = [one for record in records for one in (record, *record.get("added", ()))]
    if not options.again and any((settings | how).items() <= record.items() for record in recorded):
        print(f"{title}: already in {out}")
        return
    beside = out.with_name(f"{out.name}.{options.sampler}-{options.steps}.npz")
    prompts = _prompts(demo, options, "profile")
    measured = _resumed(beside, settings, demo.model, prompts)
    done = len(measured.prompts) if measured else 0
    for number, prompt in enumerate(prompts[done:], done + 1):
        with _bar(f"{title}: profile {number} of {len(prompts)}") as progress:
            measured = extended(measured, demo.model, prompt, settings["boundaries"], progress)
        cost = {"rollouts": measured.rollouts, "calls": measured.calls, "seconds": round(measured.seconds, 2)}
        save_profile(measured.profile, beside, settings | {"batches": number, "cost": cost})
    assert measured is not None
    about = settings | how | {"threads": options.threads, "command": command}
    with _bar(f"{title}: schedules") as progress:
        _, found = host.calibrate(
            measured, out, (options.cut,) if options.cut else CUTS, options.fidelity, options.effort, progress,
            _prompts(demo, options, "checks"), _prompts(demo, options, "proofs"), about, options.add)
    beside.unlink(missing_ok=True)
    print(f"{title}\n" + "\n".join(lines(found["levels"])))
    cost = found["cost"]
    print(f"{cost['rollouts']} rollouts, {cost['calls']} calls of the model, {cost['seconds']:.0f} s; in {out}", flush=True)


def lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The levels as text."""
    yield f"{'cut':>7}{'loss':>9}  plan"
    for row in rows:
        loss = "-" if row["loss_db"] is None else f"{row['loss_db']:.1f} dB"
        yield f"{row['cut']:>7.1%}{loss:>9}  {row['plan']}  {','.join(map(str, row['boundaries']))}"


def _prompts(demo: Any, options: argparse.Namespace, part: str) -> list[Any]:
    """Prompts of a part, in batches."""
    first = _SEEDS[part] + 1000 * options.seed
    count = {"profile": options.prompts, "checks": options.checks, "proofs": options.proofs}[part]
    return batches(demo, options, "train", count, BATCH, first, first)[0] if count else []


def _resumed(path: Path, settings: dict[str, Any], model: Any, prompts: Sequence[Any]) -> Any:
    """What an earlier call measured; None if there is nothing, or of another version or with other settings."""
    from blockdance_core.host.measured import Measured

    if not path.is_file():
        return None
    try:
        profile, kept = load_profile(path)
    except ValueError:  # of another version
        return None
    if not settings.items() <= kept.items():
        return None
    return Measured(model, tuple(prompts[: kept["batches"]]), profile, **kept["cost"])


def save_profile(profile: Profile, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
    """Write a profile, whole or not at all, as a NumPy archive; what it was measured with beside it, as JSON."""
    fields = {field.name: getattr(profile, field.name) for field in dataclasses.fields(profile)}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(path.name + ".part")
    with written.open("wb") as file:
        np.savez_compressed(file, settings=json.dumps(dict(settings)), **fields)
    os.replace(written, path)


def load_profile(path: str | os.PathLike[str]) -> tuple[Profile, dict[str, Any]]:
    """A profile and its settings, as `save_profile` wrote them; nothing in the file is executed.

    Raises:
        ValueError: The file was written by another version.
    """
    with np.load(path, allow_pickle=False) as file:
        found = {name: file[name] for name in file.files}
    if found.keys() != {"settings", *(field.name for field in dataclasses.fields(Profile))} or found["grams"].ndim != 5:
        raise ValueError(f"{path} holds {', '.join(sorted(found))}: it is of another version. Profile again.")
    settings: dict[str, Any] = json.loads(str(found.pop("settings")))
    rows: dict[str, Any] = {name: tuple(found.pop(name).tolist()) for name in ("boundaries", "costs", "lags", "sigmas")}
    return Profile(**rows, **found), settings


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
